"""Disputes: money taken at once with a fee, evidence, the bank's word, and inquiries that take nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import stripe

from tests.payouts.local_stripe.conftest import DAY, KEY, LocalStripe, http

DISPUTES, NOT_RECEIVED, INQUIRES = "4000000000000259", "4000000000002685", "4000000000001976"


def refused(code: str | None) -> Any:
    return pytest.raises(stripe.InvalidRequestError, check=lambda error: error.code == code)


def control(local: LocalStripe, **given: Any) -> Any:
    return http.post(f"{local.url}/_control/disputes", json=given, auth=(KEY, ""))


def dispute_of(local: LocalStripe, session: Any) -> Any:
    (dispute,) = local.sdk.disputes.list({"charge": session.payment_intent.latest_charge.id}).data
    return dispute


def kinds(local: LocalStripe) -> list[str]:
    return [event.type for event in reversed(local.sdk.events.list({"limit": 100}).data) if "dispute" in event.type]


def test_a_card_that_disputes_takes_the_money_and_a_fee_at_once(own: Callable[..., LocalStripe]) -> None:
    local = own()
    session = local.paid(10_000, card=DISPUTES)

    dispute = dispute_of(local, session)

    assert (dispute.status, dispute.reason, dispute.amount) == ("needs_response", "fraudulent", 10_000)
    (taken,) = dispute.balance_transactions
    assert (taken.type, taken.amount, taken.fee, taken.net) == ("adjustment", -10_000, 1_500, -11_500)
    assert taken.reporting_category == "dispute"
    assert local.sdk.balance_transactions.retrieve(taken.id).source == dispute.id
    assert local.funds() == (9_680 - 11_500, 0)
    assert local.sdk.charges.retrieve(dispute.charge).disputed
    assert kinds(local) == ["charge.dispute.created", "charge.dispute.funds_withdrawn"]
    with refused("charge_disputed"):
        local.sdk.refunds.create({"charge": dispute.charge})


def test_winning_evidence_brings_the_money_back_and_not_the_fee(own: Callable[..., LocalStripe]) -> None:
    local = own()
    dispute = dispute_of(local, local.paid(10_000, card=NOT_RECEIVED))

    staged = local.sdk.disputes.update(
        dispute.id, {"evidence": {"product_description": "Digits"}, "submit": False, "metadata": {"by": "a"}}
    )
    assert (staged.status, staged.evidence_details.has_evidence) == ("needs_response", True)
    sent = local.sdk.disputes.update(dispute.id, {"evidence": {"uncategorized_text": "winning_evidence"}})
    assert (sent.status, sent.evidence_details.submission_count) == ("under_review", 1)

    won = local.sdk.disputes.retrieve(dispute.id)
    assert (won.status, [one.amount for one in won.balance_transactions]) == ("won", [-10_000, 10_000])
    assert won.evidence.product_description == "Digits"
    assert local.funds() == (9_680 - 1_500, 0)
    assert kinds(local) == [
        "charge.dispute.created",
        "charge.dispute.funds_withdrawn",
        "charge.dispute.updated",
        "charge.dispute.updated",
        "charge.dispute.funds_reinstated",
        "charge.dispute.closed",
    ]
    with refused("dispute_evidence_not_accepted"):
        local.sdk.disputes.update(dispute.id, {"evidence": {"uncategorized_text": "more"}})


@pytest.mark.parametrize("how", ["evidence", "close", "silence", "bank"])
def test_a_dispute_is_lost_by_evidence_by_giving_in_by_silence_or_by_the_bank(
    own: Callable[..., LocalStripe], how: str
) -> None:
    local = own()
    dispute = dispute_of(local, local.paid(10_000, card=DISPUTES))

    match how:
        case "evidence":
            local.sdk.disputes.update(dispute.id, {"evidence": {"uncategorized_text": "losing_evidence"}})
        case "close":
            local.sdk.disputes.close(dispute.id)
        case "silence":
            local.advance(11 * DAY)
        case "bank":
            assert control(local, dispute=dispute.id, verdict="lost").status_code == 200

    lost = local.sdk.disputes.retrieve(dispute.id)
    assert (lost.status, len(lost.balance_transactions)) == ("lost", 1)
    assert sum(local.funds()) == 9_680 - 11_500
    assert kinds(local)[-1] == "charge.dispute.closed"
    with refused("dispute_closed"):
        local.sdk.disputes.close(dispute.id)


def test_an_inquiry_takes_nothing_until_it_escalates(own: Callable[..., LocalStripe]) -> None:
    local = own()
    first, second = (dispute_of(local, local.paid(1_000, card=INQUIRES)) for _ in range(2))
    assert (first.status, first.balance_transactions, first.is_charge_refundable) == (
        "warning_needs_response",
        [],
        True,
    )
    local.sdk.refunds.create({"charge": first.charge, "amount": 100})

    local.sdk.disputes.update(first.id, {"evidence": {"uncategorized_text": "escalate_inquiry_evidence"}})
    first = local.sdk.disputes.retrieve(first.id)
    assert (first.status, len(first.balance_transactions)) == ("needs_response", 1)
    local.advance(11 * DAY)

    assert local.sdk.disputes.retrieve(second.id).status == "warning_closed"
    assert local.sdk.disputes.retrieve(first.id).status == "lost"


def test_a_charge_is_disputed_on_demand_for_a_part_and_once_at_a_time(own: Callable[..., LocalStripe]) -> None:
    local = own()
    charge = local.paid(10_000).payment_intent.latest_charge.id

    assert control(local, charge=charge, amount=10_001).status_code == 400
    opened = control(local, charge=charge, amount=2_500, reason="duplicate").json()
    assert control(local, charge=charge).json()["error"]["code"] == "charge_disputed"
    assert control(local, dispute=opened["id"], verdict="perhaps").status_code == 400
    assert control(local, charge="ch_unknown").status_code == 404

    dispute = local.sdk.disputes.retrieve(opened["id"])
    assert (dispute.amount, dispute.reason, dispute.balance_transactions[0].net) == (2_500, "duplicate", -4_000)
