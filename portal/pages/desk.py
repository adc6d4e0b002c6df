"""The desk of finance staff: refunds with their reason, disputes and the answer to the bank, and what payees owe.

For anyone else it does not exist (404). Every act is a service's, with the person's name in the audit log.
"""

import uuid

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from marketplace.errors import DomainError
from marketplace.models import Party
from marketplace.money import MINOR_DIGITS, Money
from payouts import selectors as payouts
from payouts.models import Dispute, Payment, StripeEvent
from payouts.services import clawbacks, disputes, recoveries, refunds, unapplied
from portal.pages.forms import DisputeAnswerForm, RefundForm, ReversalForm, WriteOffForm
from portal.second_factor import StaffRequest, staff_only

PER_PAGE = 50


@staff_only
@require_GET
def desk(request: StaffRequest) -> HttpResponse:
    """What waits for a person: open disputes by their deadline, refunds that failed, debts; and the payments to find."""
    query = request.GET.get("q", "").strip()
    page = Paginator(payouts.payments_found(query), PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "page": page,
        "query": query,
        "disputes": payouts.open_disputes(),
        "refunds": payouts.unfinished_refunds()[:PER_PAGE],
        "debts": payouts.debts(),
        "n_failed_events": StripeEvent.unsettled().count(),
        "unapplied": unapplied.unapplied(),
        "runs": payouts.payout_runs().exclude(status="done")[:10],
    }
    return render(request, "portal/desk.html", context)


@staff_only
@require_http_methods(["GET", "POST"])
def payment(request: StaffRequest, payment_id: int) -> HttpResponseBase:
    """One payment: what is left of each line, what went back, and a form to give more back."""
    found = get_object_or_404(payouts.payments_found(""), pk=payment_id)
    parts = clawbacks.parts_left(found) if found.status == Payment.Status.PAID else []
    left = Money(sum(part.left.micros for part in parts), found.currency)
    form = RefundForm(
        request.POST or None,
        currency=found.currency,
        parts=parts,
        initial={"key": uuid.uuid4().hex, "amount": left.amount_text()},
    )
    if form.is_valid():
        try:
            made = refunds.request_refund(payment=found, user=request.user, **form.refund)
        except DomainError as error:
            form.add_refusal(error)
        else:
            if made.is_by_bank:
                messages.success(request, f"{made.amount} goes back by bank transfer: send it, then record it here.")
                return redirect("desk-bank-refund", refund_id=made.pk)
            messages.success(request, f"{made.amount} goes back to the card.")
            return redirect("desk-payment", payment_id=found.pk)
    context = {
        "payment": found,
        "parts": parts,
        "left": left,
        "form": form if left else None,
        "refunds": found.refunds.select_related("requested_by").prefetch_related("transfers"),
        "transfers": payouts.references_paid_by(found),
        "disputes": found.disputes.all(),
    }
    return render(request, "portal/desk_payment.html", context, status=422 if form.errors else 200)


@staff_only
@require_http_methods(["GET", "POST"])
def dispute(request: StaffRequest, dispute_id: int) -> HttpResponseBase:
    """One dispute: what was taken and frozen, by when to answer, and the form for it."""
    found = get_object_or_404(Dispute.objects.select_related("payment__order__buyer"), pk=dispute_id)
    form = DisputeAnswerForm(request.POST or None)
    if form.is_valid():
        try:
            disputes.answer_dispute(dispute=found, user=request.user, **form.answer)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "The answer goes to the bank.")
            return redirect("desk-dispute", dispute_id=found.pk)
    answer = found.answer
    context = {
        "dispute": found,
        "answer": answer,
        "told": [(disputes.EVIDENCE_FIELDS[name], text) for name, text in answer.evidence.items()] if answer else [],
        "movements": [
            (movement, Money(movement.amount_micros, movement.currency), Money(movement.fee_micros, movement.currency))
            for movement in found.movements.order_by("pk")
        ],
        "clawbacks": [
            (clawback, Money(clawback.amount_micros, clawback.currency), Money(clawback.loss_micros, clawback.currency))
            for clawback in found.clawbacks.select_related("undo").order_by("pk")
        ],
        "form": form if found.takes_evidence and (answer is None or answer.was_refused) else None,
    }
    return render(request, "portal/desk_dispute.html", context, status=422 if form.errors else 200)


@staff_only
@require_http_methods(["GET", "POST"])
def debt(request: StaffRequest, party_id: int, currency: str) -> HttpResponseBase:
    """What one party owes: ask Stripe for it as a courtesy, or bear it."""
    party = get_object_or_404(Party, pk=party_id)
    if currency not in MINOR_DIGITS:
        raise Http404("No balance is held in this currency")
    owed = recoveries.owing([party.pk]).get((party.pk, currency), Money(0, currency))
    sent = payouts.reversible_payouts_of(party, currency)
    is_reversal = request.POST.get("act") == "reverse"
    reversal = ReversalForm(request.POST if is_reversal else None, payouts=sent, currency=currency, prefix="reversal")
    write_off = WriteOffForm(
        request.POST if request.POST.get("act") == "write-off" else None, currency=currency, prefix="write-off"
    )
    for form, act, sentence in (
        (
            reversal,
            recoveries.request_reversal,
            "Stripe is asked; if the balance there does not suffice, nothing happens.",
        ),
        (write_off, recoveries.write_off, "Written off."),
    ):
        if not form.is_valid():
            continue
        given = form.given if form is reversal else form.given | {"party": party}
        try:
            act(user=request.user, **given)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, sentence)
            return redirect("desk-debt", party_id=party.pk, currency=currency)
    context = {
        "party": party,
        "currency": currency,
        "owed": owed,
        "taken_back": [one for one in payouts.taken_back_of(party) if one.amount.currency == currency],
        "reversals": payouts.reversals_of(party, currency),
        "reversal_form": reversal if owed and sent else None,
        "write_off_form": write_off if owed else None,
    }
    has_errors = bool(reversal.errors or write_off.errors)
    return render(request, "portal/desk_debt.html", context, status=422 if has_errors else 200)
