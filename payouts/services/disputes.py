"""Disputes: what the card's bank takes is booked as Stripe says it, what it concerns is frozen, and its decision settles it.

    open    Stripe has taken the amount and a fee (an inquiry: nothing yet); the unreleased pools and what was not sent of the
            order's payables are frozen, downloads stop, no refund is made
    won     the amount is back (the fee is not); everything thaws
    lost    the freeze is undone and the amount taken back as a refund's is; what no line has left is the platform's loss

Stripe's events may come twice, late or in any order: none is believed, each makes us ask how the dispute stands.
"""

import logging
from collections.abc import Mapping
from datetime import timedelta

from django.db import transaction

from marketplace import clock, jobs
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from marketplace.services.licenses import resume_licenses, suspend_licenses
from payouts import chart, gateway
from payouts.errors import DisputeNotAnswerable, PaymentMismatch
from payouts.models import Clawback, Dispute, DisputeAnswer, JournalEntry, Movement, Payment
from payouts.services import bookings, clawbacks, movements
from payouts.services.reconciliation import Difference

logger = logging.getLogger(__name__)

#: What the bank may be told in words: Stripe's field → what it is for. Files are attached in Stripe's dashboard.
EVIDENCE_FIELDS = {
    "product_description": "What was sold",
    "access_activity_log": "When and how it was downloaded",
    "refund_policy_disclosure": "How the buyer was told of the refund policy",
    "refund_refusal_explanation": "Why no refund is due",
    "duplicate_charge_explanation": "Why the charges are not the same",
    "uncategorized_text": "Anything else",
}
MAX_EVIDENCE = 20_000  # characters a field


