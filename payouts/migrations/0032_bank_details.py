"""Where payees whom Stripe does not reach are paid."""

import datetime
import django.db.models.deletion
import django.db.models.expressions
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('marketplace', '0009_licenses_in_arrears'),
        ('payouts', '0031_bank_rules'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='BankDetails',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('sealed', models.TextField()),
                ('last_four', models.CharField(max_length=4)),
                ('entered_at', models.DateTimeField()),
                ('usable_from', models.DateTimeField()),
                ('entered_by', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL)),
                ('party', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='bank_details', to='marketplace.party')),
            ],
            options={
                'ordering': ['-pk'],
            },
        ),
        migrations.AddField(
            model_name='railpayout',
            name='details',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='rail_payouts', to='payouts.bankdetails'),
        ),
        migrations.CreateModel(
            name='BankDetailsNotice',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('status', models.CharField(choices=[('queued', 'Queued'), ('running', 'Running'), ('done', 'Done'), ('failed', 'Failed')], db_index=True, default='queued', max_length=10)),
                ('attempt', models.PositiveIntegerField(default=0)),
                ('n_failures', models.PositiveIntegerField(default=0)),
                ('due_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('queued_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('sent_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('started_at', models.DateTimeField(blank=True, null=True)),
                ('finished_at', models.DateTimeField(blank=True, null=True)),
                ('lease_expires_at', models.DateTimeField(blank=True, null=True)),
                ('progress_done', models.PositiveBigIntegerField(default=0)),
                ('progress_total', models.PositiveBigIntegerField(default=0)),
                ('error_code', models.CharField(blank=True, max_length=60)),
                ('error_message', models.TextField(blank=True)),
                ('error_pointers', models.JSONField(blank=True, default=dict)),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('details', models.OneToOneField(on_delete=django.db.models.deletion.PROTECT, related_name='notice', to='payouts.bankdetails')),
            ],
            options={
                'abstract': False,
            },
        ),
        migrations.AddConstraint(
            model_name='bankdetails',
            constraint=models.CheckConstraint(condition=models.Q(('usable_from__gte', django.db.models.expressions.CombinedExpression(models.F('entered_at'), '+', models.Value(datetime.timedelta(days=3))))), name='bank_details_are_held_for_72_hours'),
        ),
        migrations.AddConstraint(
            model_name='bankdetailsnotice',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('lease_expires_at__isnull', False), ('status', 'running')), models.Q(models.Q(('status', 'running'), _negated=True), ('lease_expires_at__isnull', True)), _connector='OR'), name='payouts_bankdetailsnotice_lease_iff_running'),
        ),
    ]
