"""The desk's page of keys: a fresh second factor to make one, shown once, listed and revoked."""

from typing import Any

import pytest
from django.test import Client
from rest_framework.test import APIClient

from marketplace.models import StaffKey, User
from portal.second_factor import FRESH_SECONDS
from tests.factories.marketplace import UserFactory
from tests.pages import assert_page, signed_in, text_of, with_second_factor

PAGE = "/desk/keys/"
FORM = {"name": "month-end script", "scopes": ["desk:read", "desk:act"], "days": "30"}


@pytest.fixture
def ann(db: Any) -> User:
    user: User = UserFactory(is_staff=True, email="ann@desk.example")
    return user


@pytest.fixture
def desk(ann: User) -> Client:
    return with_second_factor(Client(), ann)


def test_the_page_exists_for_staff_alone(alice: Any) -> None:
    assert signed_in(alice).get(PAGE).status_code == 404
    assert signed_in(alice).post(PAGE, FORM).status_code == 404
    assert Client().get(PAGE).status_code == 404
    assert StaffKey.objects.count() == 0


def test_a_key_is_made_after_a_fresh_second_factor_and_shown_once(ann: User) -> None:
    stale = with_second_factor(Client(), ann, seconds_ago=FRESH_SECONDS + 1)
    assert stale.post(PAGE, FORM).url.startswith("/accounts/2fa/reauthenticate/")
    assert StaffKey.objects.count() == 0

    browser = with_second_factor(Client(), ann)
    made = browser.post(PAGE, FORM)

    key = StaffKey.objects.get()
    text = made.context["made_text"]
    assert text.startswith("sk_desk_") and text in assert_page(made) and "no-store" in made["Cache-Control"]
    assert (key.user, key.scopes) == (ann, ["desk:act", "desk:read"])
    listed = assert_page(browser.get(PAGE))
    assert text not in listed and key.prefix in listed and "ann@desk.example" in listed and "0 acts" in listed
    assert "staff key made" in assert_page(browser.get("/desk/audit/"))
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {text}")
    assert client.get("/api/v1/desk/refunds/").status_code == 200
    assert "last used" in assert_page(browser.get(PAGE))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"days": "91"}, "less than or equal to 90"),
        ({"days": "0"}, "greater than or equal to 1"),
        ({"scopes": []}, "Choose at least one"),
        ({"scopes": ["buy"]}, "Select a valid choice"),
        ({"name": ""}, "required"),
    ],
)
def test_a_key_that_cannot_be_is_refused_beside_its_field(desk: Client, wrong: Any, says: str) -> None:
    assert says in assert_page(desk.post(PAGE, FORM | wrong), 422)
    assert StaffKey.objects.count() == 0


def test_anyone_of_the_staff_revokes_a_key(desk: Client) -> None:
    desk.post(PAGE, FORM)
    key = StaffKey.objects.get()
    revoke = f"{PAGE}{key.pk}/revoke/"
    colleague = with_second_factor(Client(), UserFactory(is_staff=True))
    assert colleague.get(revoke).status_code == 405

    assert colleague.post(revoke).url == PAGE

    assert "Revoke" not in text_of(colleague.get(PAGE)) and "ended" in assert_page(colleague.get(PAGE))
    assert colleague.post(f"{PAGE}999999/revoke/").status_code == 404


def test_the_desk_leads_to_it_and_the_docs_tell_of_it(desk: Client) -> None:
    assert 'href="/desk/keys/"' in desk.get("/desk/audit/").content.decode()
    docs = desk.get("/api/v1/docs/").content.decode()
    assert "/api/v1/desk/payout-runs/" in docs and "sk_desk_" in docs and "One-Time-Code" in docs
