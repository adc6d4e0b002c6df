"""A party's month, per currency, so that whoever reads it can recompute it.

opening + earned + adjusted − paid out = closing
"""

import csv
import io
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db.models import Sum

from attribution.models import Share
from marketplace.errors import InvalidInput
from marketplace.models import Party
from marketplace.money import Money
from payouts.models import Division, DivisionLine, JournalEntry, Posting

#: What a spreadsheet would take for a formula, and the blanks that it skips before one.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
COLUMNS = [
    "date",
    "what",
    "dataset",
    "version",
    "model",
    "result",
    "role",
    "records",
    "weight",
    "weight_total",
    "share_low",
    "share_high",
    "divided",
    "pot",
    "earned",
    "taken_back",
    "paid_out",
    "balance",
    "currency",
    "due",
]
SOURCES = {
    Division.Source.UPFRONT: "upfront share of a sale",
    Division.Source.POOL: "royalty pool of a sale",
    Division.Source.ROYALTY: "royalty on a model's revenue",
}


@dataclass(frozen=True)
class StatementLine:
    """What one division gave the party in one role.

    `amount` is `pot · weight / weight_total`, rounded to a micro: down, or up where the remainder was among the largest.
    """

    division_id: int
    divided_at: datetime
    source: str
    dataset: str
    version: int
    model: str  # "" when by count
    result: str  # "" when by count
    role: str
    n_records: int
    weight: int
    weight_total: int
    share_low: float | None  # 95 % interval of the raw share, when by a result that has one
    share_high: float | None
    divided: Money  # the whole amount, before it was split in two pots
    pot: Money
    amount: Money
    due_at: datetime

    @property
    def share(self) -> float:
        return self.weight / self.weight_total


@dataclass(frozen=True)
class StatementPayout:
    """One movement between the party and its bank: a payout promised (positive), or one booked back (negative)."""

    payout_id: int
    booked_at: datetime
    what: str
    amount: Money


@dataclass(frozen=True)
class StatementAdjustment:
    """What a refund, a dispute or a debt did to the balance; negative where it was taken back."""

    booked_at: datetime
    what: str
    amount: Money


@dataclass(frozen=True)
class CurrencyStatement:
    currency: str
    opening: Money
    lines: list[StatementLine]
    adjustments: list[StatementAdjustment]
    payouts: list[StatementPayout]
    closing: Money

    @property
    def earned(self) -> Money:
        return Money(sum(line.amount.micros for line in self.lines), self.currency)

    @property
    def paid_out(self) -> Money:
        return Money(sum(payout.amount.micros for payout in self.payouts), self.currency)

    @property
    def adjusted(self) -> Money:
        return Money(sum(adjustment.amount.micros for adjustment in self.adjustments), self.currency)

    @property
    def recomputes(self) -> bool:
        return self.opening + self.earned + self.adjusted - self.paid_out == self.closing


@dataclass(frozen=True)
class Statement:
    party: Party
    year: int
    month: int
    starts_at: datetime
    ends_at: datetime  # the first moment that is not in it
    currencies: list[CurrencyStatement]


def month_bounds(year: int, month: int) -> tuple[datetime, datetime]:
    """The month's first moment and the next one's, in UTC.

    Raises:
        InvalidInput: there is no such month.
    """
    if not (2000 <= year <= 9998 and 1 <= month <= 12):
        raise InvalidInput(f"{year}-{month:02} is no month; write it as 2026-03.", pointers={"/month": "no month"})
    after = (year, month + 1) if month < 12 else (year + 1, 1)
    return datetime(year, month, 1, tzinfo=UTC), datetime(*after, 1, tzinfo=UTC)


