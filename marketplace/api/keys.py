"""API keys: made once, shown once, kept as a hash; every request acts for the key's party."""

import hashlib
import secrets
from typing import Any

from django.db import transaction
from django.utils import timezone
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from marketplace.errors import InvalidInput
from marketplace.models import ApiKey, Party, User
from marketplace.services import audit
from marketplace.services.authority import require_authority

PREFIX = "rk_"


@transaction.atomic
def create_api_key(
    *, party: Party, user: User, name: str, scopes: list[str], spending_limit_micros: int | None = None
) -> tuple[ApiKey, str]:
    """Make a key; its text is in the answer and nowhere else.

    Raises:
        NotAllowed: the user may not manage the party's keys.
        InvalidInput: no scope, an unknown one, or a negative limit.
    """
    require_authority(user=user, party=party, to="make keys for it")
    unknown = sorted(set(scopes) - set(ApiKey.Scope.values))
    if unknown or not scopes:
        raise InvalidInput(
            f"Choose at least one scope of {', '.join(ApiKey.Scope.values)}.",
            pointers={"scopes": f"unknown: {', '.join(unknown)}" if unknown else "empty"},
        )
    if spending_limit_micros is not None and spending_limit_micros < 0:
        raise InvalidInput("A spending limit is 0 or more.", pointers={"spending_limit": "negative"})
    text = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey.objects.create(
        party=party,
        name=name,
        prefix=text[: len(PREFIX) + 6],
        key_sha256=_digest(text),
        scopes=sorted(set(scopes)),
        spending_limit_micros=spending_limit_micros,
        created_by=user,
    )
    audit.record(
        actor=user,
        party=party,
        action="key.made",
        target=f"key:{key.pk}",
        scopes=key.scopes,
    )
    return key, text


@transaction.atomic
def revoke_api_key(*, key: ApiKey, user: User) -> None:
    """End a key at once and for ever; again, nothing more happens.

    Raises:
        NotAllowed: the user may not manage the party's keys.
    """
    require_authority(user=user, party=key.party, to="revoke its keys")
    if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now()):
        audit.record(actor=user, party=key.party, action="key.revoked", target=f"key:{key.pk}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class ApiKeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer rk_…`; `request.auth` is the key, `request.auth.party` whom it acts for."""

    def authenticate(self, request: Request) -> tuple[None, ApiKey] | None:
        scheme, _, text = get_authorization_header(request).decode("latin-1").partition(" ")
        if not scheme:
            return None
        if scheme.lower() != "bearer":
            raise AuthenticationFailed("Send the key as 'Authorization: Bearer rk_…'.")
        key = ApiKey.objects.select_related("party").filter(key_sha256=_digest(text.strip()), revoked_at=None).first()
        if key is None:
            raise AuthenticationFailed("This API key is unknown or revoked; make a new one on your party's keys page.")
        ApiKey.objects.filter(pk=key.pk).update(last_used_at=timezone.now())
        return None, key

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def needed_scope(view: Any, method: str) -> str | None:
    """The scope that a view's action needs; None: it is public."""
    if (of_desk := getattr(view, "needed_scope", None)) is not None:
        return str(of_desk(method))
    action: str = getattr(view, "action", None) or method.lower()
    scope: str | None = getattr(view, "scopes", {}).get(action, ApiKey.Scope.READ)
    return scope


class HasScope(BasePermission):
    """The view names its scope per action (`scopes = {"create": "buy"}`); reading what is public needs no key."""

    def has_permission(self, request: Request, view: Any) -> bool:
        needed = needed_scope(view, request.method or "")
        if needed is None:
            return True
        if not isinstance(request.auth, ApiKey):
            return False
        self.message = f"This key lacks the scope '{needed}'."
        return needed in request.auth.scopes


class ApiKeyScheme(OpenApiAuthenticationExtension):
    target_class = ApiKeyAuthentication
    name = "apiKey"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer", "description": "An API key of your party, rk_…"}


def acting_key(request: Request) -> ApiKey:
    """The key of a request that `HasScope` let through to what is private."""
    key = request.auth
    assert isinstance(key, ApiKey), "a view that is public has no acting party"
    return key


def idempotency_key(request: Request) -> str:
    """The `Idempotency-Key` header of a write that moves money or makes an order.

    Raises:
        InvalidInput: it is missing, empty or longer than 255 characters.
    """
    key: str = request.headers.get("Idempotency-Key", "").strip()
    if not key or len(key) > 255:
        raise InvalidInput(
            "Send an Idempotency-Key header of 1 to 255 characters, new for each order and the same on a retry.",
            pointers={"Idempotency-Key": "missing" if not key else "too long"},
        )
    return key
