"""Refunds as their buyer, their payee and the staff see them, on pages and over the API."""

from datetime import timedelta
from typing import Any

import pytest

from marketplace import clock
from marketplace.api.keys import create_api_key
from marketplace.models import ApiKey, License, Order, Party, User
from marketplace.services.downloads import note_first_download
from payouts import gateway, ledger
from payouts.models import (
    Dispute,
    DisputeAnswer,
    JournalEntry,
    Payment,
    Payout,
    PayoutRun,
    Refund,
    TransferReversal,
    WriteOff,
)
from payouts.selectors import earnings_of
from payouts.services import disputes, transfers
from payouts.services.proofs import check_books
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell
from tests.pages import assert_page, signed_in, with_second_factor

DOLLAR = 1_000_000


@pytest.fixture
def order(alice: Any, carol: Any) -> Order:
    """Carol has paid 100 USD for alice's data."""
    version = PublishedVersionFactory(contributions={alice: 1})
    made: Order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version)])
    sell(made)
    return made


@pytest.fixture
def finance(client: Any, db: Any) -> Any:
    """A browser of somebody on the staff, who acts for no party."""
    user = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
    return with_second_factor(client, user)


def test_the_buyer_asks_for_the_money_back_on_the_orders_page(order: Order, carol: Any) -> None:
    browser = signed_in(carol)
    page = f"/orders/{order.public_id}/"
    assert "Give back, and refund $100.00" in assert_page(browser.get(page))

    assert browser.post(f"{page}refund/").status_code == 302
    assert browser.post(f"{page}refund/").status_code == 302  # a second click finds the first one's

    text = assert_page(browser.get(page))
    assert "The licenses have ended" in text and "refund on its way" in text and "$100.00" in text
    assert "Give back" not in text
    assert Refund.objects.count() == 1
    assert "revoked" in assert_page(browser.get("/licenses/"))
    assert "refunded" in assert_page(browser.get("/orders/"))


def test_after_the_first_download_the_button_is_gone_and_the_refusal_says_why(order: Order, carol: Any) -> None:
    note_first_download(license=License.objects.get())
    browser = signed_in(carol)

    assert "Give back" not in assert_page(browser.get(f"/orders/{order.public_id}/"))
    refused = assert_page(browser.post(f"/orders/{order.public_id}/refund/"), 409)

    assert "ended with the first download" in refused
    assert Refund.objects.count() == 0


def test_strangers_and_unpaid_orders_get_nothing_back(order: Order, carol: Any, mallory: Any) -> None:
    unpaid = OrderFactory(buyer=carol, offers=[OfferFactory()])

    assert signed_in(mallory).post(f"/orders/{order.public_id}/refund/").status_code == 404
    refused = assert_page(signed_in(carol).post(f"/orders/{unpaid.public_id}/refund/"), 409)

    assert "has not been paid" in refused
    assert Refund.objects.count() == 0


def test_the_api_gives_back_for_a_key_that_may_buy(client: Any, order: Order, carol: Any, mallory: Any) -> None:
    def call(method: str, party: Any, scopes: list[str], **headers: str) -> Any:
        _, secret = create_api_key(party=party, user=party.user, name="test", scopes=scopes)
        address = f"/api/v1/orders/{order.public_id}/refunds/"
        return getattr(client, method)(address, headers={"Authorization": f"Bearer {secret}"} | headers)

    buy = [ApiKey.Scope.BUY, ApiKey.Scope.READ]
    assert call("post", carol, [ApiKey.Scope.READ], **{"Idempotency-Key": "1"}).status_code == 403
    assert call("post", mallory, buy, **{"Idempotency-Key": "1"}).status_code == 404
    assert call("get", mallory, buy).status_code == 404
    assert call("post", carol, buy).status_code == 422
    assert Refund.objects.count() == 0

    made = call("post", carol, buy, **{"Idempotency-Key": "1"})
    again = call("post", carol, buy, **{"Idempotency-Key": "1"})

    assert (made.status_code, made.json()["amount"]) == (201, {"amount": "100.00", "currency": "USD"})
    assert (made.json()["state"], made.json()["reason"]) == ("intended", "of_right")
    assert again.json()["id"] == made.json()["id"]
    assert call("get", carol, buy).json() == [made.json()]
    order.refresh_from_db()
    assert order.status == "refunded"


