"""Who may act at the desk: staff who have shown a second factor in this session, and again lately where they move money.

allauth keeps in the session how and when its user has shown who they are; the login asks everybody for the second factor who has
one. Staff without one are sent to set it up before they see anything.
"""

import base64
import hashlib
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec
from urllib.parse import urlencode

from allauth.account.authentication import get_authentication_records
from allauth.account.internal.flows.reauthentication import suspend_request
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.mfa.utils import is_mfa_enabled
from cryptography.fernet import Fernet
from django.conf import settings
from django.contrib import admin, messages
from django.http import Http404, HttpRequest, HttpResponseBase, HttpResponseRedirect
from django.shortcuts import redirect
from django.urls import reverse

from marketplace.models import User

#: For so long after showing it a person may move money without showing it again.
FRESH_SECONDS = 600
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
P = ParamSpec("P")


class StaffRequest(HttpRequest):
    user: User


class MFAAdapter(DefaultMFAAdapter):
    """Secrets of second factors are kept encrypted: whoever reads the database cannot make codes."""

    def encrypt(self, text: str) -> str:
        return _cipher().encrypt(text.encode()).decode()

    def decrypt(self, encrypted_text: str) -> str:
        return _cipher().decrypt(encrypted_text.encode()).decode()


def _cipher() -> Fernet:
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(f"second factor:{settings.MFA_KEY}".encode()).digest()))


def shown_at(request: HttpRequest) -> float | None:
    """When this session's user last showed a second factor, in seconds of the epoch; None: not in this session."""
    if not request.user.is_authenticated:
        return None
    records = get_authentication_records(request, request.user)
    return max((float(one["at"]) for one in records if one.get("method") == "mfa"), default=None)


def is_fresh(request: HttpRequest) -> bool:
    shown = shown_at(request)
    return shown is not None and time.time() - shown < FRESH_SECONDS


def staff_only(
    view: Callable[Concatenate[StaffRequest, P], HttpResponseBase],
) -> Callable[Concatenate[HttpRequest, P], HttpResponseBase]:
    """Staff with a second factor; whatever changes something needs a fresh one. For anyone else the page does not exist."""

    @wraps(view)
    def inner(request: Any, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        if not (request.user.is_authenticated and request.user.is_active and request.user.is_staff):
            raise Http404("There is no such page")
        answer = _ask_for_it(request)
        return view(request, *args, **kwargs) if answer is None else answer

    return inner


def fresh_factor(
    view: Callable[Concatenate[Any, P], HttpResponseBase],
) -> Callable[Concatenate[Any, P], HttpResponseBase]:
    """Of a signed-in person: a second factor shown in the last ten minutes, to see the form and to send it.

    What was sent without is not kept for later, as the desk's acts are: it may be what must not lie in a session.
    """

    @wraps(view)
    def inner(request: Any, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        if not is_mfa_enabled(request.user):
            messages.warning(request, "This decides where money goes, so it needs a second factor: set it up first.")
            return redirect("mfa_activate_totp")
        if is_fresh(request):
            return view(request, *args, **kwargs)
        if request.method not in SAFE_METHODS:
            messages.warning(request, "Nothing was saved: show your second factor again, then enter it once more.")
            return redirect(request.path)
        answer: HttpResponseBase = suspend_request(request, reverse("mfa_reauthenticate"))
        return answer

    return inner


def _ask_for_it(request: Any) -> HttpResponseBase | None:
    """Where to send somebody who must set up or show a second factor first; what they were about to do is resumed then."""
    if not is_mfa_enabled(request.user):
        messages.warning(request, "The desk needs a second factor: set it up first.")
        return redirect("mfa_activate_totp")
    if request.method in SAFE_METHODS:
        if shown_at(request) is not None:
            return None
    elif is_fresh(request):
        return None
    answer: HttpResponseBase = suspend_request(request, reverse("mfa_reauthenticate"))
    return answer


class AdminSite(admin.AdminSite):
    """Django's admin behind the same door as the desk."""

    def has_permission(self, request: HttpRequest) -> bool:
        return bool(
            super().has_permission(request)
            and is_mfa_enabled(request.user)
            and (shown_at(request) is not None if request.method in SAFE_METHODS else is_fresh(request))
        )

    def login(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        """The site's own pages ask for password and second factor."""
        page = request.GET.get("next") or reverse("admin:index")
        if self.has_permission(request):
            return HttpResponseRedirect(reverse("admin:index"))
        if not request.user.is_authenticated:
            return HttpResponseRedirect(f"{reverse('account_login')}?{urlencode({'next': page})}")
        if not super().has_permission(request):
            raise Http404("There is no such page")
        if not is_mfa_enabled(request.user):
            messages.warning(request, "The admin pages need a second factor: set it up first.")
            return redirect("mfa_activate_totp")
        return HttpResponseRedirect(f"{reverse('mfa_reauthenticate')}?{urlencode({'next': page})}")
