"""Our books against Stripe's: funds that became available are settled, and every difference is named."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import connection, transaction
from django.utils import timezone

from marketplace import clock
from marketplace.jobs import Job
from marketplace.money import Money
from payouts import chart, gateway, ledger
from payouts.models import JournalEntry, Movement, Payment, Payout, Refund, StripeEvent, TransferReversal
from payouts.services import movements

logger = logging.getLogger(__name__)

#: An intent that Stripe has not answered for this long is for a person to look at.
IN_TRANSIT_LIMIT = timedelta(minutes=15)
#: Stripe's kinds of balance transactions that refunds, disputes and reversals cause.
MOVED_BY = {
    "refund": "refund",
    "payment_refund": "refund",
    "refund_failure": "refund_failure",
    "payment_failure_refund": "refund_failure",
    "adjustment": "dispute",
    "transfer_refund": "reversal",
}


@dataclass(frozen=True)
class Difference:
    """One thing on which we and Stripe disagree, or that has waited too long."""

    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True)
class Cash:
    """One currency's funds, by our ledger and by Stripe."""

    ledger_pending: Money
    ledger_available: Money
    stripe_pending: Money
    stripe_available: Money

    @property
    def agrees(self) -> bool:
        return (self.ledger_pending, self.ledger_available) == (self.stripe_pending, self.stripe_available)


@dataclass(frozen=True)
class Reconciliation:
    differences: list[Difference]
    cash: list[Cash]
    n_transactions: int  # of Stripe's, compared one by one

    @property
    def agrees(self) -> bool:
        return not self.differences


def settle_funds() -> int:
    """Book what Stripe has made available since; returns how many payments and other movements.

    Funds become available in the order of `available_on`, so one question beyond the last settled one is enough.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again; what was settled stays settled.
    """
    n_settled = 0
    unsettled = Payment.objects.filter(status=Payment.Status.PAID, settled_at=None)
    for currency in unsettled.values_list("currency", flat=True).distinct().order_by("currency"):
        for payment in unsettled.filter(currency=currency).order_by("available_on", "pk"):
            assert payment.balance_transaction_id is not None  # a paid payment knows it (a database check)
            if not gateway.get_balance_transaction(payment.balance_transaction_id).is_available:
                break
            n_settled += _settle(payment)
    for movement in Movement.objects.filter(settled_at=None).order_by("currency", "available_on", "pk"):
        if gateway.get_balance_transaction(movement.balance_transaction_id).is_available:
            n_settled += movements.settle(movement, at=clock.now())
    return n_settled


def reconcile(*, also: Sequence[Difference] = ()) -> Reconciliation:
    """Compare balances and every balance transaction with the ledger, both ways; nothing is changed.

    Args:
        also: what was found before, by the sweeps; it is told with the rest.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: Stripe did not tell.
    """
    cash = _compare_cash()
    differences = list(also)
    differences += [
        Difference(
            "cash_differs",
            f"the ledger has {held.ledger_pending} pending and {held.ledger_available} available, "
            f"Stripe {held.stripe_pending} and {held.stripe_available}",
        )
        for held in cash
        if not held.agrees
    ]
    n_transactions, found = _compare_transactions()
    differences += found
    differences += _waiting_too_long()
    for difference in differences:
        logger.error("Reconciliation found %s", difference)
    return Reconciliation(differences, cash, n_transactions)


@transaction.atomic
def _settle(payment: Payment) -> bool:
    payment = Payment.objects.select_for_update(of=("self",)).get(pk=payment.pk)
    if payment.settled_at is not None:
        return False
    assert payment.fee_micros is not None
    net = payment.amount_micros - payment.fee_micros
    payment.settled_at = clock.now()
    payment.save(update_fields=["settled_at"])
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={chart.cash_available(payment.currency): net, chart.cash_pending(payment.currency): -net},
        booked_at=payment.settled_at,
    )
    logger.info("Settled payment=%s net=%s %s", payment.pk, net, payment.currency)
    return True


def _compare_cash() -> list[Cash]:
    ours = ledger.balances(prefix="cash")
    theirs = gateway.balance()
    ours = {code: micros for code, micros in ours.items() if chart.parse(code).name != "cash:bank"}  # not at Stripe
    currencies = sorted({chart.parse(code).currency for code in ours} | {c for c, held in theirs.items() if any(held)})
    return [
        Cash(
            ledger_pending=Money(ours.get(chart.cash_pending(currency), 0), currency),
            ledger_available=Money(ours.get(chart.cash_available(currency), 0), currency),
            stripe_pending=Money.from_minor(theirs.get(currency, (0, 0))[0], currency),
            stripe_available=Money.from_minor(theirs.get(currency, (0, 0))[1], currency),
        )
        for currency in currencies
    ]


