"""Invoices, transfers to our bank account and tax rates by a key."""

from datetime import timedelta
from typing import Any

import pytest

from marketplace import clock
from marketplace.models import StaffAct
from marketplace.money import Money
from payouts.models import BankReceipt, Document, Payment, TaxRate
from payouts.services import billing, sales
from payouts.services.proofs import check_books
from tests.desk import Desk
from tests.factories.marketplace import OfferFactory, OrderFactory

DOLLAR = 1_000_000


@pytest.fixture
def invoice(carol: Any) -> Document:
    """Carol is asked for 100 USD by bank transfer."""
    address = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}
    billing.set_billing_profile(party=carol, user=carol.user, **address)
    order = OrderFactory(buyer=carol, offers=[OfferFactory(price_micros=100 * DOLLAR)])
    return sales.invoice_order(order=order)


def transfer(invoice: Document, /, **changes: Any) -> dict[str, Any]:
    return {
        "invoice": invoice.reference,
        "amount": {"amount": "100.00", "currency": "USD"},
        "reference": "4711",
        "received_on": f"{clock.today()}",
    } | changes


def test_a_transfer_is_recorded_by_one_person_and_booked_by_another(
    invoice: Document, ann: Desk, ann_again: Desk, ben: Desk
) -> None:
    (unpaid,) = ann.get("invoices/", unpaid=True)["results"]
    assert (unpaid["reference"], unpaid["payment_status"]) == (invoice.reference, "open")
    assert "Carol GmbH" in str(ann.get(f"invoices/{invoice.reference}/")["content"])
    ann.get("invoices/INV-2026-1/", 404)

    made, again = (ann.act("receipts/", transfer(invoice), 201, key="k", code="") for _ in range(2))
    path = f"receipts/{made['id']}/"
    assert made == again and (made["status"], made["recorded_by"]) == ("recorded", "ann@desk.example")
    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{path}approve/", None, "One-Time-Code", status=403, code="")
    assert Payment.objects.get().status == "open"
    booked = ben.act(f"{path}approve/")

    assert (booked["status"], booked["decided_by"]) == ("booked", "ben@desk.example")
    payment = Payment.objects.get()
    assert (payment.status, payment.method, payment.amount) == ("paid", "bank", Money(100 * DOLLAR, "USD"))
    assert ann.get("receipts/", status="booked")["results"] == [booked] == [ann.get(path)]
    assert ann.get("receipts/", status="recorded")["results"] == []
    assert ann.get("invoices/", unpaid=True)["results"] == []
    assert [one["payment_status"] for one in ann.get("invoices/")["results"]] == ["paid"]
    assert check_books().findings == []


def test_a_transfer_is_rejected_without_a_code(invoice: Document, ann: Desk, ben: Desk) -> None:
    made = ann.act("receipts/", transfer(invoice), 201, code="")

    assert ben.act(f"receipts/{made['id']}/reject/", code="")["status"] == "rejected"
    assert ben.act(f"receipts/{made['id']}/approve/", None, 409)["code"] == "receipt_not_possible"
    assert Payment.objects.get().status == "open"


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"invoice": "INV-2026-1"}, "/invoice"),
        ({"invoice": "CN-2026-000001"}, "/invoice"),
        ({"amount": {"amount": "99.00", "currency": "USD"}}, "/amount"),
        ({"amount": {"amount": "-1", "currency": "USD"}}, "/amount"),
        ({"reference": " "}, "/reference"),
        ({"reference": "x" * 121}, "/reference"),
        ({"received_on": "2999-01-01"}, "/received_on"),
        ({"received_on": "today"}, "/received_on"),
    ],
)
def test_a_transfer_that_cannot_be_leaves_nothing(invoice: Document, ann: Desk, changes: Any, pointer: str) -> None:
    ann.refused("receipts/", transfer(invoice, **changes), pointer, code="")

    assert BankReceipt.objects.count() == StaffAct.objects.count() == 0


def rate(**changes: Any) -> dict[str, Any]:
    return {"jurisdiction": "DE", "name": "VAT", "rate_bps": 1_900, "valid_from": f"{clock.today()}"} | changes


def test_a_tax_rate_is_added_and_ended(ann: Desk) -> None:
    made = ann.act("tax-rates/", rate(is_reversed=True), 201)
    assert (made["rate_bps"], made["is_reversed"], made["valid_until"]) == (1_900, True, None)
    assert made["created_by"] == "ann@desk.example"
    ann.refused("tax-rates/", rate(), "/jurisdiction")
    path, today = f"tax-rates/{made['id']}/end/", f"{clock.today()}"
    ann.refused(path, {"last_day": f"{clock.today() - timedelta(days=1)}"}, "/valid_until")
    ann.refused(path, {"last_day": "soon"}, "/last_day")
    ann.refused(path, {"last_day": today}, "One-Time-Code", status=403, code="")

    ended = ann.act(path, {"last_day": today})

    assert ended["valid_until"] == today
    assert ann.get("tax-rates/", jurisdiction="DE")["results"] == [ended]
    assert ann.get("tax-rates/", jurisdiction="FR")["results"] == []


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"jurisdiction": "Germany"}, "/jurisdiction"),
        ({"jurisdiction": "de"}, "/jurisdiction"),
        ({"rate_bps": 0}, "/rate_bps"),
        ({"rate_bps": 10_001}, "/rate_bps"),
        ({"rate_bps": 19.5}, "/rate_bps"),
        ({"valid_from": "2020-01-01"}, "/valid_from"),
        ({"name": ""}, "/name"),
    ],
)
def test_a_tax_rate_that_cannot_be_leaves_nothing(ann: Desk, changes: Any, pointer: str) -> None:
    ann.refused("tax-rates/", rate(**changes), pointer)

    assert TaxRate.objects.count() == StaffAct.objects.count() == 0
