"""Orders that were placed before there were deadlines have had theirs."""

from datetime import timedelta

from django.db import migrations
from django.db.models import F


def set_deadline(apps, schema_editor):
    apps.get_model("marketplace", "Order").objects.filter(expires_at=None).update(
        expires_at=F("placed_at") + timedelta(hours=24)
    )


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0004_order_expires_at"),
    ]

    operations = [
        migrations.RunPython(set_deadline, migrations.RunPython.noop),
    ]
