"""The desk at our own bank account: refunds that go back by transfer, and money that fits no invoice.

Whatever is booked here takes two people: one records or proposes, another has seen it on the bank's statement.
"""

from typing import Any

from django.contrib import messages
from django.core.paginator import Page, Paginator
from django.db.models import Case, Prefetch, QuerySet, When
from django.http import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from marketplace import clock
from marketplace.errors import DomainError
from marketplace.web.views.orders import refusal
from payouts import selectors as payouts
from payouts.models import BankReceipt, OutgoingTransfer, ReceiptApplication, ReceiptUse, Refund
from payouts.services import outgoing, unapplied
from portal.pages.desk import PER_PAGE
from portal.pages.forms import ApplyForm, NotSentForm, RecordTransferForm, ReturnedForm, ReturnForm, UnappliedForm
from portal.second_factor import StaffRequest, staff_only


@staff_only
@require_http_methods(["GET", "POST"])
def bank(request: StaffRequest) -> HttpResponseBase:
    """What people do at the bank: send refunds, confirm, and give money that fits no invoice a place; a form to record some."""
    form = UnappliedForm(
        request.POST or None, initial={"received_on": clock.today(), "note": request.GET.get("for", "")[:200]}
    )
    if form.is_valid():
        try:
            unapplied.record_unapplied(by=request.user, **form.given)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "Recorded. Somebody else confirms it before anything is booked.")
            return redirect("desk-bank")
    unused = _page(request, unapplied.unapplied(), "unused")
    context = {
        "to_send": _page(request, outgoing.refunds_to_send(), "send"),
        "transfers": _page(request, outgoing.transfers_waiting(), "out"),
        "receipts": _page(request, payouts.unmatched_receipts_waiting(), "arrived"),
        "applications": _page(request, unapplied.applications_waiting(), "uses"),
        "unused": unused,
        "unapplied": unapplied.with_age(unused),
        "form": form,
    }
    return render(request, "portal/desk_bank.html", context, status=422 if form.errors else 200)


def _page(request: StaffRequest, rows: QuerySet[Any], name: str) -> Page[Any]:
    """Each of the lists has its own page, by its own name in the address."""
    return Paginator(rows, PER_PAGE).get_page(request.GET.get(name))


@staff_only
@require_http_methods(["GET", "POST"])
def receipt(request: StaffRequest, receipt_id: int) -> HttpResponseBase:
    """Money that fits no invoice: apply it to one, or record that it went back to its payer."""
    found = get_object_or_404(
        BankReceipt.objects.select_related("recorded_by", "decided_by"), pk=receipt_id, payment=None
    )
    left = found.left
    of_the_payer_first = Case(When(payer=found.payer, then=0), default=1)
    others = unapplied.unapplied().filter(currency=found.currency).exclude(pk=found.pk)
    act = request.POST.get("act", "")
    apply = ApplyForm(
        request.POST if act == "apply" else None,
        prefix="apply",
        invoices=payouts.unpaid_invoices().filter(currency=found.currency),
        others=list(others.order_by(of_the_payer_first, "received_on", "pk")[:PER_PAGE]),
    )
    returning = ReturnForm(
        request.POST if act == "return" else None,
        prefix="return",
        currency=found.currency,
        initial={"amount": left.amount_text(), "sent_on": clock.today()},
    )
    try:
        if apply.is_valid():
            money = [found, *BankReceipt.objects.filter(pk__in=apply.cleaned_data["together"])]
            payment = apply.cleaned_data["invoice"].payment
            unapplied.propose_application(payment=payment, money=money, by=request.user)
            messages.success(request, "Proposed. Somebody else approves it before anything is booked.")
            return redirect("desk-bank")
        if returning.is_valid():
            outgoing.record_money_returned(receipt=found, by=request.user, **returning.given)
            messages.success(request, "Recorded. Somebody else confirms it before anything is booked.")
            return redirect("desk-bank")
    except DomainError as error:
        (apply if act == "apply" else returning).add_refusal(error)
    context = {
        "receipt": found,
        "left": left,
        "days": (clock.today() - found.received_on).days,
        "uses": found.uses.select_related("application__payment", "application__decided_by"),
        "returns": found.returns.select_related("recorded_by"),
        "apply": apply if left else None,
        "returning": returning if left else None,
        "returned": ReturnedForm(),
    }
    has_errors = bool(apply.errors or returning.errors)
    return render(request, "portal/desk_bank_receipt.html", context, status=422 if has_errors else 200)


