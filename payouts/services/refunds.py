"""Refunds: intent, then effect, as payouts are. What was paid by bank transfer is intended here too, and sent by `outgoing`.

    intended   what it takes → refunding, committed before Stripe is called; the licenses of what is refunded wholly end
    sent       Stripe took it from our balance: refunding → cash (pending: the card's bank has yet to accept it)
    refused    Stripe definitely refused: the intent is reversed, the licenses are back
    failed     the card's bank sent it back: cash → refunding, and the intent is reversed

A refund as of right is of what was never downloaded. Staff may refund anything that is left, and say why.
"""

import logging
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from django.db import transaction
from django.db.models import QuerySet, Sum
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.errors import InvalidInput, KeyReused
from marketplace.models import License, Order, User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_authority, require_staff
from payouts import chart, gateway, ledger
from payouts.errors import NotRefundable, PaymentMismatch
from payouts.models import (
    Clawback,
    DisputeAnswer,
    JournalEntry,
    Movement,
    Payment,
    Refund,
    SurplusCharge,
    TransferReversal,
)
from payouts.services import attempts, clawbacks, documents, movements, recoveries
from payouts.services.reconciliation import Difference

logger = logging.getLogger(__name__)

#: How each of ours is told to Stripe, whose list is shorter.
STRIPES_REASONS = {
    Refund.Reason.DUPLICATE: "duplicate",
    Refund.Reason.SURPLUS: "duplicate",
    Refund.Reason.FRAUD: "fraudulent",
}


# --- intent -----------------------------------------------------------------------------------------------------------


def refundable_lines(order: Order) -> list[License]:
    """The licenses that the buyer may give back as of right: in force and never downloaded."""
    licenses = License.objects.filter(order_line__order=order, first_downloaded_at=None).order_by("order_line")
    return [license for license in licenses if license.is_live(clock.now())]


@transaction.atomic
def refund_of_right(*, order: Order, user: User | None) -> Refund:
    """Give back what the buyer has not downloaded; a second call finds the first one's refund.

    Args:
        user: who asks in the buyer's name; None: a key of the buyer's.

    Raises:
        NotAllowed: the user may not act for the buyer.
        NotRefundable: unpaid, refunded, disputed, or everything was downloaded.
    """
    if user is not None:
        require_authority(user=user, party=order.buyer, to="ask for its money back")
    payment = _hold_paid_payment(order)
    standing = payment.refunds.filter(reason=Refund.Reason.OF_RIGHT, state__in=Refund.STANDING).first()
    _refuse_disputed(payment)
    # The rows are held: a download at this moment is either seen here, or finds its license ended.
    list(License.objects.select_for_update(of=("self",)).filter(order_line__order=order).order_by("pk"))
    licenses = refundable_lines(order)
    parts = {part.line.pk: part.left.micros for part in clawbacks.parts_left(payment)}
    amounts = {
        license.order_line_id: parts[license.order_line_id] for license in licenses if parts[license.order_line_id]
    }
    if not amounts:
        if standing is not None:
            return standing
        raise NotRefundable(_why_not_of_right(order))
    number = payment.refunds.filter(reason=Refund.Reason.OF_RIGHT).count() + 1
    return _intend(payment, amounts, reason=Refund.Reason.OF_RIGHT, note="", key=f"of_right:{number}", user=user)


