"""One amount, divided among the payees of one version: two pots by role, integer weights, lines, and their entries.

The labellers' pot is `labellers_bps` of the amount, the rights holders' the rest. Each pot is divided by the paid shares of
its own partition, or by count where no result measured it (DESIGN §5, "Division").
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Q

from attribution.models import AttributionResult, Share
from attribution.selectors import weights_by_payee
from marketplace import clock
from marketplace.models import DatasetVersion, OrderLine, Party, RecordCopy
from marketplace.money import Money
from marketplace.selectors import money_counts
from payouts import chart, ledger
from payouts.allocation import allocate
from payouts.errors import ResultNotPublished
from payouts.models import (
    Dispute,
    Division,
    DivisionLine,
    JournalEntry,
    Payment,
    Payout,
    RoyaltyInvoiceLine,
    RoyaltyPool,
)

logger = logging.getLogger(__name__)

Role = DivisionLine.Role
ENTRY_KINDS = {
    Division.Source.UPFRONT: JournalEntry.Kind.UPFRONT,
    Division.Source.POOL: JournalEntry.Kind.RELEASE,
    Division.Source.ROYALTY: JournalEntry.Kind.ROYALTY_SPLIT,
}


@dataclass(frozen=True)
class Pot:
    """What one role's payees divide, and by which integers; `counts` are the records behind each weight."""

    role: DivisionLine.Role
    amount: Money
    weights: Mapping[int, int]
    counts: Mapping[int, int]


def pots_of(
    *, version: DatasetVersion, amount: Money, labellers_bps: int, result: AttributionResult | None
) -> list[Pot]:
    """The pots with somebody in them; where nobody labelled, the rights holders have it all in one.

    In the labellers' pot a record without a labeller counts for its rights holder, so if nobody labelled the two pots
    would be divided alike.
    """
    holders = _weights(version, result, Role.RIGHTS_HOLDER)
    labellers = _weights(version, result, Role.LABELLER)
    is_one_pot = labellers[0] == holders[0]
    labellers_part = Money(0, amount.currency) if is_one_pot else amount.share(labellers_bps)
    pots = [
        Pot(Role.RIGHTS_HOLDER, amount - labellers_part, *holders),
        Pot(Role.LABELLER, labellers_part, *labellers),
    ]
    return [pot for pot in pots if pot.amount]


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

    now = clock.now()
    pots = pots_of(version=version, amount=amount, labellers_bps=labellers_bps, result=result)
    due_at = now + timedelta(days=_hold_days(is_known=_is_known_buyer(buyer, payment)))
    if payment is not None and payment.available_on is not None:
        due_at = max(due_at, payment.available_on)
    totals = {pot.role: sum(pot.weights.values()) for pot in pots}
    division = Division.objects.create(
        key=key,
        source=source,
        version=version,
        order_line=order_line,
        pool=pool,
        invoice_line=invoice_line,
        result=result,
        amount_micros=amount.micros,
        currency=amount.currency,
        labellers_bps=labellers_bps,
        holders_weight=totals.get(Role.RIGHTS_HOLDER, 0),
        labellers_weight=totals.get(Role.LABELLER, 0),
        due_at=due_at,
        divided_at=now,
    )
    payees = {party for pot in pots for party in pot.weights}
    due_by_party = _due_dates(division, payees)
    lines = [
        DivisionLine(
            division=division,
            party_id=party,
            role=pot.role,
            n_records=pot.counts.get(party, 0),
            weight=pot.weights[party],
            amount_micros=due.micros,
            due_at=due_by_party[party],
        )
        for pot in pots
        for party, due in sorted(allocate(pot.amount, pot.weights).items())
        if due
    ]
    DivisionLine.objects.bulk_create(lines, batch_size=1_000)
    _book(division, lines)
    logger.info("Divided key=%s result=%s micros=%s lines=%s", key, result and result.pk, amount.micros, len(lines))
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
        case _:
            assert division.invoice_line is not None
            return chart.royalty(division.invoice_line, division.currency)


def _book(division: Division, lines: list[DivisionLine]) -> None:
    dues: dict[int, int] = {}
    for line in lines:
        dues[line.party_id] = dues.get(line.party_id, 0) + line.amount_micros
    source = source_account(division)
    for number, batch in enumerate(ledger.batches(dues, size=ledger.MAX_LEGS - 1)):
        ledger.post(
            key=f"{division.key}:{number}",
            kind=ENTRY_KINDS[Division.Source(division.source)],
            postings={source: sum(batch.values())}
            | {chart.payable(party, division.currency): -micros for party, micros in batch.items()},
            booked_at=division.divided_at,
        )


def _weights(
    version: DatasetVersion, result: AttributionResult | None, role: DivisionLine.Role
) -> tuple[dict[int, int], dict[int, int]]:
    """Positive weights by payee and the records behind them: measured ones, or counts where nothing was measured."""
    counts = {count.party_id: count.n_records for count in money_counts(version) if count.role == role}
    if result is not None:
        measured = weights_by_payee(version=version, result=result, partition=role.value)
        measured = {party: weight for party, weight in measured.items() if weight > 0}
        if measured:
            shares = Share.objects.filter(result=result, version=version, partition=role.value)
            return measured, dict(shares.values_list("party", "n_records"))
    return counts, counts


def _hold_days(*, is_known: bool) -> int:
    days: int = settings.HOLD_DAYS_KNOWN if is_known else settings.HOLD_DAYS_NEW
    return days


def _is_known_buyer(buyer: Party, payment: Payment | None) -> bool:
    """Whether earlier money of theirs has arrived for good, and no bank took any of it back or is about to."""
    theirs = Payment.objects.filter(Q(order__buyer=buyer) | Q(invoice__report__licensee=buyer))
    if theirs.filter(disputes__status__in=[*Dispute.OPEN, "lost"]).exists():
        return False
    earlier = theirs.filter(settled_at__isnull=False)
    if payment is not None:
        earlier = earlier.exclude(pk=payment.pk)
    return earlier.exists()


def _due_dates(division: Division, payees: set[int]) -> dict[int, datetime]:
    """Each payee's own date: later for the new ones, and for whoever is paid for copies, so that a claim can overturn it."""
    paid_before = set(
        Payout.objects.filter(party__in=payees, status__in=[Payout.Status.SENT, Payout.Status.PAID])
        .values_list("party", flat=True)
        .distinct()
    )
    copies = RecordCopy.objects.filter(version=division.version_id)
    of_copies = set(copies.values_list("payee", flat=True).distinct())
    of_copies |= set(copies.filter(labeller__isnull=False).values_list("labeller", flat=True).distinct())
    return {
        party: max(
            division.due_at,
            division.divided_at + timedelta(days=_hold_days(is_known=party in paid_before and party not in of_copies)),
        )
        for party in payees
    }
