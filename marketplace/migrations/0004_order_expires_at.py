from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0003_order_api_key"),
    ]

    operations = [
        migrations.AddField("order", "expires_at", models.DateTimeField(null=True)),
    ]
