"""Recompute an issued statement from the stored attribution and pools, and name the first line that differs.

A line is divided anew: weights from the published result's shares, or from the counts; the amount from what the ledger says left
the pool; its part by largest remainder. What the buyer paid and the platform kept comes from the shares and from what the ledger
says a sale or royalty put where it waited (`gross`). A statement is read in the format in which it was issued. Balances, adjustments and payouts come from the ledger.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from itertools import zip_longest

from django.db.models import Q, Sum

from marketplace.models import Contribution, Party, RecordCopy
from marketplace.money import Money
from payouts.errors import NotFound
from payouts.models import Division, DivisionLine, IssuedStatement, JournalEntry, Posting
from payouts.services import issuing, statements
from payouts.services.divisions import Due, Pot, due_of, pots_of, source_account
from payouts.services.gross import gross_by_ledger

#: Names may be changed after a statement was issued; everything else must come out the same today.
NAMES = ("dataset", "model")
KEPT_DIVISIONS = 8


@dataclass(frozen=True)
class Mismatch:
    """The first thing that differs: which row of the CSV (1 is the first after the header), which column, and both values."""

    line: int
    column: str
    stated: str
    expected: str
    against: str  # "issued" or "recomputed"

    def __str__(self) -> str:
        return f"line {self.line}, {self.column}: {self.stated or 'nothing'} is stated, {self.expected or 'nothing'} {self.against}"


@dataclass(frozen=True)
class Verified:
    statement: IssuedStatement
    n_rows: int
    mismatch: Mismatch | None


def get_statement(number: str) -> IssuedStatement:
    """
    Raises:
        NotFound: no statement has this number.
    """
    found = IssuedStatement.objects.filter(number=number).select_related("party", "period").first()
    if found is None:
        raise NotFound(f"There is no statement {number}.")
    return found


def verify_statement(statement: IssuedStatement, *, given: Iterable[str] | None = None) -> Verified:
    """Compare a statement row by row with what the stored evidence gives today; memory does not grow with its lines.

    Args:
        given: the lines of a downloaded CSV, which must be the issued one first.

    Raises:
        InvalidInput: the file is no statement's.
    """
    if given is not None:
        n_rows, mismatch = _first_difference(
            statements.read_rows(given, format=statement.format),
            issuing.stored_rows(statement),
            against="was issued",
            skip=(),
        )
        if mismatch is not None:
            return Verified(statement, n_rows, mismatch)
    digest = sha256()
    for line in issuing.stored_csv(statement):
        digest.update(line.encode())
    if digest.hexdigest() != statement.csv_sha256:
        return Verified(
            statement, 0, Mismatch(0, "SHA-256", digest.hexdigest(), statement.csv_sha256, against="was issued")
        )
    starts_at, ends_at = statements.month_bounds(statement.period.starts_on.year, statement.period.starts_on.month)
    anew = statements.statement_rows(
        party=statement.party,
        starts_at=starts_at,
        ends_at=ends_at,
        number=statement.number,
        lines=recomputed_lines,
        format=statement.format,
    )
    n_rows, mismatch = _first_difference(
        issuing.stored_rows(statement), anew, against="comes out when recomputed", skip=NAMES
    )
    return Verified(statement, n_rows, mismatch)


def recomputed_lines(
    party: Party, starts_at: datetime, ends_at: datetime, currency: str
) -> Iterator[statements.StatementLine]:
    """What every division of the month owes the party by the stored attribution, whether a line of it was stored or not."""
    copies = RecordCopy.objects.filter(Q(payee=party) | Q(labeller=party))
    versions = Contribution.objects.filter(party=party).values("version")
    divisions = (
        Division.objects.filter(divided_at__gte=starts_at, divided_at__lt=ends_at, currency=currency)
        .exclude(source=Division.Source.CORRECTION)  # an adjustment: no weight gives its amount
        .filter(
            Q(version__in=versions)
            | Q(version__in=copies.values("version"))
            | Q(pk__in=party.division_lines.values("division"))
        )
        .select_related(
            "version__dataset",
            "result__model",
            "pool",
            "order_line__offer",
            "order_line__order",
            "invoice_line__invoice__report",
            "invoice_line__result__model",
        )
        .order_by("divided_at", "pk")
    )
    cache: OrderedDict[tuple[int, int | None, int, int], list[tuple[Pot, Due]]] = OrderedDict()
    for division in divisions.iterator(chunk_size=200):
        amount = _left_the_pool(division)
        key = (division.version_id, division.result_id, division.labellers_bps, amount.micros)
        if key not in cache:
            pots = pots_of(
                version=division.version, amount=amount, labellers_bps=division.labellers_bps, result=division.result
            )
            cache[key] = [(pot, due) for pot in pots if (due := due_of(pot, party)) is not None]
            while len(cache) > KEPT_DIVISIONS:
                cache.popitem(last=False)
        gross = gross_by_ledger(division) if cache[key] else None
        stored = {line.role: line for line in DivisionLine.objects.filter(division=division, party=party)}
        for pot, due in sorted(cache[key], key=lambda of: of[0].role.value):
            assert gross is not None
            role = pot.role.value
            line = statements.line_of(
                division,
                role=role,
                n_records=due.n_records,
                weight=due.weight,
                amount_micros=due.micros,
                due_at=stored[role].due_at if role in stored else None,
                measured=statements.measured_of(party, {division.result_id} - {None}),
                gross=gross,
            )
            yield replace(line, divided=amount, pot=pot.amount, weight_total=pot.weight_total)


def _left_the_pool(division: Division) -> Money:
    """What the division's entries took from where the money lay, by the ledger."""
    entries = JournalEntry.objects.filter(key__startswith=f"{division.key}:")
    taken = Posting.objects.filter(entry__in=entries, account__code=source_account(division), amount_micros__gt=0)
    return Money(int(taken.aggregate(sum=Sum("amount_micros", default=0))["sum"]), division.currency)


def _first_difference(
    stated: Iterator[dict[str, str]], expected: Iterator[dict[str, str]], *, against: str, skip: tuple[str, ...]
) -> tuple[int, Mismatch | None]:
    n_rows = 0
    for number, (left, right) in enumerate(zip_longest(stated, expected), start=1):
        if left is None or right is None:
            one = right if left is None else left
            what = " ".join(filter(None, (one["what"], one["division"])))
            row = ("nothing", what) if left is None else (what, "nothing")
            return n_rows, Mismatch(number, "the whole line", *row, against=against)
        for column in left:
            if column not in skip and left[column] != right[column]:
                return n_rows, Mismatch(number, column, left[column], right[column], against=against)
        n_rows += 1
    return n_rows, None