@staff_only
@require_POST
def application(request: StaffRequest, application_id: int) -> HttpResponseBase:
    found = get_object_or_404(
        ReceiptApplication.objects.prefetch_related(Prefetch("uses", ReceiptUse.objects.select_related("receipt"))),
        pk=application_id,
    )
    try:
        unapplied.decide_application(application=found, approved=request.POST.get("act") == "approve", by=request.user)
    except DomainError as error:
        return refusal(request, error)
    return redirect("desk-bank")


@staff_only
@require_http_methods(["GET", "POST"])
def refund(request: StaffRequest, refund_id: int) -> HttpResponseBase:
    """A refund by transfer: record that it was sent, say why it cannot be, or that it came back."""
    found = get_object_or_404(
        Refund.objects.select_related("payment__order__buyer", "payment__invoice__report__licensee", "requested_by"),
        pk=refund_id,
        method="bank",
    )
    transfer = found.transfer
    act = request.POST.get("act", "")
    sent = RecordTransferForm(
        request.POST if act == "sent" else None, prefix="sent", initial={"sent_on": clock.today()}
    )
    not_sent = NotSentForm(request.POST if act == "refuse" else None, prefix="refuse")
    returned = ReturnedForm(request.POST if act == "returned" else None, prefix="returned")
    chosen = {"sent": sent, "refuse": not_sent, "returned": returned}.get(act)
    if chosen is not None and chosen.is_valid():
        try:
            if act == "sent":
                outgoing.record_refund_sent(refund=found, by=request.user, **sent.cleaned_data)
                messages.success(request, "Recorded. Somebody else confirms it before anything is booked.")
            elif act == "refuse":
                outgoing.refuse_refund(refund=found, by=request.user, **not_sent.cleaned_data)
                messages.success(request, "Nothing was sent: everything is where it was, and the buyer reads why.")
            elif transfer is not None:
                outgoing.note_returned(transfer=transfer, by=request.user, **returned.cleaned_data)
                messages.success(request, "It is in the bank again, and everything is where it was.")
        except DomainError as error:
            chosen.add_refusal(error)
        else:
            return redirect("desk-bank-refund", refund_id=found.pk)
    is_open = found.state == Refund.State.INTENDED and transfer is None
    assert found.payment is not None  # what went the bank's way has one (a database check)
    context = {
        "refund": found,
        "payment": found.payment,
        "transfer": transfer,
        "receipts": payouts.receipts_that_paid(found.payment),
        "sent": sent if is_open else None,
        "not_sent": not_sent if is_open else None,
        "returned": returned if transfer is not None and transfer.status == OutgoingTransfer.Status.BOOKED else None,
    }
    has_errors = bool(chosen is not None and chosen.errors)
    return render(request, "portal/desk_bank_refund.html", context, status=422 if has_errors else 200)


@staff_only
@require_POST
def transfer(request: StaffRequest, transfer_id: int) -> HttpResponseBase:
    """Confirm a recorded transfer, or turn the record down; or, of money that fitted no invoice, that it came back."""
    found = get_object_or_404(OutgoingTransfer, pk=transfer_id)
    form = ReturnedForm(request.POST)
    try:
        if request.POST.get("act") == "returned":
            given = form.cleaned_data if form.is_valid() else {}
            outgoing.note_returned(
                transfer=found, by=request.user, reference=given.get("reference", ""), note=given.get("note", "")
            )
        else:
            outgoing.decide_transfer(transfer=found, approved=request.POST.get("act") == "approve", by=request.user)
    except DomainError as error:
        return refusal(request, error)
    return redirect("desk-bank")
