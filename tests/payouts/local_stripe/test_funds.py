"""Paying people: onboarding, funds that become available, transfers, payouts to the bank, and the clock that drives them."""

from collections.abc import Callable

import pytest
import stripe

from .conftest import DAY, IBAN, LocalStripe, http


def _transfer(
    local: LocalStripe, destination: str, amount: int, currency: str = "usd", **more: object
) -> stripe.Transfer:
    transfer: stripe.Transfer = local.sdk.transfers.create(
        {"amount": amount, "currency": currency, "destination": destination, **more}
    )
    return transfer


def test_a_charge_is_pending_for_two_days_and_then_available(local: LocalStripe) -> None:
    pending, available = local.funds()
    booked = local.paid(20_000).payment_intent.latest_charge.balance_transaction

    assert local.funds() == (pending + booked.net, available)
    local.advance(2 * DAY - 60)
    assert local.sdk.balance_transactions.retrieve(booked.id).status == "pending"
    local.advance(60)
    assert local.sdk.balance_transactions.retrieve(booked.id).status == "available"
    assert local.funds() == (0, available + pending + booked.net)
    event = local.sdk.events.list({"type": "balance.available", "limit": 1}).data[0]
    assert event.created == booked.available_on


def test_currencies_are_kept_apart(local: LocalStripe) -> None:
    before = {currency: local.funds(currency) for currency in ("usd", "eur", "jpy")}
    local.paid(10_000, "eur", card="4000000000000077")
    local.paid(5_000, "jpy", card="4000000000000077")

    assert local.funds("usd") == before["usd"]
    assert local.funds("eur")[1] - before["eur"][1] == 10_000 - 320
    assert local.funds("jpy")[1] - before["jpy"][1] == 5_000 - 175


def test_onboarding_makes_an_account_payable(local: LocalStripe) -> None:
    account = local.account(metadata={"party": "3"})
    assert (account.type, account.details_submitted, account.capabilities.transfers) == ("express", False, "inactive")
    assert account.requirements.disabled_reason == "requirements.past_due"
    assert "external_account" in account.requirements.currently_due

    link = local.onboarding_link(account.id)
    page = http.get(link)
    assert page.status_code == 200
    assert "play money" in page.text
    assert "<script" not in page.text
    done = http.post(link, data=IBAN)
    assert (done.status_code, done.headers["Location"]) == (303, "http://shop.test/return")

    ready = local.sdk.accounts.retrieve(account.id)
    assert (ready.details_submitted, ready.payouts_enabled, ready.capabilities.transfers) == (True, True, "active")
    assert (ready.requirements.currently_due, ready.requirements.disabled_reason) == ([], None)
    assert ready.external_accounts.data[0].last4 == "3000"
    assert ready.metadata["party"] == "3"
    events = local.sdk.events.list({"type": "account.updated"}, {"stripe_account": account.id}).data
    assert [(event.account, event.data.object.payouts_enabled) for event in events] == [(account.id, True)]
    assert events[0].data.previous_attributes["payouts_enabled"] is False


def test_an_onboarding_link_works_once_and_for_minutes(local: LocalStripe) -> None:
    account = local.account().id
    used, late = local.onboarding_link(account), local.onboarding_link(account)
    http.post(used, data=IBAN)
    local.advance(5 * 60)

    for link in (used, late):
        assert http.get(link).headers["Location"] == "http://shop.test/refresh"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", "", "owner"),
        ("country", "FR", "opened for DE"),
        ("account_number", "DE89370400440532013001", "wrong check number"),
        ("account_number", "12", "4 to 17 digits"),
    ],
)
def test_bad_bank_details_are_named_and_kept_out(local: LocalStripe, field: str, value: str, words: str) -> None:
    account = local.account().id
    page = http.post(local.onboarding_link(account), data=IBAN | {field: value})

    assert page.status_code == 400
    assert words in page.text
    assert local.sdk.accounts.retrieve(account).details_submitted is False


def test_a_transfer_moves_available_funds(local: LocalStripe) -> None:
    payee = local.onboarded()
    local.paid(50_000, card="4000000000000077")
    before = local.funds()
    transfer = _transfer(local, payee, 12_345, transfer_group="payout:1", metadata={"payout": "1"})

    assert local.funds() == (before[0], before[1] - 12_345)
    assert local.funds(account=payee) == (0, 12_345)
    entry = local.sdk.balance_transactions.retrieve(transfer.balance_transaction)
    assert (entry.type, entry.amount, entry.fee, entry.net, entry.source) == (
        "transfer",
        -12_345,
        0,
        -12_345,
        transfer.id,
    )
    received = local.sdk.charges.retrieve(transfer.destination_payment, {}, {"stripe_account": payee})
    assert (received.amount, received.source_transfer) == (12_345, transfer.id)
    theirs = local.sdk.balance_transactions.list({}, {"stripe_account": payee}).data
    assert [(entry.type, entry.net) for entry in theirs] == [("payment", 12_345)]
    assert [found.id for found in local.sdk.transfers.list({"transfer_group": "payout:1"}).data] == [transfer.id]
    assert local.sdk.transfers.retrieve(transfer.id).metadata["payout"] == "1"
    assert local.sdk.events.list({"type": "transfer.created", "limit": 1}).data[0].data.object.id == transfer.id


