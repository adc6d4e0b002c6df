from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.utils.functional import SimpleLazyObject

from marketplace.models import Membership


def site(request: HttpRequest) -> dict[str, Any]:
    """What every page needs: whom the person acts for, for whom else they may, and whether the money is play money."""
    return {
        "acting_party": getattr(request, "party", None),
        "acting_membership": getattr(request, "membership", None),
        "memberships": SimpleLazyObject(lambda: _memberships(request)),
        "is_demo": settings.IS_DEMO,
        "base_url": settings.BASE_URL,
    }


def _memberships(request: HttpRequest) -> list[Membership]:
    if not request.user.is_authenticated:
        return []
    return list(Membership.objects.filter(user=request.user).select_related("party").order_by("pk"))
