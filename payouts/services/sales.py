"""A sale: the buyer pays once, and in one transaction the licenses are granted and every part of the price has its place."""

import logging
from datetime import datetime, timedelta

from django.db import transaction

from marketplace.models import License, Order
from marketplace.services.orders import OrderNotPayable, mark_paid
from payouts import chart, gateway, ledger
from payouts.errors import AlreadyPaid
from payouts.models import Division, JournalEntry, Payment, RoyaltyPool
from payouts.services import checkouts
from payouts.services.divisions import divide

logger = logging.getLogger(__name__)

#: What a pool waits after the disclosure was due, and from the sale where no disclosure is due.
POOL_GRACE = timedelta(days=30)
POOL_WAITS = timedelta(days=180)


def start_checkout(*, order: Order, success_url: str, cancel_url: str) -> str:
    """The address at Stripe where the buyer pays the order; the webhook, not the way back, marks it paid.

    Raises:
        AlreadyPaid: it is.
        OrderNotPayable: it was cancelled.
        StripeUnavailable, StripeDeclined: see `payouts.errors`.
    """
    if order.status == Order.Status.PAID:
        raise AlreadyPaid(f"Order {order.public_id} has been paid.")
    if order.status != Order.Status.PLACED:
        raise OrderNotPayable(f"Order {order.public_id} is {order.status}; place a new one.")
    payment, _ = Payment.objects.get_or_create(
        order=order, defaults={"currency": order.currency, "amount_micros": order.total_micros}
    )
    lines = [
        gateway.CheckoutLine(f"{line.version.dataset.title}, version {line.version.number}", line.price.to_minor())
        for line in order.lines.select_related("order", "version__dataset").order_by("pk")
    ]
    return checkouts.open_checkout(payment=payment, lines=lines, success_url=success_url, cancel_url=cancel_url)


@transaction.atomic
def book_payment(*, payment: Payment, checkout: gateway.PaidCheckout) -> Payment:
    """Book a paid order: licenses, the sale's entry, a pool per line and the upfront shares; again, nothing happens.

    Raises:
        PaymentMismatch: what Stripe took is not what was asked for; nothing is booked.
        OrderNotPayable: the order was cancelled before the money came; nothing is booked.
    """
    taken = checkouts.take_payment(payment=payment, checkout=checkout)
    if taken is None:
        return Payment.objects.get(pk=payment.pk)
    order = taken.order
    assert order is not None and taken.paid_at is not None and taken.fee_micros is not None
    licenses = {license.order_line_id: license for license in mark_paid(order=order, paid_at=taken.paid_at)}
    order.refresh_from_db()

    currency, fee = taken.currency, 0
    lines = list(order.lines.select_related("offer", "version", "order").order_by("pk"))
    postings = {
        chart.cash_pending(currency): taken.amount_micros - taken.fee_micros,
        chart.stripe_fees(currency): taken.fee_micros,
    }
    for line in lines:
        upfront, pooled = line.price.share(line.offer.upfront_bps), line.price.share(line.offer.pool_bps)
        fee += line.price.micros - upfront.micros - pooled.micros
        postings[chart.upfront(line, currency)] = -upfront.micros
        if pooled:
            pool = RoyaltyPool.objects.create(
                order_line=line,
                version=line.version,
                amount_micros=pooled.micros,
                currency=currency,
                deadline=_deadline(licenses[line.pk], taken.paid_at),
            )
            postings[chart.royalty_pool(pool)] = -pooled.micros
    postings[chart.platform_fee(currency)] = -fee
    ledger.post(key=f"sale:payment:{taken.pk}", kind=JournalEntry.Kind.SALE, postings=postings, booked_at=taken.paid_at)
    for line in lines:
        if upfront := line.price.share(line.offer.upfront_bps):
            divide(
                key=f"upfront:line:{line.pk}",
                source=Division.Source.UPFRONT,
                version=line.version,
                amount=upfront,
                labellers_bps=line.offer.labellers_bps,
                buyer=order.buyer,
                payment=taken,
                order_line=line,
            )
    logger.info("Booked sale order=%s payment=%s micros=%s %s", order.pk, taken.pk, taken.amount_micros, currency)
    return taken


def _deadline(license: License, paid_at: datetime) -> datetime:
    if license.offer.disclosure_due_days:
        return license.disclosure_due_at + POOL_GRACE
    return paid_at + POOL_WAITS
