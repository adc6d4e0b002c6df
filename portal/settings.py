"""One settings file over the environment; `.env.example` explains each variable.

`RESIDUAL_MODE` has no default. Production without a Stripe key, a database or a broker does not start: it never falls
back to play money or an empty database (DESIGN §2).
"""

import hashlib
from pathlib import Path

import environ
from csp.constants import NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from payouts.approval_limits import read_limits

BASE_DIR = Path(__file__).resolve().parent.parent
env = environ.Env()

RESIDUAL_MODE = env("RESIDUAL_MODE")
if RESIDUAL_MODE not in ("demo", "production"):
    raise ImproperlyConfigured(f"RESIDUAL_MODE is {RESIDUAL_MODE!r}; set it to demo (only ./run does) or production")
IS_DEMO = RESIDUAL_MODE == "demo"
VAR = Path(env("RESIDUAL_VAR", default=str(BASE_DIR / "var")))

SECRET_KEY = env("SECRET_KEY")
DEBUG = env.bool("DEBUG", default=False)
BASE_URL = env("BASE_URL", default="http://127.0.0.1:8000") if IS_DEMO else env("BASE_URL")
ALLOWED_HOSTS = (
    env.list("ALLOWED_HOSTS", default=["127.0.0.1", "localhost", "testserver"])
    if IS_DEMO
    else env.list("ALLOWED_HOSTS")
)
CSRF_TRUSTED_ORIGINS = [BASE_URL]
#: Keys the private fingerprints by which copies are found; changing it forgets every fingerprint.
FINGERPRINT_KEY = env("FINGERPRINT_KEY", default=SECRET_KEY) if IS_DEMO else env("FINGERPRINT_KEY")

if not IS_DEMO and (DEBUG or not FINGERPRINT_KEY):
    raise ImproperlyConfigured("Production runs with DEBUG=false and a FINGERPRINT_KEY, long and random")

INSTALLED_APPS = [
    "marketplace",
    "attribution",
    "payouts",
    "portal.apps.PortalConfig",
    "portal.apps.AdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.humanize",
    "django.contrib.messages",
    "django.contrib.sessions",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "csp",
    "django_htmx",
    "rest_framework",
    "drf_spectacular",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "marketplace.bodies.BodyLimitMiddleware",  # before the next, which reads a form's body
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "marketplace.web.middleware.ActingPartyMiddleware",
    "marketplace.api.middleware.RateLimitHeadersMiddleware",
]

ROOT_URLCONF = "portal.urls"
WSGI_APPLICATION = "portal.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "portal.pages.context.site",
            ],
        },
    }
]

