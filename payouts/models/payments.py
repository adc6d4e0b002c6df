"""Money that comes in: one payment per order or royalty invoice, at Stripe or into our bank account, and Stripe's events."""

from typing import ClassVar

from django.db import models
from django.db.models import F, Func, Q
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.models import Party
from marketplace.money import Money


class Payment(models.Model):
    """What is asked for one order or one royalty invoice, tax included: open → paid → settled (its funds are available).

    It is paid on a page of Stripe's, or by a transfer to our bank account (`BankReceipt`).
    """

    class Status(models.TextChoices):
        OPEN = "open"
        PAID = "paid"

    class Method(models.TextChoices):
        STRIPE = "stripe"
        BANK = "bank"  # a transfer to our own account, which Stripe does not see

    order = models.OneToOneField("marketplace.Order", models.PROTECT, null=True, related_name="payment")
    invoice = models.OneToOneField("payouts.RoyaltyInvoice", models.PROTECT, null=True, related_name="payment")
    status = models.CharField(max_length=4, choices=Status, default=Status.OPEN)
    currency = models.CharField(max_length=3)
    amount_micros = models.BigIntegerField()  # what the buyer is charged, tax included, whole minor units
    tax_micros = models.BigIntegerField(default=0)  # of it
    tax_rate = models.ForeignKey("payouts.TaxRate", models.PROTECT, null=True, related_name="+")  # none: nothing to tax
    purchase_order = models.CharField(max_length=60, blank=True)  # the buyer's own number for it
    due_on = models.DateField(null=True)  # of what is paid by invoice
    method = models.CharField(max_length=6, choices=Method, default=Method.STRIPE)
    checkout_id = models.CharField(max_length=255, unique=True, null=True)  # null until Stripe has answered
    checkout_url = models.TextField(blank=True)
    checkout_attempt = models.PositiveIntegerField(
        default=1
    )  # in the idempotency key; rises when a session has expired, and when the key would only repeat an error
    checkout_asked_at = models.DateTimeField(null=True)  # wall time at which Stripe was last asked whether it is over
    #: Of a debit that takes days: since when the buyer's bank has been confirming it, and the last one that it refused.
    awaits_bank_since = models.DateTimeField(null=True)  # business time
    bank_refused_at = models.DateTimeField(null=True)  # business time
    bank_refusal = models.TextField(blank=True)  # Stripe's words
    charge_id = models.CharField(max_length=255, unique=True, null=True)
    balance_transaction_id = models.CharField(max_length=255, unique=True, null=True)
    fee_micros = models.BigIntegerField(null=True)  # Stripe's, from the balance transaction
    available_on = models.DateTimeField(null=True)
    created_at = models.DateTimeField(default=timezone.now)
    paid_at = models.DateTimeField(null=True)
    settled_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(order__isnull=False, invoice__isnull=True) | Q(order__isnull=True, invoice__isnull=False),
                name="payment_is_for_one_thing",
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="payment_positive"),
            models.CheckConstraint(
                condition=Q(tax_micros__gte=0, tax_micros__lt=F("amount_micros"))
                & (Q(tax_micros=0) | Q(tax_rate__isnull=False)),
                name="tax_is_part_of_the_payment",
            ),
            models.CheckConstraint(
                condition=Q(status="open")
                | Q(method="bank", charge_id=None, fee_micros=0, paid_at__isnull=False, settled_at__isnull=False)
                | Q(
                    method="stripe",
                    charge_id__isnull=False,
                    balance_transaction_id__isnull=False,
                    fee_micros__isnull=False,
                    available_on__isnull=False,
                    paid_at__isnull=False,
                ),
                name="paid_payment_knows_its_charge",
            ),
        ]

    def __str__(self) -> str:
        return f"Payment {self.pk}: {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)

    @property
    def tax(self) -> Money:
        return Money(self.tax_micros, self.currency)

    @property
    def is_on_its_way(self) -> bool:
        """A transfer for it is on our bank's statement, and waits for a second person."""
        return (
            self.receipts.filter(status=BankReceipt.Status.RECORDED).exists()
            or self.applications.filter(status="proposed").exists()
        )

    @property
    def net(self) -> Money:
        """What is divided into fee, upfront share and pool; tax is none of it."""
        return self.amount - self.tax

    @property
    def asked_of(self) -> "Party":
        if self.order is not None:
            return self.order.buyer
        assert self.invoice is not None  # a database check
        licensee: Party = self.invoice.report.licensee
        return licensee


