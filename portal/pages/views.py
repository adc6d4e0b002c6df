"""Pages over several packages: home, models and their shares, checkouts, earnings and statements."""

import uuid
from datetime import date
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    HttpResponsePermanentRedirect,
    JsonResponse,
)
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from attribution import selectors as attribution
from attribution.grades import MEANING, disclosed_grade
from attribution.holding import holding_results, succession
from attribution.models import PPQ, AttributionResult, Share
from marketplace import clock
from marketplace import selectors as marketplace
from marketplace.errors import DomainError
from marketplace.export.citations import bibtex, csl_json
from marketplace.models import Disclosure, Order, TrainedModel
from marketplace.money import MAX_CHARGE_MINOR, MINOR_DIGITS, Money
from marketplace.services.disclosures import canonical_json
from marketplace.services.parties import set_country
from marketplace.web.access import ActingRequest, acting, acting_owner, see_other
from marketplace.web.views.orders import refusal
from payouts import selectors as payouts
from payouts.services import bank_details, billing, duties, payees, plans, reach, refunds, royalties, sales
from payouts.standing import standings_of
from portal.pages import selectors
from portal.pages.forest import forest
from portal.pages.forms import CountryForm, MinimumForm, RevenueForm

PER_PAGE = 24
N_DRAWN = 24
N_SHARES = 50
N_LINES = 100


@require_GET
def home(request: HttpRequest) -> HttpResponse:
    return render(request, "portal/home.html", {"figures": selectors.site_figures(clock.now())})


@require_GET
def robots(request: HttpRequest) -> HttpResponse:
    private = "/accounts/ /admin/ /api/ /desk/ /downloads/ /earnings/ /invitations/ /invoices/ /licenses/ /orders/ /settings/ /uploads/"
    lines = ["User-agent: *", *(f"Disallow: {path}" for path in private.split())]
    return HttpResponse("\n".join(lines) + "\n", content_type="text/plain")


@require_GET
def favicon(request: HttpRequest) -> HttpResponsePermanentRedirect:
    return HttpResponsePermanentRedirect(settings.STATIC_URL + "favicon.svg")


# --- models -----------------------------------------------------------------------------------------------------------
@require_GET
def models(request: HttpRequest) -> HttpResponse:
    page = Paginator(selectors.public_models(clock.now()), PER_PAGE).get_page(request.GET.get("page"))
    holding = holding_results(page, among=[disclosure for model in page for disclosure in model.disclosures.all()])
    rows = [(model, next(iter(model.disclosures.all())), holding.get(model.pk)) for model in page]
    return render(request, "portal/model_list.html", {"section": "models", "page": page, "rows": rows})


@require_GET
def model(request: HttpRequest, slug: str) -> HttpResponse:
    """What a model was trained on, what that is worth to it, and how strong the evidence is."""
    found, disclosures = model_or_404(request, slug)
    latest = disclosures[0]
    citations = list(
        latest.citations.select_related("version__dataset__owner", "license__order_line__order").order_by("position")
    )
    run = attribution.open_run(latest)
    standing = succession(found, among=disclosures)
    result = standing.holding
    verification = attribution.find_verification(latest)
    context = {
        "section": "models",
        "model": found,
        "disclosure": latest,
        "disclosures": disclosures,
        "is_owner": found.owner == request.party,  # type: ignore[attr-defined]
        "citations": citations,
        "evidence": attribution.evidence_state(latest),
        "disclosed_grade": disclosed_grade(latest.document),
        "verification": verification,
        "replayed": attribution.verification_progress(verification) if verification else None,
        "metered_run": attribution.find_metered_run(latest),
        "run": run,
        "progress": attribution.run_progress(run) if run else None,
        "result": result,
        "passed_over": standing.passed_over,
        "meaning": MEANING[result.grade] if result else "",
        "reliability_source": attribution.reliability_source(result) if result else "none",
        "partitions": _partitions(request, result, [citation.version_id for citation in citations]) if result else [],
        "n_drawn": N_DRAWN,
        "overdue": duties.overdue_of(found),
        "index": attribution.find_index(latest),
    }
    if request.htmx:  # type: ignore[attr-defined]
        return render(request, "portal/_model_progress.html", context)
    return render(request, "portal/model_detail.html", context)


