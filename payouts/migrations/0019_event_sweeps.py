"""Up to when each account's list of events at Stripe was read."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("payouts", "0018_booked_at_indexed")]

    operations = [
        migrations.CreateModel(
            name="EventSweep",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("account", models.CharField(max_length=64, unique=True)),
                ("swept_until", models.DateTimeField()),
                ("swept_at", models.DateTimeField()),
            ],
        ),
    ]
