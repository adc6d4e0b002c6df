"""The catalogue and a dataset's page, for everyone; a new dataset and its terms, for whom it belongs to."""

import uuid
from typing import Any

from django.conf import settings
from django.core.paginator import Paginator
from django.db.models import Count
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from marketplace import selectors
from marketplace.errors import DomainError
from marketplace.export.odrl import ALLOWED_USES
from marketplace.models import Contribution, Dataset, DatasetVersion, Membership, Offer, Party
from marketplace.money import Money
from marketplace.services.offers import publish_offer
from marketplace.services.versions import create_dataset
from marketplace.web.access import ActingRequest, acting_editor, acting_owner
from marketplace.web.forms import DatasetForm, OfferForm, OrderForm
from marketplace.web.terms import Example, example_sale
from marketplace.web.thumbnails import thumbnail

PER_PAGE = 24
PEOPLE_PER_PAGE = 50


@require_GET
def catalogue(request: HttpRequest) -> HttpResponse:
    query = request.GET.get("q", "").strip()[:200]
    page = Paginator(selectors.listed_datasets(query), PER_PAGE).get_page(request.GET.get("page"))
    listings = [(dataset, selectors.current_offer(dataset)) for dataset in page]
    context = {"section": "datasets", "query": query, "page": page, "listings": listings}
    return render(request, "marketplace/dataset_list.html", context)


@acting_editor
@require_GET
def my_datasets(request: ActingRequest) -> HttpResponse:
    page = Paginator(selectors.datasets_of(request.party), PER_PAGE).get_page(request.GET.get("page"))
    return render(request, "marketplace/my_datasets.html", {"section": "datasets", "page": page})


@require_GET
def dataset(request: HttpRequest, slug: str) -> HttpResponse:
    found = _dataset_or_404(slug, request.party)  # type: ignore[attr-defined]
    return render(request, "marketplace/dataset_detail.html", dataset_context(request, found))


def dataset_context(request: HttpRequest, found: Dataset, form: OrderForm | None = None) -> dict[str, Any]:
    """All that a dataset's page shows; `form` is the buy form when it was refused."""
    offer = selectors.current_offer(found)
    is_owner = found.owner == request.party  # type: ignore[attr-defined]
    version = offer.version if offer else (_latest_version(found) if is_owner else None)
    context: dict[str, Any] = {
        "section": "datasets",
        "dataset": found,
        "offer": offer,
        "version": version,
        "is_owner": is_owner,
        "is_for_sale": offer is not None and found.status == Dataset.Status.LISTED,
        "citations": selectors.cited_by(found),
        "price_history": selectors.price_history(found),
    }
    if version and version.status != DatasetVersion.Status.DRAFT:
        context |= _inside(version) | _people(request, version)
    if offer:
        context["example"] = example_of(offer)
        context["uses"] = [ALLOWED_USES.get(use, use) for use in offer.allowed_uses]
        context["form"] = form or OrderForm(initial={"key": uuid.uuid4().hex, "offer": offer.pk})
    return context


@require_GET
def odrl(request: HttpRequest, slug: str) -> JsonResponse:
    """The current offer as an ODRL policy, the bytes whose hash every license keeps."""
    offer = selectors.current_offer(_dataset_or_404(slug, request.party))  # type: ignore[attr-defined]
    if offer is None:
        raise Http404("It has no offer")
    return JsonResponse(offer.policy, content_type="application/ld+json")


@acting_editor
@require_http_methods(["GET", "POST"])
def dataset_new(request: ActingRequest) -> HttpResponseBase:
    form = DatasetForm(request.POST or None)
    if form.is_valid():
        try:
            made = create_dataset(owner=request.party, user=request.user, **form.cleaned_data)
        except DomainError as error:
            form.add_refusal(error)
        else:
            return redirect("upload", slug=made.slug)
    return render(request, "marketplace/dataset_form.html", {"section": "datasets", "form": form}, status=_status(form))


@acting_owner
@require_http_methods(["GET", "POST"])
def offer_new(request: ActingRequest, slug: str) -> HttpResponseBase:
    found = get_object_or_404(selectors.datasets_of(request.party), slug=slug)
    offer = selectors.current_offer(found)
    form = OfferForm(request.POST or None, initial=_initial(offer) if offer else None)
    if request.method == "POST" and form.is_valid() and "preview" not in request.POST:
        try:
            publish_offer(dataset=found, user=request.user, **form.terms)
        except DomainError as error:
            form.add_refusal(error)
        else:
            return redirect("dataset", slug=found.slug)
    context = {
        "section": "datasets",
        "dataset": found,
        "form": form,
        "offer": offer,
        "example": _example_from(form, offer),
        "platform_fee_bps": settings.PLATFORM_FEE_BPS,
    }
    if request.htmx and "preview" in request.POST:
        return render(request, "marketplace/_terms_example.html", context)
    return render(request, "marketplace/offer_form.html", context, status=_status(form))


