"""Taking an amount of one payment back from where it lies, and giving it back again; refunds and disputes share it.

Of each line the platform returns its own fee in proportion; the rest comes from the unreleased pool first, then from the
payees, each for their own part: out of what they were not sent yet, and beyond it from their later earnings (`receivable`).
What no line has left is the platform's loss. A refund of everything leaves every account of the sale at zero.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from django.db import transaction
from django.db.models import Q, QuerySet, Sum

from marketplace import clock
from marketplace.models import OrderLine
from marketplace.money import Money
from marketplace.services.licenses import match_refunded
from payouts import chart, ledger
from payouts.allocation import allocate
from payouts.models import (
    Clawback,
    ClawbackLine,
    ClawbackUndo,
    Dispute,
    Division,
    DivisionCorrection,
    DivisionLine,
    JournalEntry,
    Payment,
    Reclaim,
    Refund,
    RoyaltyInvoice,
    RoyaltyInvoiceLine,
    RoyaltyPool,
)
from payouts.services import recoveries
from payouts.services.royalties import parts_of, release_returned

logger = logging.getLogger(__name__)

#: A payee may need two legs of an entry: what they are owed, and what they owe.
PAYEES_PER_ENTRY = (ledger.MAX_LEGS - 1) // 2
KINDS = {
    Clawback.Kind.REFUND: (JournalEntry.Kind.REFUND_INTENT, JournalEntry.Kind.REFUND_UNDONE),
    Clawback.Kind.FREEZE: (JournalEntry.Kind.DISPUTE_FREEZE, JournalEntry.Kind.DISPUTE_THAW),
    Clawback.Kind.DISPUTE: (JournalEntry.Kind.DISPUTE_LOST, JournalEntry.Kind.REVERSAL),
    Clawback.Kind.CORRECTION: (JournalEntry.Kind.CORRECTION, JournalEntry.Kind.REVERSAL),
}
#: A royalty names the order line of its license, and is divided out of its own payment, not of the order's.
NO_ROYALTY = ~Q(division__source=Division.Source.ROYALTY) & ~Q(
    division__corrects__division__source=Division.Source.ROYALTY
)


@dataclass(frozen=True)
class Part:
    """One line of a paid order or invoice: what it cost, tax included, and how much of that went back already."""

    line: OrderLine | RoyaltyInvoiceLine
    price: Money
    fee: Money  # the platform's part of the price
    tax: Money  # of the price, which includes it
    given_back: Money  # of the price, by clawbacks that stand
    fee_given_back: Money
    tax_given_back: Money

    @property
    def left(self) -> Money:
        return self.price - self.given_back


def parts_left(payment: Payment) -> list[Part]:
    """A paid payment's lines with what may still be taken back of each, in order; freezes do not count as taken."""
    standing = ClawbackLine.objects.filter(clawback__payment=payment, clawback__undo=None).exclude(
        clawback__kind__in=[Clawback.Kind.FREEZE, Clawback.Kind.CORRECTION]
    )
    which = "order_line" if payment.order_id is not None else "invoice_line"
    sums = {
        row[which]: tuple(Money(int(row[name]), payment.currency) for name in ("amount", "fee", "tax"))
        for row in standing.values(which).annotate(
            amount=Sum("amount_micros"), fee=Sum("fee_micros"), tax=Sum("tax_micros")
        )
    }
    none = (Money(0, payment.currency),) * 3
    priced = list(_priced_lines(payment))
    nets = {line.pk: net.micros for line, net, _ in priced}
    taxes = allocate(payment.tax, nets) if payment.tax_micros else {}
    return [
        Part(line, net + taxes.get(line.pk, none[0]), fee, taxes.get(line.pk, none[0]), *sums.get(line.pk, none))
        for line, net, fee in priced
    ]