class DebitRefusal(Job):
    """A debit that a buyer's bank refused, told to the buyer once, however often Stripe tells us. As a job: the mail."""

    task_name: ClassVar[str] = "payouts.tasks.send_debit_refusal"

    payment = models.ForeignKey(Payment, models.PROTECT, related_name="debit_refusals")
    checkout_id = models.CharField(max_length=255, unique=True)  # the page on which the debit was given
    reason = models.TextField(blank=True)  # Stripe's words
    refused_at = models.DateTimeField()  # business time
    mailed_at = models.DateTimeField(null=True)  # business time; null when done: it was paid otherwise before

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"Refused debit of {self.payment}"


class BankReceiptQuerySet(models.QuerySet["BankReceipt"]):
    def with_left(self) -> "BankReceiptQuerySet":
        """Money that fits no invoice and is not used up, by the database's own rule (migration `0031_bank_rules`); see `left`."""
        left = Func("pk", function="payouts_left_of_receipt", output_field=models.BigIntegerField())
        unapplied = self.filter(payment=None, status=BankReceipt.Status.BOOKED).alias(left_of_it=left)
        return unapplied.exclude(left_of_it=0).prefetch_related("uses__application", "returns")


class BankReceipt(models.Model):
    """A transfer that arrived in our bank account: recorded by one person, booked when another confirms it.

    It pays one payment, exactly; or, without one, it fits no invoice and is held for its payer (`ReceiptUse`, `OutgoingTransfer`).
    """

    class Status(models.TextChoices):
        RECORDED = "recorded"
        BOOKED = "booked"
        REJECTED = "rejected"

    payment = models.ForeignKey(Payment, models.PROTECT, null=True, related_name="receipts")
    payer = models.CharField(max_length=200, blank=True)  # as the statement names them, where it fits no invoice
    note = models.CharField(max_length=500, blank=True)  # what it may have been meant for
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    reference = models.CharField(max_length=120)  # the bank statement's own number of the transfer
    received_on = models.DateField()
    status = models.CharField(max_length=8, choices=Status, default=Status.RECORDED)
    recorded_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    recorded_at = models.DateTimeField()  # business time
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)

    objects = BankReceiptQuerySet.as_manager()

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["reference"], condition=~Q(status="rejected"), name="one_receipt_per_bank_transfer"
            ),
            models.UniqueConstraint(
                fields=["payment"], condition=~Q(status="rejected"), name="one_receipt_per_payment"
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="receipt_positive"),
            models.CheckConstraint(
                condition=Q(status="recorded", decided_by=None, decided_at=None)
                | (~Q(status="recorded") & Q(decided_by__isnull=False, decided_at__isnull=False)),
                name="decided_receipt_knows_by_whom",
            ),
            models.CheckConstraint(
                condition=~Q(status="booked") | ~Q(decided_by=F("recorded_by")), name="receipt_needs_a_second_person"
            ),
            models.CheckConstraint(
                condition=Q(payment__isnull=False, payer="") | (Q(payment=None) & ~Q(payer="")),
                name="receipt_has_payment_or_payer",
            ),
        ]

    def __str__(self) -> str:
        return f"Transfer {self.reference} of {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)

    @property
    def left(self) -> Money:
        """Of money that fits no invoice: what neither pays one nor goes back, proposals included."""
        if self.payment_id is not None or self.status != self.Status.BOOKED:
            return Money(0, self.currency)
        used = sum(use.amount_micros for use in self.uses.all() if use.application.status != "rejected")
        gone = sum(one.amount_micros for one in self.returns.all() if one.status in ("recorded", "booked"))
        return Money(self.amount_micros - used - gone, self.currency)