# --- data -------------------------------------------------------------------------------------------------------------
DATABASES = {"default": env.db_url("DATABASE_URL") | {"CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True}}
if DATABASES["default"]["ENGINE"] != "django.db.backends.postgresql":
    raise ImproperlyConfigured("DATABASE_URL must name a PostgreSQL database: the ledger's rules are PostgreSQL's")
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
REDIS_URL = env("REDIS_URL")
CACHES = {"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": REDIS_URL}}
SESSION_ENGINE = "django.contrib.sessions.backends.db"

S3_BUCKET = env("S3_BUCKET", default="")
MEDIA_ROOT = env("MEDIA_ROOT", default=str(VAR / "media"))
STORAGES = {
    "default": {
        "BACKEND": "storages.backends.s3.S3Storage",
        "OPTIONS": {
            "bucket_name": S3_BUCKET,
            "endpoint_url": env("S3_ENDPOINT_URL", default=None),
            "file_overwrite": False,
        },
    }
    if S3_BUCKET
    else {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": MEDIA_ROOT}},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedStaticFilesStorage"},
}
STATIC_URL = "/static/"
STATIC_ROOT = env("STATIC_ROOT", default=str(VAR / "static"))
STATICFILES_DIRS = [BASE_DIR / "portal" / "static"]
WHITENOISE_USE_FINDERS = IS_DEMO  # the demo serves from the tree, production from what collectstatic made
FILE_UPLOAD_MAX_MEMORY_SIZE = 1_000_000  # larger uploads go to disk as they arrive
DATA_UPLOAD_MAX_MEMORY_SIZE = 10_000_000
MAX_UPLOAD_BYTES = env.int("MAX_UPLOAD_BYTES", default=2_000_000_000)
MAX_JSON_BYTES = env.int("MAX_JSON_BYTES", default=1_000_000)  # of one API request
MAX_DISCLOSURE_BYTES = env.int("MAX_DISCLOSURE_BYTES", default=16_000_000)  # its selection may have 100,000 ranges
MAX_ARTIFACT_BYTES = env.int("MAX_ARTIFACT_BYTES", default=500_000_000)  # a checkpoint or a file of queries

# --- work -------------------------------------------------------------------------------------------------------------
CELERY_BROKER_URL = REDIS_URL
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_SERIALIZER = "json"
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_TASK_DEFAULT_QUEUE = "default"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": 3600, "socket_timeout": 5, "socket_connect_timeout": 5}
CELERY_TASK_ROUTES = {
    "marketplace.tasks.ingest_upload": {"queue": "ingest"},
    "attribution.tasks.*": {"queue": "attribution"},
    "payouts.tasks.issue_statements": {"queue": "default"},
    "payouts.tasks.send_statement_notice": {"queue": "default"},
    "payouts.tasks.execute_proof": {"queue": "default"},  # it may take long, and asks Stripe nothing
    "payouts.tasks.send_bank_details_notice": {"queue": "default"},
    "payouts.tasks.send_debit_refusal": {"queue": "default"},
    "payouts.tasks.*": {"queue": "payments"},
}
CELERY_BEAT_SCHEDULE_FILENAME = str(VAR / "celerybeat-schedule")
CELERY_BEAT_SCHEDULE = {
    "sweep": {"task": "marketplace.tasks.sweep_jobs", "schedule": 5.0, "options": {"expires": 5}},
    "open-runs": {"task": "attribution.tasks.request_missing_runs", "schedule": 5.0, "options": {"expires": 5}},
    "divide": {"task": "payouts.tasks.divide_what_is_ready", "schedule": 5.0, "options": {"expires": 5}},
    "expire-orders": {"task": "payouts.tasks.cancel_expired_orders", "schedule": 60.0, "options": {"expires": 60}},
    "royalties": {"task": "payouts.tasks.follow_up_royalties", "schedule": 300.0, "options": {"expires": 300}},
    "settle": {"task": "payouts.tasks.settle_funds", "schedule": 10.0, "options": {"expires": 10}},
    "payout-runs": {
        "task": "payouts.tasks.request_daily_payout_runs",
        "schedule": 3600.0,
        "options": {"expires": 3600},
    },
    "snapshots": {"task": "payouts.tasks.take_snapshots", "schedule": 30.0, "options": {"expires": 30}},
    "check-balances": {"task": "payouts.tasks.check_balances", "schedule": 60.0, "options": {"expires": 60}},
    "served-countries": {"task": "payouts.tasks.ask_served_countries", "schedule": 600.0, "options": {"expires": 600}},
    "prove-books": {"task": "payouts.tasks.request_daily_proof", "schedule": 900.0, "options": {"expires": 900}},
    "close-months": {"task": "payouts.tasks.close_what_is_over", "schedule": 3600.0, "options": {"expires": 3600}},
    "reconcile": {"task": "payouts.tasks.reconcile", "schedule": 900.0, "options": {"expires": 900}},
}

#: What measuring a model may cost, in trainings of it.
ATTRIBUTION_BUDGET = env.float("ATTRIBUTION_BUDGET", default=400.0)
#: new questions which records moved an output, of one party or one address
QUESTIONS_PER_HOUR = {
    "party": env.int("QUESTIONS_PER_HOUR", default=120),
    "address": env.int("QUESTIONS_PER_HOUR_WITHOUT_ACCOUNT", default=20),
}
ATTRIBUTION_THREADS = env.int("ATTRIBUTION_THREADS", default=1)  # of torch in a job; replays are bit-equal at one count

# --- people -----------------------------------------------------------------------------------------------------------
AUTH_USER_MODEL = "marketplace.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
ACCOUNT_EMAIL_VERIFICATION = env("ACCOUNT_EMAIL_VERIFICATION", default="optional" if IS_DEMO else "mandatory")
ACCOUNT_ADAPTER = "portal.accounts.AccountAdapter"
# Second factors: an authenticator app and recovery codes. Their secrets are encrypted with a key of their own.
MFA_ADAPTER = "portal.second_factor.MFAAdapter"
MFA_KEY = env(
    "MFA_KEY", default=FINGERPRINT_KEY
)  # like it, never changed: whoever has a second factor would be locked out
MFA_SUPPORTED_TYPES = ["totp", "recovery_codes"]
MFA_TOTP_ISSUER = "Residual"
MFA_RECOVERY_CODES_SHOW_ONCE = True
LOGIN_REDIRECT_URL = "/"
LOGIN_URL = "account_login"
EMAIL_BACKEND = (
    "django.core.mail.backends.filebased.EmailBackend" if IS_DEMO else "django.core.mail.backends.smtp.EmailBackend"
)
EMAIL_FILE_PATH = str(VAR / "mail")
EMAIL_HOST = env("EMAIL_HOST", default="localhost")
EMAIL_PORT = env.int("EMAIL_PORT", default=25)
EMAIL_HOST_USER = env("EMAIL_HOST_USER", default="")
EMAIL_HOST_PASSWORD = env("EMAIL_HOST_PASSWORD", default="")
EMAIL_USE_TLS = env.bool("EMAIL_USE_TLS", default=not IS_DEMO)
INVITATIONS_PER_DAY = env.int("INVITATIONS_PER_DAY", default=100)  # that one owner may send
DEFAULT_FROM_EMAIL = env("DEFAULT_FROM_EMAIL", default="Residual <no-reply@residual.example>")

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False

# --- money ------------------------------------------------------------------------------------------------------------
# Only the web (a restricted key) and the payments worker are given a key; the others run without, and cannot pay.
STRIPE_API_KEY = env("STRIPE_API_KEY", default="")
STRIPE_API_BASE = env("STRIPE_API_BASE", default=None)
STRIPE_PLATFORM_COUNTRY = env("STRIPE_PLATFORM_COUNTRY", default="US")
STRIPE_WEBHOOK_SECRET = env("STRIPE_WEBHOOK_SECRET", default="")
STRIPE_CONNECT_WEBHOOK_SECRET = env("STRIPE_CONNECT_WEBHOOK_SECRET", default="")
#: Stripe allows 100 requests a second with a live key and 25 with a test key; what else asks it needs some of them.
STRIPE_REQUESTS_PER_SECOND = env.float("STRIPE_REQUESTS_PER_SECOND", default=20.0)
STRIPE_CONNECTIONS = env.int("STRIPE_CONNECTIONS", default=8)  # of one payments worker, side by side
#: Currency → whole units; a payout run of more waits for a second person.
try:
    PAYOUT_RUN_APPROVAL_ABOVE = read_limits(env("PAYOUT_RUN_APPROVAL_ABOVE", default="10000"))
except ValueError as error:
    raise ImproperlyConfigured(f"PAYOUT_RUN_APPROVAL_ABOVE: {error}") from error
RESIDUAL_PROCESS = env("RESIDUAL_PROCESS", default="web")  # web, ingest, attribution, default, payments, beat
if not IS_DEMO:
    if STRIPE_API_BASE:
        raise ImproperlyConfigured("STRIPE_API_BASE is for the demo's local Stripe; production talks to Stripe itself")
    if "_test_" in STRIPE_API_KEY:
        raise ImproperlyConfigured("STRIPE_API_KEY is a test key: production never sells for play money")
    if RESIDUAL_PROCESS in ("web", "payments") and not STRIPE_API_KEY:
        raise ImproperlyConfigured(f"STRIPE_API_KEY is missing: the {RESIDUAL_PROCESS} process cannot run without it")
    if RESIDUAL_PROCESS == "web" and not (STRIPE_WEBHOOK_SECRET and STRIPE_CONNECT_WEBHOOK_SECRET):
        raise ImproperlyConfigured("STRIPE_WEBHOOK_SECRET and STRIPE_CONNECT_WEBHOOK_SECRET are missing")
#: Seals the bank details of payees whom Stripe does not reach; never changed: nobody could be paid over another rail.
BANK_DETAILS_KEY = env("BANK_DETAILS_KEY", default="")
if IS_DEMO and not BANK_DETAILS_KEY:  # of its own, and kept as long as the demo's one secret is
    BANK_DETAILS_KEY = hashlib.sha256(f"bank details {SECRET_KEY}".encode()).hexdigest()
if RESIDUAL_PROCESS == "web" and not BANK_DETAILS_KEY:  # no other process seals or opens them, so none is given the key
    raise ImproperlyConfigured(
        "BANK_DETAILS_KEY is missing: the web process seals payees’ bank details under it. Make one, and keep it for ever: "
        "python -c 'import secrets; print(secrets.token_urlsafe(50))'. If payees entered theirs while it was unset, it is the "
        "value of FINGERPRINT_KEY."
    )
PLATFORM_FEE_BPS = 1_000
#: Who sells: as every invoice names it, and where a bank transfer goes.
SELLER_NAME = env("SELLER_NAME", default="Residual (demo)" if IS_DEMO else "")
SELLER_ADDRESS = env("SELLER_ADDRESS", default="1 Example Street\n10115 Berlin" if IS_DEMO else "").replace("\\n", "\n")
SELLER_VAT_ID = env("SELLER_VAT_ID", default="")
SELLER_BANK = env("SELLER_BANK", default="Play money, IBAN DE89 3704 0044 0532 0130 00" if IS_DEMO else "")
#: Royalties in business days: how often and by when revenue is reported, when invoices fall due, what follows if not.
ROYALTY_REPORT_MONTHS = env.int("ROYALTY_REPORT_MONTHS", default=3)
ROYALTY_REPORT_DUE_DAYS = env.int("ROYALTY_REPORT_DUE_DAYS", default=30)
INVOICE_DUE_DAYS = env.int("INVOICE_DUE_DAYS", default=30)
ROYALTY_REMIND_DAYS_BEFORE = env.int("ROYALTY_REMIND_DAYS_BEFORE", default=7)
ROYALTY_REMIND_DAYS_AFTER = env.int("ROYALTY_REMIND_DAYS_AFTER", default=7)
ROYALTY_SUSPEND_DAYS = env.int("ROYALTY_SUSPEND_DAYS", default=30)  # overdue for so long, the license is suspended
HOLD_DAYS_NEW, HOLD_DAYS_KNOWN = 30, 7
DOWNLOAD_URL_SECONDS = 600

# --- API --------------------------------------------------------------------------------------------------------------
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["marketplace.api.keys.ApiKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["marketplace.api.keys.HasScope"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["marketplace.bodies.LimitedJSONParser"],
    "DEFAULT_PAGINATION_CLASS": "marketplace.api.pagination.CreatedCursorPagination",
    "DEFAULT_SCHEMA_CLASS": "marketplace.api.schema.ScopedAutoSchema",
    "EXCEPTION_HANDLER": "marketplace.api.problems.problem_response",
    "DEFAULT_THROTTLE_CLASSES": ["marketplace.api.throttling.PartyThrottle"],
    "DEFAULT_THROTTLE_RATES": {
        "party": env("API_RATE", default="600/min"),
        "anon": env("API_ANON_RATE", default="120/min"),
    },
    "UNAUTHENTICATED_USER": None,
    "NUM_PROXIES": env.int("TRUSTED_PROXIES", default=0 if IS_DEMO else 1),  # else a forged header resets the limit
    "PAGE_SIZE": 50,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Residual API",
    "VERSION": "1",
    "DESCRIPTION": "Find, license and download training data; disclose what a model was trained on; report its revenue.",
    "OAS_VERSION": "3.1.0",  # whose schemas are JSON Schema, null included
    "SERVE_INCLUDE_SCHEMA": False,
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SERVE_AUTHENTICATION": [],
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "marketplace.api.schema.describe_problems",
    ],
    "ENUM_NAME_OVERRIDES": {
        "OrderStatus": "marketplace.models.orders.Order.Status",
        "JobStatus": "marketplace.jobs.Job.Status",
        "PaymentMethod": "payouts.models.payments.Payment.Method",
        "PartitionEnum": "attribution.models.Share.Partition",
        "DocumentKind": "payouts.models.Document.Kind",
        "PaymentStatus": "payouts.models.Payment.Status",
        "PayoutStatus": "payouts.models.Payout.Status",
        "PayoutRunState": "payouts.models.PayoutRun.State",
        "RefundState": "payouts.models.Refund.State",
        "ReceiptStatus": "payouts.models.BankReceipt.Status",
        "ProposalStatus": "payouts.models.ReceiptApplication.Status",
        "OutgoingTransferStatus": "payouts.models.OutgoingTransfer.Status",
        "SettlementStatus": "payouts.models.EventSettlement.Status",
    },
}

# --- security ---------------------------------------------------------------------------------------------------------
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "font-src": [SELF],
        "connect-src": [SELF],
        # After a POST the browser follows our redirect to Stripe's page, which form-action covers too.
        "form-action": [SELF, STRIPE_API_BASE or "https://checkout.stripe.com", "https://connect.stripe.com"],
        "frame-ancestors": [NONE],
        "base-uri": [NONE],
    }
}
X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_HTTPONLY = True
if not IS_DEMO:
    SECURE_SSL_REDIRECT = env.bool("SECURE_SSL_REDIRECT", default=True)
    SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$"]  # a load balancer asks from inside, without TLS
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_HSTS_SECONDS = 31_536_000
    SECURE_HSTS_INCLUDE_SUBDOMAINS = True
    SECURE_HSTS_PRELOAD = True
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": env("LOG_LEVEL", default="INFO")},
}
