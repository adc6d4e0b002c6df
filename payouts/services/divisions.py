"""One amount, divided among the payees of one version: two pots by role, integer weights, lines, and their entries.

The labellers' pot is `labellers_bps` of the amount, the rights holders' the rest. Each pot is divided by the paid shares of
its own partition, or by count where no result measured it (DESIGN §5, "Division").

All of it happens inside the database, set-wise: a million payees cost this process no memory, and records are counted once per
version.
"""

import logging
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone

from attribution.models import AttributionResult
from marketplace import clock
from marketplace.models import DatasetVersion, OrderLine, Party
from marketplace.money import Money
from marketplace.planning import hash_joins
from marketplace.selectors import MONEY_COUNTS
from payouts import chart, ledger
from payouts.errors import ResultNotPublished
from payouts.models import (
    Dispute,
    Division,
    DivisionCorrection,
    DivisionLine,
    JournalEntry,
    PayeeCount,
    Payment,
    Refund,
    RoyaltyInvoiceLine,
    RoyaltyPool,
)

logger = logging.getLogger(__name__)

Role = DivisionLine.Role
ENTRY_KINDS = {
    Division.Source.UPFRONT: JournalEntry.Kind.UPFRONT,
    Division.Source.POOL: JournalEntry.Kind.RELEASE,
    Division.Source.ROYALTY: JournalEntry.Kind.ROYALTY_SPLIT,
    Division.Source.CORRECTION: JournalEntry.Kind.CORRECTION,
}


@dataclass(frozen=True)
class Pot:
    """What one role's payees divide, and by which integers: the paid shares of a result, or counts where it is None."""

    role: DivisionLine.Role
    amount: Money
    version: int
    result: int | None
    weight_total: int
    is_kept: bool = True  # whether the version's counts are; otherwise its records are counted

    def weights(self) -> tuple[str, dict[str, Any]]:
        """A statement that selects (party, weight, records) of the pot's payees, with its parameters."""
        counted = _COUNTED if self.is_kept else _COUNTED_ANEW
        return (counted if self.result is None else _MEASURED), {
            "version": self.version,
            "role": self.role.value,
            "result": self.result,
        }


_MEASURED = """SELECT party_id, paid_ppq AS weight, n_records FROM attribution_share
WHERE result_id = %(result)s AND version_id = %(version)s AND partition = %(role)s AND paid_ppq > 0"""
_COUNTED = """SELECT party_id, n_records AS weight, n_records FROM payouts_payeecount
WHERE version_id = %(version)s AND role = %(role)s"""
_COUNTED_ANEW = f"""SELECT party_id, n AS weight, n AS n_records FROM ({MONEY_COUNTS}) counted (party_id, role, n)
WHERE role = %(role)s"""  # noqa: S608

#: Hamilton's method of `payouts.allocation`, by the database: whole floors, then one micro each to the largest remainders, ties
#: to the lower party. `numeric`, because pool · weight has up to 31 digits.
ALLOCATED = """
SELECT party_id, weight, n_records, floor + (rank <= %(micros)s - all_floors)::int AS micros FROM (
    SELECT party_id, weight, n_records, floor, sum(floor) OVER () AS all_floors,
        row_number() OVER (ORDER BY remainder DESC, party_id) AS rank
    FROM (
        SELECT party_id, weight, n_records, div(%(micros)s::numeric * weight, %(total)s::numeric) AS floor,
            mod(%(micros)s::numeric * weight, %(total)s::numeric) AS remainder
        FROM ({weights}) weights
    ) parts
) ranked
"""


def allocated(pot: Pot) -> tuple[str, dict[str, Any]]:
    """A statement that selects (party, weight, records, micros) of a pot's payees, zero micros included."""
    weights, parameters = pot.weights()
    return ALLOCATED.format(weights=weights), parameters | {"micros": pot.amount.micros, "total": pot.weight_total}


