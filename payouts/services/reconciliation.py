"""Our books against Stripe's: funds that became available are settled, and every difference is named."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from django.db import transaction
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
    transactions = list(gateway.balance_transactions())
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
    differences += _compare_transactions(transactions)
    differences += _waiting_too_long()
    for difference in differences:
        logger.error("Reconciliation found %s", difference)
    return Reconciliation(differences, cash, len(transactions))


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


def _compare_transactions(transactions: list[gateway.BalanceTransaction]) -> Iterator[Difference]:
    """Each of Stripe's has one of ours with its net; each of ours has one of Stripe's."""
    charges = {
        identifier: Money(amount - (fee or 0), currency)
        for identifier, amount, fee, currency in Payment.objects.filter(status=Payment.Status.PAID).values_list(
            "balance_transaction_id", "amount_micros", "fee_micros", "currency"
        )
    }
    transfers = {
        identifier: Money(-amount, currency)
        for identifier, amount, currency in Payout.objects.filter(transfer_id__isnull=False).values_list(
            "transfer_id", "amount_micros", "currency"
        )
    }
    caused = {
        movement.balance_transaction_id: Money(movement.net_micros, movement.currency)
        for movement in Movement.objects.all()
    }
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
    for theirs in transactions:
        net = Money.from_minor(theirs.net_minor, theirs.currency)
        if theirs.kind in ("charge", "payment"):
            name, booked = "charge", charges.pop(theirs.id, None)
        elif theirs.kind == "transfer":
            name, booked = "transfer", transfers.pop(theirs.source, None)
            if booked is None and may_be_on_its_way[net.micros, net.currency]:
                may_be_on_its_way[net.micros, net.currency] -= 1
                continue  # made, and its answer is not booked yet; the age of intents is checked by itself
        elif theirs.kind in MOVED_BY:
            name, booked = MOVED_BY[theirs.kind], caused.pop(theirs.id, None)
            if booked is None and may_be_on_its_way_back[net.micros, net.currency]:
                may_be_on_its_way_back[net.micros, net.currency] -= 1
                continue
        else:
            yield Difference("unknown_movement", f"Stripe's {theirs.kind} {theirs.id} of {net} is not in the ledger")
            continue
        if booked is None:
            yield Difference(f"{name}_not_booked", f"Stripe's {name} {theirs.id} of {net} is not in the ledger")
        elif booked != net:
            yield Difference(f"{name}_differs", f"Stripe's {name} {theirs.id} is {net}, the ledger has {booked}")
    for name, rest in (("charge", charges), ("transfer", transfers), ("movement", caused)):
        for identifier, booked in rest.items():
            yield Difference(
                f"{name}_not_at_stripe", f"{identifier} of {booked} is booked, and Stripe does not have it"
            )


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
