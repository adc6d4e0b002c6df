"""A party's month, per currency, so that whoever reads it can recompute it.

opening + earned + adjusted − paid out = closing

A month that is open is shown as it stands; once it is closed, `issuing` makes a numbered statement of it that stays. Lines are
streamed, so that a labeller with hundreds of thousands of them costs no more memory than one with ten.
"""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from django.db.models import Case, Count, F, QuerySet, Sum, When

from attribution.models import PPQ, Share
from marketplace.csv_cells import cell_text, written
from marketplace.errors import InvalidInput
from marketplace.models import Party
from marketplace.money import MICROS, Money
from payouts.books import EARNING_KINDS, PAYING_KINDS
from payouts.models import Division, DivisionLine, IssuedStatement, JournalEntry, Posting
from payouts.services.gross import Gross, gross_of

CHUNK = 2_000
#: The columns of each format in which statements were ever issued. One that was issued is read and proved in its own for ever.
FORMATS: dict[int, list[str]] = {}
FORMATS[1] = [
    "statement",
    "line",
    "date",
    "what",
    "division",
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
    "owing",
    "currency",
    "due",
]
#: From what the buyer paid to the amount, and what was measured under its own name.
FORMATS[2] = [
    "statement",
    "line",
    "date",
    "what",
    "division",
    "dataset",
    "version",
    "model",
    "result",
    "role",
    "revenue",
    "model_share",
    "royalty_percent",
    "gross_of",
    "gross",
    "fee_percent",
    "platform_fee",
    "pool_percent",
    "pool",
    "divided",
    "pot",
    "records",
    "weight",
    "weight_total",
    "earned",
    "measured_share",
    "measured_low",
    "measured_high",
    "taken_back",
    "paid_out",
    "balance",
    "owing",
    "currency",
    "due",
]
#: What is issued now.
FORMAT = 2
COLUMNS = FORMATS[FORMAT]
SOURCES = {
    Division.Source.UPFRONT: "upfront share of a sale",
    Division.Source.POOL: "royalty pool of a sale",
    Division.Source.ROYALTY: "royalty on a model's revenue",
}


@dataclass(frozen=True)
class StatementLine:
    """What one division gave the party in one role.

    `amount` is `pot · weight / weight_total`, rounded to a micro: down, or up where the remainder was among the largest.
    `share` is that quotient. `measured` is another thing: what the party's records did for the whole model, signed, as the
    result published it, and the interval is of it.
    """

    division_key: str  # "release:pool:3": which pool, order line or invoice line it came from
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
    measured: float | None  # when by a result that measured it; also None in a row of the first format
    measured_low: float | None  # 95 % interval
    measured_high: float | None
    gross: Gross | None  # None only in a row of the first format
    divided: Money  # the whole amount, before it was split in two pots
    pot: Money
    amount: Money
    due_at: datetime | None  # None only where a recomputed line was never stored

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
    earned: Money
    lines: list[StatementLine]  # empty where there were too many to show
    adjustments: list[StatementAdjustment]
    payouts: list[StatementPayout]
    closing: Money

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


def statement(*, party: Party, year: int, month: int, with_lines: bool = True) -> Statement:
    """Everything that moved a party's balance in a month; balances are the ledger's, lines the divisions'.

    Args:
        with_lines: without them what they come to is all that is known of them (`n_lines`, `earned`).

    Raises:
        InvalidInput: there is no such month.
    """
    starts_at, ends_at = month_bounds(year, month)
    opening = _payable(party, before=starts_at)
    closing = _payable(party, before=ends_at)
    lines: dict[str, list[StatementLine]] = defaultdict(list)
    earned: dict[str, int] = {
        row["division__currency"]: int(row["sum"])
        for row in _lines_between(party, starts_at, ends_at)
        .order_by()
        .values("division__currency")
        .annotate(sum=Sum("amount_micros"))
    }
    if with_lines:
        for line in stored_lines(party, starts_at, ends_at):
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
                earned=Money(earned.get(currency, 0), currency),
                lines=lines[currency],
                adjustments=adjustments[currency],
                payouts=payouts[currency],
                closing=Money(closing.get(currency, 0), currency),
            )
            for currency in sorted({*opening, *closing, *earned, *adjustments, *payouts})
        ],
    )