@dataclass(frozen=True)
class Due:
    """What one payee gets of a pot, and by what."""

    party: int
    weight: int
    n_records: int
    micros: int


def dues_of(pot: Pot) -> list[Due]:
    """Of each of a pot's payees who gets something."""
    return _dues(pot, "micros > 0", {})


def due_of(pot: Pot, party: Party) -> Due | None:
    """Of one payee; None if they get nothing of it."""
    found = _dues(pot, "micros > 0 AND party_id = %(party)s", {"party": party.pk})
    return found[0] if found else None


def _dues(pot: Pot, condition: str, given: dict[str, object]) -> list[Due]:
    statement, parameters = allocated(pot)
    chosen = f"SELECT party_id, weight, n_records, micros FROM ({statement}) dues WHERE {condition}"  # noqa: S608
    with ledger.room_to_sort() as cursor:
        cursor.execute(chosen, parameters | given)
        return [Due(party, int(weight), n, int(micros)) for party, weight, n, micros in cursor.fetchall()]


def pots_of(
    *, version: DatasetVersion, amount: Money, labellers_bps: int, result: AttributionResult | None
) -> list[Pot]:
    """The pots with somebody in them; where nobody labelled, the rights holders have it all in one.

    In the labellers' pot a record without a labeller counts for its rights holder, so if nobody labelled the two pots
    would be divided alike.
    """
    pots = [_pot(version, result, role) for role in (Role.RIGHTS_HOLDER, Role.LABELLER)]
    labellers_part = Money(0, amount.currency) if _are_alike(*pots) else amount.share(labellers_bps)
    parts = [amount - labellers_part, labellers_part]
    return [replace(pot, amount=part) for pot, part in zip(pots, parts, strict=True) if part]


def divided_by(pots: list[Pot], result: AttributionResult | None) -> tuple[AttributionResult | None, str]:
    """What the pots were divided by, as payees are to read it: a result that gave weights, and the one pot that it gave none."""
    counted = [pot.role.value for pot in pots if pot.result is None]
    if result is None or len(counted) == len(pots):
        return None, ""
    return result, counted[0] if counted else ""


def keep_counts(version: DatasetVersion) -> None:
    """Count a published version's records by payee, once; the next division reads what was counted."""
    if PayeeCount.objects.filter(version=version).exists():
        return
    with hash_joins() as cursor:
        cursor.execute(
            f"""INSERT INTO payouts_payeecount (version_id, role, party_id, n_records)
            SELECT %(version)s, role, party_id, n FROM ({MONEY_COUNTS}) counted (party_id, role, n)
            ORDER BY role, party_id ON CONFLICT DO NOTHING""",  # noqa: S608
            {"version": version.pk},
        )


def _pot(version: DatasetVersion, result: AttributionResult | None, role: DivisionLine.Role) -> Pot:
    """Measured weights, or counts where nothing was measured; of no amount yet."""
    is_kept = PayeeCount.objects.filter(version=version).exists()
    pot = Pot(role, Money(0, "USD"), version.pk, result.pk if result else None, 0, is_kept)
    with connection.cursor() as cursor:
        for by in (pot, replace(pot, result=None)) if result else (pot,):
            weights, parameters = by.weights()
            cursor.execute(f"SELECT sum(weight) FROM ({weights}) weights", parameters)  # noqa: S608
            (total,) = cursor.fetchone()
            if total:
                return replace(by, weight_total=int(total))
    return pot


def _are_alike(one: Pot, other: Pot) -> bool:
    """Whether both pots have the same payees with the same weights."""
    if one.weight_total != other.weight_total:
        return False
    (ours, parameters), (theirs, theirs_parameters) = one.weights(), other.weights()
    theirs = re.sub(r"%\((\w+)\)s", r"%(other_\1)s", theirs)
    with connection.cursor() as cursor:
        cursor.execute(
            f"""SELECT NOT EXISTS (
                SELECT FROM ({ours}) ours FULL JOIN ({theirs}) theirs USING (party_id, weight)
                WHERE ours.party_id IS NULL OR theirs.party_id IS NULL
            )""",  # noqa: S608
            parameters | {f"other_{name}": value for name, value in theirs_parameters.items()},
        )
        return bool(cursor.fetchone()[0])


