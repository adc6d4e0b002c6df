"""A person of the staff at the desk's API, whose answers are held against the OpenAPI document as they come."""

import itertools
import re
from typing import Any

import jsonschema
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import (
    TOTP,
    format_hotp_value,
    generate_totp_secret,
    hotp_value,
    yield_hotp_counters_from_time,
)
from allauth.mfa.utils import decrypt
from django.core.cache import cache
from rest_framework.test import APIClient

from marketplace.api.staff_keys import create_staff_key
from marketplace.models import User

BASE = "/api/v1/desk/"
_numbers = itertools.count(1)


def code_of(user: User) -> str:
    """What the person's app shows now, as if nobody had used it yet."""
    secret = decrypt(Authenticator.objects.get(user=user, type="totp").data["secret"])
    code = str(format_hotp_value(hotp_value(secret, list(yield_hotp_counters_from_time())[1])))
    cache.delete(f"allauth.mfa.totp.used?user={user.pk}&code={code}")
    return code


class Desk:
    """One person of the staff and their key."""

    def __init__(self, document: dict[str, Any], user: User, scopes: list[str], days: int = 30) -> None:
        if not Authenticator.objects.filter(user=user).exists():
            TOTP.activate(user, generate_totp_secret())
        self.document, self.user = document, user
        self.key, self.text = create_staff_key(user=user, name="tests", scopes=scopes, days=days)
        self.client = APIClient()
        self.client.credentials(HTTP_AUTHORIZATION=f"Bearer {self.text}")

    def get(self, path: str, status: int = 200, /, **query: Any) -> Any:
        answer = self.client.get(path if path.startswith("http") else BASE + path, query or None)
        assert answer.status_code == status, answer.content
        if answer["Content-Type"] not in ("application/json", "application/problem+json"):
            return answer
        self._hold(answer, "get")
        return answer.json()

    def act(
        self, path: str, data: Any = None, status: int = 200, /, *, key: str | None = None, code: str | None = None
    ) -> Any:
        """With a current code, unless another one is given (an empty one: none) and a new Idempotency-Key."""
        shown = code_of(self.user) if code is None else code
        headers = {"Idempotency-Key": key or f"act-{next(_numbers)}"} | ({"One-Time-Code": shown} if shown else {})
        answer = self.client.post(BASE + path, data, format="json", headers=headers)
        assert answer.status_code == status, b"".join(answer) if answer.streaming else answer.content
        if answer["Content-Type"] not in ("application/json", "application/problem+json"):
            return answer
        self._hold(answer, "post")
        return answer.json()

    def refused(self, path: str, data: Any, *pointers: str, status: int = 422, **given: Any) -> Any:
        """A refusal with exactly these pointers."""
        problem = self.act(path, data, status, **given)
        assert sorted(error["pointer"] for error in problem.get("errors", [])) == sorted(pointers), problem
        return problem

    def _hold(self, answer: Any, method: str) -> None:
        """The answer is what the document says."""
        path = answer.wsgi_request.path
        (operation,) = [
            methods[method]
            for template, methods in self.document["paths"].items()
            if method in methods and _specific(template, path, self.document)
        ]
        told = operation["responses"].get(str(answer.status_code)) or operation["responses"]["default"]
        (content,) = told["content"].values()
        schema = content["schema"] | {"components": self.document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())


def _matches(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\\{.+?\\}", "[^/]+", re.escape(template)), path) is not None


def _specific(template: str, path: str, document: dict[str, Any]) -> bool:
    """Of several templates that match, the one with the fewest holes."""
    matching = [one for one in document["paths"] if _matches(one, path)]
    return _matches(template, path) and template == min(matching, key=lambda one: one.count("{"))