@dataclass(frozen=True)
class LineTotal:
    """What a month's lines come to, by source, dataset version, model and role."""

    currency: str
    source: str
    dataset: str
    version: int
    model: str  # "" when by count
    role: str
    n_lines: int
    amount: Money


def totals_of(*, party: Party, year: int, month: int) -> list[LineTotal]:
    """A month's lines, summed up in the database; the largest first.

    Raises:
        InvalidInput: there is no such month.
    """
    sums = (
        _lines_between(party, *month_bounds(year, month))
        .order_by()
        .annotate(  # a pot that its division's result gave no weight went by count
            by=Case(When(division__counted_role=F("role"), then=None), default=F("division__result__model__name"))
        )
        .values(
            "division__currency",
            "division__source",
            "division__version__dataset__title",
            "division__version__number",
            "by",
            "role",
        )
        .annotate(n=Count("pk"), sum=Sum("amount_micros"))
        .order_by("division__currency", "-sum")
    )
    return [
        LineTotal(
            currency=row["division__currency"],
            source=SOURCES[Division.Source(row["division__source"])],
            dataset=row["division__version__dataset__title"],
            version=row["division__version__number"],
            model=row["by"] or "",
            role=row["role"],
            n_lines=row["n"],
            amount=Money(int(row["sum"]), row["division__currency"]),
        )
        for row in sums
    ]


def n_lines_of(*, party: Party, year: int, month: int) -> int:
    return _lines_between(party, *month_bounds(year, month)).count()


Lines = Callable[[Party, datetime, datetime, str], Iterator[StatementLine]]


def statement_rows(
    *,
    party: Party,
    starts_at: datetime,
    ends_at: datetime,
    number: str = "",
    lines: "Lines | None" = None,
    format: int = FORMAT,
) -> Iterator[dict[str, str]]:
    """The statement's rows, one a movement, opening and closing balances included, streamed; every cell is text.

    No cell acts as a formula, and no amount is negative: what was taken back, and what is owed to us, have columns of their own.

    Args:
        number: the statement's, once it has one.
        lines: where the earned lines come from; the stored ones by default.
        format: whose columns the rows have.
    """
    lines = lines or stored_lines
    opening = _payable(party, before=starts_at)
    closing = _payable(party, before=ends_at)
    in_lines = (
        _lines_between(party, starts_at, ends_at).order_by().values_list("division__currency", flat=True).distinct()
    )
    n_rows = 0
    for currency in sorted({*opening, *closing, *in_lines}):
        for cells in _currency_rows(party, starts_at, ends_at, currency, opening, closing, lines):
            n_rows += 1
            given = {"statement": number, "line": n_rows, "currency": currency} | cells
            yield {name: _cell(given.get(name, "")) for name in FORMATS[format]}


def csv_lines(rows: Iterator[dict[str, str]], *, format: int = FORMAT) -> Iterator[str]:
    """Rows as the lines of a CSV file, its header first."""
    yield written(FORMATS[format])
    for row in rows:
        yield written(row.values())


def statement_csv(*, party: Party, year: int, month: int) -> Iterator[str]:
    """A month as CSV, streamed.

    Raises:
        InvalidInput: there is no such month.
    """
    starts_at, ends_at = month_bounds(year, month)
    return csv_lines(statement_rows(party=party, starts_at=starts_at, ends_at=ends_at))


def read_rows(lines: Iterable[str], *, format: int = FORMAT) -> Iterator[dict[str, str]]:
    """The rows of such a file, streamed.

    Raises:
        InvalidInput: its header is not a statement's of this format.
    """
    columns = FORMATS[format]
    reader = csv.DictReader(lines)
    if reader.fieldnames is None or list(reader.fieldnames) != columns:
        raise InvalidInput("This is no statement: its first row does not name a statement's columns.")
    for row in reader:
        yield {name: row[name] or "" for name in columns}


