"""A payout run's approval limit is of a currency; what was written down before holds for every one until the next is."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('payouts', '0036_bank_keeps_promises'),
    ]

    operations = [
        migrations.AddField(
            model_name='approvallimit',
            name='currency',
            field=models.CharField(blank=True, default='', max_length=3),
        ),
    ]
