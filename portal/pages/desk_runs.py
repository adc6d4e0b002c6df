"""The desk's pages of payout runs: what each pays and what failed, and a person's word on it; and of one payee."""

import uuid

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from marketplace.errors import DomainError
from marketplace.models import Party
from marketplace.money import Money
from payouts import chart
from payouts import selectors as payouts
from payouts.models import PayoutRun
from payouts.services import bank_details, reach, transfers
from payouts.standing import payout_problem, standings_of
from portal.pages.desk import PER_PAGE
from portal.pages.forms import ReasonForm, StartRunForm
from portal.second_factor import StaffRequest, staff_only

#: What staff may do to a run in each state: the act's name, the button, and whether it needs a reason.
ACTS = {
    PayoutRun.State.AWAITING_APPROVAL: [("approve", "Approve", False), ("reject", "Reject", True)],
    PayoutRun.State.SENDING: [("pause", "Pause", True)],
    PayoutRun.State.SHORT_OF_FUNDS: [("pause", "Pause", True)],
    PayoutRun.State.PAUSED: [("resume", "Go on", False)],
}
SERVICES = {
    "approve": transfers.approve_payout_run,
    "reject": transfers.reject_payout_run,
    "pause": transfers.pause_payout_run,
    "resume": transfers.resume_payout_run,
}
DONE = {
    "approve": "Approved. It sends what was planned.",
    "reject": "Rejected. What is due stays due.",
    "pause": "Paused. What is on its way to Stripe is brought to its end, and nothing more is sent.",
    "resume": "It goes on where it was.",
}
#: A payee's state at Stripe, as staff read it; the payee's own page says it to them, with what they must do.
AT_STRIPE = {
    "not_started": "Not set up yet",
    "unfinished": "Stripe needs more from them before it can pay",
    "checking": "Stripe is checking what they entered",
    "paused": "Stripe holds payouts to their bank until it has what it asked for",
    "ready": "Set up: Stripe can pay them",
}
SKIPPED = {"below_minimum": "below the payee’s minimum", "not_ready": "not set up at Stripe"}


@staff_only
@require_http_methods(["GET", "POST"])
def payout_runs(request: StaffRequest) -> HttpResponseBase:
    form = StartRunForm(request.POST or None, initial={"key": uuid.uuid4().hex})
    if form.is_valid():
        given = form.cleaned_data
        try:
            run = transfers.request_payout_run(
                currency=given["currency"], key=f"desk:{given['currency']}:{given['key']}", user=request.user
            )
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, "The run is planned now; above the limit it waits for a colleague.")
            return redirect("desk-payout-run", run_id=run.pk)
    page = Paginator(payouts.payout_runs(), PER_PAGE).get_page(request.GET.get("page"))
    failures = payouts.failures_by_run(page)
    context = {"page": page, "runs": [(run, failures.get(run.pk, 0)) for run in page], "form": form}
    return render(request, "portal/desk_payout_runs.html", context, status=422 if form.errors else 200)


@staff_only
@require_http_methods(["GET", "POST"])
def payout_run(request: StaffRequest, run_id: int) -> HttpResponseBase:
    """One run: how far it is, what failed and why, who was passed over; and the acts its state allows."""
    run = get_object_or_404(payouts.payout_runs(), pk=run_id)
    acts = [] if run.is_finished else ACTS.get(PayoutRun.State(run.state), [])
    act = request.POST.get("act", "")
    needs_reason = {name: needs for name, _, needs in acts}.get(act)
    form = ReasonForm(request.POST if needs_reason else None)
    if request.method == "POST" and act in SERVICES and (not needs_reason or form.is_valid()):
        given = {"reason": form.cleaned_data["reason"]} if needs_reason else {}
        try:
            SERVICES[act](run=run, by=request.user, **given)  # type: ignore[operator]
        except DomainError as error:
            messages.error(request, error.message)
        else:
            messages.success(request, DONE[act])
        return redirect("desk-payout-run", run_id=run.pk)
    failures = Paginator(payouts.run_failures(run), PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "run": run,
        "figures": payouts.run_figures(run),
        "acts": acts,
        "form": form if any(needs for _, _, needs in acts) else None,
        "failures": failures,
        "reasons": [(payout, payout_problem(payout)) for payout in failures],
        "passed_over": payouts.passed_over_in(run)[:PER_PAGE],
        "waiting": payouts.waiting_in(run)[:10],
        "skipped": [
            (SKIPPED.get(name, name), told["n"], Money(told["micros"], run.currency))
            for name, told in run.skipped.items()
        ],
        "is_starter": run.started_by_id is not None and run.started_by_id == request.user.pk,
    }
    return render(request, "portal/desk_payout_run.html", context, status=422 if form.errors else 200)


@staff_only
@require_GET
def payee(request: StaffRequest, party_id: int) -> HttpResponse:
    """One payee as they see it: what their money waits for, and their payouts."""
    party = get_object_or_404(Party, pk=party_id)
    account = payouts.payee_of(party)
    earned = payouts.earnings_of(party)
    page = Paginator(payouts.payouts_of(party).select_related("run"), PER_PAGE).get_page(request.GET.get("page"))
    rails = Paginator(payouts.rail_payouts_of(party), PER_PAGE).get_page(request.GET.get("rails"))
    context = {
        "party": party,
        "account": account,
        "at_stripe": AT_STRIPE[payouts.onboarding_of(account).state],
        "is_unserved": reach.is_unserved(party),
        "details": bank_details.latest_of(party),
        "earnings": [(of, of.in_transit + of.sent, chart.payable(party.pk, of.currency)) for of in earned],
        "standings": standings_of(party, earned),
        "page": page,
        "reasons": [(payout, payout_problem(payout)) for payout in page],
        "rails": rails,
        "over_rails": [(payout, payouts.paid_over_a_rail(payout)) for payout in rails],
    }
    return render(request, "portal/desk_payee.html", context)


@staff_only
@require_POST
def erase_bank_details(request: StaffRequest, party_id: int) -> HttpResponseBase:
    """Where a payee asked us to, instead of doing it on their own page."""
    party = get_object_or_404(Party, pk=party_id)
    try:
        bank_details.erase_on_request(party=party, by=request.user, reason=request.POST.get("reason", ""))
    except DomainError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, "Erased. What is due waits until the payee enters an account.")
    return redirect("desk-payee", party_id=party.pk)