@transaction.atomic
def request_refund(
    *, payment: Payment, amount: Money, reason: Refund.Reason, note: str, user: User, key: str, line: int | None = None
) -> Refund:
    """Give back an amount of a paid order or invoice, decided by staff; the same key and request give the same refund.

    Args:
        line: the order or invoice line that it is for; None: every line in proportion to what is left of it.
        note: why, in words.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: an amount that cannot be, another currency, an unknown line, or no note.
        NotRefundable: unpaid, disputed, or less is left.
        KeyReused: the key stands for another refund.
    """
    require_staff(user=user, to="refund what was downloaded")
    payment = Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice").get(pk=payment.pk)
    asked = (amount.micros, amount.currency, reason.value, note.strip(), line)
    if known := payment.refunds.filter(key=f"staff:{key}").first():
        if (known.amount_micros, known.currency, known.reason, known.note, known.line) != asked:
            raise KeyReused("This key was used for another refund of the same payment; use a new one.")
        return known
    if payment.status != Payment.Status.PAID:
        raise NotRefundable("This has not been paid, so there is nothing to give back.")
    if not note.strip():
        raise InvalidInput("Say why, in words: an auditor reads it.", pointers={"/note": "missing"})
    if amount.currency != payment.currency:
        raise InvalidInput(
            f"It was paid in {payment.currency}; {amount} cannot be given back, nothing is exchanged.",
            pointers={"/amount/currency": f"should be {payment.currency}"},
        )
    if amount.micros <= 0 or amount.floor_to_minor() != amount:
        raise InvalidInput(
            f"Give back a positive amount in whole cents; {amount} is not.",
            pointers={"/amount/amount": "cannot be paid"},
        )
    parts = clawbacks.parts_left(payment)
    if line is not None:
        parts = [part for part in parts if part.line.pk == line]
        if not parts:
            raise InvalidInput(f"Line {line} is not of this payment.", pointers={"/line": "unknown"})
    left = Money(sum(part.left.micros for part in parts), payment.currency)
    if left < amount:
        raise NotRefundable(
            f"{left} of it is left to give back, {amount} is too much.",
            pointers={"/amount/amount": "above what is left"},
        )
    _refuse_disputed(payment)
    amounts = clawbacks.spread(amount, parts)
    return _intend(payment, amounts, reason=reason, note=note.strip(), key=f"staff:{key}", user=user, line=line)


def give_back_corrected(*, payment: Payment, amounts: dict[int, int], note: str, key: str) -> Refund:
    """Inside the transaction that holds the payment's row: what a corrected report shows to have been too much; once per key.

    Raises:
        NotRefundable: its bank decided a dispute about it.
    """
    if known := payment.refunds.filter(key=key).first():
        return known
    _refuse_disputed(payment)
    return _intend(payment, amounts, reason=Refund.Reason.CORRECTED, note=note, key=key, user=None)


def _hold_paid_payment(order: Order) -> Payment:
    payment = Payment.objects.select_for_update(of=("self",)).filter(order=order, status=Payment.Status.PAID).first()
    if payment is None:
        raise NotRefundable(f"Order {order.public_id} has not been paid, so there is nothing to give back.")
    payment.order = order
    return payment


def _refuse_disputed(payment: Payment) -> None:
    """While the bank decides, Stripe refunds nothing; an inquiry takes nothing, so it may be answered by a refund."""
    if payment.disputes.filter(status__in=["needs_response", "under_review"]).exists():
        raise NotRefundable(
            "The payment is disputed at the card's bank, which has taken the money already; its decision settles this."
        )
    if payment.disputes.filter(status="lost").exists():
        raise NotRefundable("The card's bank decided a dispute about this payment and has given the money back.")


def _why_not_of_right(order: Order) -> str:
    if order.status == Order.Status.REFUNDED:
        return f"Order {order.public_id} has been refunded."
    first = (
        License.objects.filter(order_line__order=order, first_downloaded_at__isnull=False)
        .order_by("first_downloaded_at")
        .first()
    )
    if first is not None and first.first_downloaded_at is not None:
        return (
            f"The right to a refund ended with the first download, on {first.first_downloaded_at:%d %B %Y}. If the data is not "
            "what was sold, write to us: we may refund it still."
        )
    return "The licenses have ended, and with them the right to a refund."


