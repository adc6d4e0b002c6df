"""The desk's page of staff members' own keys to its API: made after a fresh second factor, shown once, revoked by anyone of them."""

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Count
from django.http import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from marketplace.api.staff_keys import create_staff_key, revoke_staff_key
from marketplace.errors import DomainError
from marketplace.models import StaffKey
from marketplace.selectors import staff_keys
from portal.pages.forms import StaffKeyForm
from portal.second_factor import StaffRequest, staff_only

PER_PAGE = 50


@never_cache
@staff_only
@require_http_methods(["GET", "POST"])
def keys(request: StaffRequest) -> HttpResponseBase:
    """The answer to the POST is the only page that ever shows a key's text."""
    form = StaffKeyForm(request.POST or None)
    made, text = None, ""
    if form.is_valid():
        try:
            made, text = create_staff_key(user=request.user, **form.cleaned_data)
        except DomainError as error:
            form.add_refusal(error)
        else:
            form = StaffKeyForm()
    found = staff_keys().annotate(n_acts=Count("acts"))
    context = {
        "tab": "keys",
        "form": form,
        "made": made,
        "made_text": text,
        "page": Paginator(found, PER_PAGE).get_page(request.GET.get("page")),
        "wall": timezone.now(),
    }
    return render(request, "portal/desk_keys.html", context, status=422 if form.errors else 200)


@staff_only
@require_POST
def revoke(request: StaffRequest, key_id: int) -> HttpResponseBase:
    key = get_object_or_404(StaffKey, pk=key_id)
    revoke_staff_key(key=key, user=request.user)
    messages.success(request, f"The key {key.prefix}… no longer works.")
    return redirect("desk-keys")