def example_of(offer: Offer) -> Example:
    return example_sale(
        price=offer.price,
        platform_fee_bps=offer.platform_fee_bps,
        upfront_bps=offer.upfront_bps,
        pool_bps=offer.pool_bps,
        labellers_bps=offer.labellers_bps,
        royalty_bps=offer.royalty_bps,
        royalty_cap=offer.royalty_cap,
    )


def _example_from(form: OfferForm, offer: Offer | None) -> Example | None:
    """Of what the form says now; of the defaults or the last offer before anything was said; of nothing while it is wrong."""
    if not form.is_bound:
        return example_of(offer) if offer else _default_example()
    if not form.is_valid():
        return None
    terms = form.terms
    return example_sale(
        platform_fee_bps=settings.PLATFORM_FEE_BPS,
        **{
            name: terms[name]
            for name in ("price", "upfront_bps", "pool_bps", "labellers_bps", "royalty_bps", "royalty_cap")
        },
    )


def _default_example() -> Example:
    fields = OfferForm.base_fields
    return example_sale(
        price=Money.parse(fields["price"].initial, "USD"),
        platform_fee_bps=settings.PLATFORM_FEE_BPS,
        royalty_cap=None,
        **{f"{name}_bps": fields[name].initial * 100 for name in ("upfront", "pool", "labellers", "royalty")},
    )


def _initial(offer: Offer) -> dict[str, Any]:
    """A change of terms starts from the terms there are."""
    return {
        "price": offer.price.amount_text(),
        "currency": offer.currency,
        "upfront": f"{offer.upfront_bps / 100:g}",
        "pool": f"{offer.pool_bps / 100:g}",
        "royalty": f"{offer.royalty_bps / 100:g}",
        "royalty_cap": offer.royalty_cap.amount_text() if offer.royalty_cap else "",
        "labellers": f"{offer.labellers_bps / 100:g}",
        "term_days": offer.term_days,
        "seats": offer.seats,
        "disclosure_due_days": offer.disclosure_due_days,
        "allowed_uses": offer.allowed_uses,
    }


def _dataset_or_404(slug: str, party: Party | None) -> Dataset:
    return get_object_or_404(selectors.datasets_visible_to(party), slug=slug)


def _latest_version(found: Dataset) -> DatasetVersion | None:
    return found.versions.exclude(status=DatasetVersion.Status.DRAFT).order_by("-number").first()


def _people(request: HttpRequest, version: DatasetVersion) -> dict[str, Any]:
    """Who gave what to a version: rights holders, then labellers, most records first, a page at a time."""
    numbers = dict(version.contributions.order_by().values_list("role").annotate(n=Count("pk")))
    rows = version.contributions.select_related("party").order_by("-role", "-n_records", "number")
    page = Paginator(rows, PEOPLE_PER_PAGE).get_page(request.GET.get("people"))
    owner, membership = version.dataset.owner, request.membership  # type: ignore[attr-defined]
    may_invite = (
        version.status == DatasetVersion.Status.PUBLISHED
        and membership is not None
        and membership.party == owner
        and membership.role != Membership.Role.VIEWER
    )
    named = selectors.contributors_of(owner).filter(pk__in=[row.party_id for row in page]) if may_invite else []
    invited = {party.pk: next(iter(party.invitations.all()), None) for party in named if not party.is_claimed}
    return {
        "n_holders": numbers.get(Contribution.Role.RIGHTS_HOLDER, 0),
        "n_labellers": numbers.get(Contribution.Role.LABELLER, 0),
        "people": page,
        "people_rows": [(row, row.party_id in invited, invited.get(row.party_id)) for row in page],
        "may_invite": may_invite,
    }


def _inside(version: DatasetVersion) -> dict[str, Any]:
    """The rows that anyone may see."""
    content = version.features.get("content", {})
    rows = [
        row
        | {
            "image": thumbnail(row["content"], minimum=content["minimum"], maximum=content["maximum"])
            if content.get("kind") == "vector"
            else "",
            "shown": row["content"] if isinstance(row["content"], str) else _numbers(row["content"]),
        }
        for row in version.preview
    ]
    return {
        "preview": rows,
        "preview_is_pictures": bool(rows) and all(row["image"] for row in rows),
        "classes": version.features.get("label", {}).get("classes", []),
    }


def _numbers(values: list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:12])
    return f"{shown}, … ({len(values)} numbers)" if len(values) > 12 else shown


def _status(form: DatasetForm | OfferForm) -> int:
    return 422 if form.is_bound and not form.is_valid() else 200