def _intend(
    payment: Payment,
    amounts: dict[int, int],
    *,
    reason: Refund.Reason,
    note: str,
    key: str,
    user: User | None,
    line: int | None = None,
    made_at_stripe: str | None = None,
) -> Refund:
    """Commit to a refund. One that Stripe has made already, or that a person sends, has no work for a worker."""
    now = clock.now()
    is_by_bank = payment.method == Payment.Method.BANK
    is_job = made_at_stripe is None and not is_by_bank
    refund = Refund.objects.create(
        status=jobs.Job.Status.QUEUED if is_job else jobs.Job.Status.DONE,
        refund_id=made_at_stripe,
        payment=payment,
        amount_micros=sum(amounts.values()),
        currency=payment.currency,
        method=payment.method,
        reason=reason,
        note=note,
        requested_by=user,
        key=key,
        line=line,
        intended_at=now,
    )
    inquiries = clawbacks.thaw(payment)  # a refund is one way to answer an inquiry
    clawbacks.take_back(
        payment=payment,
        amounts=amounts,
        to_account=(chart.refunding_bank if is_by_bank else chart.refunding)(payment.currency),
        kind=Clawback.Kind.REFUND,
        refund=refund,
    )
    for inquiry in inquiries:
        clawbacks.freeze(payment=payment, dispute=inquiry, to_account=chart.dispute(inquiry))
    audit.record(
        actor=user,
        party=payment.order.buyer_id if payment.order else None,
        action="refund.requested",
        target=f"payment:{payment.pk}",
        refund=refund.pk,
        amount_micros=refund.amount_micros,
        currency=refund.currency,
        reason=refund.reason,
    )
    if is_job:
        jobs.wake(refund)
    logger.info(
        "Intended refund=%s payment=%s micros=%s reason=%s", refund.pk, payment.pk, refund.amount_micros, reason
    )
    return refund


def refund_surplus(
    *,
    surplus: SurplusCharge,
    amount: Money,
    note: str,
    user: User | None,
    key: str,
    made_at_stripe: str | None = None,
) -> Refund:
    """Inside a transaction: give back what a charge took that is for nothing; once per key.

    Args:
        made_at_stripe: the refund that somebody has made in Stripe's dashboard already.

    Raises:
        NotRefundable: less of it is left, or it was returned by a manual entry.
    """
    held = SurplusCharge.objects.select_for_update(of=("self",)).get(pk=surplus.pk)
    if known := held.refunds.filter(key=key).first():
        return known
    if amount > left_of(held):
        raise NotRefundable(f"{left_of(held)} of charge {held.charge_id} is left to give back, {amount} is too much.")
    recoveries.lock(amount.currency)  # no two take the same balance
    if made_at_stripe is None and amount.micros > -ledger.balance(chart.surplus(amount.currency)):
        raise NotRefundable(f"{chart.surplus(amount.currency)} holds less: a manual entry has returned it.")
    now = clock.now()
    refund = Refund.objects.create(
        status=jobs.Job.Status.QUEUED if made_at_stripe is None else jobs.Job.Status.DONE,
        refund_id=made_at_stripe,
        surplus=held,
        amount_micros=amount.micros,
        currency=amount.currency,
        reason=Refund.Reason.SURPLUS if made_at_stripe is None else Refund.Reason.AT_STRIPE,
        note=note,
        requested_by=user,
        key=key,
        intended_at=now,
    )
    ledger.post(
        key=f"surplus:refund:{refund.pk}:intent",
        kind=JournalEntry.Kind.REFUND_INTENT,
        postings={
            chart.surplus(amount.currency): amount.micros,
            chart.refunding(amount.currency): -amount.micros,
        },
        booked_at=now,
    )
    if made_at_stripe is None:
        jobs.wake(refund)
    logger.info("Intended refund=%s charge=%s micros=%s", refund.pk, held.charge_id, amount.micros)
    return refund


def left_of(surplus: SurplusCharge) -> Money:
    """What of a surplus charge is on no way back to the card."""
    standing = surplus.refunds.filter(state__in=Refund.STANDING).aggregate(sum=Sum("amount_micros", default=0))
    return surplus.amount - Money(int(standing["sum"]), surplus.currency)


