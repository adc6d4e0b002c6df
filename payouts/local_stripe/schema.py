"""Stripe's own document decides what a request may say and what an answer must look like.

OpenAPI 3.0 writes null as `nullable: true`; JSON Schema (Draft 7) as a type, so the document is rewritten on loading. Stripe
closes the objects of requests but leaves those of answers open; here both are closed, so that a key which Stripe does not
have is found in either direction. Form bodies (`a[b][0]=c`) are decoded and their strings read as the schema's types first.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError, best_match

from payouts.local_stripe.errors import StripeError

DOCUMENT = Path(__file__).parent / "openapi" / "spec3.reduced.json"
API_VERSION = "2026-08-26.dahlia"
FORM = "application/x-www-form-urlencoded"

_DEFINITIONS = "#/definitions/"
_KEY_PARTS = re.compile(r"\[([^\[\]]*)\]")


class SchemaMismatch(AssertionError):
    """An answer or an event that Stripe's document does not allow."""


@dataclass(frozen=True)
class Operation:
    """One endpoint: its path with placeholders, and validators for what goes in and what comes out."""

    method: str
    path: str
    request: dict[str, Any]  # the schema of query and form parameters together
    validator: Draft7Validator
    answer: Draft7Validator
    refusal: Draft7Validator

    @property
    def required(self) -> list[str]:
        return list(self.request.get("required", []))


def _rewrite(node: Any) -> Any:
    """OpenAPI 3.0 to Draft 7: null as a type, references into `definitions`, objects closed unless said otherwise."""
    if isinstance(node, list):
        return [_rewrite(item) for item in node]
    if not isinstance(node, dict):
        return node
    # `properties` maps names, not keywords, so it is not rewritten as a schema; prose would only take room.
    skipped = ("description", "title", "nullable", "properties")
    kept = {key: _rewrite(value) for key, value in node.items() if key not in skipped}
    if isinstance(node.get("properties"), dict):
        kept["properties"] = {name: _rewrite(value) for name, value in node["properties"].items()}
        if node.get("type") == "object":
            kept.setdefault("additionalProperties", False)
    if isinstance(node.get("$ref"), str):
        return {"$ref": _DEFINITIONS + node["$ref"].rsplit("/", 1)[-1]}
    if node.get("nullable") is True:
        if "anyOf" in kept:
            kept["anyOf"] = [*kept["anyOf"], {"type": "null"}]
        else:
            kept["type"] = [kept["type"], "null"]
            if "enum" in kept:
                kept["enum"] = [*kept["enum"], None]
    return kept


@cache
def _document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    if loaded["info"]["version"] != API_VERSION:
        raise ValueError(f"{DOCUMENT.name} describes {loaded['info']['version']}, not {API_VERSION}")
    return loaded


@cache
def _definitions() -> dict[str, Any]:
    return {name: _rewrite(schema) for name, schema in _document()["components"]["schemas"].items()}


def _validator(schema: dict[str, Any]) -> Draft7Validator:
    return Draft7Validator({**schema, "definitions": _definitions()})


@cache
def operations() -> dict[tuple[str, str], Operation]:
    """Every endpoint of the document by (METHOD, path)."""
    found = {}
    for path, methods in _document()["paths"].items():
        for method, described in methods.items():
            body = described["requestBody"]["content"].get(FORM, {}).get("schema", {})
            properties = dict(body.get("properties", {}))
            required = list(body.get("required", []))
            for parameter in described.get("parameters", []):
                if parameter["in"] == "query":
                    properties[parameter["name"]] = parameter["schema"]
                    if parameter["required"]:
                        required.append(parameter["name"])
            request = _rewrite({"type": "object", "properties": properties, "additionalProperties": False})
            request["required"] = required
            responses = described["responses"]
            found[method.upper(), path] = Operation(
                method=method.upper(),
                path=path,
                request=request,
                validator=_validator(request),
                answer=_validator(_rewrite(responses["200"]["content"]["application/json"]["schema"])),
                refusal=_validator(_rewrite(responses["default"]["content"]["application/json"]["schema"])),
            )
    return found


@cache
def _patterns() -> list[tuple[str, re.Pattern[str], Operation]]:
    return [
        (method, re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path))), operation)
        # A path without placeholders wins over one with: it is looked at first.
        for (method, path), operation in sorted(operations().items(), key=lambda item: item[0][1].count("{"))
    ]


def find_operation(method: str, path: str) -> Operation | None:
    """The endpoint that a concrete request path (`/v1/charges/ch_1`) addresses."""
    for candidate, pattern, operation in _patterns():
        if candidate == method and pattern.fullmatch(path):
            return operation
    return None


def expandable(kind: str) -> set[str]:
    """The fields of an object that hold an id and may be expanded."""
    properties = _document()["components"]["schemas"].get(kind, {}).get("properties", {})
    return {name for name, schema in properties.items() if "x-expansionResources" in schema}


def known_kind(kind: str) -> bool:
    return kind in _definitions()


