"""A checkout at Stripe for one order or one royalty invoice: opened here, and checked here once Stripe says it is paid.

open → complete and paid (a card)
     → complete, and the buyer's bank says in days whether a debit goes through → paid | failed: a new page may be opened
     → expired: a new page may be opened
"""

import logging
from collections.abc import Callable, Sequence

from django.db import transaction

from marketplace import clock
from marketplace.errors import DomainError
from marketplace.money import MAX_CHARGE_MINOR, Money
from marketplace.services.orders import PAYMENT_TERM, extend_payment
from payouts import chart, gateway
from payouts.errors import (
    AlreadyPaid,
    PayByBankTransfer,
    PaymentMismatch,
    PaymentUnderWay,
    StripeUnavailable,
)
from payouts.models import Payment, SurplusCharge
from payouts.services import debits
from payouts.services.refusals import declined

logger = logging.getLogger(__name__)

MAX_ITEMS = 100  # that Stripe lists on its page


class NotBookedByStripe(Exception):
    """Stripe has the money and has not yet written its balance transaction; ask again."""


def reference_of(payment: Payment) -> str:
    """What a checkout is for, as Stripe is told and must say again."""
    if payment.order is not None:
        return str(payment.order.public_id)
    # Of a payment whose amount was asked anew the earlier page is closed, so one name suffices.
    return f"royalty-invoice-{payment.invoice_id}"


def open_checkout(
    *,
    payment: Payment,
    lines: Sequence[gateway.CheckoutLine],
    success_url: str,
    cancel_url: str,
    still_due: Callable[[], object] = lambda: None,
) -> str:
    """The address of the payment's page at Stripe: the open one, or a new one if it has expired.

    The row stays locked while Stripe is asked, so that two clicks at once give one page.

    Args:
        still_due: called once the row is locked; it raises if there is nothing to pay any more.

    Raises:
        AlreadyPaid: it is, or Stripe says so and the webhook is on its way.
        PaymentUnderWay: the buyer's bank is confirming a debit.
        StripeUnavailable, StripeDeclined: see the classes.
    """
    under_way: PaymentUnderWay | None = None
    with transaction.atomic():
        payment.refresh_from_db(from_queryset=Payment.objects.select_for_update())
        if payment.status == Payment.Status.PAID:
            raise AlreadyPaid("This has been paid.")
        still_due()
        try:
            url = _open_page(payment, lines, success_url, cancel_url)
        except gateway.StripeUncertain as error:
            # Not raised in here: what was learnt of the attempt's key must stay written.
            payment.save(update_fields=["checkout_attempt"])
            failure: Exception = error
        except PaymentUnderWay as error:
            under_way = error  # likewise: since when it is must stay written
        else:
            return url
    if under_way is not None:
        raise under_way
    raise StripeUnavailable("Stripe did not answer. Nothing was charged; try again in a minute.") from failure


def _open_page(payment: Payment, lines: Sequence[gateway.CheckoutLine], success_url: str, cancel_url: str) -> str:
    try:
        if payment.checkout_id:
            known = gateway.get_checkout(payment.checkout_id)
            if known.status == "open":
                return payment.checkout_url
            _note_bank(payment, known)
            if not _is_over(known):
                raise why_taken(payment)
            payment.checkout_attempt += 1
        session = _create(payment, lines, success_url, cancel_url)
    except gateway.StripeRefused as error:
        raise declined(error, "Stripe does not accept this payment") from error
    payment.checkout_id, payment.checkout_url = session.id, session.url
    payment.awaits_bank_since, payment.bank_refused_at, payment.bank_refusal = None, None, ""
    payment.save(
        update_fields=[
            "checkout_id",
            "checkout_url",
            "checkout_attempt",
            "awaits_bank_since",
            "bank_refused_at",
            "bank_refusal",
        ]
    )
    logger.info("Opened checkout payment=%s micros=%s %s", payment.pk, payment.amount_micros, payment.currency)
    return session.url


