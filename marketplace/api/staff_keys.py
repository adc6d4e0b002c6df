"""Staff members' own keys to the desk's API: who acts by one is the person, with the person's second factor for what counts.

    desk:read   looks
    desk:act    acts too; whatever is more than a proposal, a stop or a look also needs a one-time code in a header

A key is made on a page of the desk after a fresh second factor, shown once, kept as a hash, lasts ninety days at most, and
ends at once with its person's being active staff or with the second factor (triggers, migration `0012_staff_key_rules`).
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from allauth.mfa.models import Authenticator
from django.core.cache import cache
from django.db import connection, transaction
from django.utils import timezone
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.errors import InvalidInput, KeyReused, NotAllowed, SecondFactorNeeded, TooManyCodes
from marketplace.models import StaffAct, StaffKey, User
from marketplace.services import audit
from marketplace.services.authority import require_staff

PREFIX = "sk_desk_"
CODE_HEADER = "One-Time-Code"
#: So many codes of one person are looked at in so many seconds; a right one begins anew.
MAX_CODES, CODES_SECONDS = 5, 300


# --- a key's life -----------------------------------------------------------------------------------------------------
@transaction.atomic
def create_staff_key(*, user: User, name: str, scopes: list[str], days: int) -> tuple[StaffKey, str]:
    """Make a key for oneself; its text is in the answer and nowhere else. The page has asked for a fresh second factor.

    Raises:
        NotAllowed: the user is no active staff, or has no second factor.
        InvalidInput: no name, no scope, an unknown one, or not 1 to 90 days.
    """
    user = User.objects.select_for_update().get(pk=user.pk)  # whoever ends their being staff waits, and finds this key
    factor = Authenticator.objects.filter(user=user, type=Authenticator.Type.TOTP).first()
    require_staff(user=user, to="have a key to the desk")
    if factor is None:
        raise NotAllowed("Only staff with a second factor can have a key to the desk.")
    if not name.strip() or len(name) > 80:
        raise InvalidInput("Name it in 1 to 80 characters: where will it live?", pointers={"name": "missing"})
    unknown = sorted(set(scopes) - set(StaffKey.Scope.values))
    if unknown or not scopes:
        raise InvalidInput(
            f"Choose at least one scope of {', '.join(StaffKey.Scope.values)}.",
            pointers={"scopes": f"unknown: {', '.join(unknown)}" if unknown else "empty"},
        )
    longest = StaffKey.LONGEST.days
    if not 1 <= days <= longest:
        raise InvalidInput(f"A key lasts 1 to {longest} days.", pointers={"days": f"not 1 to {longest}"})
    text, now = PREFIX + secrets.token_urlsafe(32), timezone.now()
    key = StaffKey.objects.create(
        user=user,
        name=name.strip(),
        prefix=text[: len(PREFIX) + 6],
        key_sha256=_digest(text),
        scopes=sorted(set(scopes)),
        second_factor=factor,
        created_at=now,
        expires_at=now + timedelta(days=days),
    )
    audit.record(
        actor=user,
        action="staff_key.made",
        target=f"staff_key:{key.pk}",
        after={"scopes": key.scopes, "expires_at": f"{key.expires_at:%Y-%m-%dT%H:%M:%SZ}"},
    )
    return key, text


@transaction.atomic
def revoke_staff_key(*, key: StaffKey, user: User) -> None:
    """End a key at once and for ever, one's own or a colleague's; again, nothing more happens.

    Raises:
        NotAllowed: the user is no active staff.
    """
    require_staff(user=user, to="revoke a key to the desk")
    if StaffKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now()):
        audit.record(actor=user, action="staff_key.revoked", target=f"staff_key:{key.pk}", user=key.user_id)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- who is it, and what may they -------------------------------------------------------------------------------------
class StaffKeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer sk_desk_…`; `request.auth` is the key, and `acting_staff` the person."""

    def authenticate(self, request: Request) -> tuple[None, StaffKey] | None:
        scheme, _, text = get_authorization_header(request).decode("latin-1").partition(" ")
        if not scheme:
            return None
        text = text.strip()
        if scheme.lower() != "bearer" or not text.startswith(PREFIX):
            raise AuthenticationFailed(
                f"The desk takes a staff member's own key: 'Authorization: Bearer {PREFIX}…'. A party's key is none."
            )
        key = (
            StaffKey.objects.select_related("user")
            .filter(key_sha256=_digest(text), user__is_staff=True, user__is_active=True, second_factor__isnull=False)
            .first()
        )
        if key is None or not key.is_alive:
            raise AuthenticationFailed("This key is unknown, expired or revoked; make a new one at the desk.")
        StaffKey.objects.filter(pk=key.pk).update(last_used_at=timezone.now())
        return None, key

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class StaffKeyScheme(OpenApiAuthenticationExtension):
    target_class = StaffKeyAuthentication
    name = "staffKey"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer", "description": f"A staff member's own key, {PREFIX}…"}


