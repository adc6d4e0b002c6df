"""What drf-spectacular cannot know: which scope a key needs, and that every refusal is a problem document."""

from typing import Any

from drf_spectacular.openapi import AutoSchema

from marketplace.api.keys import needed_scope
from marketplace.api.staff_keys import CODE_HEADER
from marketplace.models import StaffKey

PROBLEM = {
    "type": "object",
    "description": "RFC 9457. `code` stays the same; `errors` point to the fields.",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong and the remedy, for a person."},
        "code": {"type": "string", "example": "price_changed"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "detail"],
                "properties": {
                    "pointer": {"type": "string", "example": "/expected_total"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}


class ScopedAutoSchema(AutoSchema):
    """Reads each view's `scopes`, as the permission does."""

    def get_auth(self) -> list[dict[str, Any]]:
        return super().get_auth() if self._scope() else []

    def get_operation(self, *args: Any) -> dict[str, Any] | None:
        operation: dict[str, Any] | None = super().get_operation(*args)
        if operation is not None and (scope := self._scope()):
            needs = f"Needs a key with the scope `{scope}`."
            if scope == StaffKey.Scope.ACT and getattr(self.view, "needs_code", True):
                needs += f" Needs a one-time code of yours in `{CODE_HEADER}`."
            operation["description"] = f"{operation.get('description', '')}\n\n{needs}".strip()
        return operation

    def get_override_parameters(self) -> Any:
        """What a desk view takes besides, for each of its methods: headers of an act, filters of a list."""
        parameters: list[Any] = super().get_override_parameters()
        of_desk = getattr(self.view, "parameters", None)
        return parameters if of_desk is None else [*parameters, *of_desk(self.method)]

    def _scope(self) -> str | None:
        return needed_scope(self.view, self.method)


def describe_problems(result: dict[str, Any], generator: Any, request: Any, public: bool) -> dict[str, Any]:
    """Postprocessing: give every operation the answer that a refusal is."""
    result["components"]["schemas"]["Problem"] = PROBLEM
    refusal = {
        "description": "A refusal",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for methods in result["paths"].values():
        for operation in methods.values():
            operation["responses"].setdefault("default", refusal)
    return result
