"""Refunds and transfer reversals: what they take from which balance, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import stripe

from tests.payouts.local_stripe.conftest import CARD, DAY, LocalStripe, http

LATER_SUCCEEDS, LATER_FAILS, AT_ONCE = "4000000000007726", "4000000000005126", "4000000000000077"


def charge_of(session: Any) -> Any:
    return session.payment_intent.latest_charge


def refused(code: str) -> Any:
    return pytest.raises(stripe.InvalidRequestError, check=lambda error: error.code == code)


def test_a_full_refund_takes_the_whole_charge_and_leaves_the_fee(local: LocalStripe) -> None:
    before = local.funds()
    charge = charge_of(local.paid(10_000))

    refund = local.sdk.refunds.create(
        {"charge": charge.id, "reason": "requested_by_customer", "metadata": {"refund": "1"}},
    )

    booked = local.sdk.balance_transactions.retrieve(refund.balance_transaction)
    assert (refund.status, refund.amount, refund.charge) == ("succeeded", 10_000, charge.id)
    assert (booked.type, booked.amount, booked.fee, booked.source) == ("refund", -10_000, 0, refund.id)
    assert booked.available_on == charge.balance_transaction.available_on  # still pending, like the charge
    assert local.funds() == (before[0] - 320, before[1])
    charge = local.sdk.charges.retrieve(charge.id)
    assert (charge.amount_refunded, charge.refunded) == (10_000, True)
    assert local.sdk.refunds.retrieve(refund.id).metadata.to_dict() == {"refund": "1"}
    with refused("charge_already_refunded"):
        local.sdk.refunds.create({"charge": charge.id})


def test_partial_refunds_add_up_to_the_charge_and_no_further(local: LocalStripe) -> None:
    charge = charge_of(local.paid(1_000))
    first = local.sdk.refunds.create({"payment_intent": charge.payment_intent, "amount": 400})

    with refused("amount_too_large"):
        local.sdk.refunds.create({"charge": charge.id, "amount": 601})
    with refused("parameter_invalid_integer"):
        local.sdk.refunds.create({"charge": charge.id, "amount": 0})
    rest = local.sdk.refunds.create({"charge": charge.id})

    assert [refund.id for refund in local.sdk.refunds.list({"charge": charge.id}).data] == [rest.id, first.id]
    assert rest.amount == 600
    assert local.sdk.refunds.update(first.id, {"metadata": {"why": "half"}}).metadata.to_dict() == {"why": "half"}


def test_the_same_key_refunds_once(local: LocalStripe) -> None:
    charge = charge_of(local.paid(1_000))
    first, second = (
        local.sdk.refunds.create({"charge": charge.id, "amount": 100}, {"idempotency_key": f"refund:{charge.id}"})
        for _ in range(2)
    )

    assert first.id == second.id
    assert local.sdk.charges.retrieve(charge.id).amount_refunded == 100


def test_a_charge_that_failed_cannot_be_refunded(local: LocalStripe) -> None:
    session = local.session()
    answer = http.post(session.url, data=CARD | {"card_number": "4000000000009979"})
    assert answer.status_code == 402
    (charge,) = local.sdk.charges.list({"limit": 1}).data
    assert charge.outcome.reason == "stolen_card"

    with refused("charge_not_refundable"):
        local.sdk.refunds.create({"charge": charge.id})


def test_a_refund_of_available_money_needs_available_money(own: Callable[..., LocalStripe]) -> None:
    local = own()
    charge = charge_of(local.paid(1_000, card=AT_ONCE))
    assert local.funds() == (0, 941)

    with refused("balance_insufficient"):
        local.sdk.refunds.create({"charge": charge.id})
    local.sdk.refunds.create({"charge": charge.id, "amount": 941})

    assert local.funds() == (0, 0)


def test_a_refund_may_be_decided_later(own: Callable[..., LocalStripe]) -> None:
    local = own()
    waits = local.sdk.refunds.create({"charge": charge_of(local.paid(card=LATER_SUCCEEDS)).id})
    fails = local.sdk.refunds.create({"charge": charge_of(local.paid(card=LATER_FAILS)).id})
    assert (waits.status, waits.pending_reason, fails.status) == ("pending", "processing", "succeeded")

    local.advance(DAY + 1)

    failed = local.sdk.refunds.retrieve(fails.id)
    returned = local.sdk.balance_transactions.retrieve(failed.failure_balance_transaction)
    assert local.sdk.refunds.retrieve(waits.id).status == "succeeded"
    assert (failed.status, returned.type, returned.amount, returned.source) == (
        "failed",
        "refund_failure",
        10_000,
        fails.id,
    )
    charge = local.sdk.charges.retrieve(failed.charge)
    assert (charge.amount_refunded, charge.refunded) == (0, False)
    kinds = [event.type for event in local.sdk.events.list({"limit": 100}).data]
    assert {"refund.failed", "refund.updated", "refund.created", "charge.refunded", "charge.refund.updated"} <= set(
        kinds
    )
    assert sum(local.funds()) == 2 * (10_000 - 320) - 10_000


def test_a_transfer_is_reversed_only_as_far_as_the_account_has_it(own: Callable[..., LocalStripe]) -> None:
    local = own()
    local.paid(10_000, card=AT_ONCE)
    account = local.onboarded()
    transfer = local.sdk.transfers.create({"amount": 5_000, "currency": "usd", "destination": account})

    with refused("amount_too_large"):
        local.sdk.transfers.reversals.create(transfer.id, {"amount": 5_001})
    reversal = local.sdk.transfers.reversals.create(transfer.id, {"amount": 2_000, "metadata": {"reversal": "1"}})
    assert local.funds() == (0, 9_680 - 3_000)
    assert local.funds(account=account) == (0, 3_000)
    local.advance(2 * DAY)  # the rest has gone to the bank
    with refused("balance_insufficient"):
        local.sdk.transfers.reversals.create(transfer.id)

    booked = local.sdk.balance_transactions.retrieve(reversal.balance_transaction)
    assert (booked.type, booked.amount, booked.reporting_category) == ("transfer_refund", 2_000, "transfer_reversal")
    transfer = local.sdk.transfers.retrieve(transfer.id)
    assert (transfer.amount_reversed, transfer.reversed) == (2_000, False)
    assert [one.id for one in local.sdk.transfers.reversals.list(transfer.id).data] == [reversal.id]
    assert local.sdk.transfers.reversals.retrieve(transfer.id, reversal.id).amount == 2_000
    assert [event.data.object.id for event in local.sdk.events.list({"type": "transfer.reversed"}).data] == [
        transfer.id
    ]
