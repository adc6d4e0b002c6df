"""Our bank account at the desk, and what buyers read of their money there."""

from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from marketplace import clock
from marketplace.api.keys import create_api_key
from marketplace.models import ApiKey, Order
from marketplace.money import Money
from payouts import ledger
from payouts.models import BankReceipt, OutgoingTransfer, Payment, ReceiptApplication, Refund
from payouts.services import billing, receipts, sales, unapplied
from payouts.services.proofs import check_books
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory, UserFactory
from tests.pages import assert_page, signed_in, with_second_factor

DOLLAR = 1_000_000
ADDRESS = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}


@pytest.fixture
def people(db: Any) -> Any:
    return UserFactory(is_staff=True), UserFactory(is_staff=True)


@pytest.fixture
def desks(people: Any) -> Any:
    return tuple(with_second_factor(Client(), one) for one in people)


@pytest.fixture
def order(carol: Any, alice: Any) -> Order:
    """Invoiced to carol: 100 USD."""
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}), price_micros=100 * DOLLAR)
    made: Order = OrderFactory(buyer=carol, offers=[offer])
    sales.invoice_order(order=made)
    return made


@pytest.fixture
def paid(order: Order, people: Any) -> Order:
    payment = Payment.objects.get()
    told = {"payment": payment, "amount": payment.amount, "reference": "IN 1", "received_on": clock.today()}
    receipts.decide_receipt(receipt=receipts.record_receipt(by=people[0], **told), approved=True, by=people[1])
    return order


def test_a_buyer_who_paid_by_transfer_gets_it_back_by_transfer(paid: Order, carol: Any, desks: Any) -> None:
    ann, ben = desks
    browser = signed_in(carol)
    page = f"/orders/{paid.public_id}/"
    assert "Give back, and refund $100.00" in assert_page(browser.get(page))
    assert browser.post(f"{page}refund/").status_code == 302
    text = assert_page(browser.get(page))
    assert "goes back by bank transfer" in text and "card" not in text.split("Refunded")[1].split("Lines")[0]
    refund = Refund.objects.get()
    to_send = f"/desk/bank/refunds/{refund.pk}/"
    assert to_send in ann.get("/desk/bank/").content.decode()
    assert to_send in ann.get("/desk/").content.decode()
    shown = assert_page(ann.get(to_send))
    assert "transfer IN 1" in shown and "It cannot be sent" in shown

    assert "number" in assert_page(ann.post(to_send, {"act": "sent", "sent-reference": " ", "sent-sent_on": "x"}), 422)
    assert (
        ann.post(to_send, {"act": "sent", "sent-reference": "OUT 1", "sent-sent_on": f"{clock.today()}"}).url == to_send
    )
    decide = f"/desk/bank/transfers/{OutgoingTransfer.objects.get().pk}/"
    assert ann.post(decide, {"act": "approve"}).status_code == 403
    for shown in (assert_page(ann.get("/desk/bank/")), assert_page(ann.get(to_send))):
        assert "somebody else confirms" in shown and "Withdraw" in shown and "Reject" not in shown
    for shown in (assert_page(ben.get("/desk/bank/")), assert_page(ben.get(to_send))):
        assert "Confirm" in shown and "Reject" in shown and "Withdraw" not in shown
    assert ben.post(decide, {"act": "approve"}).url == "/desk/bank/"

    assert ledger.balances(prefix="bank") == {} and check_books().findings == []
    assert "Sent by bank transfer" in assert_page(browser.get(page)) and "OUT 1" in assert_page(browser.get(page))
    returned = {"act": "returned", "returned-reference": "IN 2", "returned-note": "account closed"}
    assert ann.post(to_send, returned).url == to_send
    assert "account closed" in assert_page(browser.get(page)) and "Paid" in assert_page(browser.get(page))
    assert check_books().findings == []


def test_staff_refund_it_and_may_say_that_it_cannot_be_sent(paid: Order, carol: Any, desks: Any) -> None:
    ann, ben = desks
    payment = Payment.objects.get()
    page = f"/desk/payments/{payment.pk}/"
    text = assert_page(ann.get(page))
    assert "Paid by transfer IN 1" in text and "not paid yet" not in text and "Stripe’s fee" not in text
    asked = {"key": "k", "amount": "40.00", "reason": "goodwill", "note": "late"}
    to_send = ann.post(page, asked).url
    assert to_send == f"/desk/bank/refunds/{Refund.objects.get().pk}/"

    assert ben.post(to_send, {"act": "refuse", "refuse-note": "no account"}).url == to_send

    assert "no account" in assert_page(ann.get(page)) and "no account" in assert_page(
        signed_in(carol).get(f"/orders/{paid.public_id}/")
    )
    assert Refund.objects.get().state == "refused" and check_books().findings == []


def test_the_api_says_by_which_way_it_goes_back(paid: Order, carol: Any, client: Client) -> None:
    _, secret = create_api_key(party=carol, user=carol.user, name="k", scopes=[ApiKey.Scope.BUY, ApiKey.Scope.READ])
    headers = {"Authorization": f"Bearer {secret}", "Idempotency-Key": "r1"}

    answer = client.post(f"/api/v1/orders/{paid.public_id}/refunds/", headers=headers)

    assert answer.status_code == 201
    assert (answer.json()["method"], answer.json()["state"]) == ("bank", "intended")
    assert "Our staff send it by hand" in answer.json()["sentence"]


