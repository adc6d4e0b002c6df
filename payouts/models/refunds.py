"""Money that goes back: refunds, disputes, and what each payee gives of it.

    Refund, Dispute      what the buyer's bank is given, or takes: a state each, and the call at Stripe that goes with it
    Clawback             the amount of one payment that is taken back from where it lies, by line, pool and payee (evidence)
    ClawbackUndo         that it was given back: the refund failed, the dispute was won (evidence)
    TransferReversal     a courtesy: what a payee owes, fetched from their balance at Stripe
    WriteOff             what a payee owes and nobody expects any more (evidence)
    Movement             each of Stripe's balance transactions that these caused

PostgreSQL itself refuses a refund beyond what was paid, a clawback beyond a line's price, a pool's rest or a payee's line
(migration `0005_refund_rules`).
"""

from typing import TYPE_CHECKING, ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.money import Money
from payouts.models.payments import Payment

if TYPE_CHECKING:
    from payouts.models.bank import OutgoingTransfer


class Refund(Job):
    """Part or all of one payment, or of a charge that is for nothing, given back the way it was paid: intended → sent, or refused and booked back.

    The job's `status` says how the work stands, `state` how the money does. What was paid by bank transfer is no job: a person
    sends it (`OutgoingTransfer`).
    """

    class State(models.TextChoices):
        INTENDED = "intended"  # booked to refunding; Stripe may or may not know
        PENDING = "pending"  # taken from our balance; the bank has yet to accept
        SENT = "sent"
        REFUSED = "refused"  # Stripe definitely refused; booked back
        FAILED = "failed"  # the card's bank sent it back; booked back

    class Reason(models.TextChoices):
        OF_RIGHT = "of_right", "not downloaded yet"
        FAULTY_DATA = "faulty_data", "the data is not what was sold"
        DUPLICATE = "duplicate", "bought twice"
        FRAUD = "fraud", "the card was stolen"
        GOODWILL = "goodwill", "goodwill"
        CORRECTED = "corrected", "the licensee corrected its revenue report"
        SURPLUS = "surplus", "paid for nothing that was asked for"
        AT_STRIPE = "at_stripe", "refunded in Stripe's dashboard"

    #: States in which the buyer has the money, or may have it.
    STANDING: ClassVar[list[str]] = ["intended", "pending", "sent"]
    task_name: ClassVar[str] = "payouts.tasks.execute_refund"

    payment = models.ForeignKey("payouts.Payment", models.PROTECT, null=True, related_name="refunds")
    surplus = models.ForeignKey("payouts.SurplusCharge", models.PROTECT, null=True, related_name="refunds")
    amount_micros = models.BigIntegerField()  # whole minor units
    currency = models.CharField(max_length=3)
    method = models.CharField(max_length=6, choices=Payment.Method, default=Payment.Method.STRIPE)  # its payment's
    reason = models.CharField(max_length=11, choices=Reason)
    note = models.TextField(blank=True)  # why, in words; staff must give them
    requested_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    key = models.CharField(max_length=120)  # of the request
    line = models.BigIntegerField(null=True)  # the order or invoice line asked for; none: all of them in proportion
    state = models.CharField(max_length=8, choices=State, default=State.INTENDED)
    stripe_attempt = models.PositiveIntegerField(default=1)  # in the idempotency key `refund:{id}:{attempt}`
    first_tried_at = models.DateTimeField(null=True)  # wall time; Stripe forgets a key after a day
    refund_id = models.CharField(max_length=255, unique=True, null=True)
    refusal_code = models.CharField(max_length=60, blank=True)
    refusal_message = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    intended_at = models.DateTimeField()  # business time
    made_at = models.DateTimeField(null=True)  # business time, at Stripe

    class Meta(Job.Meta):
        ordering = ["-pk"]
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["payment", "key"], name="one_refund_per_payment_and_key"),
            models.UniqueConstraint(fields=["surplus", "key"], name="one_refund_per_surplus_charge_and_key"),
            models.CheckConstraint(
                condition=Q(payment__isnull=False, surplus=None) | Q(payment=None, surplus__isnull=False),
                name="refund_is_of_one_charge",
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="refund_positive"),
            models.CheckConstraint(
                condition=Q(state__in=["intended", "refused"])
                | Q(method="stripe", refund_id__isnull=False)
                | Q(method="bank", refund_id=None),
                name="sent_refund_has_its_id",
            ),
        ]

    def __str__(self) -> str:
        return f"Refund {self.pk}: {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)

    @property
    def charge_id(self) -> str:
        charge: str | None = self.payment.charge_id if self.payment is not None else self.surplus.charge_id  # type: ignore[union-attr]
        assert charge is not None  # a paid payment has its charge (a database check)
        return charge

    @property
    def is_by_bank(self) -> bool:
        return self.method == Payment.Method.BANK

    @property
    def transfer(self) -> "OutgoingTransfer | None":
        """Of one by bank: the transfer that carries it, as recorded, booked or come back."""
        return next((one for one in self.transfers.all() if one.status != "rejected"), None)

    @property
    def sentence(self) -> str:
        """How it stands, as the buyer is told."""
        if self.state == self.State.REFUSED:
            return f"Nothing was sent: {self.refusal_message}"
        if self.is_by_bank:
            return self._by_bank()
        match self.State(self.state):
            case self.State.INTENDED:
                return "On its way to your card; Stripe has not answered yet."
            case self.State.PENDING:
                return "On its way to your card; its bank has yet to accept it."
            case self.State.FAILED:
                return "Your card’s bank sent it back; write to us for another way."
        return "It went back to your card; banks take five to ten days to show it."

    def _by_bank(self) -> str:
        transfer = self.transfer
        if transfer is None:
            return (
                "It goes back by bank transfer to the account that paid. Our staff send it by hand; its reference stands here "
                "once it has left."
            )
        day = f"{transfer.sent_on:%-d %B %Y}"
        if transfer.status == transfer.Status.RECORDED:
            return (
                f"Transferred on {day}; a second person looks for it on our bank’s statement before it counts as sent."
            )
        if transfer.status == transfer.Status.RETURNED:
            return (
                f"Your bank sent the transfer of {day} back ({transfer.return_note}). Write to us with the account that it "
                "should go to."
            )
        return f"Sent by bank transfer on {day}, reference {transfer.reference}."


