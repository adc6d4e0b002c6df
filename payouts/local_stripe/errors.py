"""Refusals in Stripe's shape."""

from typing import Any


class StripeError(Exception):
    """What Stripe answers when it does not do what it was asked.

    Args:
        message: for the developer who reads it.
        code: Stripe's own error code, where it has one for the case.
        param: the parameter at fault, as the form names it: `line_items[0][quantity]`.
        headers: what the answer carries beside its body.
        remembered: whether an idempotency key keeps the answer; it does once an endpoint began to execute.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        remembered: bool = True,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.remembered = remembered
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        error = {"type": self.kind, "message": self.message}
        if self.code:
            error["code"] = self.code
            error["doc_url"] = f"https://stripe.com/docs/error-codes/{self.code.replace('_', '-')}"
        if self.param:
            error["param"] = self.param
        return {"error": error}


def missing(kind: str, identifier: str, *, param: str = "id") -> StripeError:
    return StripeError(f"No such {kind}: '{identifier}'", status=404, code="resource_missing", param=param)
