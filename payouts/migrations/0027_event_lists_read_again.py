"""Stripe's lists of events were read without the types that are looked for now; it still has thirty days of them."""

from django.db import migrations


def read_again(apps, schema_editor):
    apps.get_model("payouts", "EventSweep").objects.all().delete()


class Migration(migrations.Migration):
    dependencies = [("payouts", "0026_settled_event_rules")]

    operations = [migrations.RunPython(read_again, migrations.RunPython.noop)]
