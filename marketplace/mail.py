"""One mail from its pair of templates, `email/NAME.txt` and `email/NAME.html`."""

from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from django.template.loader import render_to_string


def send_mail(
    name: str, *, to: str, subject: str, context: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    """Send it now, or raise what the mail server's refusal raises."""
    given = {**context, "base_url": settings.BASE_URL}
    mail = EmailMultiAlternatives(
        " ".join(subject.split()),  # a name may hold a line break, a header may not
        render_to_string(f"email/{name}.txt", given),
        to=[to],
        headers=dict(headers or {}),
    )
    mail.attach_alternative(render_to_string(f"email/{name}.html", given), "text/html")
    mail.send()
