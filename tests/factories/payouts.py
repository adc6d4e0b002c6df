"""Rows of payouts, made by the services that make them in earnest; only Stripe's word is given instead of asked for."""

import itertools
from datetime import timedelta
from typing import Any

import factory

from marketplace import clock
from marketplace.models import Order, Party
from marketplace.money import Money
from payouts import chart, gateway, ledger
from payouts.models import JournalEntry, PayeeAccount, Payment, Payout, PayoutRun, RoyaltyInvoice, RoyaltyPool
from payouts.services import royalties, sales
from payouts.services.checkouts import reference_of
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory

_numbers = itertools.count(1)


def paid_checkout(payment: Payment, **changes: Any) -> gateway.PaidCheckout:
    """What Stripe says once a payment's page was paid; its fee is 2.9 % and 30 minor units."""
    number = next(_numbers)
    minor = payment.amount.to_minor()
    fee = (minor * 29 + 500) // 1000 + 30
    told: dict[str, Any] = {
        "id": payment.checkout_id or f"cs_test_{number}",
        "status": "complete",
        "payment_status": "paid",
        "amount_total_minor": minor,
        "currency": payment.currency,
        "order_id": reference_of(payment),
        "public_reference": reference_of(payment),
        "metadata": {"payment": str(payment.pk)},
        "payment_intent": f"pi_{number}",
        "charge": f"ch_{number}",
        "balance_transaction": f"txn_{number}",
        "fee_minor": fee,
        "net_minor": minor - fee,
        "booked_currency": payment.currency,
        "available_on": clock.now() + timedelta(days=2),
    }
    return gateway.PaidCheckout(**told | changes)


def sell(order: Order, **changes: Any) -> Payment:
    """Pay and book an order."""
    payment, _ = Payment.objects.get_or_create(
        order=order, defaults={"currency": order.currency, "amount_micros": order.total_micros}
    )
    return sales.book_payment(payment=payment, checkout=paid_checkout(payment, **changes))


def collect(invoice: RoyaltyInvoice, **changes: Any) -> Payment:
    """Pay and book a royalty invoice."""
    payment, _ = Payment.objects.get_or_create(
        invoice=invoice, defaults={"currency": invoice.currency, "amount_micros": invoice.total_micros}
    )
    return royalties.book_payment(payment=payment, checkout=paid_checkout(payment, **changes))


def pay_out(
    party: Party,
    amount: Money,
    *,
    run: PayoutRun | None = None,
    status: str = "intended",
    is_owed: bool = True,
    **fields: Any,
) -> Payout:
    """A payout with the entries of its status, in a run of its own.

    Args:
        is_owed: whether the party is owed that much already; otherwise it is credited to it here.
        fields: of the payout.
    """
    currency = amount.currency
    run = run or PayoutRun.objects.create(currency=currency, due_until=clock.now(), key=f"run {next(_numbers)}")
    given = {"destination": "acct_1", "currency": currency, "intended_at": clock.now()} | fields
    payout = Payout.objects.create(run=run, party=party, amount_micros=amount.micros, **given)
    payable, promised = chart.payable(party, currency), chart.in_transit(currency)
    if not is_owed:
        owed = {payable: -amount.micros, chart.platform_fee(currency): amount.micros}
        ledger.post(key=f"owed for payout {payout.pk}", kind=JournalEntry.Kind.SALE, postings=owed)
    intent = {payable: amount.micros, promised: -amount.micros}
    ledger.post(key=f"payout:{payout.pk}:intent", kind=JournalEntry.Kind.PAYOUT_INTENT, postings=intent)
    if status != "intended":
        sent = {promised: amount.micros, chart.cash_available(currency): -amount.micros}
        ledger.post(key=f"payout:{payout.pk}:sent", kind=JournalEntry.Kind.PAYOUT_SENT, postings=sent)
        for reached in ("sent", "paid")[: 1 + (status == "paid")]:
            Payout.objects.filter(pk=payout.pk).update(status=reached, transfer_id=f"tr_{payout.pk}")
        payout.refresh_from_db()
    return payout


class PoolFactory(factory.Factory):
    """The royalty pool of a sold order line: `amount` of the price, the rest is the platform's fee; nothing upfront.

    Args:
        amount: what the pool holds; four fifths of the price.
        contributions, labellers: see `PublishedVersionFactory`.
    """

    class Meta:
        model = RoyaltyPool

    @classmethod
    def _create(
        cls,
        model_class: type[RoyaltyPool],
        *args: Any,
        amount: Money | None = None,
        buyer: Party | None = None,
        version: Any = None,
        contributions: Any = None,
        labellers: Any = None,
        labellers_bps: int = 0,
        **offer: Any,
    ) -> RoyaltyPool:
        amount = amount or Money(20_000_000, "USD")
        version = version or PublishedVersionFactory(contributions=contributions, labellers=labellers)
        terms = {"platform_fee_bps": 2_000, "upfront_bps": 0, "pool_bps": 8_000, "labellers_bps": labellers_bps} | offer
        made = OfferFactory(version=version, price_micros=amount.micros * 5 // 4, currency=amount.currency, **terms)
        order = OrderFactory(buyer=buyer or PartyFactory(), offers=[made])
        sell(order)
        return RoyaltyPool.objects.get(order_line__order=order)


class PayeeAccountFactory(factory.django.DjangoModelFactory):
    """A payee that Stripe can pay."""

    class Meta:
        model = PayeeAccount

    party = factory.SubFactory(PartyFactory)
    stripe_account_id = factory.Sequence(lambda n: f"acct_{n:016}")
    details_submitted = True
    transfers_active = True
    payouts_enabled = True
