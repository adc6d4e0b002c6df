"""A buyer's and licensee's papers: how they are billed, their invoices, a royalty invoice, and what a model would owe."""

import uuid
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from marketplace import clock
from marketplace import selectors as marketplace
from marketplace.errors import DomainError
from marketplace.models import Dataset, Offer
from marketplace.money import Money
from marketplace.web.access import ActingRequest, acting, acting_owner
from marketplace.web.views.orders import refusal
from payouts import selectors as payouts
from payouts.models import BillingProfile, Document, RoyaltyInvoice
from payouts.services import billing, documents, duties, quotes, report_corrections, royalties, sales
from portal.pages.forms import BillingForm, CorrectReportForm, EstimateForm, PurchaseOrderForm

PER_PAGE = 30


@acting
@require_GET
def invoice_list(request: ActingRequest) -> HttpResponse:
    page = Paginator(payouts.documents_of(request.party), PER_PAGE).get_page(request.GET.get("page"))
    context = {"section": "invoices", "page": page, "today": clock.today()}
    return render(request, "portal/document_list.html", context)


@acting
@require_GET
def invoice(request: ActingRequest, reference: str) -> HttpResponse:
    return document_page(request, _document_or_404(request, reference))


@acting
@require_GET
def invoice_pdf(request: ActingRequest, reference: str) -> HttpResponse:
    return pdf_of(_document_or_404(request, reference))


def pdf_of(document: Document) -> HttpResponse:
    headers = {"Content-Disposition": f'attachment; filename="{document.reference}.pdf"'}
    return HttpResponse(documents.render_pdf(document), content_type="application/pdf", headers=headers)


def document_page(request: HttpRequest, document: Document, *, is_desk: bool = False) -> HttpResponse:
    context = document_context(document, is_desk=is_desk)
    return render(request, "portal/document_detail.html", context)


def document_context(document: Document, *, is_desk: bool) -> dict[str, Any]:
    """What the page of an invoice or credit note shows; at the desk it stands under the desk's tabs."""
    return {
        "section": "" if is_desk else "invoices",
        "is_desk": is_desk,
        "document": document,
        "content": document.content,
        "today": clock.today(),
        "back": reverse("desk-invoices" if is_desk else "invoices"),
    }


def _document_or_404(request: ActingRequest, reference: str) -> Document:
    found = payouts.find_document(payouts.documents_of(request.party), reference)
    if found is None:
        raise Http404("There is no such document")
    return found


@acting_owner
@require_http_methods(["GET", "POST"])
def billing_profile(request: ActingRequest) -> HttpResponseBase:
    """How the party's next invoices name it."""
    profile = BillingProfile.objects.filter(party=request.party).first()
    names = ("legal_name", "address", "country", "region", "vat_id")
    initial: dict[str, Any] = {name: getattr(profile, name) for name in names} if profile else {}
    initial = initial or {"legal_name": request.party.name, "country": request.party.country}
    form = BillingForm(request.POST or None, initial=initial)
    if form.is_valid():
        try:
            billing.set_billing_profile(party=request.party, user=request.user, **form.cleaned_data)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "Saved. It is on every invoice from now on; earlier ones stay as they are.")
            return redirect("invoices")
    context = {"section": "invoices", "form": form}
    return render(request, "portal/billing_form.html", context, status=422 if form.errors else 200)


@acting_owner
@require_POST
def order_invoice(request: ActingRequest, order_id: uuid.UUID) -> HttpResponseBase:
    """The order's invoice, issued before it is paid."""
    order = get_object_or_404(marketplace.orders_visible_to(request.party), public_id=order_id)
    if not BillingProfile.objects.filter(party=request.party).exists():
        messages.warning(request, "An invoice names the buyer: say how you are billed, then ask for it again.")
        return redirect("billing")
    form = PurchaseOrderForm(request.POST)
    try:
        number = form.cleaned_data["purchase_order"] if form.is_valid() else request.POST.get("purchase_order", "")
        document = sales.invoice_order(order=order, purchase_order=number)
    except DomainError as error:
        return refusal(request, error)
    messages.success(request, f"Invoice {document.reference} is due on {document.due_on:%d %B %Y}.")
    return redirect("invoice", reference=document.reference)


