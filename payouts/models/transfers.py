"""Money that goes out: intent first (booked and committed), then the transfer at Stripe."""

from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.money import Money


class PayoutRun(Job):
    """Everything due in one currency at one business time, as one resumable job, or as one job per shard of it."""

    class State(models.TextChoices):
        PLANNING = "planning"  # what is due to whom is being written down
        AWAITING_APPROVAL = "awaiting_approval"  # above the limit: a second person must agree before anything is sent
        SENDING = "sending"
        PAUSED = "paused"  # by staff
        SHORT_OF_FUNDS = "short_of_funds"  # the rest goes on when funds become available, oldest due first
        REJECTED = "rejected"
        ENDED = "ended"

    task_name: ClassVar[str] = "payouts.tasks.execute_payout_run"
    #: Nothing more is intended while it is in one of these (PostgreSQL refuses it too).
    STOPPED: ClassVar[tuple[str, ...]] = (State.AWAITING_APPROVAL, State.PAUSED, State.REJECTED)

    currency = models.CharField(max_length=3)
    due_until = models.DateTimeField()  # business time
    key = models.CharField(max_length=120, unique=True)  # "run:USD:2026-12-31"
    state = models.CharField(max_length=17, choices=State, default=State.PLANNING)
    planned_at = models.DateTimeField(null=True)
    n_planned = models.PositiveIntegerField(default=0)
    planned_micros = models.BigIntegerField(default=0)
    skipped = models.JSONField(default=dict)  # {"below_minimum": {"n": 3, "micros": 120000}, "not_ready": …}
    funded_until = models.PositiveIntegerField(default=0)  # the funds that there are reach to this position
    started_by = models.ForeignKey(
        "marketplace.User", models.PROTECT, null=True, related_name="+"
    )  # null: the schedule
    approved_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    approved_at = models.DateTimeField(null=True)
    #: The limit that held when it was planned: above it, PostgreSQL lets nothing be sent that another person did not approve.
    approval_above_micros = models.BigIntegerField(null=True)
    paused_at = models.DateTimeField(null=True)  # wall time, of the last pause
    note = models.TextField(blank=True)  # why it was paused or rejected

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.CheckConstraint(
                condition=Q(approved_by=None) | Q(started_by=None) | ~Q(approved_by=F("started_by")),
                name="nobody_approves_their_own_run",
            ),
        ]

    def __str__(self) -> str:
        return self.key

    @property
    def planned(self) -> Money:
        return Money(self.planned_micros, self.currency)


class ApprovalLimit(models.Model):
    """Above it a payout run in the currency needs a second person; append-only, the latest counts.

    `migrate` writes it from `PAYOUT_RUN_APPROVAL_ABOVE`, as the owner of the tables: the application can read it, not raise it.
    """

    currency = models.CharField(
        max_length=3, blank=True, default=""
    )  # none: of every currency, as once there was one limit
    above_micros = models.BigIntegerField()
    set_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]
        constraints = [models.CheckConstraint(condition=Q(above_micros__gte=0), name="approval_limit_not_negative")]

    def __str__(self) -> str:
        return f"{self.above_micros} {self.currency} since {self.set_at:%Y-%m-%d}"

    @classmethod
    def of(cls, currency: str, *, using: str = "default") -> "ApprovalLimit | None":
        """The one that counts, as PostgreSQL chooses it (`payouts_approval_above`)."""
        return cls.objects.using(using).filter(currency__in=["", currency]).first()


class PayoutShard(Job):
    """About a minute of a large run's work: the planned payouts from one position to another."""

    task_name: ClassVar[str] = "payouts.tasks.execute_payout_shard"

    run = models.ForeignKey(PayoutRun, models.PROTECT, related_name="shards")
    first = models.PositiveIntegerField()  # position
    end = models.PositiveIntegerField()  # the first position that is not its

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["run", "first"], name="one_shard_per_run_and_position"),
            models.CheckConstraint(condition=Q(end__gt=F("first")), name="shard_not_empty"),
        ]

    def __str__(self) -> str:
        return f"{self.run} from {self.first} to {self.end}"


