import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    """What a key has spent is what its orders say."""

    dependencies = [("marketplace", "0002_append_only_rules")]

    operations = [
        migrations.AddField(
            model_name="order",
            name="api_key",
            field=models.ForeignKey(
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="orders",
                to="marketplace.apikey",
            ),
        ),
    ]