def _compare_transactions() -> tuple[int, list[Difference]]:
    """Each of Stripe's has one of ours with its net; each of ours has one of Stripe's. How many, and what does not agree.

    Stripe's go into a temporary table page by page, and the database compares: memory grows with the differences alone.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            "CREATE TEMPORARY TABLE told_by_stripe (id text, kind text, source text, net numeric, currency text) ON COMMIT DROP"
        )
        # What is booked while Stripe's list is being read may be too new to be in it.
        cursor.execute(f"CREATE TEMPORARY TABLE booked_before ON COMMIT DROP AS {_BOOKED}")
        n_transactions = 0
        with cursor.copy("COPY told_by_stripe FROM STDIN") as copy:
            for theirs in gateway.balance_transactions_backwards():
                net = Money.from_minor(theirs.net_minor, theirs.currency).micros
                copy.write_row((theirs.id, MOVED_BY.get(theirs.kind, theirs.kind), theirs.source, net, theirs.currency))
                n_transactions += 1
        cursor.execute("CREATE INDEX ON told_by_stripe (id); CREATE INDEX ON told_by_stripe (source)")
        cursor.execute("ANALYZE told_by_stripe")
        differences = [*_theirs(cursor), *_ours(cursor)]
        cursor.execute("DROP TABLE told_by_stripe, booked_before")
    return n_transactions, differences


#: What we booked of each of Stripe's, by its id; a transfer's is its source.
_BOOKED = """
SELECT 'charge' AS name, balance_transaction_id AS id, amount_micros - coalesce(fee_micros, 0) AS net, currency
FROM payouts_payment WHERE status = 'paid' AND method = 'stripe'
UNION ALL SELECT 'transfer', transfer_id, -amount_micros, currency FROM payouts_payout WHERE transfer_id IS NOT NULL
UNION ALL SELECT 'movement', balance_transaction_id, amount_micros - fee_micros, currency FROM payouts_movement
"""
_NAMED = """
SELECT id AS txn, CASE WHEN kind IN ('charge', 'payment') THEN 'charge' WHEN kind = 'transfer' THEN 'transfer'
    WHEN kind = ANY(%(moved)s) THEN 'movement' ELSE 'unknown' END AS name,
    CASE WHEN kind = 'transfer' THEN source ELSE id END AS id, kind, net, currency
FROM told_by_stripe
"""


def _theirs(cursor: Any) -> Iterator[Difference]:
    # Made, and its answer is not booked yet: the age of intents is checked by itself.
    may_be_on_its_way = Counter(
        (-payout.amount_micros, payout.currency) for payout in Payout.objects.filter(status=Payout.Status.INTENDED)
    )
    may_be_on_its_way_back = Counter(
        (-refund.amount_micros, refund.currency) for refund in Refund.objects.filter(state=Refund.State.INTENDED)
    )
    may_be_on_its_way_back.update(
        (reversal.amount_micros, reversal.currency)
        for reversal in TransferReversal.objects.filter(state=TransferReversal.State.INTENDED)
    )
    cursor.execute(
        f"""
        SELECT theirs.txn, theirs.name, theirs.kind, theirs.net, theirs.currency, booked.net, booked.currency
        FROM ({_NAMED}) theirs LEFT JOIN ({_BOOKED}) booked ON booked.name = theirs.name AND booked.id = theirs.id
        WHERE booked.id IS NULL OR booked.net <> theirs.net OR booked.currency <> theirs.currency ORDER BY theirs.txn
        """,  # noqa: S608
        {"moved": sorted(set(MOVED_BY.values()))},
    )
    for txn, name, kind, net_micros, currency, booked_micros, booked_currency in cursor.fetchall():
        net = Money(int(net_micros), currency)
        called = kind if name == "movement" else name
        way = {"transfer": may_be_on_its_way, "movement": may_be_on_its_way_back}.get(name)
        if name == "unknown":
            yield Difference("unknown_movement", f"Stripe's {kind} {txn} of {net} is not in the ledger")
        elif booked_micros is not None:
            booked = Money(int(booked_micros), booked_currency)
            yield Difference(f"{called}_differs", f"Stripe's {called} {txn} is {net}, the ledger has {booked}")
        elif way is not None and way[net.micros, net.currency]:
            way[net.micros, net.currency] -= 1
        else:
            yield Difference(f"{called}_not_booked", f"Stripe's {called} {txn} of {net} is not in the ledger")


def _ours(cursor: Any) -> Iterator[Difference]:
    cursor.execute(
        f"""
        SELECT booked.name, booked.id, booked.net, booked.currency
        FROM booked_before booked LEFT JOIN ({_NAMED}) theirs ON theirs.name = booked.name AND theirs.id = booked.id
        WHERE theirs.id IS NULL ORDER BY booked.name, booked.id
        """,  # noqa: S608
        {"moved": sorted(set(MOVED_BY.values()))},
    )
    for name, identifier, micros, currency in cursor.fetchall():
        booked = Money(int(micros), currency)
        yield Difference(f"{name}_not_at_stripe", f"{identifier} of {booked} is booked, and Stripe does not have it")


def _waiting_too_long() -> Iterator[Difference]:
    wall = timezone.now()
    for payout in Payout.objects.filter(status=Payout.Status.INTENDED, created_at__lt=wall - IN_TRANSIT_LIMIT).order_by(
        "pk"
    ):
        minutes = int((wall - payout.created_at).total_seconds() // 60)
        yield Difference("in_transit_too_long", f"payout {payout.pk} of {payout.amount} for {minutes} minutes")
    tried: list[type[Refund] | type[TransferReversal]] = [Refund, TransferReversal]
    for model in tried:
        old = model._default_manager.filter(state="intended", created_at__lt=wall - IN_TRANSIT_LIMIT)
        for intent in old.order_by("pk"):
            minutes = int((wall - intent.created_at).total_seconds() // 60)
            yield Difference(f"{model.__name__.lower()}_too_long", f"{intent} for {minutes} minutes")
    for event in StripeEvent.objects.filter(status=Job.Status.FAILED).order_by("pk"):
        yield Difference("event_not_applied", f"{event.type} {event.event_id}: {event.error_message}")
