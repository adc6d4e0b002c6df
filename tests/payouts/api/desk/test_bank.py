"""Our own bank account by a key: money that fits no invoice, and refunds that a person sends; each seen by two people."""

from datetime import timedelta
from typing import Any

import pytest

from marketplace import clock
from marketplace.models import AuditEvent, StaffAct
from payouts import ledger
from payouts.models import BankReceipt, Document, OutgoingTransfer, Payment, ReceiptApplication, Refund
from payouts.services import billing, sales
from payouts.services.proofs import check_books
from tests.desk import Desk
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import sell

DOLLAR = 1_000_000


def usd(amount: str) -> dict[str, str]:
    return {"amount": amount, "currency": "USD"}


def today() -> str:
    return f"{clock.today()}"


@pytest.fixture
def invoice(carol: Any, alice: Any) -> Document:
    """Carol is asked for 100 USD by bank transfer."""
    address = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}
    billing.set_billing_profile(party=carol, user=carol.user, **address)
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}), price_micros=100 * DOLLAR)
    return sales.invoice_order(order=OrderFactory(buyer=carol, offers=[offer]))


def money(**changes: Any) -> dict[str, Any]:
    told = {"payer": "CAROL GMBH", "amount": usd("60.00"), "reference": "IN 1", "received_on": today()}
    return told | changes


def arrived(ann: Desk, ben: Desk, amount: str, reference: str = "IN 1") -> int:
    """Money that fits no invoice, seen by two."""
    made = ann.act("unapplied/", money(amount=usd(amount), reference=reference), 201, code="")
    ben.act(f"receipts/{made['id']}/approve/")
    number: int = made["id"]
    return number


# --- money that fits no invoice ---------------------------------------------------------------------------------------


def test_money_that_fits_no_invoice_is_held_once_two_have_seen_it(ann: Desk, ann_again: Desk, ben: Desk) -> None:
    made, again = (ann.act("unapplied/", money(note="half of it?"), 201, key="k", code="") for _ in range(2))
    assert made == again
    assert (made["payment"], made["buyer"], made["payer"], made["note"]) == (None, None, "CAROL GMBH", "half of it?")
    assert (made["status"], made["recorded_by"]) == ("recorded", "ann@desk.example")
    path = f"unapplied/{made['id']}/"
    assert ann.get(path)["left"] == usd("0.00") and ann.get("unapplied/")["results"] == []
    assert ann.get("receipts/", fits_invoice=False, status="recorded")["results"] == [made]
    assert ann.get("receipts/", fits_invoice=True)["results"] == []
    for desk in (ann, ann_again):
        assert desk.act(f"receipts/{made['id']}/approve/", None, 403)["code"] == "four_eyes"
    assert ledger.balances() == {}

    ben.act(f"receipts/{made['id']}/approve/")
    clock.advance(timedelta(days=12))

    assert ledger.balances() == {"bank:USD": 60 * DOLLAR, "unapplied:USD": -60 * DOLLAR}
    (held,) = ann.get("unapplied/")["results"]
    assert (held["receipt"]["id"], held["left"], held["days"]) == (made["id"], usd("60.00"), 12)
    assert ann.get(path) == held | {"uses": [], "returns": []}
    assert AuditEvent.objects.get(action="receipt.recorded").actor == ann.user
    assert check_books().findings == []


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"payer": " "}, "/payer"),
        ({"payer": "x" * 201}, "/payer"),
        ({"amount": usd("0")}, "/amount"),
        ({"amount": usd("-1")}, "/amount"),
        ({"amount": usd("1.001")}, "/amount"),
        ({"amount": "5"}, "/amount"),
        ({"reference": ""}, "/reference"),
        ({"reference": "x" * 121}, "/reference"),
        ({"received_on": "2999-01-01"}, "/received_on"),
        ({"received_on": "today"}, "/received_on"),
        ({"note": "x" * 501}, "/note"),
    ],
)
def test_money_that_cannot_have_arrived_leaves_nothing(ann: Desk, changes: Any, pointer: str) -> None:
    ann.refused("unapplied/", money(**changes), pointer, code="")

    assert BankReceipt.objects.count() == StaffAct.objects.count() == 0


