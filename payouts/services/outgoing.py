"""Transfers out of our bank account to buyers and payers: one person sends and records, another has seen it on the statement.

    refund intended    `refunds`: what it takes → refunding_bank, as a card's refund is
    recorded           one of the staff has sent it, under the bank's reference; nothing is booked
    booked             another one has seen it: refunding_bank → bank, with its credit note
    rejected           the record was wrong; the refund waits for a transfer again
    refused            it cannot be sent: the intent is reversed
    returned           it came back: bank → refunding_bank, and the intent is reversed

Money that fits no invoice goes back to its payer the same way, out of `unapplied`.
"""

import logging
from datetime import date

from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, ledger
from payouts.errors import AlreadyDecided, FourEyes, TransferNotPossible
from payouts.models import BankReceipt, JournalEntry, OutgoingTransfer, Payment, Refund
from payouts.services import documents, refunds
from payouts.services.receipts import checked_reference

logger = logging.getLogger(__name__)

Status = OutgoingTransfer.Status


def record_refund_sent(*, refund: Refund, reference: str, sent_on: date, by: User) -> OutgoingTransfer:
    """Write down that a refund has been transferred; nothing is booked. The same transfer again is the same row.

    Args:
        reference: the bank statement's own number of the transfer.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reference, or a day to come.
        TransferNotPossible: the refund goes back to a card, has ended or has another transfer; or the reference is another's.
    """
    reference = _checked(reference, sent_on, by)
    with transaction.atomic():
        _, refund = _hold(refund)
        if (known := refund.transfer) is not None and known.reference == reference:
            return known
        if not refund.is_by_bank:
            raise TransferNotPossible(f"Refund {refund.pk} goes back to the card; Stripe sends it.")
        if refund.state != Refund.State.INTENDED:
            raise TransferNotPossible(f"Refund {refund.pk} is {refund.state} already.")
        return _record(Money(refund.amount_micros, refund.currency), reference, sent_on, by, refund=refund)


def record_money_returned(
    *, receipt: BankReceipt, amount: Money, reference: str, sent_on: date, by: User
) -> OutgoingTransfer:
    """Write down that money that fits no invoice, or a part of it, has been sent back to its payer; nothing is booked.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reference, a day to come, another currency or no positive amount.
        TransferNotPossible: less is left of it, or the reference is another's.
    """
    reference = _checked(reference, sent_on, by)
    if amount.currency != receipt.currency or amount.micros <= 0 or amount.floor_to_minor() != amount:
        raise InvalidInput(
            f"Give a positive amount of {receipt.currency} in whole cents; {amount} is not.",
            pointers={"/amount": "cannot be sent"},
        )
    with transaction.atomic():
        receipt = BankReceipt.objects.select_for_update(of=("self",)).get(pk=receipt.pk)
        known = receipt.returns.filter(reference=reference, amount_micros=amount.micros).exclude(status=Status.REJECTED)
        if (found := known.first()) is not None:
            return found
        if (left := receipt.left) < amount:
            raise TransferNotPossible(
                f"{left} of {receipt.amount} is left; {amount} is too much.", pointers={"/amount": "above what is left"}
            )
        return _record(amount, reference, sent_on, by, receipt=receipt)


@transaction.atomic
def decide_transfer(*, transfer: OutgoingTransfer, approved: bool, by: User) -> OutgoingTransfer:
    """Book a recorded transfer, or reject the record; the second call with the same decision finds it decided.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user recorded it.
        AlreadyDecided: it was decided otherwise.
    """
    require_staff(user=by, to="confirm a transfer")
    payment, refund, transfer = _held_with_cause(transfer)
    wanted = Status.BOOKED if approved else Status.REJECTED
    if transfer.status == wanted:
        return transfer
    if transfer.status != Status.RECORDED:
        raise AlreadyDecided(f"This transfer was {transfer.status} already.")
    if approved and by.pk == transfer.recorded_by_id:
        raise FourEyes("You recorded it; another one of the staff must have seen it on the bank’s statement.")
    now = clock.now()
    transfer.status, transfer.decided_by, transfer.decided_at = wanted, by, now
    transfer.save(update_fields=["status", "decided_by", "decided_at"])
    if approved:
        _post(transfer, "sent", micros=transfer.amount_micros)
        if refund is not None:
            refund.state, refund.made_at = Refund.State.SENT, now
            refund.save(update_fields=["state", "made_at"])
            documents.issue_credit_note(refund)
    _note(transfer, f"transfer.{wanted.value}", by, payment)
    return transfer