def staff_scope(method: str) -> str:
    """Every method that may change something needs the scope to act: no view can forget it."""
    return StaffKey.Scope.READ if method in SAFE_METHODS else StaffKey.Scope.ACT


class MayActAtDesk(BasePermission):
    """The scope, and for an act the person's one-time code, unless the view says that its act needs none (`needs_code`)."""

    def has_permission(self, request: Request, view: Any) -> bool:
        key, needed = request.auth, staff_scope(request.method or "")
        if not isinstance(key, StaffKey):
            return False
        if needed not in key.scopes:
            self.message = f"This key lacks the scope '{needed}'."
            return False
        if needed == StaffKey.Scope.ACT and view.needs_code:
            show_code(user=key.user, code=request.headers.get(CODE_HEADER, ""))
        return True


def show_code(*, user: User, code: str) -> None:
    """The person's second factor for one act: a current code of their authenticator app, each good for one request.

    Raises:
        SecondFactorNeeded: none was given, or it is wrong, old or used before, here or on a page.
        TooManyCodes: too many wrong ones lately.
    """
    code = code.strip()
    if not code:
        raise SecondFactorNeeded(
            f"This act needs your second factor: send the code that your authenticator app shows now as {CODE_HEADER}.",
            pointers={CODE_HEADER: "missing"},
        )
    counter = f"staff-codes:{user.pk}"
    cache.add(counter, 0, timeout=CODES_SECONDS)
    try:
        n_looked_at = cache.incr(counter)
    except ValueError:  # it has just expired
        cache.set(counter, 1, timeout=CODES_SECONDS)
        n_looked_at = 1
    if n_looked_at > MAX_CODES:
        raise TooManyCodes(f"Too many wrong codes. Wait {CODES_SECONDS // 60} minutes.", pointers={CODE_HEADER: "wait"})
    factor = Authenticator.objects.filter(user=user, type=Authenticator.Type.TOTP).first()
    if factor is None or not factor.wrap().validate_code(code):
        raise SecondFactorNeeded(
            "This code is wrong, has passed or was used before: each is good for one request. Send the next one.",
            pointers={CODE_HEADER: "not current, or used"},
        )
    cache.delete(counter)


def acting_staff(request: Request) -> User:
    """The person of a request that `MayActAtDesk` let through."""
    assert isinstance(request.auth, StaffKey), "only a staff member's key comes here"
    user: User = request.auth.user
    return user


# --- one act for one key ----------------------------------------------------------------------------------------------
@transaction.atomic
def acted_once(request: Request, *, key: str, act: Callable[[], Response]) -> Response:
    """Do it, and keep the answer in the same transaction; the same person's same request under the same key is answered with it.

    What was refused is not kept: the key is free again.

    Raises:
        KeyReused: the key stands for something else.
    """
    user, staff_key = acting_staff(request), request.auth
    assert isinstance(staff_key, StaffKey)
    asked = json.dumps([request.method, request.path, request.data], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(asked.encode()).hexdigest()
    with connection.cursor() as cursor:  # the same key twice at once: the second waits for the first
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"staff:{user.pk}:{key}"])
    known = StaffAct.objects.filter(user=user, idempotency_key=key).first()
    if known is not None:
        if known.asked_sha256 != digest:
            raise KeyReused("You used this Idempotency-Key for something else; use a new one.")
        return Response(known.answer, status=known.answer_status)
    response = act()
    StaffAct.objects.create(
        user=user,
        key=staff_key,
        idempotency_key=key,
        path=request.path,
        asked_sha256=digest,
        answer_status=response.status_code,
        answer=json.loads(JSONRenderer().render(response.data)),
    )
    return response