class Dispute(models.Model):
    """A cardholder's complaint about one payment, as Stripe last described it."""

    #: Stripe's own words, by whether anything is still open.
    OPEN: ClassVar[list[str]] = [
        "needs_response",
        "under_review",
        "warning_needs_response",
        "warning_under_review",
    ]
    TAKES_EVIDENCE: ClassVar[list[str]] = ["needs_response", "warning_needs_response"]

    dispute_id = models.CharField(max_length=255, unique=True)
    payment = models.ForeignKey("payouts.Payment", models.PROTECT, related_name="disputes")
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    reason = models.CharField(max_length=60)
    status = models.CharField(max_length=22)  # Stripe's
    opened_at = models.DateTimeField()
    evidence_due_at = models.DateTimeField(null=True)
    closed_at = models.DateTimeField(null=True)  # business time
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]
        constraints = [models.CheckConstraint(condition=Q(amount_micros__gt=0), name="dispute_positive")]

    def __str__(self) -> str:
        return f"Dispute {self.pk}: {self.amount}, {self.status}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)

    @property
    def is_open(self) -> bool:
        return self.status in self.OPEN

    @property
    def is_inquiry(self) -> bool:
        """The bank only asks; no money was taken."""
        return self.status.startswith("warning_")

    @property
    def takes_evidence(self) -> bool:
        return self.status in self.TAKES_EVIDENCE

    @property
    def answer(self) -> "DisputeAnswer | None":
        """The last one given, taken or refused."""
        return max(self.answers.all(), key=lambda answer: answer.pk, default=None)


class DisputeAnswer(Job):
    """What staff answered the bank: the evidence, or that we give in. Another one may follow only what Stripe refused."""

    task_name: ClassVar[str] = "payouts.tasks.send_dispute_answer"

    dispute = models.ForeignKey(Dispute, models.PROTECT, related_name="answers")
    gives_in = models.BooleanField(default=False)
    evidence = models.JSONField(default=dict)  # Stripe's field → text
    given_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    given_at = models.DateTimeField()  # business time

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(
                fields=["dispute"], condition=~Q(status="failed"), name="one_answer_unless_it_failed"
            ),
        ]

    def __str__(self) -> str:
        return f"Answer to {self.dispute}"

    @property
    def was_refused(self) -> bool:
        """Stripe did not take it; what failed otherwise is tried again."""
        return self.status == self.Status.FAILED and self.error_code not in self.reopened_codes


