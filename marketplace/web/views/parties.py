"""Whom one acts for: switch, found an organisation, take up an invitation; and the keys that act without a person."""

import uuid

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods, require_POST

from marketplace import selectors
from marketplace.api.keys import create_api_key, revoke_api_key
from marketplace.errors import DomainError
from marketplace.models import ApiKey, Membership, Party
from marketplace.money import Money
from marketplace.services import invitations
from marketplace.services.parties import create_party
from marketplace.web.access import ActingRequest, acting_editor, acting_owner
from marketplace.web.forms import SCOPES, ApiKeyForm, InvitationForm, OrganisationForm
from marketplace.web.middleware import SESSION_KEY
from marketplace.web.views.orders import refusal


@login_required
@require_POST
def party_switch(request: ActingRequest) -> HttpResponseBase:
    try:
        chosen = uuid.UUID(request.POST.get("party", ""))
    except ValueError:
        raise Http404("There is no such party") from None
    membership = get_object_or_404(
        Membership.objects.select_related("party"), user=request.user, party__public_id=chosen
    )
    request.session[SESSION_KEY] = membership.party_id
    messages.success(request, f"You now act for {membership.party.name}.")
    # Not back to the page one came from: what the former party could see there may not exist for this one.
    return redirect("home")


@login_required
@require_http_methods(["GET", "POST"])
def organisation_new(request: ActingRequest) -> HttpResponseBase:
    form = OrganisationForm(request.POST or None)
    if form.is_valid():
        party = create_party(
            user=request.user,
            name=form.cleaned_data["name"],
            kind=Party.Kind.ORGANISATION,
            country=form.cleaned_data["country"].upper(),
        )
        request.session[SESSION_KEY] = party.pk
        messages.success(request, f"{party.name} is there, and you act for it.")
        return redirect("home")
    return render(request, "marketplace/organisation_form.html", {"form": form}, status=422 if form.errors else 200)


@login_required
@require_http_methods(["GET", "POST"])
def invitation(request: ActingRequest, token: str) -> HttpResponseBase:
    """A GET only shows it: a mail scanner that follows links must not take it up."""
    if request.method == "GET":
        try:
            found = invitations.get_invitation(token=token, user=request.user)
        except DomainError as error:
            return refusal(request, error)
        context = {"invitation": found, "parts": invitations.labelled_parts(found.party)}
        return render(request, "marketplace/invitation.html", context)
    try:
        party = invitations.accept_invitation(token=token, user=request.user)
    except DomainError as error:
        return refusal(request, error)
    request.session[SESSION_KEY] = party.pk
    messages.success(request, f"{party.name} is yours. What its records earned so far is below.")
    return redirect("earnings")


@acting_editor
@require_http_methods(["GET", "POST"])
def invite_contributor(request: ActingRequest, slug: str, party_id: uuid.UUID) -> HttpResponseBase:
    """One contributor of one's own dataset, to the address that one knows of them."""
    dataset = get_object_or_404(selectors.datasets_of(request.party), slug=slug)
    party = get_object_or_404(selectors.contributors_of(request.party, dataset), public_id=party_id)
    form = InvitationForm(request.POST or None)
    if form.is_valid():
        try:
            sent = invitations.invite(party=party, email=form.cleaned_data["email"], by=request.user)
        except DomainError as error:
            form.add_refusal(error)
        else:
            messages.success(request, f"{party.name} is invited at {sent.email}.")
            return redirect("dataset", slug=slug)
    context = {"section": "datasets", "dataset": dataset, "party": party, "form": form}
    return render(request, "marketplace/invite.html", context, status=422 if form.errors else 200)


@csrf_exempt  # the mail program's own button posts here (RFC 8058), from no page of ours; the mark is the authority
@require_http_methods(["GET", "POST"])
def opt_out(request: HttpRequest, mark: str) -> HttpResponseBase:
    """A GET only asks: a mail scanner that follows links must not opt anyone out."""
    try:
        if request.method == "POST":
            invitations.opt_out(mark=mark)
        else:
            invitations.read_opt_out_mark(mark)
    except DomainError as error:
        return refusal(request, error)
    return render(request, "marketplace/opt_out.html", {"is_done": request.method == "POST"})


@never_cache
@acting_owner
@require_http_methods(["GET", "POST"])
def api_keys(request: ActingRequest) -> HttpResponseBase:
    """The answer to the POST is the only page that ever shows a key's text."""
    form = ApiKeyForm(request.POST or None)
    made, text = None, ""
    if form.is_valid():
        try:
            made, text = create_api_key(
                party=request.party,
                user=request.user,
                name=form.cleaned_data["name"],
                scopes=form.cleaned_data["scopes"],
                spending_limit_micros=form.cleaned_data["spending_limit"],
            )
            form = ApiKeyForm()
        except DomainError as error:
            form.add_refusal(error)
    context = {
        "form": form,
        "made": made,
        "made_text": text,
        "keys": [(key, _limit(key)) for key in selectors.api_keys_of(request.party)],
        "scopes": SCOPES,
    }
    return render(request, "marketplace/api_keys.html", context, status=422 if form.errors else 200)


@acting_owner
@require_POST
def api_key_revoke(request: ActingRequest, key_id: int) -> HttpResponseBase:
    key: ApiKey = get_object_or_404(selectors.api_keys_of(request.party), pk=key_id)
    revoke_api_key(key=key, user=request.user)
    messages.success(request, f"The key {key.prefix}… no longer works.")
    return redirect("api-keys")


def _limit(key: ApiKey) -> str:
    """The limit holds in each currency alike, so it is written without one."""
    return "" if key.spending_limit_micros is None else Money(key.spending_limit_micros, "USD").amount_text()
