"""Payout runs as staff see them, and the payee's side of them on pages and over the API."""

from typing import Any

import pytest
from django.test import override_settings

from marketplace.models import User
from marketplace.money import Money
from marketplace.templatetags.residual import money
from payouts import gateway
from payouts.models import Payout, PayoutMinimum, PayoutRun
from payouts.services import attempts, pacing
from payouts.services.transfers import request_payout_run
from tests.factories.payouts import PayeeAccountFactory, pay_out
from tests.pages import assert_page, signed_in, with_second_factor
from tests.payouts.api.test_royalties import client_of
from tests.payouts.services.test_transfers import Stripe, earn, execute


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Stripe:
    stripe = Stripe()
    monkeypatch.setattr(gateway, "create_transfer", stripe.create_transfer)
    monkeypatch.setattr(gateway, "find_transfer", stripe.find_transfer)
    monkeypatch.setattr(attempts.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(pacing.Turns, "wait", lambda self: 0.0)
    return stripe


@pytest.fixture
def finance(client: Any, db: Any) -> Any:
    return staff(client, "finance")


def staff(client: Any, name: str) -> Any:
    user = User.objects.create_user(f"{name}@example.org", "correct horse battery staple", is_staff=True)
    return with_second_factor(client, user)


def test_the_desks_pages_exist_for_staff_alone(alice: Any) -> None:
    browser = signed_in(alice)
    for page in ("/desk/payout-runs/", "/desk/payout-runs/1/", f"/desk/payees/{alice.pk}/"):
        assert browser.get(page).status_code == 404


def test_a_run_is_started_and_its_failures_are_named(told: Stripe, finance: Any, alice: Any, bob: Any) -> None:
    earn({alice: 2, bob: 1}, price="30")
    for party in (alice, bob):
        PayeeAccountFactory(party=party)
    told.answers = [gateway.StripeRefused("account_closed", "The account is closed.", 400)]
    assert "No run yet" in assert_page(finance.get("/desk/payout-runs/"))

    answer = finance.post("/desk/payout-runs/", {"currency": "USD", "key": "k"})
    finance.post("/desk/payout-runs/", {"currency": "USD", "key": "k"})  # a second click
    run = execute(PayoutRun.objects.get())

    text = assert_page(finance.get(answer["Location"]))
    assert run.started_by and "finance@example.org" in text
    assert "The account is closed." in text and "ended" in text
    assert "1 failed" in assert_page(finance.get("/desk/payout-runs/"))
    refused = Payout.objects.get(status="refused")
    payee = assert_page(finance.get(f"/desk/payees/{refused.party_id}/"))
    assert f"Stripe refused the payout of {money(refused.amount)}: The account is closed." in payee
    assert "Refused by Stripe" in text


@override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 1})
def test_a_colleague_approves_and_the_starter_cannot(told: Stripe, finance: Any, client: Any, alice: Any) -> None:
    earn({alice: 1}, price="30")
    PayeeAccountFactory(party=alice)
    page = finance.post("/desk/payout-runs/", {"currency": "USD", "key": "k"})["Location"]
    run = execute(PayoutRun.objects.get())
    assert "a colleague must approve it" in assert_page(finance.get(page))

    finance.post(page, {"act": "approve"})
    run.refresh_from_db()
    assert run.state == PayoutRun.State.AWAITING_APPROVAL
    assert finance.post(page, {"act": "reject"}).status_code == 422  # without a reason
    staff(client, "colleague")
    assert "Approve" in assert_page(client.get(page))
    client.post(page, {"act": "approve"})
    client.post(page, {"act": "pause", "reason": "Wait."})
    run.refresh_from_db()
    assert run.state == PayoutRun.State.PAUSED
    assert "Wait." in assert_page(client.get(page))
    client.post(page, {"act": "resume"})

    assert execute(run).state == PayoutRun.State.ENDED
    assert "colleague@example.org" in assert_page(client.get("/desk/")) or Payout.objects.get().status == "sent"


def test_a_payee_reads_what_their_money_waits_for_and_sets_a_minimum(told: Stripe, alice: Any) -> None:
    earn({alice: 1}, price="20")
    PayeeAccountFactory(party=alice)
    browser = signed_in(alice)
    assert "Goes out with the next payout run" in assert_page(browser.get("/earnings/"))

    assert browser.post("/earnings/minimum/USD/", {"amount": "25"}).status_code == 302
    assert "Below your threshold of $25.00" in assert_page(browser.get("/earnings/"))
    wrong = browser.post("/earnings/minimum/USD/", {"amount": "0.10"})

    assert wrong.status_code == 422 and "from $1.00 to $1,000.00" in assert_page(wrong, status=422)
    assert browser.get("/earnings/minimum/CHF/").status_code == 404
    assert PayoutMinimum.objects.get().amount == Money.parse("25", "USD")


def test_the_api_tells_payouts_standings_and_the_minimum(told: Stripe, alice: Any, mallory: Any) -> None:
    earn({alice: 1}, price="20")
    PayeeAccountFactory(party=alice)
    client = client_of(alice)
    answer = client.put(
        "/api/v1/payout-minimums/USD/", {"minimum": {"amount": "25.00", "currency": "USD"}}, format="json"
    )
    assert (answer.status_code, answer.json()) == (200, {"minimum": {"amount": "25.00", "currency": "USD"}})
    (standing,) = client.get("/api/v1/earnings/").json()[0]["standings"]
    assert (standing["code"], standing["amount"]) == ("below_minimum", {"amount": "18.00", "currency": "USD"})
    refused = client.put(
        "/api/v1/payout-minimums/USD/", {"minimum": {"amount": "0.10", "currency": "USD"}}, format="json"
    )
    assert refused.status_code == 422
    client.put("/api/v1/payout-minimums/USD/", {"minimum": {"amount": "1.00", "currency": "USD"}}, format="json")
    execute(request_payout_run(currency="USD", key="one"))

    (payout,) = client.get("/api/v1/payouts/").json()["results"]
    assert (payout["status"], payout["amount"]) == ("sent", {"amount": "18.00", "currency": "USD"})
    assert client.get(f"/api/v1/payouts/{payout['id']}/").json() == payout
    assert client_of(mallory).get(f"/api/v1/payouts/{payout['id']}/").status_code == 404
    assert client.get("/api/v1/payout-minimums/CHF/").status_code == 404


def test_the_desk_and_the_payee_read_the_same_figures_by_the_same_names(told: Stripe, finance: Any, alice: Any) -> None:
    PayeeAccountFactory(party=alice)
    pay_out(alice, Money.parse("12", "USD"), is_owed=False)  # promised, and Stripe has not answered
    earn({alice: 1}, price="30")

    theirs, ours = (
        assert_page(signed_in(alice).get("/earnings/")),
        assert_page(finance.get(f"/desk/payees/{alice.pk}/")),
    )

    assert "On its way $12.00" in theirs and "Earned Went back On hold Due On its way In the bank" in ours
    assert "$12.00" in ours