def test_money_that_fits_no_invoice_is_recorded_confirmed_and_applied(order: Order, desks: Any) -> None:
    ann, ben = desks
    given = {"currency": "USD", "received_on": f"{clock.today()}", "payer": "CAROL <b>", "note": "INV?"}
    invoice = Payment.objects.get().documents.get()
    assert f"/desk/bank/?for={invoice.reference}" in ann.get(f"/desk/invoices/{invoice.reference}/").content.decode()
    assert invoice.reference in ann.get(f"/desk/bank/?for={invoice.reference}").content.decode()
    assert "negative" in assert_page(ann.post("/desk/bank/", given | {"amount": "-1", "reference": "IN 1"}), 422)
    for amount, reference in (("60.00", "IN 1"), ("55.00", "IN 2")):
        assert ann.post("/desk/bank/", given | {"amount": amount, "reference": reference}).url == "/desk/bank/"
        receipt = BankReceipt.objects.get(reference=reference)
        assert ann.post(f"/desk/receipts/{receipt.pk}/", {"act": "approve"}).status_code == 403
        assert ben.post(f"/desk/receipts/{receipt.pk}/", {"act": "approve"}).url == "/desk/bank/"
    assert "None." in assert_page(ann.get("/desk/invoices/"))
    text = assert_page(ann.get("/desk/bank/"))
    assert "CAROL" in text and "0 days" in text and "$60.00" in text
    assert "2 transfers, the oldest of CAROL" in assert_page(ann.get("/desk/"))
    first, second = BankReceipt.objects.order_by("pk")
    page = f"/desk/bank/receipts/{first.pk}/"
    apply = {"act": "apply", "apply-invoice": invoice.pk}
    assert "is missing" in assert_page(ann.post(page, apply), 422)

    assert ann.post(page, apply | {"apply-together": [second.pk]}).url == "/desk/bank/"

    shown = assert_page(ann.get("/desk/bank/"))
    assert "somebody else approves" in shown and "Withdraw" in shown and "Reject" not in shown
    shown = assert_page(ben.get("/desk/bank/"))
    assert "Approve and book" in shown and "Reject" in shown and "Withdraw" not in shown
    decide = f"/desk/bank/applications/{ReceiptApplication.objects.get().pk}/"
    assert ann.post(decide, {"act": "approve"}).status_code == 403
    assert ben.post(decide, {"act": "approve"}).url == "/desk/bank/"
    assert Payment.objects.get().status == "paid"
    assert "Paid by transfer IN 1, IN 2" in assert_page(ann.get(f"/desk/payments/{Payment.objects.get().pk}/"))
    back = {
        "act": "return",
        "return-amount": "15.00",
        "return-reference": "OUT 1",
        "return-sent_on": f"{clock.today()}",
    }
    other = f"/desk/bank/receipts/{second.pk}/"
    assert "is left" in assert_page(ann.post(other, back | {"return-amount": "15.01"}), 422)
    assert ann.post(other, back).url == "/desk/bank/"
    transfer = f"/desk/bank/transfers/{OutgoingTransfer.objects.get().pk}/"
    assert ben.post(transfer, {"act": "approve"}).status_code == 302
    assert ledger.balance("unapplied:USD") == 0
    assert "Came back" in assert_page(ann.get(other))
    assert ben.post(transfer, {"act": "returned", "reference": "IN 9", "note": "closed"}).status_code == 302
    assert BankReceipt.objects.get(pk=second.pk).left.micros == 15 * DOLLAR and check_books().findings == []


def test_the_pages_exist_for_staff_only(paid: Order, carol: Any) -> None:
    receipt = BankReceipt.objects.get()
    for page in ("/desk/bank/", f"/desk/bank/receipts/{receipt.pk}/", "/desk/bank/refunds/1/"):
        assert signed_in(carol).get(page).status_code == 404
        assert Client().get(page).status_code == 404


def test_each_list_at_the_bank_has_pages_of_its_own(people: Any, desks: Any) -> None:
    ann, _ = desks
    for number in range(51):
        unapplied.record_unapplied(
            payer=f"Payer {number}",
            amount=Money(DOLLAR, "USD"),
            reference=f"IN {number}",
            received_on=clock.today(),
            by=people[0],
        )
    with CaptureQueriesContext(connection) as first:
        text = assert_page(ann.get("/desk/bank/"))
    with CaptureQueriesContext(connection) as second:
        rest = assert_page(ann.get("/desk/bank/?arrived=2"))

    assert "Payer 49" in text and "Payer 50" not in text and "Page 1 of 2" in text
    assert "Payer 50" in rest and "Payer 49" not in rest
    assert "Payer 49" in assert_page(ann.get("/desk/bank/?out=2&arrived=x"))
    assert len(first) == len(second)
    for receipt in BankReceipt.objects.order_by("pk"):
        receipts.decide_receipt(receipt=receipt, approved=True, by=people[1])
    with CaptureQueriesContext(connection) as booked:
        text = assert_page(ann.get("/desk/bank/"))
    assert "Payer 49" in text and "Payer 50" not in text
    assert "?unused=2#unapplied-heading" in ann.get("/desk/bank/").content.decode()
    assert "Payer 50" in assert_page(ann.get("/desk/bank/?unused=2"))
    assert len(booked) <= len(first) + 3  # what of each page is left is read at once
    assert "51 transfers, the oldest of Payer 0" in assert_page(ann.get("/desk/"))
    last = BankReceipt.objects.last()
    assert last is not None
    assert assert_page(ann.get(f"/desk/bank/receipts/{last.pk}/")).count("Payer ") <= 52
