"""Every refusal leaves as `application/problem+json` (RFC 9457) with a stable code and pointers to the fields."""

import logging
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404
from rest_framework import exceptions
from rest_framework.response import Response

from marketplace.errors import DomainError

logger = logging.getLogger(__name__)


class ProblemResponse(Response):
    def __init__(
        self,
        *,
        status: int,
        code: str,
        title: str,
        detail: str,
        pointers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        data: dict[str, Any] = {
            "type": f"/docs/problems#{code}",
            "title": title,
            "status": status,
            "detail": detail,
            "code": code,
        }
        if pointers:
            data["errors"] = [{"pointer": where, "detail": what} for where, what in pointers.items()]
        super().__init__(data, status=status, headers=headers, content_type="application/problem+json")


def problem_response(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's exception handler; what it does not know goes on, to be logged and answered with 500."""
    match error:
        case DomainError():
            return ProblemResponse(
                status=error.status,
                code=error.code,
                title=type(error).__name__,
                detail=error.message,
                pointers=error.pointers,
            )
        case Http404():
            return ProblemResponse(
                status=404,
                code="not_found",
                title="Not found",
                detail="There is no such thing, or it is not yours to see.",
            )
        case PermissionDenied():
            return ProblemResponse(status=403, code="not_allowed", title="Not allowed", detail="You may not do this.")
        case exceptions.ValidationError():
            pointers = dict(_pointers(error.detail, ""))
            first = next(iter(pointers.items()), ("", "invalid"))
            return ProblemResponse(
                status=422,
                code="invalid_input",
                title="Invalid input",
                detail=f"{first[0] or 'The body'}: {first[1]}",
                pointers=pointers,
            )
        case exceptions.APIException():
            headers: dict[str, str] = {}
            if getattr(error, "auth_header", None):
                headers["WWW-Authenticate"] = error.auth_header  # type: ignore[attr-defined]
            if getattr(error, "wait", None):
                headers["Retry-After"] = str(int(error.wait) + 1)  # type: ignore[attr-defined]
            return ProblemResponse(
                status=error.status_code,
                code=str(error.get_codes()),
                title=type(error).__name__,
                detail=str(error.detail),
                headers=headers,
            )
    return None


def _pointers(detail: Any, path: str) -> Any:
    if isinstance(detail, dict):
        for name, inner in detail.items():
            yield from _pointers(inner, path if name == "non_field_errors" else f"{path}/{name}")
    elif isinstance(detail, list) and any(isinstance(inner, dict | list) for inner in detail):
        for index, inner in enumerate(detail):
            yield from _pointers(inner, f"{path}/{index}")
    elif isinstance(detail, list):
        yield path, " ".join(str(inner) for inner in detail)
    else:
        yield path, str(detail)
