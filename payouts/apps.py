from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.db import connections
from django.db.models.signals import post_migrate


class PayoutsConfig(AppConfig):
    name = "payouts"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        post_migrate.connect(_keep_approval_limits, sender=self)


def _keep_approval_limits(sender: AppConfig, using: str, **kwargs: Any) -> None:
    """Write the settings down where the application cannot raise it, and PostgreSQL holds runs against it."""
    from marketplace.money import MICROS
    from payouts.models import ApprovalLimit

    table, ask = ApprovalLimit._meta.db_table, connections[using].introspection
    if table not in ask.table_names():
        return  # migrated back to before it
    with connections[using].cursor() as cursor:
        if "currency" not in {column.name for column in ask.get_table_description(cursor, table)}:
            return  # or to when there was one for all currencies, which stays as it was
    for currency, units in settings.PAYOUT_RUN_APPROVAL_ABOVE.items():
        latest = ApprovalLimit.of(currency, using=using)
        if latest is None or latest.above_micros != units * MICROS:
            ApprovalLimit.objects.using(using).create(currency=currency, above_micros=units * MICROS)
