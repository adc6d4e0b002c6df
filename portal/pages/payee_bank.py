"""Where a payee whom Stripe does not reach is paid: an owner with a fresh second factor says it; it is shown only masked, and erased on their word."""

from django.contrib import messages
from django.http import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods

from marketplace.errors import DomainError
from marketplace.web.access import ActingRequest, acting_owner
from payouts.services import bank_details, other_rails
from portal.pages.forms import BankDetailsForm
from portal.second_factor import fresh_factor


@acting_owner
@fresh_factor
@require_http_methods(["GET", "POST"])
def payee_bank(request: ActingRequest) -> HttpResponseBase:
    latest = bank_details.latest_of(request.party)
    problem = ""
    if request.POST.get("act") == "erase":
        try:
            bank_details.erase_details(party=request.party, user=request.user)
        except DomainError as error:
            problem = error.message
        else:
            messages.success(request, "Erased. What is due to you waits until you enter an account.")
            return redirect("payee-bank")
    given = request.POST if request.method == "POST" and not problem else None
    form = BankDetailsForm(given, initial={"account_holder": request.party.name})
    if form.is_valid():
        try:
            made = bank_details.set_details(party=request.party, user=request.user, **form.cleaned_data)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(
                request,
                f"Saved. It is used from {made.usable_from:%-d %B %Y, %H:%M} UTC on; every owner is told by mail.",
            )
            return redirect("earnings")
    context = {
        "section": "earnings",
        "form": form,
        "details": latest,
        "problem": problem,
        "waits": other_rails.waits_for(latest, "your") if latest else "",
    }
    return render(request, "portal/payee_bank.html", context, status=422 if problem or form.errors else 200)
