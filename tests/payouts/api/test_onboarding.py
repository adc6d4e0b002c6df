"""Onboarding over the API: how far a payee is at Stripe, and the link that a person opens."""

from typing import Any

import httpx
import pytest

from payouts.models import PayeeAccount
from tests.payouts.api.test_royalties import client_of
from tests.payouts.conftest import BANK

URL = "/api/v1/onboarding/"


def test_a_link_is_given_the_account_is_made_once_and_the_state_told(stripe: Any, alice: Any) -> None:
    client = client_of(alice)
    assert client.get(URL).json() == {
        "state": "not_started",
        "title": "Not set up yet",
        "needs": [],
        "country": "DE",
    }

    first = client.post(URL, {}, format="json")
    second = client.post(URL, {"country": "FR"}, format="json")  # too late: the account is made

    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["url"].startswith("http") and PayeeAccount.objects.count() == 1
    assert client.get(URL).json()["country"] == "DE"
    assert httpx.post(second.json()["url"], data=BANK).status_code == 303
    assert client.get(URL).json()["state"] == "unfinished"  # until Stripe's event says otherwise
    stripe.onboard(alice)
    assert client.get(URL).json()["state"] == "ready"


def test_the_country_is_said_first(stripe: Any, alice: Any) -> None:
    type(alice).objects.filter(pk=alice.pk).update(country="")
    client = client_of(alice)

    refused = client.post(URL, {}, format="json")
    wrong = client.post(URL, {"country": "Germany"}, format="json")

    for answer in (refused, wrong):
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/country")
    assert PayeeAccount.objects.count() == 0
    assert client.post(URL, {"country": "DE"}, format="json").status_code == 200
    assert client.get(URL).json()["country"] == "DE"


def test_where_stripe_does_not_pay_it_is_refused_with_the_reason(stripe: Any, alice: Any) -> None:
    type(alice).objects.filter(pk=alice.pk).update(country="CU")

    refused = client_of(alice).post(URL, {}, format="json")

    assert (refused.status_code, refused.json()["code"]) == (422, "payee_not_served")
    assert PayeeAccount.objects.count() == 0


@pytest.mark.parametrize("scopes", [["read"], ["buy"]])
def test_a_key_that_may_not_report_begins_nothing(alice: Any, scopes: list[str]) -> None:
    assert client_of(alice, *scopes).post(URL, {}, format="json").status_code == 403
    assert PayeeAccount.objects.count() == 0
