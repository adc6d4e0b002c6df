from typing import Any

import httpx
import pytest

from marketplace.errors import InvalidInput
from marketplace.models import AuditEvent, Party
from payouts.errors import PayeeNotServed, StripeDeclined, StripeUnavailable
from payouts.models import PayeeAccount
from payouts.services import payees
from payouts.services.payees import start_onboarding
from tests.factories.marketplace import PartyFactory

BACK = {"return_url": "http://site.test/earnings/", "refresh_url": "http://site.test/earnings/"}


def test_onboarding_makes_one_account_and_a_new_link_each_time(db: Any, stripe: Any, alice: Any) -> None:
    first = start_onboarding(party=alice, **BACK)
    second = start_onboarding(party=alice, **BACK)

    assert first != second
    assert len(stripe.objects("accounts")) == 1
    payee = PayeeAccount.objects.get()
    assert (payee.party, payee.is_ready) == (alice, False)


def test_a_payee_is_ready_once_stripe_says_so(db: Any, stripe: Any, alice: Any) -> None:
    url = start_onboarding(party=alice, **BACK)
    account = PayeeAccount.objects.get().stripe_account_id
    before = payees.refresh_payee(account)
    assert before is not None and not before.is_ready and before.requirements

    bank = {"name": "Alice", "country": "DE", "account_number": "DE89370400440532013000"}
    assert httpx.post(url, data=bank).status_code == 303
    payees.refresh_payee(account)

    payee = PayeeAccount.objects.get()
    assert (payee.is_ready, payee.details_submitted, payee.payouts_enabled, payee.requirements) == (
        True,
        True,
        True,
        [],
    )
    assert AuditEvent.objects.filter(party=alice, action="payee.ready").count() == 1


def test_an_account_that_is_not_ours_changes_nothing(db: Any) -> None:
    assert payees.refresh_payee("acct_unknown") is None
    assert PayeeAccount.objects.count() == 0


def test_without_an_owner_or_a_country_nothing_is_asked_of_stripe(db: Any, settings: Any) -> None:
    settings.STRIPE_API_BASE = "http://127.0.0.1:9"  # whoever asked would get no answer
    nobody = Party.objects.create(name="Nobody's", country="DE")
    nowhere = PartyFactory(country="")

    for party, why in ((nobody, "claimed"), (nowhere, "country")):
        with pytest.raises(InvalidInput, match=why):
            start_onboarding(party=party, **BACK)

    assert PayeeAccount.objects.count() == 0


def test_a_country_that_stripe_does_not_reach_is_said_plainly(db: Any, stripe: Any) -> None:
    party = PartyFactory(country="X0")  # no country of Stripe's

    with pytest.raises(PayeeNotServed, match="accrues"):
        start_onboarding(party=party, **BACK)

    assert PayeeAccount.objects.count() == 0


def test_a_silent_stripe_is_a_clear_refusal(db: Any, settings: Any, alice: Any) -> None:
    settings.STRIPE_API_BASE = "http://127.0.0.1:9"

    with pytest.raises(StripeUnavailable, match="try again"):
        start_onboarding(party=alice, **BACK)

    assert PayeeAccount.objects.count() == 0


def test_a_500_does_not_lock_the_payee_out_for_a_day(db: Any, door: Any, stripe: Any, alice: Any) -> None:
    door.refuse_with = 500
    for _ in range(2):
        with pytest.raises(StripeUnavailable, match="try again"):
            start_onboarding(party=alice, **BACK)
    door.refuse_with = None

    start_onboarding(party=alice, **BACK)

    first = door.keys[0]
    assert door.keys[:6] == [first, first, f"{first}:2", first, f"{first}:2", f"{first}:3"]
    assert len(stripe.objects("accounts")) == 1
    assert PayeeAccount.objects.get().party == alice


def test_only_an_unserved_country_is_said_to_be_one(db: Any, door: Any, alice: Any) -> None:
    door.refuse_with = 400
    with pytest.raises(StripeDeclined, match="does not open an account for Alice"):
        start_onboarding(party=alice, **BACK)

    door.refuse_with = 401
    with pytest.raises(StripeUnavailable) as ours:
        start_onboarding(party=alice, **BACK)

    assert "sk_test" not in ours.value.message
    assert PayeeAccount.objects.count() == 0


def test_a_link_that_stripe_refuses_is_a_refusal_and_no_crash(db: Any, door: Any, alice: Any) -> None:
    start_onboarding(party=alice, **BACK)
    door.refuse_with = 400

    with pytest.raises(StripeDeclined, match="does not open its page for Alice"):
        start_onboarding(party=alice, **BACK)
