"""The desk's bills: what was invoiced and not paid, corrections of divisions, and tax rates.

Whatever moves money here takes two people: one proposes or records, another approves.
"""

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from attribution.models import AttributionResult
from marketplace import clock
from marketplace.errors import DomainError
from marketplace.money import Money
from marketplace.web.views.orders import refusal
from payouts import selectors as payouts
from payouts.models import BankReceipt, DivisionCorrection, Document, TaxRate
from payouts.services import billing, corrections, receipts
from portal.pages.billing import document_context, document_page, pdf_of
from portal.pages.forms import CorrectDivisionForm, ReceiptForm, TaxRateForm
from portal.second_factor import StaffRequest, staff_only

PER_PAGE = 50


@staff_only
@require_GET
def invoices(request: StaffRequest) -> HttpResponse:
    """What waits for its money, transfers that wait for a second person, and every document."""
    page = Paginator(Document.objects.select_related("buyer", "payment", "cancelled_by"), PER_PAGE).get_page(
        request.GET.get("page")
    )
    context = {
        "page": page,
        "unpaid": payouts.unpaid_invoices()[:PER_PAGE],
        "receipts": payouts.receipts_waiting(),
        "today": clock.today(),
    }
    return render(request, "portal/desk_invoices.html", context)


@staff_only
@require_http_methods(["GET", "POST"])
def invoice(request: StaffRequest, reference: str) -> HttpResponseBase:
    """One document; where it is unpaid, the form for the transfer that pays it."""
    document = payouts.find_document(Document.objects.select_related("payment", "buyer"), reference)
    if document is None:
        raise Http404("There is no such document")
    if request.GET.get("as") == "pdf":
        return pdf_of(document)
    can_be_paid = document.kind == "INV" and document.payment.status == "open" and not hasattr(document, "cancelled_by")
    if not can_be_paid:
        return document_page(request, document, is_desk=True)
    form = ReceiptForm(
        request.POST or None,
        currency=document.currency,
        initial={"amount": document.total.amount_text(), "received_on": clock.today()},
    )
    if form.is_valid():
        try:
            receipts.record_receipt(payment=document.payment, by=request.user, **form.given)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "Recorded. Somebody else confirms it before anything is booked.")
            return redirect("desk-invoices")
    context = document_context(document, is_desk=True) | {"form": form}
    return render(request, "portal/document_detail.html", context, status=422 if form.errors else 200)


@staff_only
@require_POST
def decide_receipt(request: StaffRequest, receipt_id: int) -> HttpResponseBase:
    receipt = get_object_or_404(BankReceipt, pk=receipt_id)
    try:
        receipts.decide_receipt(receipt=receipt, approved=request.POST.get("act") == "approve", by=request.user)
    except DomainError as error:
        return refusal(request, error)
    return redirect("desk-invoices" if receipt.payment_id is not None else "desk-bank")


@staff_only
@require_GET
def division_list(request: StaffRequest) -> HttpResponse:
    query = request.GET.get("q", "").strip()
    page = Paginator(payouts.divisions_found(query), PER_PAGE).get_page(request.GET.get("page"))
    context = {"page": page, "query": query, "waiting": payouts.corrections_waiting()}
    return render(request, "portal/desk_divisions.html", context)


@staff_only
@require_http_methods(["GET", "POST"])
def division(request: StaffRequest, division_id: int) -> HttpResponseBase:
    """One division, its versions, and the form that proposes another."""
    found = get_object_or_404(payouts.divisions_found(""), pk=division_id)
    results = (
        AttributionResult.objects.filter(status=AttributionResult.Status.PUBLISHED, shares__version=found.version)
        .select_related("model")
        .distinct()
        .order_by("-pk")
    )
    form = CorrectDivisionForm(request.POST or None, results=results)
    if form.is_valid():
        try:
            proposed = corrections.propose_correction(division=found, by=request.user, **form.cleaned_data)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "Proposed. Nothing is booked until somebody else approves it.")
            return redirect("desk-correction", correction_id=proposed.pk)
    lines = found.lines.select_related("party").order_by("-amount_micros", "pk")[:PER_PAGE]
    context = {
        "division": found,
        "lines": [(line, Money(line.amount_micros, found.currency)) for line in lines],
        "n_lines": found.lines.count(),
        "corrections": found.corrections.select_related("proposed_by", "decided_by", "result__model"),
        "form": form,
    }
    return render(request, "portal/desk_division.html", context, status=422 if form.errors else 200)


@staff_only
@require_http_methods(["GET", "POST"])
def correction(request: StaffRequest, correction_id: int) -> HttpResponseBase:
    """Every payee's difference before it is booked; approving takes another person than the one who proposed."""
    found = get_object_or_404(
        DivisionCorrection.objects.select_related(
            "division__version__dataset", "proposed_by", "decided_by", "result__model"
        ),
        pk=correction_id,
    )
    if request.method == "POST":
        try:
            corrections.decide_correction(
                correction=found, approved=request.POST.get("act") == "approve", by=request.user
            )
        except DomainError as error:
            return refusal(request, error)
        return redirect("desk-correction", correction_id=found.pk)
    page = Paginator(found.lines.select_related("party").order_by("pk"), PER_PAGE).get_page(request.GET.get("page"))
    currency = found.division.currency
    context = {
        "correction": found,
        "division": found.division,
        "page": page,
        "lines": [
            (
                line,
                Money(line.before_micros, currency),
                Money(line.after_micros, currency),
                Money(line.difference_micros, currency),
            )
            for line in page
        ],
        "can_approve": found.status == "proposed" and found.proposed_by_id != request.user.pk,
    }
    return render(request, "portal/desk_correction.html", context)


@staff_only
@require_http_methods(["GET", "POST"])
def taxes(request: StaffRequest) -> HttpResponseBase:
    form = TaxRateForm(request.POST or None, initial={"valid_from": clock.today()})
    if form.is_valid():
        try:
            billing.add_tax_rate(user=request.user, **form.given)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "It is added to whatever is asked for from its first day on.")
            return redirect("desk-taxes")
    context = {"rates": TaxRate.objects.all(), "form": form, "today": clock.today()}
    return render(request, "portal/desk_taxes.html", context, status=422 if form.errors else 200)


@staff_only
@require_POST
def end_tax(request: StaffRequest, rate_id: int) -> HttpResponseBase:
    """Give an open-ended rate its last day: today."""
    rate = get_object_or_404(TaxRate, pk=rate_id)
    try:
        billing.end_tax_rate(rate=rate, last_day=clock.today(), user=request.user)
    except DomainError as error:
        return refusal(request, error)
    messages.success(request, f"{rate} ends today.")
    return redirect("desk-taxes")