@require_GET
def disclosure_document(request: HttpRequest, slug: str, number: int) -> HttpResponse:
    """The document as it was sent, in the canonical form whose SHA-256 names it."""
    found = _disclosure_or_404(request, slug, number)
    return HttpResponse(canonical_json(found.document), content_type="application/json")


@require_GET
def bibliography(request: HttpRequest, slug: str, number: str, suffix: str) -> HttpResponse:
    """One disclosure's references, for a paper: BibTeX or CSL-JSON."""
    found = _disclosure_or_404(request, slug, int(number))
    citations = found.citations.select_related("version__dataset__owner", "disclosure__model").order_by("position")
    if suffix == "bib":
        return HttpResponse(bibtex(citations), content_type="application/x-bibtex; charset=utf-8")
    return JsonResponse(csl_json(citations), safe=False, content_type="application/vnd.citationstyles.csl+json")


def _disclosure_or_404(request: HttpRequest, slug: str, number: int) -> Disclosure:
    _, disclosures = model_or_404(request, slug)
    found = next((one for one in disclosures if one.number == number), None)
    if found is None:
        raise Http404("There is no such disclosure")
    return found


def model_or_404(request: HttpRequest, slug: str) -> tuple[TrainedModel, list[Disclosure]]:
    found = get_object_or_404(TrainedModel.objects.select_related("owner"), slug=slug)
    is_owner = found.owner == request.party  # type: ignore[attr-defined]
    disclosures = list(selectors.visible_disclosures(found, is_owner=is_owner, at=clock.now()))
    if not disclosures:
        raise Http404("There is no such model")
    return found, disclosures


def _partitions(request: HttpRequest, result: AttributionResult, cited: list[int]) -> list[dict[str, Any]]:
    """Rights holders and labellers, each a page of rows for the table and, of the largest, positions for the drawing.

    A row names its source by the number that the bibliography gives it; 0: cited by an earlier disclosure only.
    """
    numbers = {version_id: number for number, version_id in enumerate(cited, 1)}
    titles = {Share.Partition.RIGHTS_HOLDER: "Rights holders", Share.Partition.LABELLER: "Labellers"}
    found = []
    for partition, title in titles.items():
        shares = attribution.result_shares(result).filter(partition=partition)
        page = Paginator(shares, N_SHARES).get_page(request.GET.get(partition.value))
        if not page.paginator.count:
            continue
        rows = [(share, numbers.get(share.version_id, 0)) for share in page]
        drawn = rows[:N_DRAWN]
        layout = forest([(share.count_ppq / PPQ, share.raw, share.low, share.high) for share, _ in drawn])
        found.append(
            {
                "id": partition.value,
                "title": title,
                "page": page,
                "rows": rows,
                "drawn": [(*row, mark) for row, mark in zip(drawn, layout.marks, strict=True)],
                "ticks": layout.ticks,
                "has_several_versions": shares.order_by().values("version").distinct().count() > 1,
            }
        )
    return found


# --- paying -----------------------------------------------------------------------------------------------------------
@acting
@require_GET
def order(request: ActingRequest, order_id: uuid.UUID) -> HttpResponse:
    """Back from Stripe (`?from=checkout`) the page waits for the webhook, which alone marks an order paid."""
    found = get_object_or_404(marketplace.orders_visible_to(request.party), public_id=order_id)
    is_paid = found.status in (Order.Status.PAID, Order.Status.REFUNDED)
    context = {
        "section": "orders",
        "order": found,
        "lines": found.lines.all(),
        "is_late": found.expires_at <= clock.now(),
        "today": clock.today(),
        "came_from_checkout": request.GET.get("from") == "checkout",
        "was_cancelled": request.GET.get("from") == "cancelled",
        "refunds": payouts.refunds_of(found),
        "dispute": payouts.open_dispute_of(found) if is_paid else None,
        "of_right": payouts.refundable_of_right(found) if is_paid else None,
        **_asked_for(found),
    }
    template = "marketplace/_order_state.html" if request.htmx else "marketplace/order_detail.html"
    return render(request, template, context)


