"""What the bank did with a rail payout: recorded by one person, booked when another has seen it."""

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('payouts', '0033_bank_details_rules'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AlterField(
            model_name='railpayout',
            name='reference',
            field=models.CharField(blank=True, max_length=120),
        ),
        migrations.CreateModel(
            name='RailConfirmation',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('outcome', models.CharField(choices=[('sent', 'Sent'), ('returned', 'Returned')], max_length=8)),
                ('reference', models.CharField(max_length=120)),
                ('status', models.CharField(choices=[('recorded', 'Recorded'), ('booked', 'Booked'), ('rejected', 'Rejected')], default='recorded', max_length=8)),
                ('recorded_at', models.DateTimeField()),
                ('decided_at', models.DateTimeField(null=True)),
                ('decided_by', models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL)),
                ('payout', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='confirmations', to='payouts.railpayout')),
                ('recorded_by', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL)),
            ],
            options={
                'ordering': ['-pk'],
                'constraints': [
                    models.UniqueConstraint(condition=models.Q(('status', 'rejected'), _negated=True), fields=('reference',), name='one_rail_confirmation_per_reference'),
                    models.UniqueConstraint(condition=models.Q(('status', 'recorded')), fields=('payout',), name='one_open_confirmation_per_rail_payout'),
                    models.UniqueConstraint(condition=models.Q(('status', 'rejected'), _negated=True), fields=('payout', 'outcome'), name='one_confirmation_per_rail_payout_and_outcome'),
                    models.CheckConstraint(condition=models.Q(('reference', ''), _negated=True), name='rail_confirmation_names_the_transfer'),
                    models.CheckConstraint(condition=models.Q(models.Q(('decided_at', None), ('decided_by', None), ('status', 'recorded')), models.Q(models.Q(('status', 'recorded'), _negated=True), ('decided_at__isnull', False), ('decided_by__isnull', False)), _connector='OR'), name='decided_rail_confirmation_knows_by_whom'),
                    models.CheckConstraint(condition=models.Q(models.Q(('status', 'booked'), _negated=True), models.Q(('decided_by', models.F('recorded_by')), _negated=True), _connector='OR'), name='rail_confirmation_needs_a_second_person'),
                ],
            },
        ),
    ]