def close_checkout(payment: Payment) -> bool:
    """Inside a transaction that holds the payment's row: close its page at Stripe; False if it was paid there, or may yet be.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    if payment.status == Payment.Status.PAID:
        return False
    if not payment.checkout_id:
        return True
    known = gateway.get_checkout(payment.checkout_id)
    _note_bank(payment, known)
    if known.status == "open":
        gateway.expire_checkout(payment.checkout_id)
    return known.status == "open" or _is_over(known)


def _is_over(known: gateway.PaidCheckout) -> bool:
    """Whether nothing comes of the page any more: expired, its debit refused, or its money booked as being for nothing."""
    if known.status != "complete":
        return known.status == "expired"
    return known.has_failed or SurplusCharge.objects.filter(charge_id=known.charge).exists()


def why_taken(payment: Payment) -> DomainError:
    """Why nothing else can be paid while its page is done."""
    if payment.awaits_bank_since is not None:
        return PaymentUnderWay(
            f"The bank has been confirming the debit since {payment.awaits_bank_since:%d %B %Y}; that usually takes up to five "
            "working days. Nothing more is to be done until it has answered."
        )
    return AlreadyPaid("Stripe has taken the payment; its confirmation arrives within a minute.")


def refuse_while_under_way(payment: Payment | None) -> None:
    """Raise if a bank is still confirming a debit, as Stripe says now.

    Raises:
        PaymentUnderWay, AlreadyPaid, StripeUnavailable: see the classes.
    """
    if payment is None or payment.awaits_bank_since is None:
        return
    with transaction.atomic():
        held = Payment.objects.select_for_update(of=("self",)).select_related("order").get(pk=payment.pk)
        if held.awaits_bank_since is None or held.checkout_id is None:
            return
        try:
            known = gateway.get_checkout(held.checkout_id)
        except (gateway.StripeRefused, gateway.StripeUncertain) as error:
            raise StripeUnavailable("Stripe did not answer. Nothing was charged; try again in a minute.") from error
        _note_bank(held, known)
    if not _is_over(known):
        raise why_taken(held)


@transaction.atomic
def note_unpaid(checkout: gateway.PaidCheckout) -> None:
    """Write down how a session that is not paid stands: a bank confirms its debit, or has refused it."""
    named = checkout.metadata.get("payment", "")
    payments = Payment.objects.select_for_update(of=("self",)).select_related("order")
    payment = payments.filter(pk=int(named)).first() if named.isdigit() else None
    if payment is not None and payment.checkout_id == checkout.id:
        _note_bank(payment, checkout)


def _note_bank(payment: Payment, known: gateway.PaidCheckout) -> None:
    """Inside a transaction that holds the payment's row. A buyer whose bank has refused is given time to pay otherwise."""
    if payment.status == Payment.Status.PAID:
        return
    if known.awaits_bank and payment.awaits_bank_since is None:
        payment.awaits_bank_since = clock.now()
        logger.info("Awaits bank payment=%s checkout=%s", payment.pk, known.id)
    elif known.has_failed and payment.bank_refused_at is None:
        payment.awaits_bank_since, payment.bank_refused_at, payment.bank_refusal = None, clock.now(), known.failure
        if payment.order is not None:
            extend_payment(order=payment.order, until=max(payment.order.expires_at, clock.now() + PAYMENT_TERM))
        debits.note_refused(payment, checkout_id=known.id)
        logger.info("Bank refused payment=%s checkout=%s", payment.pk, known.id)
    else:
        return
    payment.save(update_fields=["awaits_bank_since", "bank_refused_at", "bank_refusal"])


def fetch_checkout(session_id: str) -> gateway.PaidCheckout | None:
    """What Stripe itself says of a session; `None` while it is not paid, and then how it stands is written down.

    Raises:
        NotBookedByStripe: see the class.
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    checkout = gateway.get_checkout(session_id)
    if not checkout.is_paid:
        note_unpaid(checkout)
        return None
    if checkout.balance_transaction is None:
        raise NotBookedByStripe(f"Checkout {session_id}")
    return checkout


def refuse_too_much(payment: Payment) -> None:
    """Raise if it is more than Stripe takes at once.

    Raises:
        PayByBankTransfer: see the class.
    """
    if payment.amount.to_minor() > MAX_CHARGE_MINOR[payment.currency]:
        most = Money.from_minor(MAX_CHARGE_MINOR[payment.currency], payment.currency)
        raise PayByBankTransfer(
            f"{payment.amount} is more than the {most} that a card payment takes at once. Pay it by bank transfer: the invoice "
            "says where to, and under which number."
        )


def cash_legs(taken: Payment) -> dict[str, int]:
    """Where a paid payment's money is: at Stripe, less its fee, or in our bank account, as this payment's or as nobody's so far."""
    if taken.method == Payment.Method.BANK:
        is_applied = taken.applications.filter(status="booked").exists()
        return {(chart.unapplied if is_applied else chart.bank)(taken.currency): taken.amount_micros}
    assert taken.fee_micros is not None
    return {
        chart.cash_pending(taken.currency): taken.amount_micros - taken.fee_micros,
        chart.stripe_fees(taken.currency): taken.fee_micros,
    }


