"""Who may open a page: signed in and acting for a party, or for one with the authority to sign and pay."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect

from marketplace.models import Membership, Party, User


class ActingRequest(HttpRequest):
    """A request after `ActingPartyMiddleware`, from someone signed in."""

    user: User
    party: Party
    membership: Membership
    htmx: Any


P = ParamSpec("P")
View = Callable[Concatenate[ActingRequest, P], HttpResponseBase]


def acting(view: View[P]) -> Callable[Concatenate[HttpRequest, P], HttpResponseBase]:
    """Someone signed in who acts for a party; without one, they are asked to make it first."""

    @login_required
    @wraps(view)
    def inner(request: Any, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        if request.party is None:
            return redirect("organisation-new")
        return view(request, *args, **kwargs)

    return inner


def acting_owner(view: View[P]) -> Callable[Concatenate[HttpRequest, P], HttpResponseBase]:
    """As `acting`, and the member may sign, buy and move money in the party's name."""

    @wraps(view)
    def checked(request: ActingRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        if not request.membership.has_authority:
            raise PermissionDenied(f"Only an owner of {request.party.name} can do this. Ask one of them.")
        return view(request, *args, **kwargs)

    return acting(checked)


def acting_editor(view: View[P]) -> Callable[Concatenate[HttpRequest, P], HttpResponseBase]:
    """As `acting`, and the member may upload and describe."""

    @wraps(view)
    def checked(request: ActingRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        if request.membership.role == Membership.Role.VIEWER:
            raise PermissionDenied(f"A viewer of {request.party.name} can only read. Ask one of its owners.")
        return view(request, *args, **kwargs)

    return acting(checked)


def see_other(url: str) -> HttpResponse:
    """After a POST: go and GET that (303, so that nothing is posted again, at Stripe least of all)."""
    return HttpResponse(status=303, headers={"Location": url})
