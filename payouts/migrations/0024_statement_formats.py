"""Statements say in which format their CSV is; those that were issued before are in the first."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("payouts", "0023_counted_pots")]

    operations = [
        migrations.AddField(
            model_name="issuedstatement",
            name="format",
            field=models.PositiveSmallIntegerField(default=1),
        ),
    ]
