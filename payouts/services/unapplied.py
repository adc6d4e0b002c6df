"""Money in our bank account that fits no invoice: its payer's, until it is applied to one or goes back.

    recorded   by one of the staff, from the bank's statement; nothing is booked
    booked     another one has seen it too: bank → unapplied
    applied    it pays an open invoice exactly, perhaps together with other such money; what is over stays unapplied
    returned   to its payer (`outgoing`): unapplied → bank

Proposing and booking an application take two people as well: it decides whose money it is.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import MINOR_DIGITS, Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts.errors import AlreadyDecided, AlreadyPaid, FourEyes, ReceiptNotPossible
from payouts.models import BankReceipt, Document, Payment, ReceiptApplication, ReceiptUse
from payouts.services import receipts

logger = logging.getLogger(__name__)

Status = ReceiptApplication.Status
MAX_PAYER, MAX_NOTE = 200, 500


@transaction.atomic
def record_unapplied(
    *, payer: str, amount: Money, reference: str, received_on: date, by: User, note: str = ""
) -> BankReceipt:
    """Write down money that arrived and fits no invoice; nothing is booked. The same transfer again is the same row.

    Args:
        payer: as the statement names them.
        reference: the bank statement's own number of the transfer.
        note: what it may have been meant for.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no payer, no number, a day to come, or an amount that cannot be.
        ReceiptNotPossible: the transfer is recorded otherwise.
    """
    reference = receipts.checked(reference, received_on, by)
    payer, note = " ".join(payer.split()), " ".join(note.split())
    if not 1 <= len(payer) <= MAX_PAYER:
        raise InvalidInput("Name the payer, as the statement does.", pointers={"/payer": "missing"})
    if len(note) > MAX_NOTE:
        raise InvalidInput(f"Say it in at most {MAX_NOTE} characters.", pointers={"/note": "too long"})
    if amount.currency not in MINOR_DIGITS or amount.micros <= 0 or amount.floor_to_minor() != amount:
        raise InvalidInput(
            f"Give a positive amount in whole cents; {amount} is not.", pointers={"/amount": "cannot have arrived"}
        )
    known = BankReceipt.objects.exclude(status=BankReceipt.Status.REJECTED).filter(reference=reference).first()
    if known is not None and (known.payment_id, known.payer, known.amount) == (None, payer, amount):
        return known
    try:
        with transaction.atomic():
            receipt = BankReceipt.objects.create(
                payer=payer,
                note=note,
                amount_micros=amount.micros,
                currency=amount.currency,
                reference=reference,
                received_on=received_on,
                recorded_by=by,
                recorded_at=clock.now(),
            )
    except IntegrityError as error:
        raise ReceiptNotPossible(
            f"Transfer {reference} is recorded already, for an invoice or with another payer or amount.",
            pointers={"/reference": "taken"},
        ) from error
    receipts.note(receipt, "receipt.recorded", by)
    return receipt


@transaction.atomic
def propose_application(*, payment: Payment, money: Sequence[BankReceipt], by: User) -> ReceiptApplication:
    """Propose that money that fits no invoice pays one after all, exactly; nothing is booked.

    What arrived first is used first; of the last one what is over stays unapplied. The same proposal again is the same row.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no money, another currency, or together less than the invoice asks for.
        AlreadyPaid, ReceiptNotPossible: the invoice is paid, cancelled, not invoiced, or a transfer for it waits already.
    """
    require_staff(user=by, to="say what money pays")
    payment = Payment.objects.select_for_update(of=("self",)).get(pk=payment.pk)
    wanted = {receipt.pk for receipt in money}
    known = payment.applications.exclude(status=Status.REJECTED).first()
    if known is not None:
        if known.status == Status.PROPOSED and set(known.uses.values_list("receipt", flat=True)) <= wanted:
            return known
        raise ReceiptNotPossible("Other money is applied to this invoice already.")
    if payment.status == Payment.Status.PAID:
        raise AlreadyPaid(f"Payment {payment.pk} has been paid; this money is for something else, or goes back.")
    if payment.is_on_its_way:
        raise ReceiptNotPossible("A transfer is recorded for this invoice and waits for a second person.")
    if not Document.objects.filter(payment=payment, kind="INV", cancels=None, cancelled_by=None).exists():
        raise ReceiptNotPossible("This was not invoiced, or its invoice was cancelled: nobody owes it.")
    held = list(BankReceipt.objects.select_for_update(of=("self",)).filter(pk__in=wanted).order_by("received_on", "pk"))
    if any(receipt.currency != payment.currency for receipt in held):
        raise InvalidInput(
            f"The invoice is in {payment.currency}; nothing is exchanged.", pointers={"/money": "another currency"}
        )
    uses: dict[int, int] = {}
    missing = payment.amount_micros
    for receipt in held:
        if take := min(receipt.left.micros, missing):
            uses[receipt.pk] = take
            missing -= take
    if missing or not uses:
        raise InvalidInput(
            f"The invoice asks for {payment.amount}; {Money(missing, payment.currency)} is missing. Add other money of this "
            "payer, or wait for it: an invoice is paid exactly.",
            pointers={"/money": "too little"},
        )
    application = ReceiptApplication.objects.create(
        payment=payment,
        amount_micros=payment.amount_micros,
        currency=payment.currency,
        proposed_by=by,
        proposed_at=clock.now(),
    )
    for pk, micros in uses.items():
        ReceiptUse.objects.create(application=application, receipt_id=pk, amount_micros=micros)
    _note(application, "application.proposed", by)
    return application


@transaction.atomic
def decide_application(*, application: ReceiptApplication, approved: bool, by: User) -> ReceiptApplication:
    """Book that the money pays the invoice, or reject it; the second call with the same decision finds it decided.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user proposed it.
        AlreadyDecided: it was decided otherwise.
        ReceiptNotPossible: the payment was made on Stripe's page meanwhile.
        OrderNotPayable: the order was cancelled meanwhile; reject it, and return the money.
    """
    require_staff(user=by, to="say what money pays")
    payment = receipts.hold_payment(application.payment_id)
    application = ReceiptApplication.objects.select_for_update(of=("self",)).get(pk=application.pk)
    wanted = Status.BOOKED if approved else Status.REJECTED
    if application.status == wanted:
        return application
    if application.status != Status.PROPOSED:
        raise AlreadyDecided(f"This application was {application.status} already.")
    if approved and by.pk == application.proposed_by_id:
        raise FourEyes("You proposed it; another one of the staff must decide.")
    application.status, application.decided_by, application.decided_at = wanted, by, clock.now()
    application.save(update_fields=["status", "decided_by", "decided_at"])
    if approved:
        receipts.book_paid(payment)
    _note(application, f"application.{wanted.value}", by)
    return application


@dataclass(frozen=True)
class Unapplied:
    """Money that fits no invoice, what of it is left, and for how long it has been here."""

    receipt: BankReceipt
    left: Money
    days: int


def unapplied() -> QuerySet[BankReceipt]:
    """What is booked and not used up, the oldest first."""
    return BankReceipt.objects.with_left().select_related("recorded_by", "decided_by").order_by("received_on", "pk")


def with_age(receipts: Iterable[BankReceipt]) -> list[Unapplied]:
    today = clock.today()
    return [Unapplied(receipt, receipt.left, (today - receipt.received_on).days) for receipt in receipts]


def applications_waiting() -> QuerySet[ReceiptApplication]:
    return (
        ReceiptApplication.objects.filter(status=Status.PROPOSED)
        .select_related("proposed_by", "payment__order__buyer", "payment__invoice__report__licensee")
        .prefetch_related("uses__receipt")
        .order_by("pk")
    )


def _note(application: ReceiptApplication, action: str, by: User) -> None:
    audit.record(
        actor=by,
        action=action,
        target=f"payment:{application.payment_id}",
        party=application.payment.asked_of,
        after={
            "application": application.pk,
            "status": application.status,
            "amount_micros": application.amount_micros,
            "currency": application.currency,
            "receipts": sorted(application.uses.values_list("receipt", flat=True)),
        },
    )
    logger.info("Application=%s status=%s micros=%s", application.pk, application.status, application.amount_micros)