def test_a_transfer_is_recorded_once_and_not_as_something_else(ann: Desk, ben: Desk) -> None:
    first = ann.act("unapplied/", money(), 201, code="")
    assert ben.act("unapplied/", money(), 201, code="")["id"] == first["id"]

    refused = ben.refused("unapplied/", money(amount=usd("61.00")), "/reference", status=409, code="")

    assert refused["code"] == "receipt_not_possible" and BankReceipt.objects.count() == 1


def test_money_is_applied_to_an_invoice_by_two_people_and_the_rest_goes_back(
    invoice: Document, ann: Desk, ann_again: Desk, ben: Desk
) -> None:
    first, second = arrived(ann, ben, "60.00"), arrived(ann, ben, "55.00", "IN 2")
    asked = {"invoice": invoice.reference, "money": [second, first]}
    ann.refused("applications/", asked | {"money": [first]}, "/money", code="")
    made, again = (ann.act("applications/", asked, 201, key="k", code="") for _ in range(2))
    path = f"applications/{made['id']}/"
    assert made == again and (made["status"], made["proposed_by"]) == ("proposed", "ann@desk.example")
    assert [(use["receipt"], use["amount"]) for use in made["uses"]] == [
        (first, usd("60.00")),
        (second, usd("40.00")),
    ]
    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{path}approve/", None, "One-Time-Code", status=403, code="")
    assert Payment.objects.get().status == "open"

    booked = ben.act(f"{path}approve/")

    assert (booked["status"], booked["decided_by"]) == ("booked", "ben@desk.example")
    assert Payment.objects.get().status == "paid"
    assert (
        ann.get("applications/", status="booked", payment=booked["payment"])["results"] == [booked] == [ann.get(path)]
    )
    assert ann.get("applications/", status="proposed")["results"] == []
    (held,) = ann.get("unapplied/")["results"]
    assert (held["receipt"]["id"], held["left"]) == (second, usd("15.00"))
    assert ben.act(f"{path}reject/", None, 409, code="")["code"] == "already_decided"

    back = {"amount": usd("15.00"), "reference": "OUT 1", "sent_on": today()}
    sent = ann.act(f"unapplied/{second}/returns/", back, 201, code="")
    assert (sent["receipt"], sent["refund"], sent["status"]) == (second, None, "recorded")
    assert ann.get("unapplied/")["results"] == []
    ben.act(f"outgoing-transfers/{sent['id']}/approve/")

    seen = ann.get(f"unapplied/{second}/")
    assert (seen["left"], [one["amount"] for one in seen["uses"]]) == (usd("0.00"), [usd("40.00")])
    assert [(one["reference"], one["status"]) for one in seen["returns"]] == [("OUT 1", "booked")]
    assert ledger.balances(prefix="unapplied") == {} and check_books().findings == []


def test_a_use_is_rejected_without_a_code_and_the_money_is_free_again(invoice: Document, ann: Desk, ben: Desk) -> None:
    number = arrived(ann, ben, "100.00")
    made = ann.act("applications/", {"invoice": invoice.reference, "money": [number]}, 201, code="")
    assert ann.get("unapplied/")["results"] == []

    assert ben.act(f"applications/{made['id']}/reject/", code="")["status"] == "rejected"

    assert ann.get("unapplied/")["results"][0]["left"] == usd("100.00")
    assert Payment.objects.get().status == "open"


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"invoice": "INV-2026-1"}, "/invoice"),
        ({"invoice": "CN-2026-000001"}, "/invoice"),
        ({"money": []}, "/money"),
        ({"money": "all"}, "/money"),
        ({"money": [999_999_999]}, "/money"),
        ({"money": [10**30]}, "/money/0"),
        ({"money": list(range(1, 102))}, "/money"),
    ],
)
def test_a_use_that_cannot_be_leaves_nothing(
    invoice: Document, ann: Desk, ben: Desk, changes: Any, pointer: str
) -> None:
    number = arrived(ann, ben, "100.00")

    ann.refused("applications/", {"invoice": invoice.reference, "money": [number]} | changes, pointer, code="")

    assert ReceiptApplication.objects.count() == 0
    assert StaffAct.objects.filter(path__contains="applications").count() == 0


