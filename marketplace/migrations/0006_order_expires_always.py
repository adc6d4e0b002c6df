from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("marketplace", "0005_orders_have_a_deadline"),
    ]

    operations = [
        migrations.AlterField("order", "expires_at", models.DateTimeField()),
        migrations.AddIndex(
            "order",
            models.Index(
                fields=["expires_at"], condition=models.Q(("status", "placed")), name="unpaid_orders_by_deadline"
            ),
        ),
    ]
