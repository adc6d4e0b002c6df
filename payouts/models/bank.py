"""Our own bank account: transfers that left it for buyers and payers, and what arrived and fits no invoice.

    BankReceipt          (in `payments`) without a payment: money that fits no invoice, held for its payer
    ReceiptApplication   it pays an invoice after all; ReceiptUse: how much of which receipt
    OutgoingTransfer     a refund of what was paid by transfer, or money that fits no invoice on its way back

Each is written down by one of the staff and booked when another has seen it. PostgreSQL refuses more than a receipt holds, a
refund that no booked transfer carried, and a second thought about what a row is about (migration `0031_bank_rules`).
"""

from django.db import models
from django.db.models import F, Q

from marketplace.money import Money
from payouts.models.payments import BankReceipt, Payment


class ReceiptApplication(models.Model):
    """Money that fitted no invoice pays one, exactly: proposed by one person, booked by another."""

    class Status(models.TextChoices):
        PROPOSED = "proposed"
        BOOKED = "booked"
        REJECTED = "rejected"

    payment = models.ForeignKey(Payment, models.PROTECT, related_name="applications")
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    status = models.CharField(max_length=8, choices=Status, default=Status.PROPOSED)
    proposed_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    proposed_at = models.DateTimeField()  # business time
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)  # business time

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["payment"], condition=~Q(status="rejected"), name="one_application_per_payment"
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="application_positive"),
            models.CheckConstraint(
                condition=Q(status="proposed", decided_by=None, decided_at=None)
                | (~Q(status="proposed") & Q(decided_by__isnull=False, decided_at__isnull=False)),
                name="decided_application_knows_by_whom",
            ),
            models.CheckConstraint(
                condition=~Q(status="booked") | ~Q(decided_by=F("proposed_by")),
                name="application_needs_a_second_person",
            ),
        ]

    def __str__(self) -> str:
        return f"Application {self.pk} of {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class ReceiptUse(models.Model):
    """How much of one receipt an application takes. Append-only."""

    application = models.ForeignKey(ReceiptApplication, models.PROTECT, related_name="uses")
    receipt = models.ForeignKey(BankReceipt, models.PROTECT, related_name="uses")
    amount_micros = models.BigIntegerField()

    class Meta:
        ordering = ["pk"]
        constraints = [
            models.UniqueConstraint(fields=["application", "receipt"], name="one_use_per_application_and_receipt"),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="receipt_use_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.amount_micros} of {self.receipt}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.receipt.currency)


class OutgoingTransfer(models.Model):
    """A transfer that left our bank account for a buyer or payer: recorded by one person, booked when another has seen it."""

    class Status(models.TextChoices):
        RECORDED = "recorded"
        BOOKED = "booked"
        REJECTED = "rejected"  # the record was wrong: nothing left
        RETURNED = "returned"  # it came back

    refund = models.ForeignKey("payouts.Refund", models.PROTECT, null=True, related_name="transfers")
    receipt = models.ForeignKey(BankReceipt, models.PROTECT, null=True, related_name="returns")
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    reference = models.CharField(max_length=120)  # the bank statement's own number of the transfer
    sent_on = models.DateField()
    status = models.CharField(max_length=8, choices=Status, default=Status.RECORDED)
    recorded_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    recorded_at = models.DateTimeField()  # business time
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)  # business time
    return_reference = models.CharField(max_length=120, blank=True)  # the statement's number of what came back
    return_note = models.TextField(blank=True)  # why, as the bank said it
    returned_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    returned_at = models.DateTimeField(null=True)  # business time

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.CheckConstraint(
                condition=Q(refund__isnull=False, receipt=None) | Q(refund=None, receipt__isnull=False),
                name="outgoing_transfer_is_for_one_thing",
            ),
            models.UniqueConstraint(
                fields=["reference"], condition=~Q(status="rejected"), name="one_outgoing_transfer_per_reference"
            ),
            models.UniqueConstraint(
                fields=["refund"], condition=~Q(status="rejected"), name="one_outgoing_transfer_per_refund"
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="outgoing_transfer_positive"),
            models.CheckConstraint(
                condition=Q(status="recorded", decided_by=None, decided_at=None)
                | (~Q(status="recorded") & Q(decided_by__isnull=False, decided_at__isnull=False)),
                name="decided_transfer_knows_by_whom",
            ),
            models.CheckConstraint(
                condition=Q(status__in=["recorded", "rejected"]) | ~Q(decided_by=F("recorded_by")),
                name="outgoing_transfer_needs_a_second_person",
            ),
            models.CheckConstraint(
                condition=Q(status="returned", returned_by__isnull=False, returned_at__isnull=False)
                & ~Q(return_reference="")
                | (~Q(status="returned") & Q(returned_by=None, returned_at=None, return_reference="")),
                name="returned_transfer_knows_its_return",
            ),
        ]

    def __str__(self) -> str:
        return f"Transfer {self.reference} of {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)