def find_payment(checkout: gateway.PaidCheckout) -> Payment:
    """The payment that a paid session is for.

    Raises:
        PaymentMismatch: none of ours.
    """
    named = checkout.metadata.get("payment", "")
    payment = Payment.objects.filter(pk=int(named)).first() if named.isdigit() else None
    if payment is None:
        raise PaymentMismatch(f"Checkout {checkout.id} is paid, and we know of no payment that it is for.")
    return payment


def take_payment(*, payment: Payment, checkout: gateway.PaidCheckout) -> Payment | None:
    """Inside the transaction that books it: mark the payment paid; `None` if it was already.

    Raises:
        PaymentMismatch: amount, currency or purpose is not ours, or another session has paid already.
    """
    payment = Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice").get(pk=payment.pk)
    if SurplusCharge.objects.filter(charge_id=checkout.charge).exists():
        return None  # decided while we waited for the row
    if payment.status == Payment.Status.PAID:
        if payment.charge_id == checkout.charge:
            return None
        raise PaymentMismatch(
            f"Payment {payment.pk} was paid twice: by charge {payment.charge_id} and by {checkout.charge}. Refund one."
        )
    wanted = (payment.amount.to_minor(), payment.currency, reference_of(payment))
    given = (checkout.amount_total_minor, checkout.currency, checkout.public_reference)
    if wanted != given or not checkout.is_paid:
        raise PaymentMismatch(f"Payment {payment.pk} asked for {wanted}; checkout {checkout.id} is for {given}.")
    if checkout.booked_currency != payment.currency:
        raise PaymentMismatch(
            f"Payment {payment.pk} is in {payment.currency}, and Stripe booked charge {checkout.charge} in "
            f"{checkout.booked_currency}: we hold no balance in {payment.currency} there. Open one, or refund the charge."
        )
    assert checkout.fee_minor is not None and checkout.available_on is not None
    payment.status = Payment.Status.PAID
    payment.checkout_id = checkout.id
    payment.charge_id = checkout.charge
    payment.balance_transaction_id = checkout.balance_transaction
    payment.fee_micros = Money.from_minor(checkout.fee_minor, payment.currency).micros
    payment.available_on = checkout.available_on
    payment.paid_at = clock.now()
    payment.awaits_bank_since, payment.bank_refused_at, payment.bank_refusal = None, None, ""
    payment.save()
    return payment


def _create(
    payment: Payment, lines: Sequence[gateway.CheckoutLine], success_url: str, cancel_url: str
) -> gateway.CheckoutSession:
    """Ask with the attempt's key, and with the next one if that key is bound to other addresses.

    Stripe repeats a 5xx under its key for a day, so the next call has the next attempt. A session of an earlier key was
    never shown to anybody: its address is stored in the transaction that holds the row.
    """
    if len(lines) > MAX_ITEMS:
        lines = [gateway.CheckoutLine(f"{len(lines)} datasets", payment.amount.to_minor())]
    while True:
        try:
            return gateway.create_checkout(
                order_id=reference_of(payment),
                public_reference=reference_of(payment),
                lines=lines,
                currency=payment.currency,
                success_url=success_url,
                cancel_url=cancel_url,
                key=f"checkout:{payment.pk}:{payment.checkout_attempt}",
                metadata={"payment": str(payment.pk)},
            )
        except gateway.StripeUncertain as error:
            payment.checkout_attempt += error.is_key_spent
            if error.http_status is None or error.http_status >= 500 or not error.is_key_spent:
                raise
