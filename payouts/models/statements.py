"""What a party is told of a closed month: issued once, numbered, never changed (append-only but for the jobs)."""

from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.money import Money
from payouts.models.closing import ClosedPeriod


class StatementRun(Job):
    """Every party's statement of one closed month, as one resumable job."""

    task_name: ClassVar[str] = "payouts.tasks.issue_statements"

    period = models.OneToOneField(ClosedPeriod, models.PROTECT, related_name="statement_run")

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"Statements of {self.period}"


class IssuedStatement(models.Model):
    """One party's statement of one closed month. Its lines are a file whose SHA-256 stands here, its totals are rows."""

    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="statements")
    period = models.ForeignKey(ClosedPeriod, models.PROTECT, related_name="statements")
    sequence = models.PositiveIntegerField()  # 1, 2, 3 … of this party, without a gap
    number = models.CharField(max_length=40, unique=True)  # "RS-17-0003"
    party_name = models.CharField(max_length=120)  # as it was when this was issued
    n_lines = models.PositiveBigIntegerField()
    format = models.PositiveSmallIntegerField(default=1)  # of `statements.FORMATS`: which columns the CSV has
    csv_sha256 = models.CharField(max_length=64)  # of the CSV, uncompressed
    csv_bytes = models.PositiveBigIntegerField()
    issued_at = models.DateTimeField()  # business time

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(fields=["party", "period"], name="one_statement_per_party_and_month"),
            models.UniqueConstraint(fields=["party", "sequence"], name="one_statement_per_party_and_sequence"),
            models.CheckConstraint(condition=Q(sequence__gt=0), name="statement_sequence_from_1"),
        ]

    def __str__(self) -> str:
        return self.number

    @property
    def shows_fees(self) -> bool:
        """The first format says nothing of what the buyer paid and the platform kept."""
        return self.format > 1

    @property
    def month(self) -> str:
        return f"{self.period.starts_on:%Y-%m}"


class StatementBalance(models.Model):
    """One currency of a statement: opening + earned + adjusted − paid out = closing."""

    statement = models.ForeignKey(IssuedStatement, models.PROTECT, related_name="balances")
    currency = models.CharField(max_length=3)
    opening_micros = models.BigIntegerField()
    earned_micros = models.BigIntegerField()
    adjusted_micros = models.BigIntegerField()
    paid_out_micros = models.BigIntegerField()
    closing_micros = models.BigIntegerField()

    class Meta:
        ordering = ["currency"]
        constraints = [
            models.UniqueConstraint(fields=["statement", "currency"], name="one_balance_per_statement_and_currency"),
            models.CheckConstraint(
                condition=Q(
                    closing_micros=F("opening_micros")
                    + F("earned_micros")
                    + F("adjusted_micros")
                    - F("paid_out_micros")
                ),
                name="statement_balance_adds_up",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.currency} of {self.statement}"

    @property
    def opening(self) -> Money:
        return Money(self.opening_micros, self.currency)

    @property
    def earned(self) -> Money:
        return Money(self.earned_micros, self.currency)

    @property
    def adjusted(self) -> Money:
        return Money(self.adjusted_micros, self.currency)

    @property
    def paid_out(self) -> Money:
        return Money(self.paid_out_micros, self.currency)

    @property
    def closing(self) -> Money:
        return Money(self.closing_micros, self.currency)


class StatementTotal(models.Model):
    """What a statement's lines come to, by source, dataset version, model and role."""

    statement = models.ForeignKey(IssuedStatement, models.PROTECT, related_name="totals")
    currency = models.CharField(max_length=3)
    source = models.CharField(max_length=40)
    dataset = models.TextField()
    version = models.PositiveIntegerField()
    model = models.TextField(blank=True)  # "" when by count
    role = models.CharField(max_length=13)
    n_lines = models.PositiveBigIntegerField()
    amount_micros = models.BigIntegerField()

    class Meta:
        ordering = ["currency", "-amount_micros", "pk"]

    def __str__(self) -> str:
        return f"{self.dataset} of {self.statement}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class StatementNotice(Job):
    """The mail that says a statement is there, to the party's owners; as a job, it goes out whatever dies."""

    task_name: ClassVar[str] = "payouts.tasks.send_statement_notice"

    statement = models.OneToOneField(IssuedStatement, models.PROTECT, related_name="notice")
    created_at = models.DateTimeField(default=timezone.now)

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"Notice of {self.statement}"
