"""Buying: an order from a dataset's page, its state until it is paid, and the licenses it became."""

import uuid

from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_POST

from marketplace import clock, selectors
from marketplace.errors import DomainError
from marketplace.services.downloads import signed_download_url
from marketplace.services.orders import place_order
from marketplace.web.access import ActingRequest, acting, acting_owner, see_other
from marketplace.web.forms import OrderForm
from marketplace.web.views.datasets import dataset_context

PER_PAGE = 50


@acting_owner
@require_POST
def order_place(request: ActingRequest, slug: str) -> HttpResponseBase:
    """The total is that of the offer whose page was shown; the service refuses if another is on sale by now."""
    dataset = get_object_or_404(selectors.datasets_visible_to(request.party), slug=slug)
    form = OrderForm(request.POST)
    if form.is_valid():
        offer = next((one for one in selectors.price_history(dataset) if one.pk == form.cleaned_data["offer"]), None)
        if offer is None:
            raise Http404("This dataset has no such offer")
        try:
            order = place_order(
                buyer=request.party,
                user=request.user,
                key=f"web:{form.cleaned_data['key']}",
                offers=[offer],
                expected_total=offer.price,
                accepted_name=form.cleaned_data["accepted_name"],
            )
        except DomainError as error:
            form.add_refusal(error)
        else:
            return redirect("order", order_id=order.public_id)
    return render(request, "marketplace/dataset_detail.html", dataset_context(request, dataset, form), status=422)


@acting
@require_GET
def orders(request: ActingRequest) -> HttpResponse:
    page = Paginator(selectors.orders_visible_to(request.party), PER_PAGE).get_page(request.GET.get("page"))
    return render(request, "marketplace/order_list.html", {"section": "orders", "page": page})


@acting
@require_GET
def licenses(request: ActingRequest) -> HttpResponse:
    page = Paginator(selectors.licenses_visible_to(request.party), PER_PAGE).get_page(request.GET.get("page"))
    now = clock.now()
    rows = [(license, license.is_live(now)) for license in page]
    return render(request, "marketplace/license_list.html", {"section": "licenses", "page": page, "rows": rows})


@acting
@require_POST
def license_download(request: ActingRequest, license_id: uuid.UUID) -> HttpResponseBase:
    found = get_object_or_404(selectors.licenses_visible_to(request.party), public_id=license_id)
    try:
        signed = signed_download_url(license=found)
    except DomainError as error:
        return refusal(request, error)
    return see_other(signed.url)


def refusal(request: HttpRequest, error: DomainError) -> HttpResponse:
    """A refusal that belongs to no form, as a page that says what to do."""
    return render(request, "refused.html", {"error": error}, status=error.status)