def line_of_row(row: Mapping[str, str]) -> StatementLine:
    """The earned line that a row of either format tells; the first has no `gross`."""
    currency = row["currency"]

    def money(name: str) -> Money:
        return Money(micros_of(row[name]), currency)

    def fraction(*names: str) -> float | None:
        text = next((row[name] for name in names if row.get(name)), "")
        return float(text.removeprefix("'")) if text else None

    gross = None
    if "gross" in row:
        is_royalty = bool(row["revenue"])
        gross = Gross(
            of=row["gross_of"],
            amount=money("gross"),
            fee_bps=int(Decimal(row["fee_percent"]) * 100),
            fee=money("platform_fee"),
            pool_bps=int(Decimal(row["pool_percent"]) * 100),
            pool=money("pool"),
            revenue=money("revenue") if is_royalty else None,
            share_ppq=int(Decimal(row["model_share"]) * PPQ) if is_royalty else None,
            rate_bps=int(Decimal(row["royalty_percent"]) * 100) if is_royalty else None,
        )
    return StatementLine(
        division_key=row["division"],
        divided_at=datetime.fromisoformat(row["date"]),
        source=row["what"],
        dataset=row["dataset"].removeprefix("'"),
        version=int(row["version"]),
        model=row["model"].removeprefix("'"),
        result=row["result"],
        role=row["role"],
        n_records=int(row["records"]),
        weight=int(row["weight"]),
        weight_total=int(row["weight_total"]),
        measured=fraction("measured_share"),
        measured_low=fraction("measured_low", "share_low"),
        measured_high=fraction("measured_high", "share_high"),
        gross=gross,
        divided=money("divided"),
        pot=money("pot"),
        amount=money("earned"),
        due_at=datetime.fromisoformat(row["due"]) if row["due"] else None,
    )


def micros_of(cell: str) -> int:
    """An amount's cell in micros; 0 where there is none."""
    return int(Decimal(cell or "0") * MICROS)


def _currency_rows(
    party: Party,
    starts_at: datetime,
    ends_at: datetime,
    currency: str,
    opening: dict[str, int],
    closing: dict[str, int],
    lines: Lines,
) -> Iterator[dict[str, object]]:
    yield {"date": starts_at, "what": "opening balance"} | _balance(Money(opening.get(currency, 0), currency))
    for line in lines(party, starts_at, ends_at, currency):
        yield {
            "date": line.divided_at,
            "what": line.source,
            "division": line.division_key,
            "dataset": cell_text(line.dataset),
            "version": line.version,
            "model": cell_text(line.model),
            "result": line.result,
            "role": line.role,
            "records": line.n_records,
            "weight": line.weight,
            "weight_total": line.weight_total,
            "share_low": _fraction(line.measured_low),
            "share_high": _fraction(line.measured_high),
            "measured_share": _fraction(line.measured),
            "measured_low": _fraction(line.measured_low),
            "measured_high": _fraction(line.measured_high),
            **(_gross_cells(line.gross) if line.gross else {}),
            "divided": _amount(line.divided),
            "pot": _amount(line.pot),
            "earned": _amount(line.amount),
            "due": line.due_at or "",
        }
    for adjustment in _adjustments(party, starts_at, ends_at, currency):
        column = "earned" if adjustment.amount.micros > 0 else "taken_back"
        amount = adjustment.amount if adjustment.amount.micros > 0 else -adjustment.amount
        yield {"date": adjustment.booked_at, "what": adjustment.what, column: _amount(amount)}
    for payout in _payouts(party, starts_at, ends_at, currency):
        column = "paid_out" if payout.amount.micros > 0 else "earned"  # what came back is positive again
        amount = payout.amount if payout.amount.micros > 0 else -payout.amount
        yield {"date": payout.booked_at, "what": f"{payout.what} {payout.payout_id}", column: _amount(amount)}
    yield {"date": ends_at, "what": "closing balance"} | _balance(Money(closing.get(currency, 0), currency))