def decode(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Read `a[b][0]=c` as {"a": {"b": {"0": "c"}}}; whether "0" is an index is the schema's to say.

    Raises:
        StripeError: a name is malformed or used in two ways.
    """
    decoded: dict[str, Any] = {}
    for name, value in pairs:
        head, bracket, rest = name.partition("[")
        parts = _KEY_PARTS.findall(bracket + rest)
        if not head or "]" in head or "".join(f"[{part}]" for part in parts) != bracket + rest:
            raise StripeError(f"Invalid parameter name: {name}", param=name, remembered=False)
        node = decoded
        for here, following in zip([head, *parts], [*parts, None], strict=True):
            slot = here or str(len(node))  # `a[]=x` appends
            if following is None:
                if isinstance(node.get(slot), dict):
                    raise StripeError(f"Invalid object: {name}", param=name, remembered=False)
                node[slot] = value
            else:
                node = node.setdefault(slot, {})
                if not isinstance(node, dict):
                    raise StripeError(f"Invalid object: {name}", param=name, remembered=False)
    return decoded


def _coerce(value: Any, schema: Mapping[str, Any]) -> Any:
    """Read strings as the types that the schema names; what cannot be read stays, for the validator to refuse."""
    if "anyOf" in schema:
        for branch in schema["anyOf"]:
            attempt = _coerce(value, branch)
            if Draft7Validator(branch).is_valid(attempt):
                return attempt
        return _coerce(value, schema["anyOf"][0])
    kind = schema.get("type")
    if isinstance(value, str):
        if kind == "integer" and re.fullmatch(r"-?\d{1,18}", value):
            return int(value)
        if kind == "number" and re.fullmatch(r"-?\d{1,18}(\.\d{1,12})?", value):
            return float(value)
        if kind == "boolean" and value in ("true", "false"):
            return value == "true"
        return [] if kind == "array" and value == "" else value
    if kind == "array" and all(slot.isdigit() for slot in value):
        return [_coerce(value[slot], schema.get("items", {})) for slot in sorted(value, key=int)]
    if kind == "object":
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {}
        return {name: _coerce(inner, properties.get(name, rest)) for name, inner in value.items()}
    return value


def _form_name(path: Iterable[Any]) -> str:
    head, *rest = [str(part) for part in path] or [""]
    return head + "".join(f"[{part}]" for part in rest)


def _refusal(error: ValidationError) -> StripeError:
    name = _form_name(error.absolute_path)
    if error.validator == "additionalProperties":
        unknown = sorted(set(error.instance) - set(error.schema.get("properties", {})))[0]
        param = _form_name([*error.absolute_path, unknown])
        return StripeError(
            f"Received unknown parameter: {param}", code="parameter_unknown", param=param, remembered=False
        )
    if error.validator == "required":
        absent = next(field for field in error.validator_value if field not in error.instance)
        param = _form_name([*error.absolute_path, absent])
        return StripeError(f"Missing required param: {param}.", code="parameter_missing", param=param, remembered=False)
    if error.validator == "type":
        kind = error.validator_value
        code = "parameter_invalid_integer" if kind == "integer" else None
        return StripeError(f"Invalid {kind}: {error.instance}", code=code, param=name, remembered=False)
    if error.validator == "enum":
        choices = ", ".join(str(choice) for choice in error.validator_value[:20])
        return StripeError(f"Invalid {name}: must be one of {choices}", param=name, remembered=False)
    return StripeError(f"Invalid {name}: {error.message[:300]}", param=name, remembered=False)


def validate_request(
    method: str, path: str, *, query: Iterable[tuple[str, str]] = (), form: Iterable[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Check a request's parameters against Stripe's document; return them decoded, as the schema's types.

    Raises:
        StripeError: as Stripe would refuse it, naming the parameter.
        ValueError: the document has no such endpoint.
    """
    operation = find_operation(method, path)
    if operation is None:
        raise ValueError(f"{method} {path} is not in {DOCUMENT.name}")
    params: dict[str, Any] = _coerce(decode([*query, *form]), operation.request)
    errors = list(operation.validator.iter_errors(params))
    if errors:
        # An unknown name says more than what its neighbours lack, so it is reported first.
        named = [error for error in errors if error.validator in ("additionalProperties", "required")]
        named.sort(key=lambda error: error.validator)
        raise _refusal(named[0] if named else best_match(errors))
    return params


def _check(validator: Draft7Validator, value: Any, *, what: str) -> None:
    if validator.is_valid(value):  # the quick way for what is nearly always so
        return
    error = best_match(validator.iter_errors(value))
    where = "/".join(str(part) for part in error.absolute_path) or "the whole"
    raise SchemaMismatch(f"{what}, at {where}: {error.message[:500]}")


def validate_response(method: str, path: str, status: int, body: Any) -> None:
    """Check an answer against Stripe's document, keys included.

    Raises:
        SchemaMismatch: naming the place.
    """
    operation = find_operation(method, path)
    if operation is None:
        if status != 404:
            raise SchemaMismatch(f"{method} {path} answered {status}, but is not in {DOCUMENT.name}")
        operation = operations()["GET", "/v1/balance"]  # every endpoint refuses in the same shape
    _check(operation.answer if status == 200 else operation.refusal, body, what=f"{method} {path} → {status}")


@cache
def _kind_validator(kind: str) -> Draft7Validator:
    return _validator({"$ref": _DEFINITIONS + kind})


@cache
def event_types() -> frozenset[str]:
    """The names of events that an endpoint may ask for: Stripe's own list."""
    request = operations()["POST", "/v1/webhook_endpoints"].request
    return frozenset(request["properties"]["enabled_events"]["items"]["enum"])


def validate_object(body: Mapping[str, Any]) -> None:
    """Check one object against the schema that its `object` field names.

    Raises:
        SchemaMismatch: naming the place.
    """
    kind = str(body.get("object"))
    if not known_kind(kind):
        raise SchemaMismatch(f"{kind!r} is not an object of {DOCUMENT.name}")
    _check(_kind_validator(kind), body, what=kind)


def validate_event(event: Mapping[str, Any]) -> None:
    """Check an event: its envelope, its name, and `data.object` against that object's own schema.

    Raises:
        SchemaMismatch: naming the place.
    """
    _check(_kind_validator("event"), event, what=f"event {event.get('type')}")
    if event["type"] not in event_types():
        raise SchemaMismatch(f"{event['type']} is not an event of Stripe")
    validate_object(event["data"]["object"])
