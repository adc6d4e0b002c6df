"""A sale: the buyer pays once, and in one transaction the licenses are granted and every part of the price has its place."""

import logging
from datetime import UTC, datetime, time, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from marketplace import clock
from marketplace.models import License, Order
from marketplace.services.orders import cancel_order, extend_payment, hold_payable, mark_paid
from payouts import chart, gateway, ledger
from payouts.errors import AlreadyPaid
from payouts.models import Division, Document, JournalEntry, Payment, RoyaltyPool
from payouts.services import billing, checkouts, documents
from payouts.services.divisions import divide

logger = logging.getLogger(__name__)

#: What a pool waits after the disclosure was due, and from the sale where no disclosure is due.
POOL_GRACE = timedelta(days=30)
POOL_WAITS = timedelta(days=180)
MAX_CANCELLED_AT_ONCE = 1_000
#: How long an order waits beyond the day on which its invoice is due.
INVOICE_GRACE = timedelta(days=14)


def start_checkout(*, order: Order, success_url: str, cancel_url: str, purchase_order: str | None = None) -> str:
    """The address at Stripe where the buyer pays the order; the webhook, not the way back, marks it paid.

    Args:
        purchase_order: the buyer's own number, for the invoice; None: as it was.

    Raises:
        AlreadyPaid: it is.
        PaymentUnderWay: the buyer's bank is confirming a debit.
        OrderNotPayable, OfferNotOpen, BuyerInArrears: it was cancelled, its deadline is over, an offer of it has changed, or
            the buyer owes royalties.
        PayByBankTransfer: it is more than Stripe takes at once.
        StripeUnavailable, StripeDeclined: see `payouts.errors`.
    """
    if order.status == Order.Status.PAID:
        raise AlreadyPaid(f"Order {order.public_id} has been paid.")
    checkouts.refuse_while_under_way(Payment.objects.filter(order=order).first())
    payment = _ask_for(order, purchase_order=purchase_order)
    checkouts.refuse_too_much(payment)
    lines = [
        gateway.CheckoutLine(f"{line.version.dataset.title}, version {line.version.number}", line.price.to_minor())
        for line in order.lines.select_related("order", "version__dataset").order_by("pk")
    ]
    return checkouts.open_checkout(
        payment=payment,
        lines=[*lines, *billing.tax_line(payment)],
        success_url=success_url,
        cancel_url=cancel_url,
        still_due=lambda: hold_payable(order, is_invoiced=payment.due_on is not None),
    )


def invoice_order(*, order: Order, purchase_order: str = "") -> Document:
    """Issue the order's invoice before it is paid, to be paid by its due day: by bank transfer, or on Stripe's page.

    Harmless to call twice: there is one invoice.

    Raises:
        AlreadyPaid: it is.
        OrderNotPayable, OfferNotOpen, BuyerInArrears: see `start_checkout`.
        InvalidInput: the buyer's billing address is missing, or the number is too long.
    """
    if order.status == Order.Status.PAID:
        raise AlreadyPaid(f"Order {order.public_id} has been paid.")
    billing.require_profile(order.buyer)
    checkouts.refuse_while_under_way(Payment.objects.filter(order=order).first())
    with transaction.atomic():
        payment = _ask_for(order, purchase_order=purchase_order)
        payment = Payment.objects.select_for_update(of=("self",)).get(pk=payment.pk)
        if payment.due_on is None:
            if not checkouts.close_checkout(payment):
                raise checkouts.why_taken(payment)
            payment.due_on = clock.today() + timedelta(days=settings.INVOICE_DUE_DAYS)
            payment.save(update_fields=["due_on"])
            last = datetime.combine(payment.due_on + INVOICE_GRACE, time.max, tzinfo=UTC)
            extend_payment(order=order, until=last)
            logger.info("Invoiced order=%s payment=%s due_on=%s", order.pk, payment.pk, payment.due_on)
        return documents.issue_invoice(payment)


@transaction.atomic
def _ask_for(order: Order, *, purchase_order: str | None) -> Payment:
    """The order's payment, with the tax and the number that it asks for now; what was invoiced keeps both.

    A page at Stripe that asks for another amount is closed first.
    """
    payment = Payment.objects.select_for_update(of=("self",)).filter(order=order).first()
    hold_payable(order, is_invoiced=payment is not None and payment.due_on is not None)
    if payment is not None and (payment.due_on is not None or payment.status == Payment.Status.PAID):
        return payment
    tax = billing.tax_on(order.total, party=order.buyer)
    asked: dict[str, object] = {
        "amount_micros": order.total_micros + tax.amount.micros,
        "tax_micros": tax.amount.micros,
        "tax_rate": tax.rate,
    }
    if purchase_order is not None:
        asked["purchase_order"] = billing.checked_purchase_order(purchase_order)
    if payment is None:
        payment, _ = Payment.objects.get_or_create(order=order, defaults={"currency": order.currency, **asked})
        return payment
    is_other = payment.amount_micros != asked["amount_micros"]
    if is_other and payment.checkout_id and not checkouts.close_checkout(payment):
        raise checkouts.why_taken(payment)
    for name, value in asked.items():
        setattr(payment, name, value)
    payment.save(update_fields=list(asked))
    return payment


def cancel_expired_orders() -> int:
    """Cancel what was not paid in time, its page at Stripe first, so that nobody pays for what is gone; returns how many.

    What has been paid there, or is being confirmed by a bank, is left to the event that says so; what Stripe does not answer to,
    to the next call. Those that were asked about longest ago come first, so that none of these keeps the others waiting.
    """
    n_cancelled = 0
    late = Order.objects.filter(status=Order.Status.PLACED, expires_at__lte=clock.now())
    asked_first = F("payment__checkout_asked_at").asc(nulls_first=True)
    for order in late.order_by(asked_first, "pk")[:MAX_CANCELLED_AT_ONCE]:
        Payment.objects.filter(order=order).update(checkout_asked_at=timezone.now())
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
    order.refresh_from_db(fields=["expires_at"])
    if order.expires_at > clock.now():
        return False  # its bank has refused a debit, and the buyer has time to pay otherwise
    if payment is not None and payment.is_on_its_way:
        return False  # its money is there, and waits for a second person
    was_unpaid = cancel_order(order=order)
    if was_unpaid and payment is not None:
        documents.cancel_invoice(payment, why="It was not paid in time.")
    return was_unpaid


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
    return book_taken(taken)


def book_taken(taken: Payment) -> Payment:
    """Inside the transaction that marked the payment paid: licenses, the sale's entry, pools and upfront shares."""
    order = taken.order
    assert order is not None and taken.paid_at is not None
    licenses = {license.order_line_id: license for license in mark_paid(order=order, paid_at=taken.paid_at)}
    order.refresh_from_db()

    currency, fee = taken.currency, 0
    lines = list(order.lines.select_related("offer", "version", "order").order_by("pk"))
    postings = checkouts.cash_legs(taken) | billing.tax_legs(taken)
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
    documents.issue_invoice(taken)
    logger.info("Booked sale order=%s payment=%s micros=%s %s", order.pk, taken.pk, taken.amount_micros, currency)
    return taken


def _deadline(license: License, paid_at: datetime) -> datetime:
    if license.offer.disclosure_due_days:
        return license.disclosure_due_at + POOL_GRACE
    return paid_at + POOL_WAITS