def statement(*, party: Party, year: int, month: int) -> Statement:
    """Everything that moved a party's balance in a month; balances are the ledger's, lines the divisions'.

    Raises:
        InvalidInput: there is no such month.
    """
    starts_at, ends_at = month_bounds(year, month)
    opening = _payable(party, before=starts_at)
    closing = _payable(party, before=ends_at)
    lines: dict[str, list[StatementLine]] = defaultdict(list)
    for line in _lines(party, starts_at, ends_at):
        lines[line.amount.currency].append(line)
    adjustments: dict[str, list[StatementAdjustment]] = defaultdict(list)
    for adjustment in _adjustments(party, starts_at, ends_at):
        adjustments[adjustment.amount.currency].append(adjustment)
    payouts: dict[str, list[StatementPayout]] = defaultdict(list)
    for payout in _payouts(party, starts_at, ends_at):
        payouts[payout.amount.currency].append(payout)
    return Statement(
        party=party,
        year=year,
        month=month,
        starts_at=starts_at,
        ends_at=ends_at,
        currencies=[
            CurrencyStatement(
                currency=currency,
                opening=Money(opening.get(currency, 0), currency),
                lines=lines[currency],
                adjustments=adjustments[currency],
                payouts=payouts[currency],
                closing=Money(closing.get(currency, 0), currency),
            )
            for currency in sorted({*opening, *closing, *lines, *adjustments, *payouts})
        ],
    )


