"""A sale: the buyer pays once, and in one transaction the licenses are granted and every part of the price has its place."""

import logging
from datetime import datetime, timedelta

from django.db import transaction

from marketplace import clock
from marketplace.models import License, Order
from marketplace.services.orders import cancel_order, hold_payable, mark_paid
from payouts import chart, gateway, ledger
from payouts.errors import AlreadyPaid
from payouts.models import Division, JournalEntry, Payment, RoyaltyPool
from payouts.services import checkouts
from payouts.services.divisions import divide

logger = logging.getLogger(__name__)

#: What a pool waits after the disclosure was due, and from the sale where no disclosure is due.
POOL_GRACE = timedelta(days=30)
POOL_WAITS = timedelta(days=180)
MAX_CANCELLED_AT_ONCE = 1_000


def start_checkout(*, order: Order, success_url: str, cancel_url: str) -> str:
    """The address at Stripe where the buyer pays the order; the webhook, not the way back, marks it paid.

    Raises:
        AlreadyPaid: it is.
        OrderNotPayable, OfferNotOpen: it was cancelled, its deadline is over, or an offer of it has changed.
        StripeUnavailable, StripeDeclined: see `payouts.errors`.
    """
    if order.status == Order.Status.PAID:
        raise AlreadyPaid(f"Order {order.public_id} has been paid.")
    with transaction.atomic():
        hold_payable(order)
        payment, _ = Payment.objects.get_or_create(
            order=order, defaults={"currency": order.currency, "amount_micros": order.total_micros}
        )
    lines = [
        gateway.CheckoutLine(f"{line.version.dataset.title}, version {line.version.number}", line.price.to_minor())
        for line in order.lines.select_related("order", "version__dataset").order_by("pk")
    ]
    return checkouts.open_checkout(
        payment=payment,
        lines=lines,
        success_url=success_url,
        cancel_url=cancel_url,
        still_due=lambda: hold_payable(order),
    )


def cancel_expired_orders() -> int:
    """Cancel what was not paid in time, its page at Stripe first, so that nobody pays for what is gone; returns how many.

    What has been paid there is left to the event that says so; what Stripe does not answer to, to the next call.
    """
    n_cancelled = 0
    late = Order.objects.filter(status=Order.Status.PLACED, expires_at__lte=clock.now())
    for order in late.order_by("pk")[:MAX_CANCELLED_AT_ONCE]:
        try:
            n_cancelled += _cancel_expired(order)
        except (gateway.StripeRefused, gateway.StripeUncertain) as error:
            logger.warning("Could not close the checkout order=%s error=%s", order.pk, error)
    return n_cancelled


@transaction.atomic
def _cancel_expired(order: Order) -> bool:
    # Locked in the order in which opening and booking lock: the payment, then the order.
    payment = Payment.objects.select_for_update(of=("self",)).filter(order=order).first()
    if payment is not None and not checkouts.close_checkout(payment):
        return False
    return cancel_order(order=order)


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