class PlannedPayout(models.Model):
    """One payee of one run, in the order in which they are paid: whose money has waited longest comes first."""

    class Outcome(models.TextChoices):
        WAITING = "waiting"
        INTENDED = "intended"  # what became of it, the payout says
        NOT_DUE = "not_due"  # paid otherwise, or taken back, since it was planned
        NOT_READY = "not_ready"  # Stripe does not pay the payee any more
        BELOW_MINIMUM = "below_minimum"  # less was left than the payee wants at once

    run = models.ForeignKey(PayoutRun, models.PROTECT, related_name="planned_payouts")
    position = models.PositiveIntegerField()  # 0, 1, …
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="planned_payouts")
    amount_micros = models.BigIntegerField()  # at most this is paid: it is what was approved
    oldest_due_at = models.DateTimeField()
    outcome = models.CharField(max_length=13, choices=Outcome, default=Outcome.WAITING)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["run", "position"], name="one_planned_payout_per_position"),
            models.UniqueConstraint(fields=["run", "party"], name="one_planned_payout_per_party"),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="planned_payout_positive"),
        ]
        indexes = [models.Index(fields=["run", "outcome", "position"], name="planned_payouts_in_order")]

    def __str__(self) -> str:
        return f"{self.position} of {self.run}: {self.amount_micros}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.run.currency)


class PayoutMinimum(models.Model):
    """The least a payee wants to be sent at once in one currency; below it, money waits and adds up."""

    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="payout_minimums")
    currency = models.CharField(max_length=3)
    amount_micros = models.BigIntegerField()
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["party", "currency"], name="one_minimum_per_party_and_currency"),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="minimum_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.party}: at least {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class Payout(models.Model):
    """One payee's money in one run: intended → sent → paid (in the bank), or refused and booked back."""

    class Status(models.TextChoices):
        INTENDED = "intended"  # booked to in_transit; Stripe may or may not know
        SENT = "sent"  # Stripe made the transfer
        PAID = "paid"  # the connected account's payout reached the bank
        REFUSED = "refused"  # Stripe definitely refused; booked back to payable

    run = models.ForeignKey(PayoutRun, models.PROTECT, related_name="payouts")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="payouts")
    destination = models.CharField(max_length=64)  # the connected account
    amount_micros = models.BigIntegerField()  # whole minor units
    currency = models.CharField(max_length=3)
    status = models.CharField(max_length=8, choices=Status, default=Status.INTENDED)
    attempt = models.PositiveIntegerField(default=1)  # in the idempotency key `payout:{id}:{attempt}`
    first_tried_at = models.DateTimeField(null=True)  # wall time; Stripe forgets a key after a day
    transfer_id = models.CharField(max_length=255, unique=True, null=True)
    bank_payout_id = models.CharField(max_length=255, blank=True)
    refusal_code = models.CharField(max_length=60, blank=True)
    refusal_message = models.TextField(blank=True)
    bank_failure_code = models.CharField(
        max_length=60, blank=True
    )  # Stripe's, of a bank that refused; the money is at Stripe
    bank_failed_at = models.DateTimeField(null=True)  # business time
    created_at = models.DateTimeField(default=timezone.now)
    intended_at = models.DateTimeField()  # business time
    sent_at = models.DateTimeField(null=True)
    paid_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["run", "party"], condition=~Q(status="refused"), name="one_payout_per_run_and_party"
            ),  # one that Stripe had no funds for is intended again when it has
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="payout_positive"),
            models.CheckConstraint(
                condition=Q(status__in=["intended", "refused"]) | Q(transfer_id__isnull=False),
                name="sent_payout_has_its_transfer",
            ),
        ]

    def __str__(self) -> str:
        return f"Payout {self.pk}: {self.amount} to {self.party}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)
