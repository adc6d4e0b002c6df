"""A debit that the buyer's bank refused: told to the buyer by mail, once, with what to do about it."""

from django.conf import settings
from django.urls import reverse

from marketplace import clock, jobs
from marketplace.mail import send_mail
from marketplace.models import Order
from marketplace.services.authority import owners_emails
from payouts.models import DebitRefusal, Payment


def note_refused(payment: Payment, *, checkout_id: str) -> DebitRefusal:
    """Inside the transaction that writes the refusal to the payment: queue the mail about it; again, nothing happens.

    A page's debit is refused once, so its id stands for the refusal.
    """
    assert payment.bank_refused_at is not None
    refusal, is_new = DebitRefusal.objects.get_or_create(
        checkout_id=checkout_id,
        defaults={"payment": payment, "reason": payment.bank_refusal, "refused_at": payment.bank_refused_at},
    )
    if is_new:
        jobs.wake(refusal)
    return refusal


def send_refusal(refusal: DebitRefusal) -> None:
    """Tell every owner of the buyer, unless it was paid or cancelled meanwhile, or another debit is on its way."""
    payment = refusal.payment
    is_over = payment.order is not None and payment.order.status != Order.Status.PLACED
    if payment.status == Payment.Status.PAID or payment.awaits_bank_since is not None or is_over:
        return
    if payment.order is not None:
        what, pay_until = "your order", payment.order.expires_at
        path = reverse("order", args=[payment.order.public_id])
    else:
        assert payment.invoice is not None  # a database check
        what, pay_until = f"the royalties on {payment.invoice.report.model.name}", None
        path = reverse("royalty-invoice", args=[payment.invoice.pk])
    context = {
        "what": what,
        "amount": payment.amount,
        "reason": refusal.reason,
        "refused_at": refusal.refused_at,
        "pay_until": pay_until,
        "link": f"{settings.BASE_URL}{path}",
    }
    for email in owners_emails(payment.asked_of):
        subject = f"Your bank refused the debit of {payment.amount}"
        send_mail("debit_refused", to=email, subject=subject, context=context)
    refusal.write(mailed_at=clock.now())
