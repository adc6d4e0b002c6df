"""Refunds, disputes and debts by a key: what a person decides, once, and what is refused with its field."""

from typing import Any

import pytest

from marketplace.models import AuditEvent, StaffAct
from payouts import gateway, ledger
from payouts.api.desk import givebacks
from payouts.models import Dispute, DisputeAnswer, Payment, Refund, TransferReversal, WriteOff
from payouts.selectors import Debt, debts
from payouts.services import disputes
from payouts.services.proofs import check_books
from tests.desk import Desk
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import sell
from tests.portal.pages.test_refunds import _pay_out_everything

DOLLAR = 1_000_000


@pytest.fixture
def payment(alice: Any, carol: Any) -> Payment:
    """Carol has paid 100 USD for alice's data."""
    version = PublishedVersionFactory(contributions={alice: 1})
    return sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))


def refund(**changes: Any) -> dict[str, Any]:
    return {"amount": usd("80.00"), "reason": "faulty_data", "note": "Labels are shuffled."} | changes


def usd(amount: str) -> dict[str, str]:
    return {"amount": amount, "currency": "USD"}


# --- refunds ----------------------------------------------------------------------------------------------------------


def test_a_payment_is_found_and_refunded_once(payment: Payment, ann: Desk, carol: Any) -> None:
    assert [one["id"] for one in ann.get("payments/", q=carol.name)["results"]] == [payment.pk]
    assert ann.get("payments/", q="nobody")["results"] == []
    seen = ann.get(f"payments/{payment.pk}/")
    (part,) = seen["parts"]
    assert (seen["left"], part["left"], seen["fee"]) == (usd("100.00"), usd("100.00"), usd("3.20"))

    made, again = (
        ann.act(f"payments/{payment.pk}/refunds/", refund(line=part["line"]), 201, key="k") for _ in range(2)
    )

    assert made == again and Refund.objects.count() == 1
    assert (made["amount"], made["state"], made["requested_by"]) == (usd("80.00"), "intended", "ann@desk.example")
    assert ann.get(f"payments/{payment.pk}/")["left"] == usd("20.00")
    assert ann.get("refunds/", state="intended", payment=payment.pk)["results"] == [made]
    assert ann.get("refunds/", state="failed")["results"] == []
    assert ann.get(f"refunds/{made['id']}/") == made
    assert AuditEvent.objects.get(action="refund.requested").actor == ann.user
    assert check_books().findings == []


@pytest.mark.parametrize(
    ("changes", "pointer", "status"),
    [
        ({"amount": usd("100.01")}, "/amount/amount", 409),
        ({"amount": usd("-1")}, "/amount", 422),
        ({"amount": usd("0")}, "/amount/amount", 422),
        ({"amount": usd("1e30")}, "/amount", 422),
        ({"amount": usd("1.001")}, "/amount", 422),
        ({"amount": "5"}, "/amount", 422),
        ({"amount": {"amount": "5", "currency": "EUR"}}, "/amount/currency", 422),
        ({"note": ""}, "/note", 422),
        ({"note": "x" * 2_001}, "/note", 422),
        ({"reason": "of_right"}, "/reason", 422),
        ({"line": 999_999_999}, "/line", 422),
        ({"line": "one"}, "/line", 422),
    ],
)
def test_a_refund_that_cannot_be_leaves_nothing(
    payment: Payment, ann: Desk, changes: dict[str, Any], pointer: str, status: int
) -> None:
    before = ledger.balances()

    ann.refused(f"payments/{payment.pk}/refunds/", refund(**changes), pointer, status=status)

    assert (Refund.objects.count(), StaffAct.objects.count(), ledger.balances()) == (0, 0, before)


def test_without_a_code_nothing_is_refunded(payment: Payment, ann: Desk) -> None:
    ann.refused(f"payments/{payment.pk}/refunds/", refund(), "One-Time-Code", status=403, code="")

    assert Refund.objects.count() == 0


def test_a_key_is_of_one_refund(payment: Payment, ann: Desk) -> None:
    ann.act(f"payments/{payment.pk}/refunds/", refund(), 201, key="k")

    refused = ann.act(f"payments/{payment.pk}/refunds/", refund(amount=usd("20.00")), 409, key="k")

    assert refused["code"] == "idempotency_key_reused" and Refund.objects.count() == 1


# --- disputes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dispute(payment: Payment) -> Dispute:
    assert payment.charge_id is not None and payment.paid_at is not None
    return disputes._write_down(
        gateway.Dispute(
            id="du_1",
            charge=payment.charge_id,
            amount_minor=10_000,
            currency="USD",
            reason="fraudulent",
            status="needs_response",
            opened_at=payment.paid_at,
            evidence_due_at=payment.paid_at,
            movements=[],
        )
    )


def test_a_dispute_says_what_is_frozen_and_is_answered_once(dispute: Dispute, ann: Desk, ben: Desk) -> None:
    (seen,) = ann.get("disputes/", open=True)["results"]
    assert (seen["amount"], seen["takes_answer"], seen["is_open"]) == (usd("100.00"), True, True)
    assert ann.get("disputes/", open=False)["results"] == []
    detail = ann.get(f"disputes/{dispute.pk}/")
    assert [(one["kind"], one["amount"], one["is_undone"]) for one in detail["clawbacks"]] == [
        ("freeze", usd("90.00"), False)
    ]

    answered = ann.act(f"disputes/{dispute.pk}/answer/", {"evidence": {"product_description": "Digits."}})

    assert answered["takes_answer"] is False
    (answer,) = answered["answers"]
    assert (answer["evidence"], answer["given_by"]) == ({"product_description": "Digits."}, "ann@desk.example")
    assert ben.act(f"disputes/{dispute.pk}/give-in/", None, 409)["code"] == "dispute_not_answerable"
    assert DisputeAnswer.objects.count() == 1