def _asked_for(order: Order) -> dict[str, Any]:
    """What the order costs with tax, by its payment or as it would be asked for now, and its invoice."""
    payment = payouts.payment_for(order)
    document = payouts.invoice_document_of(payment)
    if payment is not None and (document is not None or payment.status == "paid"):
        tax, rate = payment.tax, payment.tax_rate
    else:
        asked = billing.tax_on(order.total, party=order.buyer)
        tax, rate = asked.amount, asked.rate
    total = order.total + tax
    return {
        "tax": tax,
        "tax_rate": rate,
        "to_pay": total,
        "document": document,
        "is_too_much": total.to_minor() > MAX_CHARGE_MINOR[order.currency],
        "purchase_order": payment.purchase_order if payment else "",
        "payment": payment,
    }


@acting_owner
@require_POST
def refund(request: ActingRequest, order_id: uuid.UUID) -> HttpResponseBase:
    """The money back for what was never downloaded."""
    found = get_object_or_404(marketplace.orders_visible_to(request.party), public_id=order_id)
    try:
        made = refunds.refund_of_right(order=found, user=request.user)
    except DomainError as error:
        return refusal(request, error)
    messages.success(request, f"{made.amount} goes back. {made.sentence}")
    return redirect("order", order_id=found.public_id)


@acting_owner
@require_POST
def checkout(request: ActingRequest, order_id: uuid.UUID) -> HttpResponseBase:
    order = get_object_or_404(marketplace.orders_visible_to(request.party), public_id=order_id)
    try:
        urls = checkout_urls(reverse("order", args=[order.public_id]))
        if "purchase_order" in request.POST:
            urls["purchase_order"] = request.POST["purchase_order"]
        return see_other(sales.start_checkout(order=order, **urls))
    except DomainError as error:
        return refusal(request, error)


def checkout_urls(page: str) -> dict[str, str]:
    """Where Stripe sends the buyer back to; arriving there proves nothing."""
    return {
        "success_url": f"{settings.BASE_URL}{page}?from=checkout",
        "cancel_url": f"{settings.BASE_URL}{page}?from=cancelled",
    }


@acting_owner
@require_http_methods(["GET", "POST"])
def royalty_list(request: ActingRequest) -> HttpResponseBase:
    """A licensee states what a model earned; the invoice follows, a line per cited dataset."""
    own_models = payouts.reportable_models_of(request.party)
    asked = {name: request.GET[name] for name in ("model", "period_start", "period_end") if name in request.GET}
    form = RevenueForm(request.POST or None, models=own_models, initial={"key": uuid.uuid4().hex} | asked)
    if form.is_valid():
        try:
            royalties.report_revenue(licensee=request.party, **form.report)
            duties.settle(request.party)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "Reported. The invoice is below.")
            return redirect("royalties")
    page = Paginator(payouts.royalty_invoices_of(request.party), PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "section": "royalties",
        "form": form,
        "page": page,
        "invoices": [
            (invoice, [(line, Money(line.amount_micros, invoice.currency)) for line in invoice.lines.all()])
            for invoice in page
        ],
        "due": payouts.by_report(payouts.reports_due_of(request.party)[:PER_PAGE]),
        "today": clock.today(),
        "has_models": bool(own_models),
        "came_from_checkout": request.GET.get("from") == "checkout",
    }
    return render(request, "portal/royalty_list.html", context, status=422 if form.errors else 200)


@acting_owner
@require_POST
def invoice_checkout(request: ActingRequest, invoice_id: int) -> HttpResponseBase:
    invoice = get_object_or_404(payouts.royalty_invoices_of(request.party), pk=invoice_id)
    try:
        return see_other(royalties.start_invoice_checkout(invoice=invoice, **checkout_urls(reverse("royalties"))))
    except DomainError as error:
        return refusal(request, error)