def _gross_cells(gross: Gross) -> dict[str, object]:
    cells: dict[str, object] = {
        "gross_of": gross.of,
        "gross": _amount(gross.amount),
        "fee_percent": _plain(Decimal(gross.fee_bps) / 100),
        "platform_fee": _amount(gross.fee),
        "pool_percent": _plain(Decimal(gross.pool_bps) / 100),
        "pool": _amount(gross.pool),
    }
    if gross.revenue is not None and gross.share_ppq is not None and gross.rate_bps is not None:
        cells |= {
            "revenue": _amount(gross.revenue),
            "model_share": _plain(Decimal(gross.share_ppq) / PPQ),
            "royalty_percent": _plain(Decimal(gross.rate_bps) / 100),
        }
    return cells


def _plain(number: Decimal) -> str:
    """Without an exponent or zeros at the end: 10, 12.5, 0.333333333333333."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _fraction(value: float | None) -> str:
    return "" if value is None else cell_text(f"{value:.6f}")


def _balance(amount: Money) -> dict[str, object]:
    return {"balance": _amount(amount)} if amount.micros >= 0 else {"balance": "0.00", "owing": _amount(-amount)}


def _cell(value: object) -> str:
    return f"{value:%Y-%m-%dT%H:%M:%SZ}" if isinstance(value, datetime) else str(value)


def _amount(amount: Money) -> str:
    return amount.amount_text(exact=True)


def _payable(party: Party, *, before: datetime) -> dict[str, int]:
    """What the ledger owed the party less what it owed the ledger, by currency.

    A month's statement is issued once nothing is booked into it any more, so what it closes with stands (`check_ledger` proves each
    of them); of the postings, those count that came after the last one.
    """
    postings = Posting.objects.filter(account__party=party, entry__booked_at__lt=before)
    last = (
        IssuedStatement.objects.filter(party=party, period__ends_at__lte=before, period__postings_after__isnull=False)
        .select_related("period")
        .order_by("-period__ends_at")
        .first()
    )
    found: dict[str, int] = defaultdict(int)
    if last is not None:
        found |= dict(last.balances.values_list("currency", "closing_micros"))
        postings = postings.filter(pk__gt=last.period.postings_after, entry__booked_at__gte=last.period.ends_at)
    for row in postings.values("account__currency").annotate(sum=Sum("amount_micros")).order_by():
        found[row["account__currency"]] -= int(row["sum"])
    return dict(found)


def _lines_between(party: Party, starts_at: datetime, ends_at: datetime) -> "QuerySet[DivisionLine]":
    return (
        DivisionLine.objects.filter(party=party, division__divided_at__gte=starts_at, division__divided_at__lt=ends_at)
        .exclude(  # an adjustment: no weight gives its amount
            division__source=Division.Source.CORRECTION
        )
        .order_by("division__divided_at", "division", "role")
    )


def stored_lines(
    party: Party, starts_at: datetime, ends_at: datetime, currency: str | None = None
) -> Iterator[StatementLine]:
    """The lines as they were divided, of one currency or of all, streamed."""
    found = _lines_between(party, starts_at, ends_at).select_related(
        "division__version__dataset",
        "division__result__model",
        "division__order_line__offer",
        "division__order_line__order",
        "division__invoice_line__invoice__report",
    )
    if currency is not None:
        found = found.filter(division__currency=currency)
    chunk: list[DivisionLine] = []
    for line in found.iterator(chunk_size=CHUNK):
        chunk.append(line)
        if len(chunk) == CHUNK:
            yield from _as_stated(party, chunk)
            chunk = []
    yield from _as_stated(party, chunk)


def _as_stated(party: Party, lines: list[DivisionLine]) -> list[StatementLine]:
    measured = measured_of(party, {line.division.result_id for line in lines} - {None})
    gross = gross_of(line.division for line in lines)
    return [
        line_of(
            line.division,
            role=line.role,
            n_records=line.n_records,
            weight=line.weight,
            amount_micros=line.amount_micros,
            due_at=line.due_at,
            measured=measured,
            gross=gross[line.division_id],
        )
        for line in lines
    ]


Measured = dict[tuple[int, int, str], tuple[float | None, float | None, float | None]]


def measured_of(party: Party, results: set[int | None]) -> Measured:
    """(result, version, partition) → the party's measured share of the whole model, and its 95 % interval."""
    return {
        (share.result_id, share.version_id, share.partition): (share.raw, share.low, share.high)
        for share in Share.objects.filter(party=party, result__in=results)
    }