def statement_csv(statement: Statement) -> str:
    """The statement as CSV, one row a movement, opening and closing included; texts cannot act as formulas."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for of in statement.currencies:
        writer.writerow(
            _row(date=statement.starts_at, what="opening balance", balance=_amount(of.opening), currency=of.currency)
        )
        for line in of.lines:
            writer.writerow(
                _row(
                    date=line.divided_at,
                    what=line.source,
                    dataset=_text(line.dataset),
                    version=line.version,
                    model=_text(line.model),
                    result=line.result,
                    role=line.role,
                    records=line.n_records,
                    weight=line.weight,
                    weight_total=line.weight_total,
                    share_low="" if line.share_low is None else f"{line.share_low:.6f}",
                    share_high="" if line.share_high is None else f"{line.share_high:.6f}",
                    divided=_amount(line.divided),
                    pot=_amount(line.pot),
                    earned=_amount(line.amount),
                    currency=of.currency,
                    due=line.due_at,
                )
            )
        for adjustment in of.adjustments:
            column = "earned" if adjustment.amount.micros > 0 else "taken_back"  # no cell is negative
            amount = _amount(adjustment.amount if adjustment.amount.micros > 0 else -adjustment.amount)
            writer.writerow(
                _row(date=adjustment.booked_at, what=adjustment.what, currency=of.currency, **{column: amount})
            )
        for payout in of.payouts:
            column = "paid_out" if payout.amount.micros > 0 else "earned"  # what came back is positive again
            amount = _amount(payout.amount if payout.amount.micros > 0 else -payout.amount)
            writer.writerow(_row(date=payout.booked_at, what=payout.what, currency=of.currency, **{column: amount}))
        writer.writerow(
            _row(date=statement.ends_at, what="closing balance", balance=_amount(of.closing), currency=of.currency)
        )
    return out.getvalue()


def _row(**cells: object) -> list[object]:
    return [
        f"{cell:%Y-%m-%dT%H:%M:%SZ}" if isinstance(cell, datetime) else cell
        for cell in (cells.get(name, "") for name in COLUMNS)
    ]


def _amount(amount: Money) -> str:
    return amount.amount_text(exact=True)


def _text(cell: str) -> str:
    return f"'{cell}" if cell.lstrip(" \n").startswith(FORMULA_STARTS) else cell


def _payable(party: Party, *, before: datetime) -> dict[str, int]:
    """What the ledger owed the party less what it owed the ledger, by currency."""
    sums = (
        Posting.objects.filter(account__party=party, entry__booked_at__lt=before)
        .values("account__currency")
        .annotate(sum=Sum("amount_micros"))
    )
    return {row["account__currency"]: -int(row["sum"]) for row in sums}


def _lines(party: Party, starts_at: datetime, ends_at: datetime) -> list[StatementLine]:
    found = (
        DivisionLine.objects.filter(party=party, division__divided_at__gte=starts_at, division__divided_at__lt=ends_at)
        .exclude(division__source=Division.Source.CORRECTION)  # an adjustment: no weight gives its amount
        .select_related("division__version__dataset", "division__result__model")
        .order_by("division__divided_at", "division", "role")
    )
    intervals = {
        (share.result_id, share.version_id, share.partition): (share.low, share.high)
        for share in Share.objects.filter(party=party, result__in={line.division.result_id for line in found} - {None})
    }
    return [_line(line, intervals) for line in found]


def _line(
    line: DivisionLine, intervals: dict[tuple[int, int, str], tuple[float | None, float | None]]
) -> StatementLine:
    division = line.division
    result = division.result
    low, high = intervals.get((division.result_id or 0, division.version_id, line.role), (None, None))
    labellers_pot = (
        division.amount.share(division.labellers_bps) if division.labellers_weight else Money(0, division.currency)
    )
    is_labeller = line.role == DivisionLine.Role.LABELLER
    return StatementLine(
        division_id=division.pk,
        divided_at=division.divided_at,
        source=SOURCES[Division.Source(division.source)],
        dataset=division.version.dataset.title,
        version=division.version.number,
        model=result.model.name if result else "",
        result=f"{result.grade} {result.number}" if result else "",
        role=line.role,
        n_records=line.n_records,
        weight=line.weight,
        weight_total=division.labellers_weight if is_labeller else division.holders_weight,
        share_low=low,
        share_high=high,
        divided=division.amount,
        pot=labellers_pot if is_labeller else division.amount - labellers_pot,
        amount=Money(line.amount_micros, division.currency),
        due_at=line.due_at,
    )


#: What else moves a party's balance, in the payee's words.
ADJUSTMENTS = {
    JournalEntry.Kind.REFUND_INTENT: "refunded to the buyer",
    JournalEntry.Kind.REFUND_UNDONE: "the refund did not reach the buyer and is yours again",
    JournalEntry.Kind.DISPUTE_FREEZE: "held while the card's bank decides a dispute",
    JournalEntry.Kind.DISPUTE_THAW: "no longer held for a dispute",
    JournalEntry.Kind.DISPUTE_LOST: "given back to the buyer by the card's bank",
    JournalEntry.Kind.TRANSFER_BACK: "taken from your balance at Stripe for what you owed",
    JournalEntry.Kind.CORRECTION: "our error in an earlier division, corrected",
    JournalEntry.Kind.WRITE_OFF: "what you owed was forgiven, or need not be after all",
}


def _adjustments(party: Party, starts_at: datetime, ends_at: datetime) -> list[StatementAdjustment]:
    sums = (
        Posting.objects.filter(
            account__party=party,
            entry__kind__in=ADJUSTMENTS,
            entry__booked_at__gte=starts_at,
            entry__booked_at__lt=ends_at,
        )
        .values("entry", "entry__kind", "entry__booked_at", "account__currency")
        .annotate(sum=Sum("amount_micros"))
        .order_by("entry__booked_at", "entry")
    )
    return [
        StatementAdjustment(
            booked_at=row["entry__booked_at"],
            what=ADJUSTMENTS[JournalEntry.Kind(row["entry__kind"])],
            amount=Money(-int(row["sum"]), row["account__currency"]),
        )
        for row in sums
        if row["sum"]
    ]


def _payouts(party: Party, starts_at: datetime, ends_at: datetime) -> list[StatementPayout]:
    kinds = {
        JournalEntry.Kind.PAYOUT_INTENT: "payout",
        JournalEntry.Kind.PAYOUT_REVERSAL: "payout refused by Stripe and booked back",
    }
    postings = (
        Posting.objects.filter(
            account__party=party,
            entry__kind__in=kinds,
            entry__booked_at__gte=starts_at,
            entry__booked_at__lt=ends_at,
        )
        .select_related("entry", "account")
        .order_by("entry__booked_at", "entry")
    )
    return [
        StatementPayout(
            payout_id=int(posting.entry.key.split(":")[1]),
            booked_at=posting.entry.booked_at,
            what=kinds[JournalEntry.Kind(posting.entry.kind)],
            amount=Money(posting.amount_micros, posting.account.currency),
        )
        for posting in postings
    ]