@transaction.atomic
def divide(
    *,
    key: str,
    source: Division.Source,
    version: DatasetVersion,
    amount: Money,
    labellers_bps: int,
    buyer: Party,
    payment: Payment | None,
    result: AttributionResult | None = None,
    order_line: OrderLine | None = None,
    pool: RoyaltyPool | None = None,
    invoice_line: RoyaltyInvoiceLine | None = None,
) -> Division:
    """Owe every payee of a version their part of an amount; the second call with a key finds the first one's division.

    The caller holds the row that the money comes from (payment, pool or invoice), so that two cannot divide it at once.

    Raises:
        ResultNotPublished: its shares may still change.
    """
    if result is not None and result.status != AttributionResult.Status.PUBLISHED:
        raise ResultNotPublished(f"Result {result.pk} is still {result.status}; money waits for published shares.")
    if found := Division.objects.filter(key=key).first():
        return found

    keep_counts(version)
    now = clock.now()
    pots = pots_of(version=version, amount=amount, labellers_bps=labellers_bps, result=result)
    due_at = now + timedelta(days=_hold_days(is_known=_is_known_buyer(buyer, payment)))
    if payment is not None and payment.available_on is not None:
        due_at = max(due_at, payment.available_on)
    totals = {pot.role: pot.weight_total for pot in pots}
    result, counted_role = divided_by(pots, result)
    division = Division.objects.create(
        key=key,
        source=source,
        version=version,
        order_line=order_line,
        pool=pool,
        invoice_line=invoice_line,
        result=result,
        counted_role=counted_role,
        amount_micros=amount.micros,
        currency=amount.currency,
        labellers_bps=labellers_bps,
        holders_weight=totals.get(Role.RIGHTS_HOLDER, 0),
        labellers_weight=totals.get(Role.LABELLER, 0),
        due_at=due_at,
        divided_at=now,
    )
    n_lines = sum(_write_lines(division, pot) for pot in pots)
    _book(division)
    logger.info("Divided key=%s result=%s micros=%s lines=%s", key, result and result.pk, amount.micros, n_lines)
    return division


def _book(division: Division) -> None:
    ledger.post_split(
        key=division.key,
        kind=ENTRY_KINDS[Division.Source(division.source)],
        source=source_account(division),
        currency=division.currency,
        booked_at=division.divided_at,
        dues="SELECT party_id, sum(amount_micros)::bigint FROM payouts_divisionline WHERE division_id = %(division)s GROUP BY 1",
        parameters={"division": division.pk},
    )


def _write_lines(division: Division, pot: Pot) -> int:
    """One statement for a pot, however many payees it has; returns how many lines it made.

    Each line has its own due date: later for new payees, and for whoever is paid for copies, so that a claim can overturn it.
    """
    statement, parameters = allocated(pot)
    with ledger.room_to_sort() as cursor:
        cursor.execute(
            _WRITE_LINES.format(allocated=statement),
            parameters
            | {
                "division": division.pk,
                "due_at": division.due_at,
                "for_new": division.divided_at + timedelta(days=_hold_days(is_known=False)),
                "for_known": division.divided_at + timedelta(days=_hold_days(is_known=True)),
                "created_at": timezone.now(),
            },
        )
        return int(cursor.rowcount)


