"""How much a request may send: refused by its length before a byte of it is read, and stopped at the limit if that lied.

A view says more than the default by `body_limit`, the name of a setting; a page that takes files also says who may send
any (`takes_files`), since the check of a form's token would read them first.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from io import BytesIO
from typing import Any, ParamSpec, TypeVar

from django.conf import settings
from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import render
from django.template.defaultfilters import filesizeformat
from rest_framework.exceptions import ParseError
from rest_framework.parsers import JSONParser

from marketplace.errors import DomainError

JSON_LIMIT, PAGE_LIMIT = "MAX_JSON_BYTES", "DATA_UPLOAD_MAX_MEMORY_SIZE"
FORM_BYTES = 1_000_000  # what a form may add to its file: boundaries, names, the token
CHUNK_BYTES = 1 << 16

P = ParamSpec("P")
R = TypeVar("R", bound=HttpResponseBase)


class BodyTooLarge(DomainError):
    """More than this address takes."""

    code = "body_too_large"
    status = 413


class LengthRequired(DomainError):
    """The server cannot know how much is coming."""

    code = "length_required"
    status = 411


def takes_files(limit: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A page whose form sends a file of at most the setting `limit`, from people who are signed in."""

    def mark(view: Callable[P, R]) -> Callable[P, R]:
        @wraps(view)
        def marked(*args: P.args, **kwargs: P.kwargs) -> R:
            return view(*args, **kwargs)

        marked.body_limit = limit  # type: ignore[attr-defined]
        marked.takes_files = True  # type: ignore[attr-defined]
        return marked

    return mark


class BodyLimitMiddleware:
    """Stands before the check of forms' tokens, which reads a body, and after the session, which says who sends it."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_view(
        self, request: HttpRequest, view: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        if request.headers.get("Transfer-Encoding") and not request.headers.get("Content-Length"):
            return _refused(request, LengthRequired("Send the body whole, with a Content-Length header."))
        target = getattr(view, "cls", view)  # of the API, the class
        length = request.headers.get("Content-Length") or "0"
        n_bytes = int(length) if length.isascii() and length.isdigit() else 0  # Django reads nothing of such a body
        takes_files = getattr(target, "takes_files", False)
        limit = body_limit(target, default=JSON_LIMIT if request.path.startswith("/api/") else PAGE_LIMIT)
        if n_bytes > limit + (FORM_BYTES if takes_files else 0):
            return _refused(request, _too_large(n_bytes, limit))
        if takes_files and n_bytes and not request.user.is_authenticated:
            return redirect_to_login(request.get_full_path())
        return None


class LimitedJSONParser(JSONParser):
    """DRF's own reads whatever comes."""

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Mapping[str, Any] | None = None) -> Any:
        limit = body_limit((parser_context or {}).get("view"), default=JSON_LIMIT)
        body = bytearray()
        while chunk := stream.read(min(CHUNK_BYTES, limit + 1 - len(body))):
            body += chunk
            if len(body) > limit:
                raise _too_large(None, limit)
        try:
            return super().parse(BytesIO(bytes(body)), media_type=media_type, parser_context=parser_context)
        except RecursionError:
            raise ParseError("JSON parse error - it is nested too deeply.") from None


def body_limit(view: Any, *, default: str) -> int:
    """In bytes; read from the settings now."""
    limit: int = getattr(settings, getattr(view, "body_limit", default))
    return limit


def problem_document(error: DomainError) -> JsonResponse:
    """A refusal outside DRF's views, as they would answer it."""
    problem = {
        "type": f"/docs/problems#{error.code}",
        "title": type(error).__name__,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
    }
    return JsonResponse(problem, status=error.status, content_type="application/problem+json")


def _too_large(n_bytes: int | None, limit: int) -> BodyTooLarge:
    what = "The request is larger" if n_bytes is None else f"The request has {filesizeformat(n_bytes)}, more"
    return BodyTooLarge(f"{what} than the {filesizeformat(limit)} that this address takes. Send less at once.")


def _refused(request: HttpRequest, error: DomainError) -> HttpResponse:
    if request.path.startswith(("/api/", "/webhooks/")):
        return problem_document(error)
    return render(request, "refused.html", {"error": error}, status=error.status)
