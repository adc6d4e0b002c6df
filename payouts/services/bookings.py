"""What a paid checkout was for, booked: a sale or a royalty."""

from payouts.models import Payment
from payouts.services import checkouts, royalties, sales


def book_checkout(session_id: str) -> Payment | None:
    """Book what a session paid for, if it is paid; the amounts are Stripe's own answer, not the event's.

    Raises:
        PaymentMismatch, OrderNotPayable: see there; nothing is booked.
        checkouts.NotBookedByStripe, gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    checkout = checkouts.fetch_checkout(session_id)
    if checkout is None:
        return None
    payment = checkouts.find_payment(checkout)
    book = sales.book_payment if payment.order_id is not None else royalties.book_payment
    return book(payment=payment, checkout=checkout)