def test_a_receipt_that_pays_an_invoice_is_no_money_that_fits_none(invoice: Document, ann: Desk) -> None:
    told = {"invoice": invoice.reference, "amount": usd("100.00"), "reference": "IN 1", "received_on": today()}
    made = ann.act("receipts/", told, 201, code="")

    ann.get(f"unapplied/{made['id']}/", 404)
    ann.act(f"unapplied/{made['id']}/returns/", {}, 422, code="")
    back = {"amount": usd("15.00"), "reference": "OUT 1", "sent_on": today()}
    ann.act(f"unapplied/{made['id']}/returns/", back, 404, code="")
    ann.refused("applications/", {"invoice": invoice.reference, "money": [made["id"]]}, "/money", code="")


@pytest.mark.parametrize(
    ("changes", "pointer", "status"),
    [
        ({"amount": usd("60.01")}, "/amount", 409),
        ({"amount": usd("0")}, "/amount", 422),
        ({"amount": {"amount": "5", "currency": "EUR"}}, "/amount", 422),
        ({"reference": " "}, "/reference", 422),
        ({"sent_on": "2999-01-01"}, "/sent_on", 422),
    ],
)
def test_more_than_is_left_is_not_sent_back(ann: Desk, ben: Desk, changes: Any, pointer: str, status: int) -> None:
    number = arrived(ann, ben, "60.00")
    back = {"amount": usd("60.00"), "reference": "OUT 1", "sent_on": today()}

    ann.refused(f"unapplied/{number}/returns/", back | changes, pointer, status=status, code="")

    assert OutgoingTransfer.objects.count() == 0


# --- refunds that a person sends --------------------------------------------------------------------------------------


@pytest.fixture
def refund(invoice: Document, ann: Desk, ben: Desk) -> int:
    """40 of the 100 USD that carol paid by transfer are to go back."""
    told = {"invoice": invoice.reference, "amount": usd("100.00"), "reference": "IN 1", "received_on": today()}
    ben.act(f"receipts/{ann.act('receipts/', told, 201, code='')['id']}/approve/")
    asked = {"amount": usd("40.00"), "reason": "goodwill", "note": "Late."}
    made = ann.act(f"payments/{Payment.objects.get().pk}/refunds/", asked, 201)
    assert (made["method"], made["state"], made["transfer"]) == ("bank", "intended", None)
    assert "Our staff send it by hand" in made["sentence"]
    number: int = made["id"]
    return number


def sent(**changes: Any) -> dict[str, Any]:
    return {"reference": "OUT 1", "sent_on": today()} | changes


def test_a_refund_by_bank_is_sent_by_one_person_and_seen_by_another(
    refund: int, ann: Desk, ann_again: Desk, ben: Desk
) -> None:
    assert [one["id"] for one in ann.get("refunds/", to_send=True)["results"]] == [refund]
    made, again = (ann.act(f"refunds/{refund}/sent/", sent(), 201, key="k", code="") for _ in range(2))
    path = f"outgoing-transfers/{made['id']}/"
    assert made == again and (made["refund"], made["amount"], made["status"]) == (refund, usd("40.00"), "recorded")
    assert ann.get("refunds/", to_send=True)["results"] == []
    assert ann.get(f"refunds/{refund}/")["transfer"] == made["id"]
    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{path}approve/", None, "One-Time-Code", status=403, code="")
    assert ledger.balances(prefix="bank") == {"bank:USD": 100 * DOLLAR}

    booked = ben.act(f"{path}approve/")

    assert (booked["status"], booked["decided_by"]) == ("booked", "ben@desk.example")
    seen = ann.get(f"refunds/{refund}/")
    assert seen["state"] == "sent" and "OUT 1" in seen["sentence"]
    assert ann.get("refunds/", method="bank", state="sent")["results"] == [seen]
    assert ann.get("refunds/", method="stripe")["results"] == []
    assert ann.get("outgoing-transfers/", status="booked", refund=refund)["results"] == [booked] == [ann.get(path)]
    assert ann.get("outgoing-transfers/", status="recorded")["results"] == []
    assert ann.get("outgoing-transfers/", receipt=1)["results"] == []
    assert ledger.balances(prefix="bank") == {"bank:USD": 60 * DOLLAR}
    assert Document.objects.filter(kind="CN").count() == 1 and check_books().findings == []