@acting_owner
@require_http_methods(["GET", "POST"])
def royalty_invoice(request: ActingRequest, invoice_id: int) -> HttpResponseBase:
    """One report with its invoice, what became of it, and the form that corrects it."""
    found = get_object_or_404(payouts.royalty_invoices_of(request.party), pk=invoice_id)
    report = found.report
    form = CorrectReportForm(
        request.POST or None,
        currency=report.currency,
        initial={
            "key": uuid.uuid4().hex,
            "amount": report.revenue.amount_text(),
            "period_start": report.period_start,
            "period_end": report.period_end,
        },
    )
    if form.is_valid():
        try:
            made = report_corrections.correct_report(licensee=request.party, report=report, **form.correction)
        except DomainError as error:
            form.add_refusal(error)
        else:
            duties.settle(request.party)
            messages.success(request, "Corrected. This is what it makes.")
            return redirect("royalty-invoice", invoice_id=made.pk)
    replaced_by = getattr(report, "replaced_by", None)
    payment = getattr(found, "payment", None)
    can_correct = replaced_by is None and found.status != RoyaltyInvoice.Status.REFUNDED
    line = found.lines.select_related("result").first()
    context = {
        "section": "royalties",
        "invoice": found,
        "result": line.result if line else None,  # every line of an invoice is by the same one
        "report": report,
        "replaced_by": replaced_by,
        "lines": [(line, Money(line.amount_micros, found.currency)) for line in found.lines.all()],
        "carried": [(one, one.total) for one in found.carried.all()],
        "documents": payment.documents.order_by("pk") if payment else [],
        "payment": payment,
        "refunds": report_corrections.refunds_of(report),
        "is_overdue": bool(found.status == "open" and found.due_on and found.due_on < clock.today()),
        "form": form if can_correct or form.errors else None,
    }
    return render(request, "portal/royalty_invoice.html", context, status=422 if form.errors else 200)


@require_GET
def estimate(request: HttpRequest) -> HttpResponse:
    """What a model would owe at a revenue: a planned selection, for anyone; one's own model, by the result that holds today."""
    party = request.party  # type: ignore[attr-defined]
    models = payouts.reportable_models_of(party) if party else payouts.reportable_models_of_nobody()
    is_asked = "revenue" in request.GET
    initial = {"datasets": "\n".join(request.GET.getlist("dataset")), "currency": "USD"}
    form = EstimateForm(request.GET if is_asked else None, models=models, initial=initial)
    context: dict[str, Any] = {"section": "royalties", "form": form}
    if form.is_valid():
        try:
            context |= _estimated(form, party)
        except DomainError as error:
            form.add_refusal(error)
    return render(request, "portal/estimate.html", context, status=422 if form.errors else 200)


def _estimated(form: EstimateForm, party: Any) -> dict[str, Any]:
    revenue, model = form.cleaned_data["revenue"], form.cleaned_data.get("model")
    if model:
        quote = royalties.quote_royalty(model=model, revenue=revenue)
        lines = [
            (
                line.license.version.dataset,
                line.share_ppq,
                line.rate_bps,
                Money(line.micros, revenue.currency),
                line.is_capped,
            )
            for line in quote.lines
        ]
        return {"model": model, "quote": quote, "lines": lines, "revenue": revenue}
    offers, records = [], {}
    for slug, n in form.cleaned_data["datasets"]:
        dataset = Dataset.objects.filter(slug=slug.rstrip("/").rpartition("/")[2], status=Dataset.Status.LISTED).first()
        offer = (
            dataset
            and Offer.objects.select_related("dataset", "version").filter(dataset=dataset).order_by("-number").first()
        )
        if not offer:
            raise quotes.InvalidInput(f"{slug} is not for sale.", pointers={"/datasets": f"{slug} is not for sale"})
        offers.append(offer)
        if n is not None:
            records[offer.pk] = n
    plan = quotes.quote_plan(offers=offers, revenue=revenue, records=records, party=party)
    lines = [
        (line.offer.dataset, line.share_ppq, line.offer.royalty_bps, line.amount, line.is_capped) for line in plan.lines
    ]
    return {"plan": plan, "lines": lines, "revenue": revenue}