class StripeEvent(Job):
    """A verified event, stored raw before anything is done with it, applied once."""

    class Endpoint(models.TextChoices):
        PLATFORM = "platform"
        CONNECT = "connect"

    task_name: ClassVar[str] = "payouts.tasks.apply_stripe_event"

    event_id = models.CharField(max_length=255, unique=True)
    endpoint = models.CharField(max_length=8, choices=Endpoint)
    type = models.CharField(max_length=100)
    account = models.CharField(max_length=64, blank=True)  # the connected account it speaks of
    payload = models.TextField()
    received_at = models.DateTimeField(default=timezone.now)

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"{self.type} {self.event_id}"

    @classmethod
    def unsettled(cls) -> "models.QuerySet[StripeEvent]":
        """Those that failed and that nobody has settled otherwise."""
        settled = EventSettlement.objects.filter(
            event=models.OuterRef("pk"), act=EventSettlement.Act.EXPLAINED, status=EventSettlement.Status.CONFIRMED
        )
        return cls.objects.filter(~models.Exists(settled), status=cls.Status.FAILED)


class EventSettlement(models.Model):
    """How one of the staff wants a failed event to be settled; done when another one has confirmed it."""

    class Act(models.TextChoices):
        EXPLAINED = "explained", "settled otherwise"  # the reason says how
        REFUND = "refund", "surplus charge, to be refunded"

    class Status(models.TextChoices):
        PROPOSED = "proposed"
        CONFIRMED = "confirmed"
        REJECTED = "rejected"

    event = models.ForeignKey(StripeEvent, models.PROTECT, related_name="settlements")
    object_id = models.CharField(max_length=255)  # what the event is about, at Stripe
    act = models.CharField(max_length=9, choices=Act)
    reason = models.TextField()
    charge_id = models.CharField(max_length=255, blank=True)  # the surplus one, and what of it is left
    amount_micros = models.BigIntegerField(null=True)
    currency = models.CharField(max_length=3, blank=True)
    status = models.CharField(max_length=9, choices=Status, default=Status.PROPOSED)
    proposed_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    proposed_at = models.DateTimeField(default=timezone.now)
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)
    note = models.TextField(blank=True)  # of whoever decided

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["event"], condition=Q(status="proposed"), name="one_proposed_settlement_per_event"
            ),
            models.CheckConstraint(
                condition=Q(status="proposed", decided_by=None, decided_at=None)
                | (~Q(status="proposed") & Q(decided_by__isnull=False, decided_at__isnull=False)),
                name="decided_settlement_knows_by_whom",
            ),
            models.CheckConstraint(
                condition=~Q(status="confirmed") | ~Q(decided_by=F("proposed_by")),
                name="settlement_needs_a_second_person",
            ),
            models.CheckConstraint(
                condition=Q(act="explained", charge_id="", amount_micros=None)
                | (Q(act="refund", amount_micros__gt=0) & ~Q(charge_id="")),
                name="surplus_settlement_names_its_charge",
            ),
        ]

    def __str__(self) -> str:
        return f"Settlement {self.pk} of {self.event}"

    @property
    def amount(self) -> Money | None:
        return None if self.amount_micros is None else Money(self.amount_micros, self.currency)


class SurplusCharge(models.Model):
    """A charge that succeeded and is for nothing that we sell: a second payment of one order, one of a cancelled order.

    Its money lies in `surplus` until it is refunded; its balance transaction is a `Movement`.
    """

    charge_id = models.CharField(max_length=255, unique=True)
    payment = models.ForeignKey(Payment, models.PROTECT, null=True, related_name="surplus_charges")  # that it names
    event = models.ForeignKey(StripeEvent, models.PROTECT, related_name="surplus_charges")  # that told of it
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    booked_at = models.DateTimeField()  # business time

    class Meta:
        ordering = ["-pk"]
        constraints = [models.CheckConstraint(condition=Q(amount_micros__gt=0), name="surplus_charge_positive")]

    def __str__(self) -> str:
        return f"Surplus charge {self.charge_id}: {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class EventSweep(models.Model):
    """Up to when an account's list of events at Stripe was read, to find what no webhook brought."""

    account = models.CharField(max_length=64, unique=True)  # a connected one; empty: our own
    swept_until = models.DateTimeField()  # Stripe's time of the newest event that was listed
    swept_at = models.DateTimeField()  # wall time

    def __str__(self) -> str:
        return f"{self.account or 'our own'} until {self.swept_until}"
