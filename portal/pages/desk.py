"""The desk of finance staff: refunds with their reason, disputes and the answer to the bank, and what payees owe.

For anyone else it does not exist (404). Every act is a service's, with the person's name in the audit log.
"""

import uuid
from dataclasses import dataclass

from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from marketplace import clock
from marketplace.errors import DomainError
from marketplace.models import Party
from marketplace.money import MINOR_DIGITS, Money
from payouts import selectors as payouts
from payouts.models import (
    BalanceCheck,
    Dispute,
    ManualEntry,
    OutgoingTransfer,
    Payment,
    RailExport,
    ReceiptApplication,
    ReconciliationRun,
    StripeEvent,
)
from payouts.services import clawbacks, disputes, other_rails, outgoing, recoveries, refunds, unapplied
from payouts.services.proving import latest_proof
from portal.pages.forms import DisputeAnswerForm, RefundForm, ReversalForm, WriteOffForm
from portal.second_factor import StaffRequest, staff_only

PER_PAGE = 50


@dataclass(frozen=True)
class Decision:
    """Something that one of the staff must do: how many of it there are, and the page to do it on."""

    count: int
    what: str
    page: str


@staff_only
@require_GET
def desk(request: StaffRequest) -> HttpResponse:
    """What waits for a person: decisions, open disputes by their deadline, refunds that failed, runs, and debts."""
    context = {
        "decisions": _decisions(),
        "disputes": payouts.open_disputes(),
        "refunds": payouts.unfinished_refunds()[:PER_PAGE],
        "debts": payouts.debts(),
        "n_failed_events": StripeEvent.unsettled().count(),
        "n_unapplied": unapplied.unapplied().count(),
        "unapplied": unapplied.with_age(unapplied.unapplied()[:1]),
        "runs": payouts.payout_runs().exclude(status="done")[:10],
    }
    return render(request, "portal/desk.html", context)


def _decisions() -> list[Decision]:
    """Of each kind that has any."""
    today = clock.today()
    latest = ReconciliationRun.objects.filter(n_differences__isnull=False).first()
    check = BalanceCheck.objects.first()
    proof = latest_proof()
    counted = [
        ((proof.n_findings or 0) if proof else 0, "thing{s} wrong in the books by their proof", "desk-reconciliation"),
        (latest.n_differences if latest else 0, "difference{s} between our books and Stripe’s", "desk-reconciliation"),
        (check.n_wrong if check else 0, "kept balance{s} unlike the sum of their postings", "desk-reconciliation"),
        (ManualEntry.objects.filter(decision=None).count(), "manual entr{ies} to approve", "desk-manual-list"),
        (payouts.corrections_waiting().count(), "correction{s} of a division to approve", "desk-divisions"),
        (payouts.receipts_waiting().count(), "bank transfer{s} to confirm", "desk-invoices"),
        (payouts.unmatched_receipts_waiting().count(), "transfer{s} that fit no invoice to confirm", "desk-bank"),
        (outgoing.refunds_to_send().count(), "refund{s} to send by bank transfer", "desk-bank"),
        (
            RailExport.objects.filter(status=RailExport.Status.AWAITING).count(),
            "export{s} over another rail to approve",
            "desk-rails",
        ),
        (other_rails.confirmations_waiting().count(), "transfer{s} over another rail to confirm", "desk-rails"),
        (
            payouts.payouts_at_a_bank_that_refused().count(),
            "payout{s} sent back by the payee’s bank",
            "desk-payout-runs",
        ),
        (StripeEvent.unsettled().count(), "event{s} of Stripe’s that could not be applied", "desk-events"),
        (
            OutgoingTransfer.objects.filter(status=OutgoingTransfer.Status.RECORDED).count(),
            "transfer{s} out of the bank to confirm",
            "desk-bank",
        ),
        (
            ReceiptApplication.objects.filter(status=ReceiptApplication.Status.PROPOSED).count(),
            "use{s} of money that fits no invoice to approve",
            "desk-bank",
        ),
        (payouts.unpaid_invoices().filter(due_on__lt=today).count(), "invoice{s} overdue", "desk-invoices"),
        (payouts.reports_open().filter(due_on__lt=today).count(), "revenue report{s} overdue", "desk-overdue"),
        (payouts.royalties_open().filter(due_on__lt=today).count(), "royalt{ies} overdue", "desk-overdue"),
    ]
    return [
        Decision(count, what.format(s="" if count == 1 else "s", ies="y" if count == 1 else "ies"), page)
        for count, what, page in counted
        if count
    ]


@staff_only
@require_GET
def payments(request: StaffRequest) -> HttpResponse:
    """Every payment, or those that a number, a charge or a buyer's name says."""
    query = request.GET.get("q", "").strip()
    page = Paginator(payouts.payments_found(query), PER_PAGE).get_page(request.GET.get("page"))
    return render(request, "portal/desk_payments.html", {"page": page, "query": query})


@staff_only
@require_GET
def dispute_list(request: StaffRequest) -> HttpResponse:
    """The open ones by their deadline, then every one there was."""
    page = Paginator(payouts.disputes_found(), PER_PAGE).get_page(request.GET.get("page"))
    return render(request, "portal/desk_disputes.html", {"page": page, "open_ones": payouts.open_disputes()})


@staff_only
@require_GET
def overdue(request: StaffRequest) -> HttpResponse:
    """What licensees must still report and pay, what is overdue of it, and the mails that went out about it."""
    page = Paginator(payouts.reports_open(), PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "page": page,
        "reports": payouts.by_report(page),
        "invoices": [
            (invoice, payouts.mailed_at(invoice.reminders.all())) for invoice in payouts.royalties_open()[:PER_PAGE]
        ],
        "today": clock.today(),
        "suspended_after": settings.ROYALTY_SUSPEND_DAYS,
    }
    return render(request, "portal/desk_overdue.html", context)


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
        "transfers": [one.reference for one in payouts.receipts_that_paid(found)],
        "documents": found.documents.order_by("pk"),
        "disputes": found.disputes.prefetch_related("answers"),
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