def test_a_transfer_that_came_back_is_noted_with_a_code(refund: int, ann: Desk, ben: Desk) -> None:
    path = f"outgoing-transfers/{ann.act(f'refunds/{refund}/sent/', sent(), 201, code='')['id']}/"
    told = {"reference": "IN 9", "note": "account closed"}
    assert ann.act(f"{path}returned/", told, 409)["code"] == "already_decided"  # it was never booked
    ben.act(f"{path}approve/")
    for missing in ("reference", "note"):
        ann.refused(f"{path}returned/", told | {missing: " "}, f"/{missing}")
    ann.refused(f"{path}returned/", told, "One-Time-Code", status=403, code="")

    back = ann.act(f"{path}returned/", told)

    assert (back["status"], back["return_note"], back["returned_by"]) == (
        "returned",
        "account closed",
        "ann@desk.example",
    )
    seen = ann.get(f"refunds/{refund}/")
    assert seen["state"] == "failed" and "account closed" in seen["sentence"]
    assert ledger.balances(prefix="bank") == {"bank:USD": 100 * DOLLAR}
    assert ledger.balances(prefix="refunding") == {} and check_books().findings == []


def test_a_record_is_rejected_without_a_code_and_the_refund_waits_again(refund: int, ann: Desk, ben: Desk) -> None:
    made = ann.act(f"refunds/{refund}/sent/", sent(), 201, code="")
    note = {"note": "Nobody says which account."}
    assert ben.act(f"refunds/{refund}/refuse/", note, 409)["code"] == "transfer_not_possible"  # a record carries it

    assert ann.act(f"outgoing-transfers/{made['id']}/reject/", code="")["status"] == "rejected"

    assert ben.act(f"outgoing-transfers/{made['id']}/approve/", None, 409)["code"] == "already_decided"
    assert [one["id"] for one in ann.get("refunds/", to_send=True)["results"]] == [refund]
    assert ledger.balances(prefix="refunding_bank") == {"refunding_bank:USD": -40 * DOLLAR}


def test_a_refund_that_cannot_be_sent_is_booked_back_with_a_code_and_a_reason(refund: int, ann: Desk) -> None:
    path, note = f"refunds/{refund}/refuse/", {"note": "Nobody says which account."}
    ann.refused(path, {}, "/note")
    ann.refused(path, note, "One-Time-Code", status=403, code="")
    assert Refund.objects.get().state == "intended"

    refused = ann.act(path, note)

    assert refused["state"] == "refused" and "Nobody says which account." in refused["sentence"]
    assert ledger.balances(prefix="refunding_bank") == {} and check_books().findings == []
    assert ann.act(f"refunds/{refund}/sent/", sent(), 409, code="")["code"] == "transfer_not_possible"


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"reference": ""}, "/reference"),
        ({"reference": "x" * 121}, "/reference"),
        ({"sent_on": "2999-01-01"}, "/sent_on"),
        ({"sent_on": "soon"}, "/sent_on"),
    ],
)
def test_a_transfer_that_cannot_have_left_leaves_nothing(refund: int, ann: Desk, changes: Any, pointer: str) -> None:
    ann.refused(f"refunds/{refund}/sent/", sent(**changes), pointer, code="")

    assert OutgoingTransfer.objects.count() == 0


def test_a_cards_refund_is_sent_by_nobody(ann: Desk, alice: Any, carol: Any) -> None:
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}))
    payment = sell(OrderFactory(buyer=carol, offers=[offer]))
    asked = {"amount": usd("10.00"), "reason": "goodwill", "note": "Late."}
    made = ann.act(f"payments/{payment.pk}/refunds/", asked, 201)

    assert (made["method"], made["transfer"]) == ("stripe", None) and "your card" in made["sentence"]
    assert ann.act(f"refunds/{made['id']}/sent/", sent(), 409, code="")["code"] == "transfer_not_possible"
    assert ann.act(f"refunds/{made['id']}/refuse/", {"note": "n"}, 409)["code"] == "transfer_not_possible"
    assert ann.get("refunds/", to_send=True)["results"] == []