_WRITE_LINES = """
WITH copies AS MATERIALIZED (
    SELECT payee_id AS party_id FROM marketplace_recordcopy WHERE version_id = %(version)s
    UNION
    SELECT labeller_id FROM marketplace_recordcopy WHERE version_id = %(version)s AND labeller_id IS NOT NULL
), known AS MATERIALIZED (
    SELECT DISTINCT party_id FROM payouts_payout WHERE status IN ('sent', 'paid')
    EXCEPT SELECT party_id FROM copies
)
INSERT INTO payouts_divisionline
    (division_id, party_id, role, n_records, weight, amount_micros, due_at, created_at)
SELECT %(division)s, party_id, %(role)s, n_records, weight, micros,
    greatest(%(due_at)s, CASE WHEN known.party_id IS NULL THEN %(for_new)s ELSE %(for_known)s END), %(created_at)s
FROM ({allocated}) dues LEFT JOIN known USING (party_id)
WHERE micros > 0
ORDER BY party_id
"""


def credit_gains(correction: DivisionCorrection) -> Division:
    """Inside the transaction that books a correction: owe the payees who had too little what the others had too much.

    Due when the corrected division was, or now.
    """
    corrected = correction.division
    gaining = [line for line in correction.lines.order_by("pk") if line.difference_micros > 0]
    now = clock.now()
    division = Division.objects.create(
        key=f"correction:{correction.pk}",
        source=Division.Source.CORRECTION,
        version=corrected.version,
        order_line=corrected.order_line,
        corrects=correction,
        result=correction.result,
        amount_micros=sum(line.difference_micros for line in gaining),
        currency=corrected.currency,
        labellers_bps=corrected.labellers_bps,
        due_at=max(now, corrected.due_at),
        divided_at=now,
    )
    lines = [
        DivisionLine(
            division=division,
            party_id=line.party_id,
            role=line.role,
            n_records=line.n_records,
            weight=line.weight,
            amount_micros=line.difference_micros,
            due_at=division.due_at,
        )
        for line in gaining
    ]
    DivisionLine.objects.bulk_create(lines, batch_size=1_000)
    _book(division)
    return division


def source_account(division: Division) -> str:
    """Where the divided money lay before."""
    match division.source:
        case Division.Source.POOL:
            # What came back to a pool after its release is divided without the pool, which has one division.
            pool = division.pool or RoyaltyPool.objects.get(order_line=division.order_line_id)
            return chart.royalty_pool(pool)
        case Division.Source.UPFRONT:
            assert division.order_line is not None
            return chart.upfront(division.order_line, division.currency)
        case Division.Source.CORRECTION:
            assert division.corrects is not None  # a database check
            return chart.correction(division.corrects)
        case _:
            assert division.invoice_line is not None
            return chart.royalty(division.invoice_line, division.currency)


def _hold_days(*, is_known: bool) -> int:
    days: int = settings.HOLD_DAYS_KNOWN if is_known else settings.HOLD_DAYS_NEW
    return days


def _is_known_buyer(buyer: Party, payment: Payment | None) -> bool:
    """Whether at least as much of theirs has arrived for good before, and no bank took any of it back or is about to.

    For good: paid so long ago that a stolen card's owner has seen the bill. A small purchase of last week, paid for only to
    be known by today, vouches for nothing; nor does it ever vouch for more than itself.
    """
    theirs = Payment.objects.filter(Q(order__buyer=buyer) | Q(invoice__report__licensee=buyer))
    if theirs.filter(disputes__status__in=[*Dispute.OPEN, "lost"]).exists():
        return False
    stood = clock.now() - timedelta(days=settings.HOLD_DAYS_NEW)
    earlier = theirs.filter(settled_at__isnull=False, paid_at__lte=stood)
    if payment is None:
        return earlier.exists()
    earlier = earlier.filter(currency=payment.currency).exclude(pk=payment.pk)
    paid = earlier.aggregate(sum=Coalesce(Sum("amount_micros"), 0))["sum"]
    back = Refund.objects.filter(payment__in=earlier, state__in=Refund.STANDING)
    refunded = back.aggregate(sum=Coalesce(Sum("amount_micros"), 0))["sum"]
    return bool(paid - refunded >= payment.amount_micros)
