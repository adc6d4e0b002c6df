"""Rate limits per API key's party, per staff member, or per address without a key, announced in headers."""

from typing import Any

from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle

from marketplace.models import ApiKey, StaffKey


class PartyThrottle(SimpleRateThrottle):
    """`RateLimit-Policy` and `RateLimit` (IETF draft) say what is left; `marketplace.api.middleware` adds them."""

    scope = "party"

    def allow_request(self, request: Request, view: Any) -> bool:
        if request.auth is None:
            self.scope = "anon"
            self.rate = self.get_rate()
            self.num_requests, self.duration = self.parse_rate(self.rate)
        allowed = super().allow_request(request, view)
        left = max(0, (self.num_requests or 0) - len(getattr(self, "history", [])))
        request._request.rate_limit = (self.num_requests, left, self.duration)  # type: ignore[attr-defined]
        return bool(allowed)

    def get_cache_key(self, request: Request, view: Any) -> str:
        match request.auth:
            case ApiKey():
                ident = f"party:{request.auth.party_id}"
            case StaffKey():
                ident = f"staff:{request.auth.user_id}"  # two keys of one person are one person
            case _:
                ident = f"addr:{self.get_ident(request)}"
        return self.cache_format % {"scope": self.scope, "ident": ident}