def test_one_may_give_in(dispute: Dispute, ann: Desk) -> None:
    assert ann.act(f"disputes/{dispute.pk}/give-in/")["answers"][0]["gives_in"] is True
    assert AuditEvent.objects.get(action="dispute.given_in").actor == ann.user


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({}, "/evidence"),
        ({"evidence": {}}, "/evidence"),
        ({"evidence": {"product_description": " "}}, "/evidence/product_description"),
        ({"evidence": {"product_description": "x" * 20_001}}, "/evidence/product_description"),
        ({"evidence": "Digits."}, "/evidence"),
    ],
)
def test_an_answer_without_evidence_is_refused(dispute: Dispute, ann: Desk, given: Any, pointer: str) -> None:
    ann.refused(f"disputes/{dispute.pk}/answer/", given, pointer)

    assert DisputeAnswer.objects.count() == 0


# --- debts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def owing(payment: Payment, ann: Desk, alice: Any) -> Any:
    """Alice was sent 30 USD that went back to carol since."""
    payout = _pay_out_everything(alice)
    ann.act(f"payments/{payment.pk}/refunds/", refund(amount=usd("100.00")), 201)
    return payout


def test_a_debt_is_asked_back_or_borne_once(owing: Any, ann: Desk, alice: Any) -> None:
    (debt,) = ann.get("debts/")["results"]
    assert (debt["party"]["id"], debt["owed"]) == (alice.pk, usd("30.00"))
    path = f"debts/{alice.pk}/USD/"
    seen = ann.get(path)
    assert [one["id"] for one in seen["reversible_payouts"]] == [owing.pk]
    assert sum(float(one["amount"]["amount"]) for one in seen["taken_back"]) == 30

    asked = {"payout": owing.pk, "amount": usd("10.00"), "note": "It was refunded."}
    reversals = [ann.act(f"{path}reversals/", asked, 201, key="r") for _ in range(2)]
    bear = {"amount": usd("20.00"), "reason": "The account is closed."}
    borne = [ann.act(f"{path}write-offs/", bear, 201, key="w") for _ in range(2)]

    assert reversals[0] == reversals[1] and borne[0] == borne[1]
    assert (TransferReversal.objects.count(), WriteOff.objects.count()) == (1, 1)
    assert (borne[0]["owed"], borne[0]["decided_by"]) == (usd("10.00"), "ann@desk.example")
    assert [one["id"] for one in ann.get(path)["reversals"]] == [reversals[0]["id"]]
    assert ann.get("debts/")["results"][0]["owed"] == usd("10.00")
    assert check_books().findings == []


@pytest.mark.parametrize(
    ("act", "changes", "pointers", "status"),
    [
        ("reversals", {"amount": usd("30.01")}, (), 409),
        ("reversals", {"payout": 999_999_999}, ("/payout",), 422),
        ("reversals", {"amount": {"amount": "5", "currency": "EUR"}}, ("/amount",), 422),
        ("reversals", {"note": ""}, ("/note",), 422),
        ("write-offs", {"amount": usd("30.01")}, (), 409),
        ("write-offs", {"amount": {"amount": "5", "currency": "EUR"}}, ("/amount/currency",), 422),
        ("write-offs", {"amount": usd("0")}, ("/amount",), 422),
        ("write-offs", {"reason": ""}, ("/reason",), 422),
    ],
)
def test_more_than_is_owed_is_neither_asked_back_nor_borne(
    owing: Any, ann: Desk, alice: Any, act: str, changes: Any, pointers: Any, status: int
) -> None:
    given = {"payout": owing.pk, "amount": usd("10.00"), "note": "n", "reason": "r"} | changes
    before = ledger.balances()

    ann.refused(f"debts/{alice.pk}/USD/{act}/", given, *pointers, status=status)

    assert (TransferReversal.objects.count(), WriteOff.objects.count(), ledger.balances()) == (0, 0, before)


def test_a_payout_of_somebody_elses_is_not_asked_back_in_this_ones_name(owing: Any, ann: Desk, bob: Any) -> None:
    given = {"payout": owing.pk, "amount": usd("10.00"), "note": "n"}

    ann.refused(f"debts/{bob.pk}/USD/reversals/", given, "/payout")
    ann.get(f"debts/{bob.pk}/CHF/", 404)
    assert ann.get(f"debts/{bob.pk}/USD/")["owed"] == usd("0.00")
    assert TransferReversal.objects.count() == 0


def test_debts_are_paged_with_a_bound(owing: Any, ann: Desk, alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = debts()
    monkeypatch.setattr(givebacks, "debts", lambda: [Debt(one.party, one.amount)] * 205)

    first = ann.get("debts/", page_size=100_000)
    second = ann.get(first["next"])

    assert (len(first["results"]), len(second["results"]), second["next"]) == (200, 5, None)
    assert len(ann.get("debts/")["results"]) == 50
    assert ann.get("debts/", offset=10**30)["results"] == []