def refresh_dispute(dispute_id: str) -> Dispute:
    """Write down how a dispute stands at Stripe now, and let what follows from it follow, once.

    Raises:
        PaymentMismatch: it is about a charge that is none of our payments'.
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    return _write_down(gateway.get_dispute(dispute_id))


def sweep_disputes(*, days: int = 150, failures: list[Difference] | None = None) -> int:
    """Ask Stripe for its disputes of the last days, for what no event told; returns how many were news.

    Args:
        failures: takes the name of each that needs a person; without it, the first is raised once all have had their turn.

    Raises:
        PaymentMismatch, gateway.StripeRefused, gateway.StripeUncertain: see `refresh_dispute`.
    """
    first: Exception | None = None
    n_news = 0
    for answer in gateway.disputes_since(clock.now() - timedelta(days=days)):
        if Dispute.objects.filter(dispute_id=answer.id, status=answer.status).exists() and not _unbooked(answer):
            continue
        try:
            _write_down(answer)
            n_news += 1
        except Exception as error:  # one of them must not keep the others from being found
            logger.exception("Dispute was not written down dispute=%s", answer.id)
            first = first or error
            if failures is not None:
                failures.append(Difference("dispute_not_written_down", f"{answer.id}: {error}", subject=answer.id))
    if first is not None and failures is None:
        raise first
    return n_news


@transaction.atomic
def answer_dispute(
    *, dispute: Dispute, user: User, evidence: Mapping[str, str] | None = None, gives_in: bool = False
) -> DisputeAnswer:
    """Answer the bank: with evidence, or by giving in; again only if Stripe refused the last one. Committed before Stripe is told.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no evidence, an unknown field, or too long a text.
        DisputeNotAnswerable: it was answered, or is closed.
    """
    require_staff(user=user, to="answer a dispute")
    texts = {name: text.strip() for name, text in (evidence or {}).items() if text.strip()}
    for name, text in texts.items():
        if name not in EVIDENCE_FIELDS or len(text) > MAX_EVIDENCE:
            raise InvalidInput(
                f"{name} is no evidence that we send, or longer than {MAX_EVIDENCE} characters.",
                pointers={f"/evidence/{name}": "refused"},
            )
    if bool(texts) == gives_in:
        raise InvalidInput("Give evidence in at least one field, or give in.", pointers={"/evidence": "missing"})
    dispute = Dispute.objects.select_for_update(of=("self",)).get(pk=dispute.pk)
    given = dispute.answer
    if not dispute.takes_evidence or not (given is None or given.was_refused):
        raise DisputeNotAnswerable(
            f"Dispute {dispute.pk} is {dispute.status.replace('_', ' ')} and takes no answer any more."
        )
    answer = DisputeAnswer.objects.create(
        dispute=dispute, gives_in=gives_in, evidence=texts, given_by=user, given_at=clock.now()
    )
    audit.record(
        actor=user,
        action="dispute.given_in" if gives_in else "dispute.answered",
        target=f"dispute:{dispute.pk}",
        fields=sorted(texts),
    )
    jobs.wake(answer)
    return answer


def send_answer(answer: DisputeAnswer) -> None:
    """Tell Stripe; harmless to run again: the bank takes evidence once, and the key is this attempt's own.

    Raises:
        DisputeNotAnswerable: the bank's time was over.
        gateway.StripeUncertain, gateway.StripeRefused: come back.
    """
    dispute = answer.dispute
    # Stripe repeats a 5xx under its key for a day; how the dispute stands is asked before each call, so another key does no harm.
    key = f"dispute_answer:{answer.pk}:{answer.attempt}"
    state = gateway.get_dispute(dispute.dispute_id)
    if state.status in Dispute.TAKES_EVIDENCE:
        try:
            if answer.gives_in:
                state = gateway.accept_dispute(dispute=dispute.dispute_id, key=key)
            else:
                state = gateway.submit_evidence(dispute=dispute.dispute_id, evidence=answer.evidence, key=key)
        except gateway.StripeRefused as error:
            if error.http_status in (401, 403):
                raise
            raise DisputeNotAnswerable(f"Stripe did not take the answer: {error.message}") from error
    _write_down(state)


def _write_down(answer: gateway.Dispute) -> Dispute:
    payment = _payment_of(answer)
    with transaction.atomic():
        payment = Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice").get(pk=payment.pk)
        dispute, is_new = Dispute.objects.get_or_create(
            dispute_id=answer.id,
            defaults={
                "payment": payment,
                "amount_micros": Money.from_minor(answer.amount_minor, answer.currency).micros,
                "currency": answer.currency,
                "reason": answer.reason[:60],
                "status": answer.status,
                "opened_at": answer.opened_at,
                "evidence_due_at": answer.evidence_due_at,
            },
        )
        if is_new:
            audit.record(
                actor=None,
                party=payment.order.buyer_id if payment.order else None,
                action="dispute.opened",
                target=f"dispute:{dispute.pk}",
                payment=payment.pk,
                amount_micros=dispute.amount_micros,
                currency=dispute.currency,
                reason=dispute.reason,
            )
        for theirs in answer.movements:
            movements.record(
                theirs,
                kind=Movement.Kind.DISPUTE,
                entry_kind=JournalEntry.Kind.DISPUTE_FUNDS,
                against=chart.dispute(dispute),
                fees_to=chart.dispute_fees(dispute.currency),
                dispute=dispute,
            )
        if dispute.closed_at is not None:
            return dispute  # an answer that was asked for earlier and comes later
        dispute.status, dispute.evidence_due_at = answer.status, answer.evidence_due_at
        if dispute.is_open:
            clawbacks.freeze(payment=payment, dispute=dispute, to_account=chart.dispute(dispute))
            if payment.order is not None:
                suspend_licenses(order=payment.order, at=clock.now())
        else:
            _close(dispute, payment)
        dispute.save(update_fields=["status", "evidence_due_at", "closed_at"])
    return dispute


def _close(dispute: Dispute, payment: Payment) -> None:
    dispute.closed_at = clock.now()
    still_open = [other for other in clawbacks.thaw(payment) if other.pk != dispute.pk]
    if dispute.status == "lost":
        amounts = clawbacks.spread(dispute.amount, clawbacks.parts_left(payment))
        beyond = Money(dispute.amount_micros - sum(amounts.values()), dispute.currency)
        clawbacks.take_back(
            payment=payment,
            amounts=amounts,
            to_account=chart.dispute(dispute),
            kind=Clawback.Kind.DISPUTE,
            dispute=dispute,
            loss=beyond if beyond else None,
        )
    for other in still_open:
        clawbacks.freeze(payment=payment, dispute=other, to_account=chart.dispute(other))
    if payment.order is not None and not still_open:
        resume_licenses(order=payment.order)
    audit.record(
        actor=None,
        party=payment.order.buyer_id if payment.order else None,
        action=f"dispute.{dispute.status}"[:60],
        target=f"dispute:{dispute.pk}",
        payment=payment.pk,
        amount_micros=dispute.amount_micros,
        currency=dispute.currency,
    )
    logger.info("Closed dispute=%s status=%s micros=%s", dispute.pk, dispute.status, dispute.amount_micros)


def _payment_of(answer: gateway.Dispute) -> Payment:
    """The payment whose charge it is; one whose own event has not come yet is booked first."""
    payment = Payment.objects.filter(charge_id=answer.charge).first()
    if payment is None:
        named = gateway.charge_marks(answer.charge).get("payment", "")
        waiting = Payment.objects.filter(pk=int(named)).first() if named.isascii() and named.isdigit() else None
        if waiting is not None and waiting.checkout_id:
            bookings.book_checkout(waiting.checkout_id)
        payment = Payment.objects.filter(charge_id=answer.charge).first()
    if payment is None:
        raise PaymentMismatch(f"Dispute {answer.id} is about charge {answer.charge}, and we know of no such payment.")
    return payment


def _unbooked(answer: gateway.Dispute) -> bool:
    ids = {theirs.id for theirs in answer.movements}
    return Movement.objects.filter(balance_transaction_id__in=ids).count() != len(ids)