def test_pending_funds_cannot_be_sent(local: LocalStripe) -> None:
    payee = local.onboarded()
    local.paid(50_000, "gbp")
    before = local.funds("gbp")
    with pytest.raises(stripe.InvalidRequestError) as refused:
        _transfer(local, payee, before[1] + 1, "gbp")

    assert (refused.value.http_status, refused.value.code) == (400, "balance_insufficient")
    assert local.funds("gbp") == before
    assert local.sdk.transfers.list({"destination": payee}).data == []


def test_an_account_that_is_not_onboarded_receives_nothing(local: LocalStripe) -> None:
    local.paid(50_000, card="4000000000000077")
    with pytest.raises(stripe.InvalidRequestError) as refused:
        _transfer(local, local.account().id, 100)

    assert refused.value.code == "insufficient_capabilities_for_transfer"


def test_a_payee_is_paid_out_each_day_and_the_money_arrives_a_day_later(local: LocalStripe) -> None:
    payee = local.onboarded()
    theirs = {"stripe_account": payee}
    local.paid(50_000, card="4000000000000077")
    _transfer(local, payee, 5_000)
    _transfer(local, payee, 7_000)
    to_midnight = DAY - local.now() % DAY

    assert local.sdk.payouts.list({}, theirs).data == []
    local.advance(to_midnight)
    (payout,) = local.sdk.payouts.list({}, theirs).data
    assert (payout.amount, payout.status, payout.automatic) == (12_000, "pending", True)
    assert local.funds(account=payee) == (0, 0)
    settled = local.sdk.balance_transactions.list({"payout": payout.id}, theirs).data
    assert sorted(entry.net for entry in settled) == [-12_000, 5_000, 7_000]

    local.advance(DAY)
    assert local.sdk.payouts.retrieve(payout.id, {}, theirs).status == "paid"
    kinds = [event.type for event in local.sdk.events.list({}, theirs).data]
    assert kinds[:2] == ["payout.paid", "payout.created"]
    assert local.sdk.payouts.list({"status": "paid"}, theirs).data[0].id == payout.id


def test_a_long_jump_of_the_clock_happens_in_order(local: LocalStripe) -> None:
    payee = local.onboarded()
    local.paid(50_000, card="4000000000000077")
    sent = _transfer(local, payee, 9_000)
    booked = local.paid(30_000).payment_intent.latest_charge.balance_transaction
    local.advance(40 * DAY)

    (payout,) = local.sdk.payouts.list({}, {"stripe_account": payee}).data
    paid, made = local.sdk.events.list({"types": ["payout.paid", "payout.created"]}, {"stripe_account": payee}).data
    assert (payout.created % DAY, payout.arrival_date - payout.created) == (0, DAY)
    assert 0 < payout.created - sent.created <= DAY
    assert (made.created, paid.created) == (payout.created, payout.arrival_date)
    available = local.sdk.events.list({"type": "balance.available", "limit": 1}).data[0]
    assert available.created == booked.available_on


def test_the_platform_is_paid_out_by_hand(local: LocalStripe) -> None:
    local.paid(50_000, card="4000000000000077")
    before = local.funds()
    payout = local.sdk.payouts.create({"amount": 1_000, "currency": "usd"})

    assert local.funds() == (before[0], before[1] - 1_000)
    assert payout.automatic is False
    local.advance(DAY)
    assert local.sdk.payouts.retrieve(payout.id).status == "paid"
    with pytest.raises(stripe.InvalidRequestError) as refused:
        local.sdk.payouts.create({"amount": 10**9, "currency": "usd"})
    assert refused.value.code == "balance_insufficient"


def test_payouts_can_be_told_to_take_no_time(own: Callable[..., LocalStripe]) -> None:
    local = own(payout_days=0)
    payee = local.onboarded()
    local.paid(50_000, card="4000000000000077")
    _transfer(local, payee, 5_000)
    local.advance(0)

    assert [payout.status for payout in local.sdk.payouts.list({}, {"stripe_account": payee}).data] == ["paid"]
    assert local.funds(account=payee) == (0, 0)