def test_a_payee_reads_what_went_back_and_why(order: Order, finance: Any, alice: Any) -> None:
    payment = Payment.objects.get()
    answer = finance.post(
        f"/desk/payments/{payment.pk}/",
        {"key": "k", "amount": "80", "line": "", "reason": "faulty_data", "note": "Labels are shuffled."},
    )
    assert answer.status_code == 302

    text = assert_page(signed_in(alice).get("/earnings/"))

    # 80 back: 8 of the fee, 60 of the pool, 12 of alice's 30.
    assert "$30.00 earned" in text and "$12.00 of what was earned went back to buyers" in text
    assert "Refunded to the buyer: the data is not what was sold." in text
    assert "Labels are shuffled" not in text  # that is for the auditor
    (of,) = earnings_of(alice)
    assert of.earned - of.taken_back == of.pending + of.due + of.in_transit + of.sent + of.paid
    month = f"{order.placed_at:%Y-%m}"
    statement = assert_page(signed_in(alice).get(f"/earnings/{month}/"))
    assert "refunded to the buyer" in statement and "recomputes" in statement
    rows = signed_in(alice).get(f"/earnings/{month}.csv").getvalue().decode()
    assert "refunded to the buyer" in rows and "12.00" in rows
    assert check_books().findings == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"amount": "100.01"}, "is left to give back"),
        ({"amount": "-1"}, "negative"),
        ({"amount": "0"}, "positive amount"),
        ({"amount": "1e30"}, "more than the largest amount"),
        ({"amount": "1.001"}, "finer than the smallest unit"),
        ({"note": ""}, "required"),
        ({"reason": "of_right"}, "valid choice"),
        ({"line": "999999"}, "valid choice"),
    ],
)
def test_a_refund_that_cannot_be_is_refused_on_the_desk(
    order: Order, finance: Any, given: dict[str, str], says: str
) -> None:
    payment = Payment.objects.get()
    form = {"key": "k", "amount": "10", "line": "", "reason": "goodwill", "note": "Because."} | given
    before = ledger.balances()

    text = assert_page(finance.post(f"/desk/payments/{payment.pk}/", form), 422)

    assert says in text
    assert (Refund.objects.count(), ledger.balances()) == (0, before)


def test_the_desk_exists_for_staff_only(order: Order, carol: Any, client: Any, finance: Any) -> None:
    payment = Payment.objects.get()
    pages = ["/desk/", f"/desk/payments/{payment.pk}/", "/desk/disputes/1/", "/desk/debts/1/USD/"]

    assert [signed_in(carol).get(page).status_code for page in pages] == [404] * 4
    assert signed_in(carol).post(pages[1], {"amount": "1"}).status_code == 404
    assert str(payment.pk) in assert_page(finance.get("/desk/"))
    assert order.buyer.name in assert_page(finance.get("/desk/", {"q": order.buyer.name[:3]}))
    assert "No payment is found" in assert_page(finance.get("/desk/", {"q": "nobody"}))
    assert str(order.public_id) in assert_page(finance.get(pages[1]))
    assert finance.get("/desk/disputes/1/").status_code == 404