# --- effect -----------------------------------------------------------------------------------------------------------


def execute_refund(refund: Refund) -> None:
    """Bring an intended refund to its end at Stripe; harmless to run again.

    Raises:
        LostLease: another worker has taken it over.
        attempts.StillUncertain: Stripe's answer is not clear; come back.
        gateway.StripeRefused: Stripe refused us rather than the refund; the intent stays.
    """
    if refund.state == Refund.State.INTENDED and not refund.is_by_bank:
        attempts.pursue(_Refunding(refund))


class _Refunding:
    """See `attempts.Effect`."""

    def __init__(self, refund: Refund) -> None:
        self.refund = refund
        self.charge = refund.charge_id

    def __str__(self) -> str:
        return f"refund={self.refund.pk}"

    @property
    def first_tried_at(self) -> datetime | None:
        return self.refund.first_tried_at

    def note_try(self) -> None:
        self.refund.write(first_tried_at=timezone.now())

    def next_attempt(self) -> None:
        self.refund.write(stripe_attempt=self.refund.stripe_attempt + 1, first_tried_at=timezone.now())

    def find(self) -> gateway.Refund | None:
        return gateway.find_refund(charge=self.charge, mark=str(self.refund.pk))

    def call(self) -> gateway.Refund:
        return gateway.create_refund(
            charge=self.charge,
            amount_minor=self.refund.amount.to_minor(),
            reason=STRIPES_REASONS.get(Refund.Reason(self.refund.reason), "requested_by_customer"),
            key=f"refund:{self.refund.pk}:{self.refund.stripe_attempt}",
            metadata={"refund": str(self.refund.pk)},
        )

    def book(self, answer: gateway.Refund) -> None:
        book_answer(self.refund.pk, answer, job=self.refund)

    @transaction.atomic
    def refuse(self, error: gateway.StripeRefused) -> None:
        _hold_source(self.refund)
        held = self.refund.lock()
        if held.state != Refund.State.INTENDED:
            return
        book_back(held, Refund.State.REFUSED, error.code, error.message)


@transaction.atomic
def book_answer(pk: int, answer: gateway.Refund, *, job: Refund | None = None) -> Refund:
    """Write down what Stripe says of one of our refunds: its movements, each once, and its state.

    Raises:
        attempts.StillUncertain: Stripe has not booked it yet; ask again.
    """
    if answer.taken is None and not answer.has_failed:
        raise attempts.StillUncertain(f"refund {answer.id} has no balance transaction yet")
    _hold_source(Refund.objects.get(pk=pk))
    held = job.lock() if job is not None else Refund.objects.select_for_update(of=("self",)).get(pk=pk)
    assert (answer.amount_minor, answer.currency) == (held.amount.to_minor(), held.currency), (
        f"refund {answer.id} is not what {held} intended"
    )
    if answer.taken is None:
        if held.state == Refund.State.INTENDED:
            held.refund_id = answer.id
            reason = answer.failure_reason or "no reason given"
            book_back(held, Refund.State.REFUSED, answer.status, f"It ended before any money moved: {reason}.")
        return held
    if held.state == Refund.State.INTENDED:
        is_waiting = answer.status in ("pending", "requires_action")
        held.state = Refund.State.PENDING if is_waiting else Refund.State.SENT
        held.refund_id, held.made_at = answer.id, clock.now()
        held.save(update_fields=["state", "refund_id", "made_at"])
        if held.payment_id is not None:  # a surplus charge has no invoice
            documents.issue_credit_note(held)
        logger.info("Sent refund=%s stripe=%s micros=%s", held.pk, answer.id, held.amount_micros)
    elif held.state == Refund.State.PENDING and answer.status == "succeeded":
        held.state = Refund.State.SENT
        held.save(update_fields=["state"])
    assert held.state != Refund.State.REFUSED, f"{held} was refused and booked back, and Stripe has made {answer.id}"
    accounts = {"against": chart.refunding(held.currency), "fees_to": chart.stripe_fees(held.currency), "refund": held}
    movements.record(
        answer.taken,
        kind=Movement.Kind.REFUND,
        entry_kind=JournalEntry.Kind.REFUND_SENT,
        **accounts,  # type: ignore[arg-type]
    )
    if answer.has_failed and answer.returned is not None and held.state != Refund.State.FAILED:
        movements.record(
            answer.returned,
            kind=Movement.Kind.REFUND_FAILURE,
            entry_kind=JournalEntry.Kind.REFUND_FAILED,
            **accounts,  # type: ignore[arg-type]
        )
        reason = answer.failure_reason or "no reason given"
        book_back(held, Refund.State.FAILED, "failed", f"The card's bank sent it back: {reason}.")
    return held


