"""Refunds by bank transfer, and money in our bank account that fits no invoice."""

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('payouts', '0029_proofs_by_the_database'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='OutgoingTransfer',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('amount_micros', models.BigIntegerField()),
                ('currency', models.CharField(max_length=3)),
                ('reference', models.CharField(max_length=120)),
                ('sent_on', models.DateField()),
                ('status', models.CharField(choices=[('recorded', 'Recorded'), ('booked', 'Booked'), ('rejected', 'Rejected'), ('returned', 'Returned')], default='recorded', max_length=8)),
                ('recorded_at', models.DateTimeField()),
                ('decided_at', models.DateTimeField(null=True)),
                ('return_reference', models.CharField(blank=True, max_length=120)),
                ('return_note', models.TextField(blank=True)),
                ('returned_at', models.DateTimeField(null=True)),
            ],
            options={
                'ordering': ['-pk'],
            },
        ),
        migrations.CreateModel(
            name='ReceiptApplication',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('amount_micros', models.BigIntegerField()),
                ('currency', models.CharField(max_length=3)),
                ('status', models.CharField(choices=[('proposed', 'Proposed'), ('booked', 'Booked'), ('rejected', 'Rejected')], default='proposed', max_length=8)),
                ('proposed_at', models.DateTimeField()),
                ('decided_at', models.DateTimeField(null=True)),
            ],
            options={
                'ordering': ['-pk'],
            },
        ),
        migrations.CreateModel(
            name='ReceiptUse',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('amount_micros', models.BigIntegerField()),
            ],
            options={
                'ordering': ['pk'],
            },
        ),
        migrations.RemoveConstraint(
            model_name='refund',
            name='sent_refund_has_its_id',
        ),
        migrations.AddField(
            model_name='bankreceipt',
            name='note',
            field=models.CharField(blank=True, max_length=500),
        ),
        migrations.AddField(
            model_name='bankreceipt',
            name='payer',
            field=models.CharField(blank=True, max_length=200),
        ),
        migrations.AddField(
            model_name='refund',
            name='method',
            field=models.CharField(choices=[('stripe', 'Stripe'), ('bank', 'Bank')], default='stripe', max_length=6),
        ),
        migrations.AlterField(
            model_name='bankreceipt',
            name='payment',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='receipts', to='payouts.payment'),
        ),
        migrations.AlterField(
            model_name='journalentry',
            name='kind',
            field=models.CharField(choices=[('sale', 'Sale'), ('upfront', 'Upfront'), ('release', 'Release'), ('royalty', 'Royalty'), ('royalty_split', 'Royalty Split'), ('settle', 'Settle'), ('payout_intent', 'Payout Intent'), ('payout_sent', 'Payout Sent'), ('payout_reversal', 'Payout Reversal'), ('reversal', 'Reversal'), ('refund_intent', 'Refund Intent'), ('refund_sent', 'Refund Sent'), ('refund_failed', 'Refund Failed'), ('refund_undone', 'Refund Undone'), ('dispute_funds', 'Dispute Funds'), ('dispute_freeze', 'Dispute Freeze'), ('dispute_thaw', 'Dispute Thaw'), ('dispute_lost', 'Dispute Lost'), ('transfer_back', 'Transfer Back'), ('recovery', 'Recovery'), ('write_off', 'Write Off'), ('correction', 'Correction'), ('manual', 'Manual'), ('rail_intent', 'Rail Intent'), ('rail_sent', 'Rail Sent'), ('rail_reversal', 'Rail Reversal'), ('surplus', 'Surplus'), ('unapplied', 'Unapplied'), ('unapplied_back', 'Unapplied Back'), ('unapplied_again', 'Unapplied Again')], max_length=16),
        ),
        migrations.AddConstraint(
            model_name='bankreceipt',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('payer', ''), ('payment__isnull', False)), models.Q(('payment', None), models.Q(('payer', ''), _negated=True)), _connector='OR'), name='receipt_has_payment_or_payer'),
        ),
        migrations.AddConstraint(
            model_name='refund',
            constraint=models.CheckConstraint(condition=models.Q(('state__in', ['intended', 'refused']), models.Q(('method', 'stripe'), ('refund_id__isnull', False)), models.Q(('method', 'bank'), ('refund_id', None)), _connector='OR'), name='sent_refund_has_its_id'),
        ),
        migrations.AddField(
            model_name='outgoingtransfer',
            name='decided_by',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='outgoingtransfer',
            name='receipt',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='returns', to='payouts.bankreceipt'),
        ),
        migrations.AddField(
            model_name='outgoingtransfer',
            name='recorded_by',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='outgoingtransfer',
            name='refund',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='transfers', to='payouts.refund'),
        ),
        migrations.AddField(
            model_name='outgoingtransfer',
            name='returned_by',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='receiptapplication',
            name='decided_by',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='receiptapplication',
            name='payment',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='applications', to='payouts.payment'),
        ),
        migrations.AddField(
            model_name='receiptapplication',
            name='proposed_by',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='receiptuse',
            name='application',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='uses', to='payouts.receiptapplication'),
        ),
        migrations.AddField(
            model_name='receiptuse',
            name='receipt',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='uses', to='payouts.bankreceipt'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('receipt', None), ('refund__isnull', False)), models.Q(('receipt__isnull', False), ('refund', None)), _connector='OR'), name='outgoing_transfer_is_for_one_thing'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.UniqueConstraint(condition=models.Q(('status', 'rejected'), _negated=True), fields=('reference',), name='one_outgoing_transfer_per_reference'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.UniqueConstraint(condition=models.Q(('status', 'rejected'), _negated=True), fields=('refund',), name='one_outgoing_transfer_per_refund'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.CheckConstraint(condition=models.Q(('amount_micros__gt', 0)), name='outgoing_transfer_positive'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('decided_at', None), ('decided_by', None), ('status', 'recorded')), models.Q(models.Q(('status', 'recorded'), _negated=True), ('decided_at__isnull', False), ('decided_by__isnull', False)), _connector='OR'), name='decided_transfer_knows_by_whom'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.CheckConstraint(condition=models.Q(('status__in', ['recorded', 'rejected']), models.Q(('decided_by', models.F('recorded_by')), _negated=True), _connector='OR'), name='outgoing_transfer_needs_a_second_person'),
        ),
        migrations.AddConstraint(
            model_name='outgoingtransfer',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('returned_at__isnull', False), ('returned_by__isnull', False), ('status', 'returned'), models.Q(('return_reference', ''), _negated=True)), models.Q(models.Q(('status', 'returned'), _negated=True), ('return_reference', ''), ('returned_at', None), ('returned_by', None)), _connector='OR'), name='returned_transfer_knows_its_return'),
        ),
        migrations.AddConstraint(
            model_name='receiptapplication',
            constraint=models.UniqueConstraint(condition=models.Q(('status', 'rejected'), _negated=True), fields=('payment',), name='one_application_per_payment'),
        ),
        migrations.AddConstraint(
            model_name='receiptapplication',
            constraint=models.CheckConstraint(condition=models.Q(('amount_micros__gt', 0)), name='application_positive'),
        ),
        migrations.AddConstraint(
            model_name='receiptapplication',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('decided_at', None), ('decided_by', None), ('status', 'proposed')), models.Q(models.Q(('status', 'proposed'), _negated=True), ('decided_at__isnull', False), ('decided_by__isnull', False)), _connector='OR'), name='decided_application_knows_by_whom'),
        ),
        migrations.AddConstraint(
            model_name='receiptapplication',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('status', 'booked'), _negated=True), models.Q(('decided_by', models.F('proposed_by')), _negated=True), _connector='OR'), name='application_needs_a_second_person'),
        ),
        migrations.AddConstraint(
            model_name='receiptuse',
            constraint=models.UniqueConstraint(fields=('application', 'receipt'), name='one_use_per_application_and_receipt'),
        ),
        migrations.AddConstraint(
            model_name='receiptuse',
            constraint=models.CheckConstraint(condition=models.Q(('amount_micros__gt', 0)), name='receipt_use_positive'),
        ),
    ]