@transaction.atomic
def note_returned(*, transfer: OutgoingTransfer, reference: str, note: str, by: User) -> OutgoingTransfer:
    """A booked transfer came back: the money is in the bank again, and where it was taken from; again, nothing happens.

    Args:
        reference: the bank statement's own number of what came back.
        note: why, as the bank says it; the buyer reads it.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reference, or no reason.
        AlreadyDecided: it was never booked.
    """
    require_staff(user=by, to="say that a transfer came back")
    reference = checked_reference(reference)
    if not note.strip():
        raise InvalidInput("Say why it came back, as the bank says it.", pointers={"/note": "missing"})
    payment, refund, transfer = _held_with_cause(transfer)
    if transfer.status == Status.RETURNED:
        return transfer
    if transfer.status != Status.BOOKED:
        raise AlreadyDecided(f"This transfer is {transfer.status}; what was not booked as sent cannot come back.")
    transfer.status, transfer.returned_by, transfer.returned_at = Status.RETURNED, by, clock.now()
    transfer.return_reference, transfer.return_note = reference, note.strip()
    transfer.save(update_fields=["status", "returned_by", "returned_at", "return_reference", "return_note"])
    _post(transfer, "returned", micros=-transfer.amount_micros)
    if refund is not None:
        assert payment is not None
        why = f"The buyer’s bank sent the transfer back: {transfer.return_note}."
        refunds.book_back(refund, Refund.State.FAILED, "returned", why)
    _note(transfer, "transfer.returned", by, payment)
    return transfer


@transaction.atomic
def refuse_refund(*, refund: Refund, note: str, by: User) -> Refund:
    """A refund by bank that cannot be sent: everything is where it was; again, nothing happens.

    Args:
        note: why; the buyer reads it.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reason.
        TransferNotPossible: it is a card's, has been sent, or a recorded transfer carries it: reject that first.
    """
    require_staff(user=by, to="end a refund")
    if not note.strip():
        raise InvalidInput("Say why it cannot be sent: the buyer reads it.", pointers={"/note": "missing"})
    payment, refund = _hold(refund)
    if refund.state == Refund.State.REFUSED:
        return refund
    if not refund.is_by_bank or refund.state != Refund.State.INTENDED:
        raise TransferNotPossible(
            f"Refund {refund.pk} is {refund.state} by {refund.method}; it cannot be refused here."
        )
    if refund.transfer is not None:
        raise TransferNotPossible("A transfer is recorded for it; reject that record first if nothing left.")
    refunds.book_back(refund, Refund.State.REFUSED, "not_sent", note.strip())
    audit.record(
        actor=by,
        action="refund.refused",
        target=f"payment:{payment.pk}",
        party=payment.asked_of,
        before={"state": "intended"},
        after={"state": "refused", "refund": refund.pk},
        note=note.strip(),
    )
    return refund


def refunds_to_send() -> QuerySet[Refund]:
    """What was promised by bank transfer and no transfer carries yet, the oldest first."""
    carried = OutgoingTransfer.objects.exclude(status=Status.REJECTED).filter(refund__isnull=False)
    return (
        Refund.objects.filter(method=Payment.Method.BANK, state=Refund.State.INTENDED)
        .exclude(pk__in=carried.values("refund"))
        .select_related("payment__order__buyer", "payment__invoice__report__licensee")
        .order_by("pk")
    )


