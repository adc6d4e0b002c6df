from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.db import connections
from django.db.models.signals import post_migrate


class PayoutsConfig(AppConfig):
    name = "payouts"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        post_migrate.connect(_keep_approval_limit, sender=self)


def _keep_approval_limit(sender: AppConfig, using: str, **kwargs: Any) -> None:
    """Write the setting down where the application cannot raise it, and PostgreSQL holds runs against it."""
    from marketplace.money import MICROS
    from payouts.models import ApprovalLimit

    if ApprovalLimit._meta.db_table not in connections[using].introspection.table_names():
        return  # migrated back to before it
    limits = ApprovalLimit.objects.using(using)
    latest, above = limits.first(), settings.PAYOUT_RUN_APPROVAL_ABOVE * MICROS
    if latest is None or latest.above_micros != above:
        limits.create(above_micros=above)
