"""Tells a client how much of its rate limit is left (draft-ietf-httpapi-ratelimit-headers)."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse


class RateLimitHeadersMiddleware:
    """Adds what `throttling.PartyThrottle` noted on the request; refusals carry it too."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        noted = getattr(request, "rate_limit", None)
        if noted is not None:
            limit, left, window_seconds = noted
            response["RateLimit-Policy"] = f'"default";q={limit};w={window_seconds}'
            response["RateLimit"] = f'"default";r={left}'
        return response