class Clawback(models.Model):
    """An amount of one payment, taken back from where it lies. Stands until its undo."""

    class Kind(models.TextChoices):
        REFUND = "refund"
        FREEZE = "freeze"  # while a dispute is open: the unreleased pool and what was not sent yet
        DISPUTE = "dispute"  # a lost one
        CORRECTION = "correction"  # of a division: what some payees lose to others; nothing goes back to the buyer

    key = models.CharField(max_length=60, unique=True)  # "refund:7", "freeze:3", "dispute:3"
    kind = models.CharField(max_length=10, choices=Kind)
    payment = models.ForeignKey("payouts.Payment", models.PROTECT, related_name="clawbacks")
    refund = models.OneToOneField(Refund, models.PROTECT, null=True, related_name="clawback")
    dispute = models.ForeignKey(Dispute, models.PROTECT, null=True, related_name="clawbacks")
    correction = models.OneToOneField("payouts.DivisionCorrection", models.PROTECT, null=True, related_name="clawback")
    amount_micros = models.BigIntegerField()  # of the lines
    loss_micros = models.BigIntegerField(default=0)  # beyond them: the bank took what had been given back before
    currency = models.CharField(max_length=3)
    taken_at = models.DateTimeField()  # business time

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(kind="refund", refund__isnull=False, dispute=None, correction=None)
                | Q(kind__in=["freeze", "dispute"], refund=None, dispute__isnull=False, correction=None)
                | Q(kind="correction", refund=None, dispute=None, correction__isnull=False),
                name="clawback_has_its_cause",
            ),
            models.CheckConstraint(condition=Q(amount_micros__gte=0, loss_micros__gte=0), name="clawback_not_negative"),
        ]

    def __str__(self) -> str:
        return self.key


class ClawbackUndo(models.Model):
    """The clawback was given back: what it took lies where it lay."""

    clawback = models.OneToOneField(Clawback, models.PROTECT, related_name="undo")
    undone_at = models.DateTimeField()  # business time

    def __str__(self) -> str:
        return f"Undo of {self.clawback}"


class ClawbackLine(models.Model):
    """One order or invoice line's part: amount = its tax + the platform's fee + of its pool + of its payees (the reclaims)."""

    clawback = models.ForeignKey(Clawback, models.PROTECT, related_name="lines")
    order_line = models.ForeignKey("marketplace.OrderLine", models.PROTECT, null=True, related_name="clawback_lines")
    invoice_line = models.ForeignKey(
        "payouts.RoyaltyInvoiceLine", models.PROTECT, null=True, related_name="clawback_lines"
    )
    amount_micros = models.BigIntegerField()
    fee_micros = models.BigIntegerField()
    pool_micros = models.BigIntegerField()
    tax_micros = models.BigIntegerField(default=0)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(order_line__isnull=False, invoice_line__isnull=True)
                | Q(order_line__isnull=True, invoice_line__isnull=False),
                name="clawback_line_is_of_one_thing",
            ),
            models.CheckConstraint(
                condition=Q(fee_micros__gte=0, pool_micros__gte=0, tax_micros__gte=0, amount_micros__gt=0)
                & Q(amount_micros__gte=models.F("fee_micros") + models.F("pool_micros") + models.F("tax_micros")),
                name="clawback_line_adds_up",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.amount_micros} of {self.clawback}"


class Reclaim(models.Model):
    """What one payee gives back of one line of one division."""

    clawback_line = models.ForeignKey(ClawbackLine, models.PROTECT, related_name="reclaims")
    division_line = models.ForeignKey("payouts.DivisionLine", models.PROTECT, related_name="reclaims")
    amount_micros = models.BigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["clawback_line", "division_line"], name="one_reclaim_per_line"),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="reclaim_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.amount_micros} of {self.division_line}"


