from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("marketplace", "0008_refunded_orders")]

    operations = [
        migrations.AddField("license", "in_arrears_at", models.DateTimeField(blank=True, null=True)),
    ]