def _hold_source(refund: Refund) -> None:
    """Inside a transaction, before the refund's own row: hold what it is a refund of."""
    if refund.payment_id is not None:
        Payment.objects.select_for_update(of=("self",)).get(pk=refund.payment_id)
    else:
        SurplusCharge.objects.select_for_update(of=("self",)).get(refunds=refund)


def book_back(held: Refund, state: Refund.State, code: str, message: str) -> None:
    """Inside the transaction that holds both rows: the buyer did not get it, so everything is where it was."""
    held.state, held.refusal_code, held.refusal_message = state, code[:60], message
    held.save(update_fields=["state", "refund_id", "refusal_code", "refusal_message"])
    if held.payment is None:
        ledger.post(
            key=f"surplus:refund:{held.pk}:back",
            kind=JournalEntry.Kind.REFUND_UNDONE,
            postings={
                chart.refunding(held.currency): held.amount_micros,
                chart.surplus(held.currency): -held.amount_micros,
            },
            booked_at=clock.now(),
        )
    else:
        clawbacks.give_back(held.clawback)
        documents.cancel_credit_note(held)
        clawbacks.freeze_again(held.payment)  # a dispute may have been opened meanwhile
    logger.warning("Booked back refund=%s state=%s code=%s", held.pk, state, code)


def refresh_refund(refund_id: str) -> Refund | None:
    """Write down how a refund stands at Stripe now, whoever made it; events may come late, twice or out of order.

    Returns None for a refund of a charge that we do not know.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain, attempts.StillUncertain: ask again.
    """
    return write_down(gateway.get_refund(refund_id))


def refresh_refunds_of(charge: str) -> list[Refund]:
    """The same for every refund of a charge.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain, attempts.StillUncertain: ask again.
    """
    answers = list(gateway.refunds_of(charge))
    return [refund for answer in reversed(answers) if (refund := write_down(answer)) is not None]


@transaction.atomic
def write_down(answer: gateway.Refund) -> Refund | None:
    """The same of what Stripe has said; see `refresh_refund`."""
    source: Payment | SurplusCharge | None = (
        Payment.objects.filter(charge_id=answer.charge).first()
        or SurplusCharge.objects.filter(charge_id=answer.charge).first()
    )
    if source is None:
        return None
    named = answer.metadata.get("refund", "")
    ours = source.refunds.filter(refund_id=answer.id).first()
    if ours is None and named.isascii() and named.isdigit():
        ours = source.refunds.filter(pk=int(named)).first()
    if ours is not None and ours.refund_id != answer.id and (ours.refund_id or ours.state == Refund.State.REFUSED):
        # A worker that was suspended in the middle of its call made it after its successor had ended ours: take it anew.
        logger.error("A refund was made after ours had ended refund=%s stripe=%s", ours.pk, answer.id)
        ours = None
    if ours is None and answer.taken is None and answer.has_failed:
        return None  # nothing moved
    return book_answer((ours or _adopt(source, answer)).pk, answer)


