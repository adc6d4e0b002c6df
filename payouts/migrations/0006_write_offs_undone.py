"""A write-off that a returned refund made needless is taken back by a row of its own, below zero, that names the refund's clawback."""

import django.db.models.deletion
from django.db import migrations, models
from django.db.models import Q


class Migration(migrations.Migration):
    dependencies = [("payouts", "0005_refund_rules")]

    operations = [
        migrations.RemoveConstraint("writeoff", "write_off_positive"),
        migrations.AddField(
            "writeoff",
            "returned",
            models.ForeignKey(
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="write_offs_undone",
                to="payouts.clawback",
            ),
        ),
        migrations.AddConstraint(
            "writeoff",
            models.CheckConstraint(
                condition=Q(amount_micros__gt=0, returned=None) | Q(amount_micros__lt=0, returned__isnull=False),
                name="write_off_positive_or_undone",
            ),
        ),
    ]
