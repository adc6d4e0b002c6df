# One image for every process of production; compose.yaml says which process gets which role and secrets.
FROM python:3.11-slim

WORKDIR /srv/residual
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 \
    RESIDUAL_MODE=production RESIDUAL_VAR=/var/lib/residual STATIC_ROOT=/srv/static MEDIA_ROOT=/srv/media

# torch by itself, at its exact pin: any other spec may fetch gigabytes for GPUs.
COPY requirements.txt .
RUN pip install "$(grep '^torch==' requirements.txt)" && pip install -r requirements.txt

COPY manage.py ./
COPY attribution attribution
COPY marketplace marketplace
COPY payouts payouts
COPY portal portal
COPY templates templates
# The values are placeholders: settings insist on having them, collectstatic reads none of them.
RUN SECRET_KEY=- FINGERPRINT_KEY=- BASE_URL=https://- ALLOWED_HOSTS=- RESIDUAL_PROCESS=default \
    DATABASE_URL=postgres://-/- REDIS_URL=redis://- python manage.py collectstatic --noinput \
    && useradd --system residual && mkdir -p "$RESIDUAL_VAR" "$MEDIA_ROOT" && chown residual "$RESIDUAL_VAR" "$MEDIA_ROOT"

USER residual
EXPOSE 8000
CMD ["gunicorn", "portal.wsgi", "--bind", "0.0.0.0:8000", "--workers", "2", "--threads", "4", "--access-logfile", "-"]
