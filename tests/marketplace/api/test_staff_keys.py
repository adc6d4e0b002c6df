"""A staff member's key: made for oneself, kept as a hash, and ended for good with what lets its person in."""

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import TOTP, generate_totp_secret
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.utils import timezone

from marketplace.api.staff_keys import create_staff_key, revoke_staff_key
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, StaffAct, StaffKey, User
from tests.factories.marketplace import UserFactory

BOTH = list(StaffKey.Scope.values)


@pytest.fixture
def ann(db: Any) -> User:
    user: User = UserFactory(is_staff=True)
    TOTP.activate(user, generate_totp_secret())
    return user


@pytest.fixture
def key(ann: User) -> StaffKey:
    return create_staff_key(user=ann, name="script", scopes=BOTH, days=90)[0]


def test_a_key_is_shown_once_and_kept_as_a_hash(ann: User) -> None:
    key, text = create_staff_key(user=ann, name=" script ", scopes=["desk:read", "desk:read"], days=7)

    key.refresh_from_db()
    assert text.startswith("sk_desk_") and len(text) > 45 and text.startswith(key.prefix)
    assert (key.key_sha256, key.scopes) == (hashlib.sha256(text.encode()).hexdigest(), ["desk:read"])
    assert text not in str(vars(key)) and key.name == "script" and key.is_alive
    assert key.expires_at - key.created_at == timedelta(days=7)
    event = AuditEvent.objects.get(action="staff_key.made")
    assert (event.actor, event.target) == (ann, f"staff_key:{key.pk}")
    assert text not in str(event.detail) and key.key_sha256 not in str(event.detail)


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["desk:root"]}, "scopes"),
        ({"scopes": ["read"]}, "scopes"),
        ({"days": 0}, "days"),
        ({"days": 91}, "days"),
        ({"name": " "}, "name"),
        ({"name": "x" * 81}, "name"),
    ],
)
def test_a_key_that_cannot_be_is_not_made(ann: User, wrong: Any, pointer: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        create_staff_key(user=ann, **{"name": "k", "scopes": BOTH, "days": 30} | wrong)

    assert list(refused.value.pointers) == [pointer]
    assert StaffKey.objects.count() == 0


def test_only_active_staff_with_a_second_factor_have_keys(ann: User, db: Any) -> None:
    other = UserFactory()
    TOTP.activate(other, generate_totp_secret())
    gone = UserFactory(is_staff=True, is_active=False)
    TOTP.activate(gone, generate_totp_secret())
    for user in (other, gone, UserFactory(is_staff=True)):
        with pytest.raises(NotAllowed):
            create_staff_key(user=user, name="k", scopes=BOTH, days=30)
    User.objects.filter(pk=ann.pk).update(is_staff=False)  # since the page read who they are
    with pytest.raises(NotAllowed):
        create_staff_key(user=ann, name="k", scopes=BOTH, days=30)

    assert StaffKey.objects.count() == 0


def test_a_colleague_may_revoke_a_key_and_nobody_else(key: StaffKey, ann: User) -> None:
    colleague, stranger = UserFactory(is_staff=True), UserFactory()
    with pytest.raises(NotAllowed):
        revoke_staff_key(key=key, user=stranger)

    for _ in range(2):
        revoke_staff_key(key=key, user=colleague)

    key.refresh_from_db()
    assert not key.is_alive
    event = AuditEvent.objects.get(action="staff_key.revoked")
    assert (event.actor, event.detail) == (colleague, {"user": ann.pk})


@pytest.mark.parametrize("lost", [{"is_staff": False}, {"is_active": False}])
def test_who_is_no_active_staff_any_more_loses_every_key_at_once(key: StaffKey, ann: User, lost: Any) -> None:
    kept = create_staff_key(user=ann, name="other", scopes=BOTH, days=1)[0]
    colleague = UserFactory(is_staff=True)
    TOTP.activate(colleague, generate_totp_secret())
    theirs = create_staff_key(user=colleague, name="theirs", scopes=BOTH, days=1)[0]

    User.objects.filter(pk=ann.pk).update(first_name="Ann")  # is nothing of it
    assert not StaffKey.objects.filter(revoked_at__isnull=False).exists()
    User.objects.filter(pk=ann.pk).update(**lost)
    User.objects.filter(pk=ann.pk).update(is_staff=True, is_active=True)

    assert set(StaffKey.objects.filter(revoked_at=None)) == {theirs}
    ended = AuditEvent.objects.filter(action="staff_key.ended")
    assert {event.target for event in ended} == {f"staff_key:{one.pk}" for one in (key, kept)}


def test_the_key_ends_with_the_second_factor_it_was_made_with(key: StaffKey, ann: User) -> None:
    Authenticator.objects.get(user=ann).delete()
    TOTP.activate(ann, generate_totp_secret())

    key.refresh_from_db()
    assert key.second_factor is None and not key.is_alive
    event = AuditEvent.objects.get(action="staff_key.ended")
    assert event.detail == {"user": ann.pk, "because": "its second factor was taken away"}


@pytest.mark.parametrize(
    "change",
    [
        "expires_at = expires_at - interval '1 day'",
        "scopes = '[]'",
        "user_id = (SELECT max(id) FROM marketplace_user)",
        "key_sha256 = 'x'",
        "created_at = now()",
    ],
)
def test_a_key_is_never_made_to_say_more(key: StaffKey, change: str) -> None:
    UserFactory(is_staff=True)

    with pytest.raises(DatabaseError, match="it can only end"), transaction.atomic():
        execute(f"UPDATE marketplace_staffkey SET {change}")  # noqa: S608


def test_a_revoked_key_is_never_brought_back_nor_any_key_deleted(key: StaffKey, ann: User) -> None:
    revoke_staff_key(key=key, user=ann)

    for statement in (
        "UPDATE marketplace_staffkey SET revoked_at = NULL",
        "UPDATE marketplace_staffkey SET revoked_at = now() + interval '1 day'",
        "DELETE FROM marketplace_staffkey",
        "TRUNCATE marketplace_staffkey CASCADE",
    ):
        with pytest.raises(DatabaseError, match="refused"), transaction.atomic():
            execute(statement)


def test_no_key_lasts_longer_than_ninety_days(ann: User) -> None:
    wall = timezone.now()
    factor = Authenticator.objects.get(user=ann)
    for expires_at in (wall + timedelta(days=90, seconds=1), wall):
        with pytest.raises(IntegrityError, match="ninety_days"), transaction.atomic():
            StaffKey.objects.create(
                user=ann,
                name="k",
                prefix="p",
                key_sha256="x",
                scopes=BOTH,
                second_factor=factor,
                created_at=wall,
                expires_at=expires_at,
            )


def test_what_was_done_by_a_key_stays_written_down(key: StaffKey, ann: User) -> None:
    StaffAct.objects.create(
        user=ann, key=key, idempotency_key="k", path="/p/", asked_sha256="x", answer_status=200, answer={}
    )

    for statement in (
        "UPDATE marketplace_staffact SET answer_status = 201",
        "DELETE FROM marketplace_staffact",
        "TRUNCATE marketplace_staffact",
    ):
        with pytest.raises(DatabaseError, match="append-only"), transaction.atomic():
            execute(statement)


def execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute(statement)
