"""Closed months, entries made by hand, and what was looked at: evidence, append-only but for the jobs.

    ClosedPeriod      a month into which nothing is posted any more; ClosedBalance keeps its trial balance
    ManualEntry       proposed by one of the staff with its legs; ManualDecision: another one approves or rejects it
    BalanceCheck      snapshots of balances, summed up again from the postings

PostgreSQL itself refuses an entry in a closed month, a decision by whoever proposed, and a manual entry that was not
approved (migration `0017_closing_rules`).
"""

from datetime import UTC, date, timedelta
from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from marketplace.money import Money
from payouts.models.ledger import JournalEntry


class ClosedPeriod(models.Model):
    """One month of the books, closed for good; months are closed one after the other."""

    starts_on = models.DateField(unique=True)  # the first of the month, UTC
    ends_at = models.DateTimeField(unique=True)  # the first moment that is not in it
    closed_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")  # null: by the job
    closed_at = models.DateTimeField()  # business time
    note = models.TextField(blank=True)  # why it was closed although something was open
    #: Everything that is booked at its end or later has a posting's id above this (given by the database; null: closed before it was).
    postings_after = models.BigIntegerField(null=True)

    class Meta:
        ordering = ["-starts_on"]

    def __str__(self) -> str:
        return f"{self.starts_on:%Y-%m}"

    @property
    def last_day(self) -> date:
        return (self.ends_at - timedelta(days=1)).astimezone(UTC).date()


class ClosedBalance(models.Model):
    """The trial balance at the end of a closed month: one purpose of the chart, everything booked before `ends_at`."""

    period = models.ForeignKey(ClosedPeriod, models.PROTECT, related_name="balances")
    purpose = models.CharField(max_length=40)  # "payable", "cash:pending"
    currency = models.CharField(max_length=3)
    debit_micros = models.DecimalField(max_digits=30, decimal_places=0)  # sums of a million payees may pass a bigint
    credit_micros = models.DecimalField(max_digits=30, decimal_places=0)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["period", "purpose", "currency"], name="one_closed_balance_per_purpose"),
            models.CheckConstraint(condition=Q(debit_micros__gte=0, credit_micros__gte=0), name="closed_balance_sides"),
        ]

    def __str__(self) -> str:
        return f"{self.purpose}:{self.currency} at the end of {self.period}"


class ManualEntry(models.Model):
    """An entry that no service makes: a fee of Stripe's that belongs to no charge, a top-up, a withdrawal of own revenue."""

    key = models.CharField(max_length=80, unique=True)  # of the request, so that a second click proposes nothing more
    currency = models.CharField(max_length=3)
    booked_at = models.DateTimeField()  # the business time that the entry will have
    reason = models.TextField()
    # The one of Stripe's balance transactions that it books, wherever it moves cash at Stripe.
    balance_transaction_id = models.CharField(max_length=255, unique=True, null=True)
    proposed_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    proposed_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"Manual entry {self.pk}"

    @property
    def state(self) -> str:
        """awaiting, approved or rejected."""
        decision = getattr(self, "decision", None)
        if decision is None:
            return "awaiting"
        return "approved" if decision.is_approved else "rejected"


class ManualLeg(models.Model):
    """What a manual entry will post to one account: debits positive."""

    manual = models.ForeignKey(ManualEntry, models.PROTECT, related_name="legs")
    account_code = models.CharField(max_length=80)
    amount_micros = models.BigIntegerField()

    class Meta:
        ordering = ["pk"]
        constraints = [
            models.UniqueConstraint(fields=["manual", "account_code"], name="one_manual_leg_per_account"),
            models.CheckConstraint(condition=~Q(amount_micros=0), name="manual_leg_not_zero"),
        ]

    def __str__(self) -> str:
        return f"{self.account_code}: {self.amount_micros}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.account_code.rpartition(":")[2])


class ManualDecision(models.Model):
    """What another one of the staff said to a proposal; approved means posted, in the same transaction."""

    manual = models.OneToOneField(ManualEntry, models.PROTECT, related_name="decision")
    is_approved = models.BooleanField()
    entry = models.OneToOneField(JournalEntry, models.PROTECT, null=True, related_name="manual_decision")
    note = models.TextField(blank=True)
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    decided_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(is_approved=True, entry__isnull=False) | Q(is_approved=False, entry=None),
                name="approved_manual_entry_is_posted",
            )
        ]

    def __str__(self) -> str:
        return f"{self.manual}: {'approved' if self.is_approved else 'rejected'}"


class BalanceCheck(models.Model):
    """One look at kept balances: so many accounts' latest snapshots, each summed up again from its postings."""

    KEPT_FINDINGS: ClassVar[int] = 20

    checked_at = models.DateTimeField(default=timezone.now, db_index=True)
    after_account = models.BigIntegerField()  # where the look began: the accounts after this one
    up_to_account = models.BigIntegerField()  # where it ended; 0: it came to the end, the next begins anew
    n_checked = models.PositiveIntegerField()
    n_wrong = models.PositiveIntegerField()
    findings = models.JSONField(default=list)  # the first few, as sentences

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"Balances checked at {self.checked_at:%Y-%m-%d %H:%M}: {self.n_wrong} wrong"
