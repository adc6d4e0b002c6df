import hashlib

import pytest
from rest_framework.test import APIClient

from marketplace.api.keys import create_api_key, revoke_api_key
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import ApiKey, AuditEvent, Membership
from tests.factories.marketplace import OfferFactory, UserFactory


def test_a_key_is_shown_once_and_kept_as_a_hash(carol):
    key, text = create_api_key(party=carol, user=carol.user, name="training", scopes=["buy", "read", "buy"])

    key.refresh_from_db()
    assert text.startswith("rk_") and len(text) > 40
    assert (key.key_sha256, key.scopes) == (hashlib.sha256(text.encode()).hexdigest(), ["buy", "read"])
    assert text not in str(vars(key)) and text.startswith(key.prefix) and len(key.prefix) == 9


@pytest.mark.parametrize(
    "wrong", [{"scopes": []}, {"scopes": ["root"]}, {"scopes": ["buy"], "spending_limit_micros": -1}]
)
def test_a_key_needs_scopes_and_no_negative_limit(carol, wrong):
    with pytest.raises(InvalidInput):
        create_api_key(party=carol, user=carol.user, name="k", **wrong)

    assert not ApiKey.objects.exists()


def test_only_an_owner_makes_and_revokes_keys(carol, mallory):
    key, _ = create_api_key(party=carol, user=carol.user, name="k", scopes=["read"])
    editor = UserFactory()
    Membership.objects.create(party=carol, user=editor, role=Membership.Role.EDITOR)

    for user in (editor, mallory.user):
        with pytest.raises(NotAllowed):
            create_api_key(party=carol, user=user, name="k", scopes=["read"])
        with pytest.raises(NotAllowed):
            revoke_api_key(key=key, user=user)

    key.refresh_from_db()
    assert (ApiKey.objects.count(), key.revoked_at) == (1, None)


def test_a_revoked_key_ends_at_once(api, carol):
    client = api(carol)
    assert client.get("/api/v1/orders/").status_code == 200

    revoke_api_key(key=client.key, user=carol.user)
    revoke_api_key(key=client.key, user=carol.user)

    refused = client.get("/api/v1/orders/")
    assert (refused.status_code, refused["WWW-Authenticate"]) == (401, "Bearer")
    assert "unknown or revoked" in refused.json()["detail"]
    assert AuditEvent.objects.filter(action="key.revoked").count() == 1


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("Bearer rk_wrong", "unknown or revoked"),
        ("Bearer", "unknown or revoked"),
        ("Basic dXNlcjpwYXNz", "Bearer rk_"),
        ("Bearer rk_\xff", "unknown or revoked"),
    ],
)
def test_a_wrong_key_is_refused_with_what_to_do(db, header, what):
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=header)

    refused = client.get("/api/v1/orders/")

    assert (refused.status_code, refused["Content-Type"]) == (401, "application/problem+json")
    assert what in refused.json()["detail"]


def test_what_is_private_needs_a_key(api, db):
    for path in ("/api/v1/orders/", "/api/v1/licenses/"):
        refused = api().get(path)
        assert (refused.status_code, refused.json()["code"]) == (401, "not_authenticated")


def test_a_key_without_the_scope_is_told_which(api, carol):
    offer = OfferFactory()
    body = {"offers": [offer.pk], "expected_total": {"amount": "100.00", "currency": "USD"}, "accepted_name": "Carol"}

    refused = api(carol, "read").post("/api/v1/orders/", body, format="json", headers={"Idempotency-Key": "1"})
    unread = api(carol, "buy").get("/api/v1/orders/")

    assert (refused.status_code, refused.json()["detail"]) == (403, "This key lacks the scope 'buy'.")
    assert (unread.status_code, unread.json()["detail"]) == (403, "This key lacks the scope 'read'.")


def test_a_session_is_no_key(client, carol):
    client.force_login(carol.user)

    assert client.get("/api/v1/orders/").status_code == 401


def test_the_last_use_is_noted(api, carol):
    client = api(carol)

    client.get("/api/v1/orders/")

    client.key.refresh_from_db()
    assert client.key.last_used_at is not None
