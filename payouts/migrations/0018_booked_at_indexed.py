"""Trial balances and journals are asked for by business time."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("payouts", "0017_closing_rules")]

    operations = [
        migrations.AddIndex(
            model_name="journalentry",
            index=models.Index(fields=["booked_at"], name="entry_booked_at"),
        ),
    ]
