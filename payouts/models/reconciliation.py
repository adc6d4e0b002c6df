"""Each look at Stripe's books beside ours, and each proof of our own, kept: what was compared and what differed."""

from typing import ClassVar

from django.db import models
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.money import Money


class ReconciliationRun(Job):
    """One comparison, both ways. As a job: staff ask for it on the page, a worker with the Stripe key does it.

    A full look reads all of Stripe's transactions. The others read what is newer than a clean look left open, since that one
    and the full look behind it have proved the rest.
    """

    task_name: ClassVar[str] = "payouts.tasks.execute_reconciliation"

    key = models.CharField(max_length=80, unique=True)  # "day:2026-03-01", or of the request
    requested_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    requested_at = models.DateTimeField(default=timezone.now)
    is_full = models.BooleanField(default=True)
    since = models.DateTimeField(
        null=True
    )  # by Stripe's clock: what it made earlier was proved before; null: all of it
    newest_at = models.DateTimeField(null=True)  # by Stripe's clock: when it made its newest
    last_entry_id = models.BigIntegerField(null=True)  # of the journal, when the look began
    covers_until = models.DateTimeField(null=True)  # business time when it began: a month that ended before is in it
    compared_until = models.DateTimeField(null=True)  # wall time: what was made later is the next look's
    last_transaction_id = models.CharField(max_length=255, blank=True)  # Stripe's newest, when the reading began
    n_transactions = models.PositiveBigIntegerField(default=0)
    n_on_their_way = models.PositiveIntegerField(default=0)  # at Stripe, and being booked: younger than a quarter hour
    n_differences = models.PositiveIntegerField(null=True)  # null: it has not ended
    cash = models.JSONField(default=list)  # per currency: ledger and Stripe, pending and available, micros

    class Meta(Job.Meta):
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"Reconciliation {self.key}"

    @property
    def agrees(self) -> bool:
        return self.status == self.Status.DONE and self.n_differences == 0


class ReconciliationDifference(models.Model):
    """One thing on which we and Stripe disagree, or that has waited too long; append-only."""

    run = models.ForeignKey(ReconciliationRun, models.PROTECT, related_name="differences")
    code = models.CharField(max_length=40)
    subject = models.CharField(max_length=255)  # what it is about, the same at every look: "txn_1", "payout:7", "USD"
    detail = models.TextField()
    cause = models.TextField()  # the likely one, and what to do
    happened_at = models.DateTimeField(null=True)  # at Stripe, or booked
    first_seen_at = models.DateTimeField()  # by the first of the looks in a row that named it
    amount_micros = models.BigIntegerField(null=True)
    currency = models.CharField(max_length=3, blank=True)

    class Meta:
        ordering = ["pk"]
        indexes = [models.Index(fields=["code", "subject"], name="difference_by_subject")]

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"

    @property
    def amount(self) -> Money | None:
        return None if self.amount_micros is None else Money(self.amount_micros, self.currency)


class BooksProof(Job):
    """Every invariant of the books, derived once more from the rows (`proofs.check_books`): each night, or asked for by staff."""

    task_name: ClassVar[str] = "payouts.tasks.execute_proof"

    key = models.CharField(max_length=80, unique=True)  # "day:2026-03-01", or of the request
    requested_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    requested_at = models.DateTimeField(default=timezone.now)
    covers_until = models.DateTimeField(null=True)  # business time when it began: a month that ended before is in it
    n_findings = models.PositiveBigIntegerField(null=True)  # null: it has not ended
    checked = models.JSONField(default=dict)  # {"entries": 812, "postings": 2301, …}

    class Meta(Job.Meta):
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"Proof {self.key}"


class ProofFinding(models.Model):
    """One thing in the books that is not as it must be; append-only. The first ones of a proof are kept, all are counted."""

    proof = models.ForeignKey(BooksProof, models.PROTECT, related_name="findings")
    code = models.CharField(max_length=60)
    detail = models.TextField()

    class Meta:
        ordering = ["pk"]

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"
