"""Transfers to our own bank account: recorded by one of the staff, booked when another has seen it on the statement too."""

import logging
from datetime import date

from django.db import IntegrityError, transaction

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, ledger
from payouts.errors import AlreadyPaid, FourEyes, ReceiptNotPossible
from payouts.models import BankReceipt, Document, JournalEntry, Payment
from payouts.services import checkouts, duties, royalties, sales

logger = logging.getLogger(__name__)

Status = BankReceipt.Status
MAX_REFERENCE = 120


@transaction.atomic
def record_receipt(*, payment: Payment, amount: Money, reference: str, received_on: date, by: User) -> BankReceipt:
    """Write down that an invoice's money has arrived; nothing is booked. The same transfer again is the same row.

    Args:
        reference: the bank statement's own number of the transfer.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no number, a day to come, or another amount than the invoice's: record it as fitting none (`unapplied`).
        AlreadyPaid: it is; the same.
        ReceiptNotPossible: it was not invoiced, or the transfer is another payment's.
    """
    reference = checked(reference, received_on, by)
    payment = Payment.objects.select_for_update(of=("self",)).get(pk=payment.pk)
    known = BankReceipt.objects.exclude(status=Status.REJECTED).filter(reference=reference).first()
    if known is not None and (known.payment_id, known.amount) == (payment.pk, amount):
        return known
    if payment.status == Payment.Status.PAID:
        raise AlreadyPaid(f"Payment {payment.pk} has been paid. Record the transfer as money that fits no invoice.")
    if amount != payment.amount:
        raise InvalidInput(
            f"The invoice asks for {payment.amount}; {amount} arrived. Record it as money that fits no invoice: from there it is "
            "applied once it pays one exactly, or goes back.",
            pointers={"/amount": f"should be {payment.amount}"},
        )
    if not Document.objects.filter(payment=payment).exists():
        raise ReceiptNotPossible("This was not invoiced, so nobody was asked for a transfer.")
    try:
        with transaction.atomic():
            receipt = BankReceipt.objects.create(
                payment=payment,
                amount_micros=amount.micros,
                currency=amount.currency,
                reference=reference,
                received_on=received_on,
                recorded_by=by,
                recorded_at=clock.now(),
            )
    except IntegrityError as error:
        raise ReceiptNotPossible(
            f"Transfer {reference} was recorded for another payment, or another transfer for this one."
        ) from error
    note(receipt, "receipt.recorded", by)
    return receipt


@transaction.atomic
def decide_receipt(*, receipt: BankReceipt, approved: bool, by: User) -> BankReceipt:
    """Book a recorded transfer, or reject it; the second call with the same decision finds it decided.

    One that fits no invoice is held for its payer.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user recorded it.
        ReceiptNotPossible: it was decided otherwise, or the payment was made on Stripe's page meanwhile.
        OrderNotPayable: the order was cancelled; reject it, and record the transfer as money that fits no invoice.
    """
    require_staff(user=by, to="confirm a transfer")
    payment = hold_payment(receipt.payment_id) if receipt.payment_id is not None else None
    receipt = BankReceipt.objects.select_for_update(of=("self",)).get(pk=receipt.pk)
    wanted = Status.BOOKED if approved else Status.REJECTED
    if receipt.status == wanted:
        return receipt
    if receipt.status != Status.RECORDED:
        raise ReceiptNotPossible(f"This transfer was {receipt.status} already.")
    if approved and by.pk == receipt.recorded_by_id:
        raise FourEyes("Somebody else has to confirm it: you recorded it.")
    receipt.status, receipt.decided_by, receipt.decided_at = wanted, by, clock.now()
    receipt.save(update_fields=["status", "decided_by", "decided_at"])
    if approved and payment is not None:
        book_paid(payment)
    elif approved:
        ledger.post(
            key=f"receipt:{receipt.pk}",
            kind=JournalEntry.Kind.UNAPPLIED,
            postings={
                chart.bank(receipt.currency): receipt.amount_micros,
                chart.unapplied(receipt.currency): -receipt.amount_micros,
            },
            booked_at=receipt.decided_at,
        )
    note(receipt, f"receipt.{wanted.value}", by)
    return receipt


def hold_payment(pk: int) -> Payment:
    """Inside a transaction: the payment with its row held, and all that booking it needs."""
    return Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice", "tax_rate").get(pk=pk)


def book_paid(payment: Payment) -> None:
    """Inside the transaction that holds its row: money in our bank account pays it.

    Raises:
        ReceiptNotPossible: it was made on Stripe's page meanwhile.
        OrderNotPayable: the order was cancelled.
    """
    if payment.status == Payment.Status.PAID or not checkouts.close_checkout(payment):
        raise ReceiptNotPossible(
            f"Payment {payment.pk} was made on Stripe's page, or its bank is confirming a debit. Reject this; the transfer is money "
            "that fits no invoice."
        )
    now = clock.now()
    payment.status, payment.method = Payment.Status.PAID, Payment.Method.BANK
    payment.fee_micros, payment.available_on, payment.paid_at, payment.settled_at = 0, now, now, now
    payment.save()
    if payment.order_id is not None:
        sales.book_taken(payment)
    else:
        royalties.book_taken(payment)
        duties.settle(payment.asked_of)


def checked(reference: str, received_on: date, by: User) -> str:
    """The statement's number, tidied up.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no number, or a day to come.
    """
    require_staff(user=by, to="record a transfer")
    if received_on > clock.today():
        raise InvalidInput(f"{received_on} is still to come.", pointers={"/received_on": "in the future"})
    return checked_reference(reference)


def checked_reference(reference: str) -> str:
    """
    Raises:
        InvalidInput: there is none, or it is too long.
    """
    reference = " ".join(reference.split())
    if not 1 <= len(reference) <= MAX_REFERENCE:
        raise InvalidInput("Give the statement's number of the transfer.", pointers={"/reference": "missing"})
    return reference


def note(receipt: BankReceipt, action: str, by: User) -> None:
    """In the audit log."""
    payment = receipt.payment
    audit.record(
        actor=by,
        party=payment.asked_of if payment is not None else None,
        action=action,
        target=f"payment:{payment.pk}" if payment is not None else f"receipt:{receipt.pk}",
        receipt=receipt.pk,
        amount_micros=receipt.amount_micros,
        currency=receipt.currency,
    )
