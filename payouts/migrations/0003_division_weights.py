from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("payouts", "0002_ledger_rules")]

    operations = [
        migrations.AddField("division", "holders_weight", models.BigIntegerField(default=0)),
        migrations.AddField("division", "labellers_weight", models.BigIntegerField(default=0)),
    ]