def _adopt(source: Payment | SurplusCharge, answer: gateway.Refund) -> Refund:
    """Inside the transaction that books it: a refund that somebody made in Stripe's dashboard: take it from where ours are taken from."""
    if isinstance(source, SurplusCharge):
        return refund_surplus(
            surplus=source,
            amount=Money.from_minor(answer.amount_minor, answer.currency),
            note=f"Refunded at Stripe as {answer.id}.",
            user=None,
            key=f"stripe:{answer.id}",
            made_at_stripe=answer.id,
        )
    payment = Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice").get(pk=source.pk)
    if known := payment.refunds.filter(key=f"stripe:{answer.id}").first():
        return known
    amount = Money.from_minor(answer.amount_minor, answer.currency)
    amounts = clawbacks.spread(amount, clawbacks.parts_left(payment))
    if sum(amounts.values()) != amount.micros:
        raise PaymentMismatch(
            f"Stripe refunded {amount} of payment {payment.pk} as {answer.id}, and we know of less that was left."
        )
    return _intend(
        payment,
        amounts,
        reason=Refund.Reason.AT_STRIPE,
        note=f"Refunded at Stripe as {answer.id}.",
        key=f"stripe:{answer.id}",
        user=None,
        made_at_stripe=answer.id,
    )


def retry_unended() -> int:
    """Queue again the refunds, reversals and answers about which Stripe was silent for longer than a job's attempts last.

    Returns how many.
    """
    failed = {"status": jobs.Job.Status.FAILED, "error_code": "internal"}
    unended: list[QuerySet[Any]] = [
        Refund.objects.filter(state=Refund.State.INTENDED, **failed),
        TransferReversal.objects.filter(state=TransferReversal.State.INTENDED, **failed),
        DisputeAnswer.objects.filter(**failed),
    ]
    return sum(jobs.reopen(row) for rows in unended for row in rows.order_by("pk"))


def _with_our_state(answers: Iterable[gateway.Refund]) -> Iterator[tuple[gateway.Refund, str | None]]:
    """Each with the state in which we know it, a page of them looked up at a time."""
    told = iter(answers)
    while page := list(islice(told, 100)):
        known = dict(
            Refund.objects.filter(refund_id__in=[answer.id for answer in page]).values_list("refund_id", "state")
        )
        for answer in page:
            yield answer, known.get(answer.id)


def sweep_refunds(*, days: int = 30, failures: list[Difference] | None = None) -> int:
    """Ask Stripe for its refunds of the last days, for what no event told; returns how many were news.

    Args:
        failures: takes the name of each that needs a person; without it, the first is raised once all have had their turn.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    first: Exception | None = None
    n_news = 0
    for answer, state in _with_our_state(gateway.refunds_since(clock.now() - timedelta(days=days))):
        ended = {"succeeded": Refund.State.SENT, "failed": Refund.State.FAILED, "canceled": Refund.State.FAILED}
        if state == ended.get(answer.status, Refund.State.PENDING):
            continue
        if answer.has_failed and state == Refund.State.REFUSED:
            continue  # it ended before any money moved
        try:
            n_news += write_down(answer) is not None
            if answer.has_failed and answer.taken and not answer.returned and failures is not None:
                failures.append(
                    Difference(
                        "refund_failed_without_return",
                        f"{answer.id} failed, and Stripe kept what it took for it",
                        subject=answer.id,
                    )
                )
        except attempts.StillUncertain as error:
            logger.warning("Stripe has not booked it yet refund=%s error=%s", answer.id, error)
        except Exception as error:  # one of them must not keep the others from being found
            logger.exception("Refund was not written down refund=%s", answer.id)
            first = first or error
            if failures is not None:
                failures.append(Difference("refund_not_written_down", f"{answer.id}: {error}", subject=answer.id))
    if first is not None and failures is None:
        raise first
    return n_news
