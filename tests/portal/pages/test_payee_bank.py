"""The page on which a payee says where they are paid, and the file that staff make of it."""

from datetime import timedelta
from typing import Any

import pytest
from django.test import Client

from marketplace import clock
from marketplace.models import AuditEvent
from payouts.models import BankDetails, RailExport, ServedCountries
from payouts.services import bank_details, manual_entries, other_rails
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory, UserFactory
from tests.factories.payouts import sell
from tests.pages import assert_page, signed_in, with_second_factor

PAGE = "/earnings/bank/"
GIVEN = {"account_holder": "Alice", "account": "DE89 3704 0044 0532 0130 00", "address": "1 Road, Berlin"}


@pytest.fixture
def earning(alice: Any, carol: Any) -> Any:
    """Stripe does not reach alice, to whom 30 USD is due."""
    ServedCountries.objects.create(platform_country="US", countries=["US"])
    version = PublishedVersionFactory(contributions={alice: 1})
    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    clock.advance(timedelta(days=40))
    return alice


@pytest.fixture
def browser(earning: Any) -> Client:
    return with_second_factor(Client(), earning.user)


def test_a_payee_whom_stripe_does_not_reach_says_where_they_are_paid(earning: Any, browser: Client) -> None:
    text = assert_page(browser.get("/earnings/"))
    assert "Waits for your bank details" in text and "Enter your bank details" in text
    assert "Set up payouts" not in text and "Stripe pays you" not in text
    assert "Nothing was saved" in assert_page(browser.post(PAGE, GIVEN | {"account": "DE00"}), 422)

    assert browser.post(PAGE, GIVEN).url == "/earnings/"

    text = assert_page(browser.get("/earnings/"))
    assert "Account ending in 3000" in text and "are not used before" in text and "0532" not in text
    shown = browser.get(PAGE).content.decode()
    assert "ending in 3000" in shown and "0532" not in shown
    clock.advance(timedelta(hours=72))
    assert "Goes out with the next bank transfers" in assert_page(browser.get("/earnings/"))


def test_it_takes_a_fresh_second_factor_and_what_was_sent_without_lies_nowhere(earning: Any) -> None:
    assert signed_in(earning).get(PAGE).url == "/accounts/2fa/totp/activate/"
    stale = with_second_factor(Client(), earning.user, seconds_ago=700)
    assert "reauthenticate" in stale.get(PAGE).url

    assert stale.post(PAGE, GIVEN).url == PAGE

    assert not BankDetails.objects.exists()
    assert "0532" not in str(dict(stale.session))


def test_who_stripe_reaches_is_sent_there(alice: Any) -> None:
    browser = with_second_factor(Client(), alice.user)
    assert "Set up payouts" in assert_page(browser.get("/earnings/"))
    assert "on its own pages" in assert_page(browser.post(PAGE, GIVEN), 422)


def test_the_file_takes_a_fresh_second_factor_and_each_is_in_the_audit_log(earning: Any, browser: Client) -> None:
    ann, ben = UserFactory(is_staff=True), UserFactory(is_staff=True)
    browser.post(PAGE, GIVEN)
    clock.advance(timedelta(hours=72))
    export = other_rails.propose_export(user=ann, currency="USD", key="e1")
    legs = {"bank:USD": 30_000_000, "cash:available:USD": -30_000_000}
    manual = manual_entries.propose(user=ann, key="f", legs=legs, reason="W", balance_transaction_id="txn_1")
    manual_entries.approve(manual=manual, user=ben)
    other_rails.approve_export(export=export, user=ben)
    page, file = f"/desk/rails/{export.pk}/", f"/desk/rails/{export.pk}.csv"
    stale = with_second_factor(Client(), ann, seconds_ago=700)
    assert "0532" not in stale.get(page).content.decode()

    assert "reauthenticate" in stale.post(file).url and stale.get(file).status_code == 405
    assert not AuditEvent.objects.filter(action="rail_export.downloaded").exists()
    fresh = with_second_factor(Client(), ann)
    answers = [fresh.post(file) for _ in range(2)]

    assert b"DE89370400440532013000" in answers[0].getvalue()
    assert answers[0].headers["Cache-Control"] == "no-store"
    events = AuditEvent.objects.filter(action="rail_export.downloaded", actor=ann, target=f"rail_export:{export.pk}")
    assert events.count() == 2 and RailExport.objects.count() == 1
    sent = other_rails.record_sent(payout=export.payouts.get(), user=ann, reference="SWIFT 1")
    assert "SWIFT 1" not in assert_page(browser.get("/earnings/"))
    other_rails.decide_confirmation(confirmation=sent, approved=True, user=ben)
    text = assert_page(browser.get("/earnings/"))
    assert "sent by bank transfer, SWIFT 1" in text and "Sent to your bank by ours" in text
    assert "Confirmed by Stripe" not in text and "The payouts" in text


def test_a_payee_erases_what_they_entered_and_staff_do_on_request(earning: Any, browser: Client) -> None:
    assert "Erase" not in assert_page(browser.get(PAGE))
    browser.post(PAGE, GIVEN)
    stale = with_second_factor(Client(), earning.user, seconds_ago=700)
    assert "Erase the account" in assert_page(browser.get(PAGE))
    stale.post(PAGE, {"act": "erase"})
    assert bank_details.latest_of(earning) is not None

    answer = browser.post(PAGE, {"act": "erase"}, follow=True)

    assert "Erased. What is due to you waits" in assert_page(answer)
    assert bank_details.latest_of(earning) is None and BankDetails.objects.get().sealed == ""
    assert "Waits for your bank details" in assert_page(browser.get("/earnings/"))
    browser.post(PAGE, GIVEN)
    desk, page = with_second_factor(Client(), UserFactory(is_staff=True)), f"/desk/payees/{earning.pk}/"
    assert "Account ending in 3000" in assert_page(desk.get(page))
    erase = f"{page}bank-details/erase/"
    assert "Say who asked for it" in assert_page(desk.post(erase, {"reason": " "}, follow=True))
    assert browser.post(erase, {"reason": "Please."}).status_code == 404
    assert bank_details.latest_of(earning) is not None
    assert "Erased." in assert_page(desk.post(erase, {"reason": "Ticket 7."}, follow=True))
    assert bank_details.latest_of(earning) is None and "Bank details" not in assert_page(desk.get(page))


def test_a_payee_reads_why_nothing_was_erased(earning: Any, browser: Client) -> None:
    ann, ben = UserFactory(is_staff=True), UserFactory(is_staff=True)
    browser.post(PAGE, GIVEN)
    clock.advance(timedelta(hours=72))
    export = other_rails.propose_export(user=ann, currency="USD", key="e1")
    legs = {"bank:USD": 30_000_000, "cash:available:USD": -30_000_000}
    manual = manual_entries.propose(user=ann, key="f", legs=legs, reason="W", balance_transaction_id="txn_1")
    manual_entries.approve(manual=manual, user=ben)
    other_rails.approve_export(export=export, user=ben)

    shown = assert_page(browser.post(PAGE, {"act": "erase"}), 422)

    assert "is under way" in shown and "Nothing was saved" not in shown
    desk = assert_page(with_second_factor(Client(), ann).get(f"/desk/payees/{earning.pk}/"))
    assert f"Export {export.pk} " in desk and "to be sent by our bank" in desk
    assert bank_details.latest_of(earning) is not None