@pytest.fixture
def dispute(order: Order) -> Dispute:
    payment = Payment.objects.get()
    assert payment.charge_id is not None and payment.paid_at is not None
    answer = gateway.Dispute(
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
    return disputes._write_down(answer)


def test_an_open_dispute_is_on_every_page_that_it_concerns(
    order: Order, dispute: Dispute, finance: Any, alice: Any, carol: Any
) -> None:
    buyers = assert_page(signed_in(carol).get(f"/orders/{order.public_id}/"))
    payees = assert_page(signed_in(alice).get("/earnings/"))
    desk = assert_page(finance.get("/desk/"))

    assert "disputed at the card’s bank" in buyers and "Give back" not in buyers
    assert "suspended" in assert_page(signed_in(carol).get("/licenses/"))
    assert "Held while the card's bank decides a dispute (fraudulent)" in payees.replace("&#x27;", "'")
    assert "needs an answer" in desk
    assert "frozen" in assert_page(finance.get(f"/desk/disputes/{dispute.pk}/"))


def test_staff_answer_a_dispute_on_the_desk(dispute: Dispute, finance: Any) -> None:
    page = f"/desk/disputes/{dispute.pk}/"
    assert "Give evidence in at least one field" in assert_page(finance.post(page, {"product_description": " "}), 422)
    assert DisputeAnswer.objects.count() == 0

    assert finance.post(page, {"product_description": "Digits, 5,620 images."}).status_code == 302

    assert DisputeAnswer.objects.get().evidence == {"product_description": "Digits, 5,620 images."}
    text = assert_page(finance.get(page))
    assert "What we answered" in text and "Digits, 5,620 images." in text and "Answer the bank" not in text


def test_the_desk_shows_an_answer_that_was_refused_and_asks_for_another(dispute: Dispute, finance: Any) -> None:
    page = f"/desk/disputes/{dispute.pk}/"
    finance.post(page, {"product_description": "Digits."})
    DisputeAnswer.objects.update(
        status="failed", error_code="dispute_not_answerable", error_message="Stripe did not take the answer: no."
    )

    assert "answer refused" in assert_page(finance.get("/desk/"))
    text = assert_page(finance.get(page))
    assert "It was refused: Stripe did not take the answer: no." in text and "Answer the bank" in text
    assert finance.post(page, {"product_description": "Digits, again."}).status_code == 302
    assert DisputeAnswer.objects.count() == 2


def test_staff_ask_a_debt_back_or_bear_it(order: Order, finance: Any, alice: Any) -> None:
    payout = _pay_out_everything(alice)
    payment = Payment.objects.get()
    form = {"key": "k", "amount": "100", "line": "", "reason": "goodwill", "note": "Because."}
    assert finance.post(f"/desk/payments/{payment.pk}/", form).status_code == 302
    page = f"/desk/debts/{alice.pk}/USD/"
    assert "$30.00" in assert_page(finance.get(page))
    assert alice.name in assert_page(finance.get("/desk/"))
    text = assert_page(signed_in(alice).get("/earnings/"))
    assert "You had been sent $30.00 of it" in text and "what you earn next pays it first" in text

    asked = {"act": "reverse", "reversal-payout": payout.pk, "reversal-amount": "31", "reversal-note": "refund"}
    assert "cannot be asked back" in assert_page(finance.post(page, asked), 422)
    assert finance.post(page, asked | {"reversal-amount": "10"}).status_code == 302
    bear = {"act": "write-off", "write-off-amount": "20.01", "write-off-reason": "closed"}
    assert "cannot be written off" in assert_page(finance.post(page, bear), 422)
    assert finance.post(page, bear | {"write-off-amount": "20"}).status_code == 302  # 10 are being fetched

    assert (TransferReversal.objects.count(), WriteOff.objects.count()) == (1, 1)
    assert list(ledger.balances(prefix="receivable").values()) == [10_000_000]
    (of,) = earnings_of(alice)
    assert (of.owed_back.micros, of.due.micros) == (10_000_000, -10_000_000)
    assert check_books().findings == []


def _pay_out_everything(party: Party) -> Payout:
    """A run that Stripe answered, without a Stripe."""
    PayeeAccountFactory(party=party)
    payment = Payment.objects.get()
    net = payment.amount_micros - (payment.fee_micros or 0)
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": net, "cash:pending:USD": -net},
    )
    Payment.objects.update(settled_at=clock.now())
    clock.advance(timedelta(days=31))
    run = PayoutRun.objects.create(currency="USD", due_until=clock.now(), key="all")
    transfers._intend(run, [party.pk])
    payout = Payout.objects.get()
    transfers._book_sent(
        payout,
        gateway.Transfer(
            id=f"tr_{payout.pk}",
            amount_minor=payout.amount.to_minor(),
            currency="USD",
            destination=payout.destination,
            transfer_group="",
            destination_payment="py",
            balance_transaction="txn",
            reversed_minor=0,
            created_at=clock.now(),
            metadata={},
        ),
    )
    return payout