def transfers_waiting() -> QuerySet[OutgoingTransfer]:
    """Recorded, and seen by one person only."""
    return (
        OutgoingTransfer.objects.filter(status=Status.RECORDED)
        .select_related("recorded_by", "refund__payment", "receipt")
        .order_by("pk")
    )


def _record(amount: Money, reference: str, sent_on: date, by: User, **cause: Refund | BankReceipt) -> OutgoingTransfer:
    try:
        with transaction.atomic():
            transfer: OutgoingTransfer = OutgoingTransfer.objects.create(
                amount_micros=amount.micros,
                currency=amount.currency,
                reference=reference,
                sent_on=sent_on,
                recorded_by=by,
                recorded_at=clock.now(),
                **cause,
            )
    except IntegrityError as error:
        raise TransferNotPossible(
            f"Transfer {reference} was recorded for something else, or another transfer for this refund.",
            pointers={"/reference": "taken"},
        ) from error
    _note(transfer, "transfer.recorded", by, transfer.refund.payment if transfer.refund else None)
    return transfer


def _post(transfer: OutgoingTransfer, stage: str, *, micros: int) -> None:
    """Out of the bank, of what was promised or held for it; with negative micros, back."""
    if transfer.refund_id is not None:
        held = chart.refunding_bank(transfer.currency)
        kind = JournalEntry.Kind.REFUND_SENT if micros > 0 else JournalEntry.Kind.REFUND_FAILED
    else:
        held = chart.unapplied(transfer.currency)
        kind = JournalEntry.Kind.UNAPPLIED_BACK if micros > 0 else JournalEntry.Kind.UNAPPLIED_AGAIN
    ledger.post(
        key=f"outgoing:{transfer.pk}:{stage}",
        kind=kind,
        postings={held: micros, chart.bank(transfer.currency): -micros},
    )


def _hold(refund: Refund) -> tuple[Payment, Refund]:
    """Locked in the order in which refunds lock: the payment, then the refund.

    Raises:
        TransferNotPossible: it is of a surplus charge.
    """
    if refund.payment_id is None:
        raise TransferNotPossible(f"Refund {refund.pk} is of a charge that is for nothing; it goes back to its card.")
    payment = (
        Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice").get(pk=refund.payment_id)
    )
    return payment, Refund.objects.select_for_update(of=("self",)).get(pk=refund.pk)


def _held_with_cause(transfer: OutgoingTransfer) -> tuple[Payment | None, Refund | None, OutgoingTransfer]:
    payment: Payment | None = None
    refund: Refund | None = None
    if transfer.refund is not None:
        payment, refund = _hold(transfer.refund)
    elif transfer.receipt is not None:
        BankReceipt.objects.select_for_update(of=("self",)).get(pk=transfer.receipt.pk)
    return payment, refund, OutgoingTransfer.objects.select_for_update(of=("self",)).get(pk=transfer.pk)


def _checked(reference: str, sent_on: date, by: User) -> str:
    require_staff(user=by, to="record a transfer")
    if sent_on > clock.today():
        raise InvalidInput(f"{sent_on} is still to come.", pointers={"/sent_on": "in the future"})
    return checked_reference(reference)


def _note(transfer: OutgoingTransfer, action: str, by: User, payment: Payment | None) -> None:
    audit.record(
        actor=by,
        action=action,
        target=f"transfer:{transfer.pk}",
        party=payment.asked_of if payment is not None else None,
        after={
            "status": transfer.status,
            "refund": transfer.refund_id,
            "receipt": transfer.receipt_id,
            "amount_micros": transfer.amount_micros,
            "currency": transfer.currency,
            "reference": transfer.reference,
        },
    )
    logger.info("Outgoing transfer=%s status=%s micros=%s", transfer.pk, transfer.status, transfer.amount_micros)
