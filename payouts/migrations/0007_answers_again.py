"""An answer that Stripe refused stays as it was given, and another may follow it; a refund keeps the line it was asked for."""

import django.db.models.deletion
from django.db import migrations, models
from django.db.models import Q


class Migration(migrations.Migration):
    dependencies = [("payouts", "0006_write_offs_undone")]

    operations = [
        migrations.AddField("refund", "line", models.BigIntegerField(null=True)),
        migrations.AlterField(
            "disputeanswer",
            "dispute",
            models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT, related_name="answers", to="payouts.dispute"
            ),
        ),
        migrations.AddConstraint(
            "disputeanswer",
            models.UniqueConstraint(
                condition=~Q(status="failed"), fields=["dispute"], name="one_answer_unless_it_failed"
            ),
        ),
    ]
