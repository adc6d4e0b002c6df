"""What a paid checkout was for, booked: a sale or a royalty."""

from payouts.models import Payment, SurplusCharge
from payouts.services import checkouts, duties, royalties, sales


def book_checkout(session_id: str) -> Payment | None:
    """Book what a session paid for, if it is paid; the amounts are Stripe's own answer, not the event's.

    Raises:
        PaymentMismatch, OrderNotPayable: see there; nothing is booked.
        checkouts.NotBookedByStripe, gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    checkout = checkouts.fetch_checkout(session_id)
    if checkout is None or SurplusCharge.objects.filter(charge_id=checkout.charge).exists():
        return None  # staff have decided that it is for nothing: its money has a place
    payment = checkouts.find_payment(checkout)
    if payment.order_id is not None:
        return sales.book_payment(payment=payment, checkout=checkout)
    booked = royalties.book_payment(payment=payment, checkout=checkout)
    duties.settle(booked.asked_of)
    return booked
