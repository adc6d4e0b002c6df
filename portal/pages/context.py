from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.utils.functional import SimpleLazyObject

from marketplace.models import Membership
from payouts.services.reach import is_served


def site(request: HttpRequest) -> dict[str, Any]:
    """What every page needs: whom the person acts for, for whom else they may, and whether the money is play money."""
    return {
        "acting_party": getattr(request, "party", None),
        "acting_membership": getattr(request, "membership", None),
        "memberships": SimpleLazyObject(lambda: _memberships(request)),
        "acting_is_unserved": SimpleLazyObject(lambda: _is_unserved(request)),
        "is_demo": settings.IS_DEMO,
        "base_url": settings.BASE_URL,
    }


def _memberships(request: HttpRequest) -> list[Membership]:
    if not request.user.is_authenticated:
        return []
    return list(Membership.objects.filter(user=request.user).select_related("party").order_by("pk"))


def _is_unserved(request: HttpRequest) -> bool:
    """Whether Stripe said that it does not pay to the party's country; asked only by the pages that tell it."""
    party = getattr(request, "party", None)
    return party is not None and is_served(party.country) is False