class TransferReversal(Job):
    """What a payee owes, asked back from their balance at Stripe: intended → sent, or refused, which changes nothing."""

    class State(models.TextChoices):
        INTENDED = "intended"
        SENT = "sent"
        REFUSED = "refused"

    task_name: ClassVar[str] = "payouts.tasks.execute_reversal"

    payout = models.ForeignKey("payouts.Payout", models.PROTECT, related_name="reversals")
    amount_micros = models.BigIntegerField()  # whole minor units
    currency = models.CharField(max_length=3)
    requested_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    note = models.TextField(blank=True)
    state = models.CharField(max_length=8, choices=State, default=State.INTENDED)
    stripe_attempt = models.PositiveIntegerField(default=1)  # in the idempotency key `reversal:{id}:{attempt}`
    first_tried_at = models.DateTimeField(null=True)  # wall time
    reversal_id = models.CharField(max_length=255, unique=True, null=True)
    refusal_code = models.CharField(max_length=60, blank=True)
    refusal_message = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    intended_at = models.DateTimeField()  # business time
    made_at = models.DateTimeField(null=True)  # business time, at Stripe

    class Meta(Job.Meta):
        ordering = ["-pk"]
        constraints = [
            *Job.Meta.constraints,
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="reversal_positive"),
            models.CheckConstraint(
                condition=Q(state__in=["intended", "refused"]) | Q(reversal_id__isnull=False),
                name="sent_reversal_has_its_id",
            ),
        ]

    def __str__(self) -> str:
        return f"Reversal {self.pk}: {self.amount} of {self.payout}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class WriteOff(models.Model):
    """What a party owed and the platform now bears, with who decided it and why; below zero: what it need not bear after all."""

    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="write_offs")
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    reason = models.TextField()
    returned = models.ForeignKey(Clawback, models.PROTECT, null=True, related_name="write_offs_undone")  # its cause
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField()  # business time

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(amount_micros__gt=0, returned=None) | Q(amount_micros__lt=0, returned__isnull=False),
                name="write_off_positive_or_undone",
            )
        ]

    def __str__(self) -> str:
        return f"Write-off {self.pk}"


class Movement(models.Model):
    """One of Stripe's balance transactions that a refund, a dispute, a reversal or a surplus charge caused."""

    class Kind(models.TextChoices):
        REFUND = "refund"
        REFUND_FAILURE = "refund_failure"
        DISPUTE = "dispute"  # withdrawn or reinstated
        REVERSAL = "reversal"
        SURPLUS = "surplus"  # a charge that is for nothing

    kind = models.CharField(max_length=14, choices=Kind)
    balance_transaction_id = models.CharField(max_length=255, unique=True)
    refund = models.ForeignKey(Refund, models.PROTECT, null=True, related_name="movements")
    dispute = models.ForeignKey(Dispute, models.PROTECT, null=True, related_name="movements")
    reversal = models.ForeignKey(TransferReversal, models.PROTECT, null=True, related_name="movements")
    surplus = models.ForeignKey("payouts.SurplusCharge", models.PROTECT, null=True, related_name="movements")
    amount_micros = models.BigIntegerField()  # signed, as Stripe says it
    fee_micros = models.BigIntegerField()  # signed: what Stripe keeps on top
    currency = models.CharField(max_length=3)
    available_on = models.DateTimeField()
    is_booked_available = models.BooleanField()  # into cash:available at once, not by way of cash:pending
    booked_at = models.DateTimeField()  # business time
    settled_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(
                    kind__in=["refund", "refund_failure"],
                    refund__isnull=False,
                    dispute=None,
                    reversal=None,
                    surplus=None,
                )
                | Q(kind="dispute", refund=None, dispute__isnull=False, reversal=None, surplus=None)
                | Q(kind="reversal", refund=None, dispute=None, reversal__isnull=False, surplus=None)
                | Q(kind="surplus", refund=None, dispute=None, reversal=None, surplus__isnull=False),
                name="movement_has_its_cause",
            ),
            models.CheckConstraint(condition=~Q(amount_micros=0), name="movement_not_zero"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.balance_transaction_id}"

    @property
    def net_micros(self) -> int:
        return self.amount_micros - self.fee_micros
