from typing import Any

from django.conf import settings
from django.http import HttpRequest


def site(request: HttpRequest) -> dict[str, Any]:
    """What every page needs: whom the person acts for, and whether the money is play money."""
    return {
        "acting_party": getattr(request, "party", None),
        "acting_membership": getattr(request, "membership", None),
        "is_demo": settings.IS_DEMO,
    }
