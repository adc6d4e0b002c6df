"""The desk's pages of Stripe's events: what was told, whether it could be applied, and how two of the staff settle what could not."""

import json

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from marketplace.errors import DomainError
from payouts import gateway
from payouts import selectors as payouts
from payouts.models import EventSettlement, StripeEvent
from payouts.services import refunds, settlements
from portal.pages.desk import PER_PAGE
from portal.pages.forms import SettlementForm
from portal.second_factor import StaffRequest, staff_only

SILENT = "Stripe did not answer; nothing was changed. Try again in a minute."


@staff_only
@require_GET
def events(request: StaffRequest) -> HttpResponse:
    state, query = request.GET.get("state", ""), request.GET.get("q", "").strip()[:255]
    state = state if state in payouts.EVENT_STATES else ""
    found = payouts.stripe_events(state=state, query=query)
    context = {
        "tab": "events",
        "page": Paginator(found, PER_PAGE).get_page(request.GET.get("page")),
        "state": state,
        "states": payouts.EVENT_STATES,
        "query": query,
    }
    return render(request, "portal/desk_events.html", context)


@staff_only
@require_http_methods(["GET", "POST"])
def event(request: StaffRequest, event_id: int) -> HttpResponseBase:
    """One event: what it says, what it concerns, and the acts on one that failed."""
    found = get_object_or_404(StripeEvent, pk=event_id)
    problem, surplus, why_not = "", None, ""
    booked = found.surplus_charges.first()
    is_open = StripeEvent.unsettled().filter(pk=found.pk).exists()
    may_be_settled = settlements.is_open(found)
    proposal = found.settlements.filter(status=EventSettlement.Status.PROPOSED).select_related("proposed_by").first()
    if may_be_settled and proposal is None:
        try:
            surplus = settlements.find_surplus(found)
        except DomainError as error:
            why_not = error.message
        except (gateway.StripeRefused, gateway.StripeUncertain):
            why_not = "Stripe did not say whether a charge is behind it; look again in a minute."
    act = request.POST.get("act", "")
    form = SettlementForm(request.POST if act == "propose" else None, has_surplus=surplus is not None)
    if request.method == "POST":
        try:
            if _acted(request, found, proposal, form, act):
                return redirect("desk-event", event_id=found.pk)
        except DomainError as error:
            problem = error.message
        except (gateway.StripeRefused, gateway.StripeUncertain):
            problem = SILENT
    context = {
        "tab": "events",
        "event": payouts.stripe_events().get(pk=found.pk),
        "payload": json.dumps(json.loads(found.payload), indent=2, ensure_ascii=False, sort_keys=True),
        "concerned": payouts.concerned_by(found),
        "settlements": found.settlements.select_related("proposed_by", "decided_by"),
        "booked": booked,
        "left": refunds.left_of(booked) if booked else None,
        "refunds": booked.refunds.order_by("pk") if booked else [],
        "proposal": proposal,
        "may_confirm": proposal is not None and proposal.proposed_by_id != request.user.pk,
        "may_retry": is_open,
        "form": form if may_be_settled and proposal is None else None,
        "surplus": surplus,
        "why_not": why_not,
        "problem": problem,
    }
    status = 422 if problem or form.errors else 200
    return render(request, "portal/desk_event.html", context, status=status)


def _acted(
    request: StaffRequest, found: StripeEvent, proposal: EventSettlement | None, form: SettlementForm, act: str
) -> bool:
    """Whether something was done; the form says what is wrong with it otherwise."""
    note = request.POST.get("note", "")[: settlements.MAX_REASON]
    if act == "retry":
        if settlements.retry(event=found, user=request.user):
            messages.success(request, "It is being tried again.")
    elif act == "propose":
        if not form.is_valid():
            return False
        settlements.propose(event=found, user=request.user, **form.proposal)
        messages.success(request, "Proposed. Another one of the staff must confirm it.")
    elif proposal is None:
        messages.info(request, "It was decided already.")
    elif act == "confirm":
        settlements.confirm(settlement=proposal, user=request.user, note=note)
        messages.success(request, "Confirmed.")
    elif act == "reject":
        settlements.reject(settlement=proposal, user=request.user, note=note)
        is_own = proposal.proposed_by_id == request.user.pk
        messages.success(request, "Withdrawn." if is_own else "Rejected.")
    return True
