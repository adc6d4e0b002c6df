"""Failed events that staff settle, charges that are for nothing, and debits that a bank takes days to confirm."""

import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('payouts', '0024_statement_formats'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='EventSettlement',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('object_id', models.CharField(max_length=255)),
                ('act', models.CharField(choices=[('explained', 'settled otherwise'), ('refund', 'surplus charge, to be refunded')], max_length=9)),
                ('reason', models.TextField()),
                ('charge_id', models.CharField(blank=True, max_length=255)),
                ('amount_micros', models.BigIntegerField(null=True)),
                ('currency', models.CharField(blank=True, max_length=3)),
                ('status', models.CharField(choices=[('proposed', 'Proposed'), ('confirmed', 'Confirmed'), ('rejected', 'Rejected')], default='proposed', max_length=9)),
                ('proposed_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('decided_at', models.DateTimeField(null=True)),
                ('note', models.TextField(blank=True)),
            ],
            options={
                'ordering': ['-pk'],
            },
        ),
        migrations.CreateModel(
            name='SurplusCharge',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('charge_id', models.CharField(max_length=255, unique=True)),
                ('amount_micros', models.BigIntegerField()),
                ('currency', models.CharField(max_length=3)),
                ('booked_at', models.DateTimeField()),
            ],
            options={
                'ordering': ['-pk'],
            },
        ),
        migrations.RemoveConstraint(
            model_name='movement',
            name='movement_has_its_cause',
        ),
        migrations.AddField(
            model_name='payment',
            name='awaits_bank_since',
            field=models.DateTimeField(null=True),
        ),
        migrations.AddField(
            model_name='payment',
            name='bank_refusal',
            field=models.TextField(blank=True),
        ),
        migrations.AddField(
            model_name='payment',
            name='bank_refused_at',
            field=models.DateTimeField(null=True),
        ),
        migrations.AddField(
            model_name='payment',
            name='checkout_asked_at',
            field=models.DateTimeField(null=True),
        ),
        migrations.AlterField(
            model_name='journalentry',
            name='kind',
            field=models.CharField(choices=[('sale', 'Sale'), ('upfront', 'Upfront'), ('release', 'Release'), ('royalty', 'Royalty'), ('royalty_split', 'Royalty Split'), ('settle', 'Settle'), ('payout_intent', 'Payout Intent'), ('payout_sent', 'Payout Sent'), ('payout_reversal', 'Payout Reversal'), ('reversal', 'Reversal'), ('refund_intent', 'Refund Intent'), ('refund_sent', 'Refund Sent'), ('refund_failed', 'Refund Failed'), ('refund_undone', 'Refund Undone'), ('dispute_funds', 'Dispute Funds'), ('dispute_freeze', 'Dispute Freeze'), ('dispute_thaw', 'Dispute Thaw'), ('dispute_lost', 'Dispute Lost'), ('transfer_back', 'Transfer Back'), ('recovery', 'Recovery'), ('write_off', 'Write Off'), ('correction', 'Correction'), ('manual', 'Manual'), ('rail_intent', 'Rail Intent'), ('rail_sent', 'Rail Sent'), ('rail_reversal', 'Rail Reversal'), ('surplus', 'Surplus')], max_length=16),
        ),
        migrations.AlterField(
            model_name='movement',
            name='kind',
            field=models.CharField(choices=[('refund', 'Refund'), ('refund_failure', 'Refund Failure'), ('dispute', 'Dispute'), ('reversal', 'Reversal'), ('surplus', 'Surplus')], max_length=14),
        ),
        migrations.AlterField(
            model_name='refund',
            name='payment',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='refunds', to='payouts.payment'),
        ),
        migrations.AlterField(
            model_name='refund',
            name='reason',
            field=models.CharField(choices=[('of_right', 'not downloaded yet'), ('faulty_data', 'the data is not what was sold'), ('duplicate', 'bought twice'), ('fraud', 'the card was stolen'), ('goodwill', 'goodwill'), ('corrected', 'the licensee corrected its revenue report'), ('surplus', 'paid for nothing that was asked for'), ('at_stripe', "refunded in Stripe's dashboard")], max_length=11),
        ),
        migrations.AddField(
            model_name='eventsettlement',
            name='decided_by',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='eventsettlement',
            name='event',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='settlements', to='payouts.stripeevent'),
        ),
        migrations.AddField(
            model_name='eventsettlement',
            name='proposed_by',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='surpluscharge',
            name='event',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='surplus_charges', to='payouts.stripeevent'),
        ),
        migrations.AddField(
            model_name='surpluscharge',
            name='payment',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='surplus_charges', to='payouts.payment'),
        ),
        migrations.AddField(
            model_name='movement',
            name='surplus',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='movements', to='payouts.surpluscharge'),
        ),
        migrations.AddField(
            model_name='refund',
            name='surplus',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='refunds', to='payouts.surpluscharge'),
        ),
        migrations.AddConstraint(
            model_name='movement',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('dispute', None), ('kind__in', ['refund', 'refund_failure']), ('refund__isnull', False), ('reversal', None), ('surplus', None)), models.Q(('dispute__isnull', False), ('kind', 'dispute'), ('refund', None), ('reversal', None), ('surplus', None)), models.Q(('dispute', None), ('kind', 'reversal'), ('refund', None), ('reversal__isnull', False), ('surplus', None)), models.Q(('dispute', None), ('kind', 'surplus'), ('refund', None), ('reversal', None), ('surplus__isnull', False)), _connector='OR'), name='movement_has_its_cause'),
        ),
        migrations.AddConstraint(
            model_name='refund',
            constraint=models.UniqueConstraint(fields=('surplus', 'key'), name='one_refund_per_surplus_charge_and_key'),
        ),
        migrations.AddConstraint(
            model_name='refund',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('payment__isnull', False), ('surplus', None)), models.Q(('payment', None), ('surplus__isnull', False)), _connector='OR'), name='refund_is_of_one_charge'),
        ),
        migrations.AddConstraint(
            model_name='eventsettlement',
            constraint=models.UniqueConstraint(condition=models.Q(('status', 'proposed')), fields=('event',), name='one_proposed_settlement_per_event'),
        ),
        migrations.AddConstraint(
            model_name='eventsettlement',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('decided_at', None), ('decided_by', None), ('status', 'proposed')), models.Q(models.Q(('status', 'proposed'), _negated=True), ('decided_at__isnull', False), ('decided_by__isnull', False)), _connector='OR'), name='decided_settlement_knows_by_whom'),
        ),
        migrations.AddConstraint(
            model_name='eventsettlement',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('status', 'confirmed'), _negated=True), models.Q(('decided_by', models.F('proposed_by')), _negated=True), _connector='OR'), name='settlement_needs_a_second_person'),
        ),
        migrations.AddConstraint(
            model_name='eventsettlement',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('act', 'explained'), ('amount_micros', None), ('charge_id', '')), models.Q(('act', 'refund'), ('amount_micros__gt', 0), models.Q(('charge_id', ''), _negated=True)), _connector='OR'), name='surplus_settlement_names_its_charge'),
        ),
        migrations.AddConstraint(
            model_name='surpluscharge',
            constraint=models.CheckConstraint(condition=models.Q(('amount_micros__gt', 0)), name='surplus_charge_positive'),
        ),
    ]