def gross_of(part: Part, net: Money) -> Money:
    """What goes back to the buyer where a net amount of a line does, its tax in proportion; at most what the line has left."""
    whole = part.price - part.tax
    return min(Money(net.micros * part.price.micros // whole.micros, net.currency), part.left)


def spread(amount: Money, parts: Iterable[Part]) -> dict[int, int]:
    """Divide an amount over lines by what each has left, to the last micro; never more than a line has."""
    lefts = {part.line.pk: part.left.micros for part in parts if part.left}
    if not lefts:
        return {}
    whole = min(amount.micros, sum(lefts.values()))
    return {pk: due.micros for pk, due in allocate(Money(whole, amount.currency), lefts).items() if due}


def take_back(
    *,
    payment: Payment,
    amounts: Mapping[int, int],
    to_account: str,
    kind: Clawback.Kind,
    refund: Refund | None = None,
    dispute: Dispute | None = None,
    loss: Money | None = None,
) -> Clawback:
    """Inside the transaction that holds the payment's row: take amounts back, line by line, into one account; once.

    Args:
        amounts: line → micros, each at most what the line has left.
        loss: what is credited to the account beyond the lines, at the platform's expense.

    Raises:
        ValueError: a line has less left.
    """
    cause = refund or dispute
    assert cause is not None
    key = f"{kind.value}:{cause.pk}"
    if found := Clawback.objects.filter(key=key).first():
        return found
    parts = {part.line.pk: part for part in parts_left(payment)}
    if any(amounts[pk] > parts[pk].left.micros or amounts[pk] <= 0 for pk in amounts):
        raise ValueError(f"{key}: {dict(amounts)} of {parts}")
    pools = _unreleased_pools(payment)  # their rows are held before the payables' lock
    recoveries.lock(payment.currency)
    clawback = Clawback.objects.create(
        key=key,
        kind=kind,
        payment=payment,
        refund=refund,
        dispute=dispute,
        amount_micros=sum(amounts.values()),
        loss_micros=loss.micros if loss else 0,
        currency=payment.currency,
        taken_at=clock.now(),
    )
    owed: dict[int, int] = defaultdict(int)
    postings = {chart.platform_fee(payment.currency): 0}
    for pk, micros in sorted(amounts.items()):
        part = parts[pk]
        fee = _in_proportion(part, micros, of=part.fee, given_back=part.fee_given_back)
        tax = _in_proportion(part, micros, of=part.tax, given_back=part.tax_given_back)
        pool = pools.get(pk)
        pooled = min(micros - fee - tax, pool.left_micros) if pool is not None else 0
        line = ClawbackLine.objects.create(
            clawback=clawback,
            **_line_of(part),
            amount_micros=micros,
            fee_micros=fee,
            tax_micros=tax,
            pool_micros=pooled,
        )
        postings[chart.platform_fee(payment.currency)] += fee
        if tax:
            assert payment.tax_rate is not None  # a database check
            account = chart.tax(payment.tax_rate, payment.currency)
            postings[account] = postings.get(account, 0) + tax
        if pool is not None and pooled:
            postings[chart.royalty_pool(pool)] = pooled
        lefts = _left_of_divisions(part)
        rest = Money(micros - fee - tax - pooled, payment.currency)
        dues = allocate(rest, {pk: left for pk, (_, left) in lefts.items()}) if rest else {}
        _reclaim(line, {pk: due.micros for pk, due in dues.items() if due}, lefts, owed)
    if loss:
        postings[chart.losses(payment.currency)] = loss.micros
    _book(clawback, to_account, postings, owed)
    _match_order(payment)
    logger.info("Took back clawback=%s payment=%s micros=%s", key, payment.pk, clawback.amount_micros)
    return clawback


def freeze(*, payment: Payment, dispute: Dispute, to_account: str) -> Clawback:
    """Inside the transaction that holds the payment's row: hold the unreleased pools and what was not sent yet; once.

    What a payee has been sent stays theirs while nobody knows who is right.
    """
    frozen_before = dispute.clawbacks.filter(kind=Clawback.Kind.FREEZE)
    if standing := frozen_before.filter(undo=None).first():
        return standing
    key = f"{Clawback.Kind.FREEZE.value}:{dispute.pk}:{frozen_before.count() + 1}"
    parts = parts_left(payment)
    pools = _unreleased_pools(payment)
    recoveries.lock(payment.currency)
    lefts = {part.line.pk: _left_of_divisions(part) for part in parts}
    unsent = recoveries.unsent_of(
        lines=[pk for of in lefts.values() for pk in of],
        parties={party for of in lefts.values() for party, _ in of.values()},
        currency=payment.currency,
    )
    frozen = {part.line.pk: {pk: unsent[pk] for pk in lefts[part.line.pk] if unsent.get(pk)} for part in parts}
    pooled = {part.line.pk: pools[part.line.pk].left_micros if part.line.pk in pools else 0 for part in parts}
    total = sum(pooled.values()) + sum(sum(of.values()) for of in frozen.values())
    clawback = Clawback.objects.create(
        key=key,
        kind=Clawback.Kind.FREEZE,
        payment=payment,
        dispute=dispute,
        amount_micros=total,
        currency=payment.currency,
        taken_at=clock.now(),
    )
    owed: dict[int, int] = defaultdict(int)
    postings = {}
    for part in parts:
        pk = part.line.pk
        if not (pooled[pk] or frozen[pk]):
            continue
        line = ClawbackLine.objects.create(
            clawback=clawback,
            **_line_of(part),
            amount_micros=pooled[pk] + sum(frozen[pk].values()),
            fee_micros=0,
            pool_micros=pooled[pk],
        )
        if pooled[pk]:
            postings[chart.royalty_pool(pools[pk])] = pooled[pk]
        _reclaim(line, frozen[pk], lefts[pk], owed)
    _book(clawback, to_account, postings, owed)
    logger.info("Froze clawback=%s payment=%s micros=%s", key, payment.pk, total)
    return clawback


def take_for_correction(*, correction: DivisionCorrection, payment: Payment, losses: Mapping[int, int]) -> Clawback:
    """Inside the transaction that holds the payment's row and the payables' lock: what some payees had too much.

    Args:
        losses: division line → micros, each at most what the line has left.
    """
    division = correction.division
    line = (
        {"order_line": division.order_line}
        if division.invoice_line is None
        else {"invoice_line": division.invoice_line}
    )
    total = sum(losses.values())
    clawback = Clawback.objects.create(
        key=f"{Clawback.Kind.CORRECTION.value}:{correction.pk}",
        kind=Clawback.Kind.CORRECTION,
        payment=payment,
        correction=correction,
        amount_micros=total,
        currency=payment.currency,
        taken_at=clock.now(),
    )
    taken = ClawbackLine.objects.create(clawback=clawback, **line, amount_micros=total, fee_micros=0, pool_micros=0)
    parties = dict(DivisionLine.objects.filter(pk__in=losses).values_list("pk", "party"))
    owed: dict[int, int] = defaultdict(int)
    _reclaim(taken, losses, {pk: (parties[pk], losses[pk]) for pk in losses}, owed)
    _book(clawback, chart.correction(correction), {}, owed)
    return clawback


def thaw(payment: Payment) -> list[Dispute]:
    """Inside the transaction that holds the payment's row: give back what is frozen of it; the disputes that it was for."""
    standing = payment.clawbacks.filter(kind=Clawback.Kind.FREEZE, undo=None).select_related("dispute").order_by("pk")
    disputes = []
    for clawback in list(standing):
        give_back(clawback)
        assert clawback.dispute is not None
        disputes.append(clawback.dispute)
    return disputes


def freeze_again(payment: Payment) -> list[Dispute]:
    """Inside the transaction that holds the payment's row: something came back to it, and while a dispute is open that is frozen too."""
    disputes = thaw(payment)
    for dispute in disputes:
        freeze(payment=payment, dispute=dispute, to_account=chart.dispute(dispute))
    return disputes


def disputed_payments_of(*, party: int, currency: str) -> QuerySet[Payment]:
    """The payments under an open dispute that gave a party something, in the order in which they are held."""
    mine = DivisionLine.objects.filter(party=party)
    of_orders = mine.filter(NO_ROYALTY, division__order_line__isnull=False)
    gave = Q(order__in=of_orders.values("division__order_line__order"))
    for line in ("division__invoice_line", "division__corrects__division__invoice_line"):
        of_invoices = mine.exclude(**{line: None})
        gave |= Q(invoice__in=of_invoices.values(f"{line}__invoice"))
        gave |= Q(invoice__in=of_invoices.values(f"{line}__invoice__carried_into"))
    opened = Dispute.objects.filter(status__in=Dispute.OPEN)
    return Payment.objects.filter(gave, pk__in=opened.values("payment"), currency=currency).order_by("pk")


def give_back(clawback: Clawback) -> None:
    """Inside the transaction that holds the payment's row: put everything where it was; again, nothing happens."""
    pools = RoyaltyPool.objects.filter(order_line__clawback_lines__clawback=clawback).order_by("pk")
    list(pools.select_for_update(of=("self",)))  # none of them is being released now
    recoveries.lock(clawback.currency)
    _, is_new = ClawbackUndo.objects.get_or_create(clawback=clawback, defaults={"undone_at": clock.now()})
    if not is_new:
        return
    kind = KINDS[Clawback.Kind(clawback.kind)][1]
    entries = JournalEntry.objects.filter(key__startswith=f"clawback:{clawback.key}:").order_by("pk")
    for number, entry in enumerate(list(entries)):
        ledger.reverse(entry, key=f"unclawback:{clawback.key}:{number}", kind=kind)
    parties = set(
        Reclaim.objects.filter(clawback_line__clawback=clawback).values_list("division_line__party", flat=True)
    )
    if clawback.kind != Clawback.Kind.FREEZE:  # a freeze makes nobody owe what was sent
        recoveries.undo_write_offs(parties=parties, returned=clawback)
    recoveries.net(parties=parties, currency=clawback.currency)
    for pool in pools.exclude(released_at=None).select_related(
        "order_line__order__buyer", "order_line__offer", "version"
    ):
        returned = Money(-ledger.balance(chart.royalty_pool(pool)), pool.currency)
        if returned:
            release_returned(pool=pool, amount=returned, key=f"release:returned:{clawback.pk}:{pool.pk}")
    _match_order(clawback.payment)
    logger.info("Gave back clawback=%s micros=%s", clawback.key, clawback.amount_micros)


def _priced_lines(payment: Payment) -> Iterable[tuple[OrderLine | RoyaltyInvoiceLine, Money, Money]]:
    """Each line with its price before tax and the platform's part of it, as the sale or the royalty was booked."""
    if payment.order is not None:
        for line in payment.order.lines.select_related("offer", "order", "version__dataset").order_by("pk"):
            price = line.price
            yield line, price, price - price.share(line.offer.upfront_bps) - price.share(line.offer.pool_bps)
        return
    assert payment.invoice is not None
    for invoice in payment.invoice.asked_with_it:
        divided = parts_of(invoice)
        for invoice_line in invoice.lines.select_related("version__dataset").order_by("pk"):
            if invoice_line.pk in divided:
                price = Money(invoice_line.amount_micros, payment.currency)
                yield invoice_line, price, price - divided[invoice_line.pk]


def _line_of(part: Part) -> dict[str, OrderLine | RoyaltyInvoiceLine]:
    return {"order_line" if isinstance(part.line, OrderLine) else "invoice_line": part.line}


def _in_proportion(part: Part, micros: int, *, of: Money, given_back: Money) -> int:
    """What of the fee, or of the tax, goes back with an amount: its part given back so far is that of the price.

    Rounded down on the way, and exactly all of it when everything is back.
    """
    back = part.given_back.micros + micros
    return max(0, of.micros * back // part.price.micros - given_back.micros)


def _unreleased_pools(payment: Payment) -> dict[int, RoyaltyPool]:
    """By order line, with the rows held, what is left annotated."""
    if payment.order_id is None:
        return {}
    mine = RoyaltyPool.objects.filter(order_line__order=payment.order_id, released_at=None).order_by("pk")
    list(mine.select_for_update(of=("self",)))
    return {pool.order_line_id: pool for pool in mine.with_left() if pool.left_micros}


def _left_of_divisions(part: Part) -> dict[int, tuple[int, int]]:
    """Division line → (party, what is left of it) of everything that this part's payees were given."""
    if isinstance(part.line, OrderLine):
        mine = Q(division__order_line=part.line) & NO_ROYALTY
    else:
        mine = Q(division__invoice_line=part.line) | Q(division__corrects__division__invoice_line=part.line)
    lines = DivisionLine.objects.filter(mine).order_by("pk")
    taken = dict(
        Reclaim.objects.filter(division_line__in=lines, clawback_line__clawback__undo=None)
        .values("division_line")
        .annotate(sum=Sum("amount_micros"))
        .values_list("division_line", "sum")
    )
    return {
        pk: (party, micros - int(taken.get(pk, 0)))
        for pk, party, micros in lines.values_list("pk", "party", "amount_micros")
        if micros > taken.get(pk, 0)
    }


def _reclaim(
    line: ClawbackLine, dues: Mapping[int, int], lefts: Mapping[int, tuple[int, int]], owed: dict[int, int]
) -> None:
    Reclaim.objects.bulk_create(
        (Reclaim(clawback_line=line, division_line_id=pk, amount_micros=micros) for pk, micros in sorted(dues.items())),
        batch_size=1_000,
    )
    for pk, micros in dues.items():
        owed[lefts[pk][0]] += micros


def _book(clawback: Clawback, to_account: str, postings: Mapping[str, int], owed: Mapping[int, int]) -> None:
    """One entry for fees, pools and the loss, then the payees in batches: from what they are owed, then as their debt."""
    kind = KINDS[Clawback.Kind(clawback.kind)][0]
    head = {code: micros for code, micros in postings.items() if micros}
    entries = [head] if head else []
    for batch in ledger.batches(owed, size=PAYEES_PER_ENTRY):
        payables = {party: chart.payable(party, clawback.currency) for party in batch}
        held = ledger.balances_of(payables.values())
        legs: dict[str, int] = {}
        for party, micros in batch.items():
            from_payable = min(micros, -held.get(payables[party], 0))
            legs[payables[party]] = from_payable
            legs[chart.receivable(party, clawback.currency)] = micros - from_payable
        entries.append(legs)
    for number, legs in enumerate(entries):
        ledger.post(
            key=f"clawback:{clawback.key}:{number}",
            kind=kind,
            postings=legs | {to_account: -sum(legs.values())},
            booked_at=clawback.taken_at,
        )


def _match_order(payment: Payment) -> None:
    """The order's state and its licenses, or the invoice's, follow what has gone back.

    A wholly refunded invoice uses neither its period nor its licenses' caps any more.
    """
    if payment.invoice is not None:
        is_refunded = all(not part.left for part in parts_left(payment))
        status = RoyaltyInvoice.Status.REFUNDED if is_refunded else RoyaltyInvoice.Status.PAID
        for invoice in payment.invoice.asked_with_it:
            paid = RoyaltyInvoice.objects.filter(
                pk=invoice.pk, status__in=[RoyaltyInvoice.Status.PAID, RoyaltyInvoice.Status.REFUNDED]
            )
            paid.exclude(status=status).update(status=status)
        return
    assert payment.order is not None  # a database check
    refunded = [part.line.pk for part in parts_left(payment) if not part.left]
    with transaction.atomic():
        match_refunded(order=payment.order, refunded=refunded, at=clock.now())
