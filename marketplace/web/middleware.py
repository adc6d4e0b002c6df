"""Which party a signed-in person acts for: `request.party` and `request.membership`, from the session, re-checked each time."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

from marketplace.models import Membership

SESSION_KEY = "acting_party"


class ActingPartyMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        membership = _membership(request)
        request.membership = membership  # type: ignore[attr-defined]
        request.party = membership.party if membership else None  # type: ignore[attr-defined]
        return self.get_response(request)


def _membership(request: HttpRequest) -> Membership | None:
    if not request.user.is_authenticated or request.path.startswith(("/api/", "/static/", "/webhooks/")):
        return None
    # Without a choice, the party joined last: whoever claimed a contributor or made an organisation came for that one.
    mine = Membership.objects.select_related("party").filter(user=request.user).order_by("-pk")
    chosen = request.session.get(SESSION_KEY)
    return (mine.filter(party_id=chosen).first() if chosen else None) or mine.first()