# --- earning ----------------------------------------------------------------------------------------------------------
@acting
@require_GET
def earnings(request: ActingRequest) -> HttpResponse:
    party = request.party
    shown = request.GET.get("show", "")
    page = Paginator(payouts.lines_of(party, shown), N_LINES).get_page(request.GET.get("page"))
    payee = payouts.payee_of(party)
    earned = payouts.earnings_of(party)
    is_unserved = reach.is_unserved(party)
    context = {
        "section": "earnings",
        "earnings": [(of, of.in_transit + of.sent) for of in earned],
        "standings": standings_of(party, earned),
        "minimums": [
            (
                of.currency,
                MinimumForm(
                    currency=of.currency, initial={"amount": plans.minimum_of(party, of.currency).amount_text()}
                ),
            )
            for of in earned
        ],
        "next_payouts": payouts.next_payout(party, earned),
        "taken_back": payouts.taken_back_of(party),
        "pools": [(pool, Money(pool.left_micros, pool.currency)) for pool in payouts.waiting_pools_of(party)],
        "payee": payee,
        "page": page,
        "lines": [(line, Money(line.amount_micros, line.division.currency)) for line in page],
        "payouts": payouts.paid_out_of(party)[:12],
        "shown": shown if shown in payouts.SHOWN else "",
        "onboarding": payouts.onboarding_of(payee),
        "is_unserved": is_unserved,
        "bank_details": bank_details.latest_of(party) if is_unserved else None,
        "issued": payouts.statements_of(party)[:12],
        "months": [(f"{year}-{month:02}", date(year, month, 1)) for year, month in payouts.open_months_of(party)],
        "country_form": CountryForm(initial={"country": party.country}) if payee is None else None,
        "came_from_stripe": request.GET.get("from") == "stripe",
    }
    return render(request, "portal/earnings.html", context)


@acting_owner
@require_http_methods(["GET", "POST"])
def payout_minimum(request: ActingRequest, currency: str) -> HttpResponseBase:
    """From how much on the party is sent its money."""
    if currency not in MINOR_DIGITS:
        raise Http404("No balance is held in this currency")
    held = {"amount": plans.minimum_of(request.party, currency).amount_text()}
    form = MinimumForm(request.POST or None, currency=currency, initial=held)
    if form.is_valid():
        try:
            plans.set_minimum(party=request.party, amount=form.cleaned_data["amount"], user=request.user)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, f"You are sent your money from {form.cleaned_data['amount']} on.")
            return redirect("earnings")
    context = {"section": "earnings", "form": form, "currency": currency}
    return render(request, "portal/minimum_form.html", context, status=422 if form.errors else 200)


@acting_owner
@require_http_methods(["GET", "POST"])
def onboarding(request: ActingRequest) -> HttpResponseBase:
    """POST: go to Stripe's own pages. GET: Stripe sent the person back because the link was too old; they ask for a fresh one."""
    party = request.party
    needs_country = payouts.payee_of(party) is None and not party.country
    if request.method == "GET":
        context = {"section": "earnings", "form": CountryForm() if needs_country else None}
        return render(request, "portal/country_form.html", context)
    if payouts.payee_of(party) is None and (needs_country or "country" in request.POST):
        form = CountryForm(request.POST if "country" in request.POST else None)
        if not form.is_valid():
            context = {"section": "earnings", "form": form}
            return render(request, "portal/country_form.html", context, status=422 if form.errors else 200)
        set_country(party=party, country=form.cleaned_data["country"])
    page = f"{settings.BASE_URL}{reverse('earnings')}"
    try:
        url = payees.start_onboarding(
            party=party, return_url=f"{page}?from=stripe", refresh_url=f"{settings.BASE_URL}{reverse('onboarding')}"
        )
    except DomainError as error:
        return refusal(request, error)
    return see_other(url)
