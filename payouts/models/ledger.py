"""Double entry, append-only, integer micros, one currency per entry; what must not be is refused by PostgreSQL itself.

The triggers are plain SQL in migration `0002_ledger_rules`: an entry's legs must be as many as it declares (two or more, at most
1,000), sum to zero and share its currency, checked once per entry at commit; a leg must belong to an entry of its own
transaction; UPDATE, DELETE and TRUNCATE are refused.
"""

from django.db import models
from django.db.models import Q
from django.utils import timezone

MAX_LEGS = 1_000


class Account(models.Model):
    """A named heap of money; `payouts.chart` gives the codes and says what each is for."""

    class Kind(models.TextChoices):
        ASSET = "asset"
        LIABILITY = "liability"
        REVENUE = "revenue"
        EXPENSE = "expense"
        EQUITY = "equity"

    code = models.CharField(max_length=80, unique=True)  # "payable:17:USD"
    kind = models.CharField(max_length=9, choices=Kind)
    currency = models.CharField(max_length=3)
    # No foreign key in the database: looked up for each statement's rows at once (migration `0021_lines_without_row_checks`).
    party = models.ForeignKey(
        "marketplace.Party", models.PROTECT, null=True, related_name="accounts", db_constraint=False
    )
    created_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return self.code


class JournalEntry(models.Model):
    """One movement of money, made whole in one transaction and never changed; the key makes it happen once."""

    class Kind(models.TextChoices):
        SALE = "sale"
        UPFRONT = "upfront"
        RELEASE = "release"
        ROYALTY = "royalty"
        ROYALTY_SPLIT = "royalty_split"
        SETTLE = "settle"  # pending funds became available
        PAYOUT_INTENT = "payout_intent"
        PAYOUT_SENT = "payout_sent"
        PAYOUT_REVERSAL = "payout_reversal"
        REVERSAL = "reversal"
        REFUND_INTENT = "refund_intent"
        REFUND_SENT = "refund_sent"
        REFUND_FAILED = "refund_failed"  # the card's bank sent it back: cash again
        REFUND_UNDONE = "refund_undone"  # refused or failed: the intent is reversed
        DISPUTE_FUNDS = "dispute_funds"  # Stripe withdrew or reinstated them
        DISPUTE_FREEZE = "dispute_freeze"
        DISPUTE_THAW = "dispute_thaw"
        DISPUTE_LOST = "dispute_lost"
        TRANSFER_BACK = "transfer_back"  # out of the payee's balance at Stripe
        RECOVERY = "recovery"  # what a party owes, netted with what it is owed
        WRITE_OFF = "write_off"
        CORRECTION = "correction"  # of a division: from those who had too much to those who had too little
        MANUAL = "manual"  # proposed by one of the staff, approved by another
        RAIL_INTENT = "rail_intent"  # promised over another rail than Stripe
        RAIL_SENT = "rail_sent"
        RAIL_REVERSAL = "rail_reversal"

    key = models.CharField(max_length=160, unique=True)
    kind = models.CharField(max_length=16, choices=Kind)
    currency = models.CharField(max_length=3)
    n_legs = models.PositiveIntegerField()
    booked_at = models.DateTimeField()  # business time
    created_at = models.DateTimeField(default=timezone.now)
    reverses = models.OneToOneField("self", models.PROTECT, null=True, related_name="reversed_by")

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(n_legs__gte=2, n_legs__lte=MAX_LEGS), name="entry_has_2_to_1000_legs")
        ]
        indexes = [models.Index(fields=["booked_at"], name="entry_booked_at")]

    def __str__(self) -> str:
        return self.key


class Posting(models.Model):
    """One leg of a journal entry: debits positive, credits negative; the legs sum to zero."""

    # No foreign keys in the database and no indexes of their own: both are looked up for each statement's legs at once (migration
    # `0013_postings_without_row_checks`), entries and accounts are never deleted, and the indexes below begin with them.
    entry = models.ForeignKey(
        JournalEntry, models.PROTECT, related_name="postings", db_constraint=False, db_index=False
    )
    leg = models.PositiveIntegerField()  # 0 … n_legs − 1, so that no leg can join a checked entry
    account = models.ForeignKey(Account, models.PROTECT, related_name="postings", db_constraint=False, db_index=False)
    amount_micros = models.BigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["entry", "account"], name="one_posting_per_account"),
            models.UniqueConstraint(fields=["entry", "leg"], name="one_posting_per_leg"),
            models.CheckConstraint(condition=~Q(amount_micros=0), name="posting_not_zero"),
        ]
        indexes = [models.Index(fields=["account", "id"], include=["amount_micros"], name="postings_of_an_account")]

    def __str__(self) -> str:
        return f"{self.account}: {self.amount_micros}"


class BalanceSnapshot(models.Model):
    """The sum of an account's postings up to one of them, so that a balance adds up only what came later. Append-only."""

    account = models.ForeignKey(Account, models.PROTECT, related_name="snapshots")
    up_to = (
        models.BigIntegerField()
    )  # id of a posting, the last of those that every account's sum of this round includes
    balance_micros = models.BigIntegerField()
    taken_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["account", "up_to"], name="one_snapshot_per_account_and_posting")
        ]

    def __str__(self) -> str:
        return f"{self.account} up to {self.up_to}: {self.balance_micros}"