def line_of(
    division: Division,
    *,
    role: str,
    n_records: int,
    weight: int,
    amount_micros: int,
    due_at: datetime | None,
    measured: Measured,
    gross: Gross,
) -> StatementLine:
    result = division.result_for(role)
    share, low, high = measured.get((result.pk if result else 0, division.version_id, role), (None, None, None))
    labellers_pot = (
        division.amount.share(division.labellers_bps) if division.labellers_weight else Money(0, division.currency)
    )
    is_labeller = role == DivisionLine.Role.LABELLER
    return StatementLine(
        division_key=division.key,
        divided_at=division.divided_at,
        source=SOURCES.get(Division.Source(division.source), division.source),
        dataset=division.version.dataset.title,
        version=division.version.number,
        model=result.model.name if result else "",
        result=f"{result.grade} {result.number}" if result else "",
        role=role,
        n_records=n_records,
        weight=weight,
        weight_total=division.labellers_weight if is_labeller else division.holders_weight,
        measured=share,
        measured_low=low,
        measured_high=high,
        gross=gross,
        divided=division.amount,
        pot=labellers_pot if is_labeller else division.amount - labellers_pot,
        amount=Money(amount_micros, division.currency),
        due_at=due_at,
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


def _adjustments(
    party: Party, starts_at: datetime, ends_at: datetime, currency: str | None = None
) -> Iterator[StatementAdjustment]:
    """Whatever moved the balance and is neither earned nor paid out; what only nets a debt comes to nothing and is left out."""
    sums = (
        _postings_between(party, starts_at, ends_at, currency)
        .exclude(entry__kind__in=[*EARNING_KINDS, *PAYING_KINDS])
        .values("entry", "entry__kind", "entry__booked_at", "account__currency")
        .annotate(sum=Sum("amount_micros"))
        .order_by("entry__booked_at", "entry")
    )
    for row in sums.iterator(chunk_size=CHUNK):
        if row["sum"]:
            kind = row["entry__kind"]
            yield StatementAdjustment(
                booked_at=row["entry__booked_at"],
                what=ADJUSTMENTS.get(JournalEntry.Kind(kind)) or kind.replace("_", " "),
                amount=Money(-int(row["sum"]), row["account__currency"]),
            )


#: What paid the party, or came back.
PAYOUTS = {
    JournalEntry.Kind.PAYOUT_INTENT: "payout",
    JournalEntry.Kind.PAYOUT_REVERSAL: "payout refused by Stripe and booked back",
    JournalEntry.Kind.RAIL_INTENT: "payout by bank transfer",
    JournalEntry.Kind.RAIL_REVERSAL: "payout by bank transfer that came back",
}


def _payouts(
    party: Party, starts_at: datetime, ends_at: datetime, currency: str | None = None
) -> Iterator[StatementPayout]:
    postings = (
        _postings_between(party, starts_at, ends_at, currency)
        .filter(entry__kind__in=PAYING_KINDS)
        .select_related("entry", "account")
        .order_by("entry__booked_at", "entry", "pk")
    )
    for posting in postings.iterator(chunk_size=CHUNK):
        yield StatementPayout(
            payout_id=int(posting.entry.key.split(":")[1]),
            booked_at=posting.entry.booked_at,
            what=PAYOUTS[JournalEntry.Kind(posting.entry.kind)],
            amount=Money(posting.amount_micros, posting.account.currency),
        )


def _postings_between(
    party: Party, starts_at: datetime, ends_at: datetime, currency: str | None
) -> "QuerySet[Posting]":
    found = Posting.objects.filter(account__party=party, entry__booked_at__gte=starts_at, entry__booked_at__lt=ends_at)
    return found if currency is None else found.filter(account__currency=currency)
