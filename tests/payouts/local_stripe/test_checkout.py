"""Buying: the session, its hosted page, and what a payment leaves behind."""

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st

from payouts.local_stripe.funds import processing_fee

from .conftest import CARD, DAY, LocalStripe, http


def _line(currency: str, *, amount: int = 1_000) -> dict:
    price = {"currency": currency, "unit_amount": amount, "product_data": {"name": "Digits"}}
    return {"price_data": price, "quantity": 1}


def test_a_paid_session_leads_to_charge_fee_and_net(local: LocalStripe) -> None:
    session = local.paid(12_900, metadata={"order": "7"}, payment_intent_data={"transfer_group": "order:7"})
    charge = session.payment_intent.latest_charge
    booked = charge.balance_transaction

    assert (session.status, session.payment_status, session.url, session.metadata["order"]) == (
        "complete",
        "paid",
        None,
        "7",
    )
    assert (session.payment_intent.status, session.payment_intent.amount_received) == ("succeeded", 12_900)
    assert (charge.paid, charge.transfer_group) == (True, "order:7")
    assert (booked.amount, booked.fee, booked.net, booked.status) == (12_900, 404, 12_496, "pending")
    assert booked.available_on - booked.created == 2 * DAY
    assert [detail.amount for detail in booked.fee_details] == [404]
    assert booked.source == charge.id
    assert [item.id for item in local.sdk.charges.list({"payment_intent": session.payment_intent.id}).data] == [
        charge.id
    ]
    assert local.sdk.charges.retrieve(charge.id).balance_transaction == booked.id
    assert local.sdk.payment_intents.list({"limit": 1}).data[0].id == session.payment_intent.id
    assert local.sdk.balance_transactions.list({"source": charge.id}).data[0].net == 12_496


@given(amount=st.integers(50, 99_999_999))
def test_the_fee_is_rounded_half_up(amount: int) -> None:
    from decimal import ROUND_HALF_UP, Decimal

    assert processing_fee(amount) == int((Decimal(amount) * Decimal("0.029")).quantize(Decimal(1), ROUND_HALF_UP)) + 30


def test_the_session_is_unpaid_until_someone_pays(local: LocalStripe) -> None:
    session = local.session(client_reference_id="R-1")

    assert (session.status, session.payment_status, session.payment_intent) == ("open", "unpaid", None)
    assert session.client_reference_id == "R-1"


def test_the_page_says_what_is_paid_for_and_that_it_is_play_money(local: LocalStripe) -> None:
    page = http.get(local.session(12_900).url)

    assert page.status_code == 200
    for words in ("USD 129.00", "Digits", "Local Stripe — play money", "http://shop.test/cart", "<label"):
        assert words in page.text
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_what_people_wrote_is_escaped(local: LocalStripe) -> None:
    product = {"currency": "usd", "unit_amount": 500, "product_data": {"name": "<script>alert(1)</script>"}}
    session = local.session(line_items=[{"price_data": product, "quantity": 1}])
    page = http.post(session.url, data=CARD | {"name": '"><script>', "cvc": "x"})

    assert page.status_code == 400
    assert "<script" not in page.text


def test_paying_twice_charges_once(local: LocalStripe) -> None:
    before = local.funds()[0]
    session = local.session(10_000)
    answers = [http.post(session.url, data=CARD) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [303, 303]
    assert {answer.headers["Location"] for answer in answers} == {f"http://shop.test/done?session={session.id}"}
    assert local.funds()[0] - before == 10_000 - 320


def test_a_declined_card_pays_nothing_and_another_may_follow(local: LocalStripe) -> None:
    before = local.funds()
    session = local.session(10_000)
    declined = http.post(session.url, data=CARD | {"card_number": "4000 0000 0000 0002"})
    tried = local.sdk.checkout.sessions.retrieve(session.id, {"expand": ["payment_intent.latest_charge"]})

    assert declined.status_code == 402
    assert "Your card was declined. Nothing was paid. Try another card." in declined.text
    assert (tried.status, tried.payment_status) == ("open", "unpaid")
    assert (tried.payment_intent.status, tried.payment_intent.last_payment_error.code) == (
        "requires_payment_method",
        "card_declined",
    )
    assert (tried.payment_intent.latest_charge.status, tried.payment_intent.latest_charge.balance_transaction) == (
        "failed",
        None,
    )
    assert local.funds() == before

    assert http.post(session.url, data=CARD).status_code == 303
    assert local.sdk.checkout.sessions.retrieve(session.id).payment_intent == tried.payment_intent.id
    assert local.funds()[0] - before[0] == 10_000 - 320


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("card_number", "4242 4242 4242 4241", "card number is not valid"),
        ("card_number", "", "card number is not valid"),
        ("card_number", "4111 1111 1111 1111", "not a test card"),
        ("expiry", "13/34", "month and year"),
        ("expiry", "01/20", "has expired"),
        ("cvc", "12", "security code"),
        ("email", "carol", "e-mail"),
        ("name", "", "name on the card"),
    ],
)
def test_a_form_that_cannot_be_right_says_why(local: LocalStripe, field: str, value: str, words: str) -> None:
    session = local.session()
    page = http.post(session.url, data=CARD | {field: value})

    assert page.status_code == 400
    assert words in page.text
    assert local.sdk.checkout.sessions.retrieve(session.id).payment_intent is None


def test_a_session_shows_its_line_items(local: LocalStripe) -> None:
    items = [
        {"price_data": {"currency": "eur", "unit_amount": 1_000 * n, "product_data": {"name": f"D{n}"}}, "quantity": n}
        for n in (1, 2)
    ]
    session = local.session(line_items=items)
    listed = local.sdk.checkout.sessions.line_items.list(session.id).data
    shown = local.sdk.checkout.sessions.retrieve(session.id, {"expand": ["line_items"]}).line_items.data

    assert (session.currency, session.amount_total) == ("eur", 5_000)
    assert [(item.description, item.quantity, item.amount_total) for item in listed] == [
        ("D1", 1, 1_000),
        ("D2", 2, 4_000),
    ]
    assert [item.id for item in shown] == [item.id for item in listed]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"mode": "subscription"}, None),
        ({"line_items": []}, "parameter_missing"),
        ({"success_url": "javascript:alert(1)"}, "url_invalid"),
        ({"customer": "cus_none"}, "resource_missing"),
        ({"automatic_tax": {"enabled": True}}, "parameter_unknown"),
        ({"line_items": [_line("usd"), _line("eur")]}, None),
        ({"line_items": [_line("xau")]}, None),
        ({"line_items": [_line("usd", amount=100_000_000)]}, "amount_too_large"),
    ],
)
def test_a_session_that_cannot_be_is_refused(local: LocalStripe, change: dict, code: str | None) -> None:
    count = len(list(local.sdk.checkout.sessions.list({"limit": 100}).auto_paging_iter()))
    with pytest.raises(stripe.InvalidRequestError) as refused:
        local.session(**change)

    assert refused.value.code == code
    assert len(list(local.sdk.checkout.sessions.list({"limit": 100}).auto_paging_iter())) == count


def test_less_than_the_smallest_charge_is_refused(local: LocalStripe) -> None:
    with pytest.raises(stripe.InvalidRequestError) as refused:
        local.session(49)

    assert refused.value.code == "amount_too_small"


def test_a_session_expires_after_a_day_or_when_told(local: LocalStripe) -> None:
    told, forgotten = local.session(), local.session()
    local.sdk.checkout.sessions.expire(told.id)
    local.advance(DAY + 1)

    for session in (told, forgotten):
        assert local.sdk.checkout.sessions.retrieve(session.id).status == "expired"
    assert local.sdk.events.list({"type": "checkout.session.expired"}).data[0].data.object.id == forgotten.id
    assert http.post(f"{local.url}/c/pay/{told.id}", data=CARD).status_code == 410
    with pytest.raises(stripe.InvalidRequestError):
        local.sdk.checkout.sessions.expire(told.id)


def test_an_unknown_link_is_a_page_too(local: LocalStripe) -> None:
    assert http.get(f"{local.url}/c/pay/cs_test_none").status_code == 404
    assert http.get(f"{local.url}/setup/e/acct_1/link_1").status_code == 404
    assert "play money" in http.get(local.url).text


# --- a debit, which takes days

DEBIT = {
    "method": "us_bank_account",
    "bank_email": "carol@example.org",
    "account_number": "000123456789",
    "routing_number": "110000000",
    "bank_name": "Carol",
}


def _told(local: LocalStripe, session: str) -> list[str]:
    """The events of one payment, oldest first."""
    intent = local.sdk.checkout.sessions.retrieve(session).payment_intent
    about = [
        (event.type, event.data.object.to_dict()) for event in local.sdk.events.list({"limit": 100}).auto_paging_iter()
    ]
    ours = [kind for kind, thing in about if intent in (thing.get("id"), thing.get("payment_intent"))]
    return ours[::-1]


def test_a_debit_is_paid_only_once_the_bank_has_confirmed_it(local: LocalStripe) -> None:
    session = local.session(12_900)
    assert "Debit USD 129.00" in http.get(session.url).text
    assert http.post(session.url, data=DEBIT).status_code == 303

    waiting = local.sdk.checkout.sessions.retrieve(session.id, {"expand": ["payment_intent.latest_charge"]})
    assert (waiting.status, waiting.payment_status, waiting.payment_intent.status) == (
        "complete",
        "unpaid",
        "processing",
    )
    charge = waiting.payment_intent.latest_charge
    assert (charge.status, charge.balance_transaction) == ("pending", None)
    assert local.sdk.balance_transactions.list({"source": charge.id}).data == []
    local.advance(4 * DAY + 60)

    path = "payment_intent.latest_charge.balance_transaction"
    paid = local.sdk.checkout.sessions.retrieve(session.id, {"expand": [path]})
    booked = paid.payment_intent.latest_charge.balance_transaction
    assert (paid.payment_status, paid.payment_intent.status) == ("paid", "succeeded")
    assert (booked.type, booked.amount, booked.fee, booked.status) == ("payment", 12_900, 103, "available")
    assert _told(local, session.id) == [
        "payment_intent.created",
        "charge.pending",
        "payment_intent.processing",
        "checkout.session.completed",
        "charge.succeeded",
        "payment_intent.succeeded",
        "checkout.session.async_payment_succeeded",
        "charge.updated",
    ]


def test_a_debit_that_the_bank_refuses_leaves_the_session_complete_and_unpaid(local: LocalStripe) -> None:
    session = local.session(12_900)
    assert http.post(session.url, data=DEBIT | {"account_number": "000222222227"}).status_code == 303
    local.advance(4 * DAY + 60)

    failed = local.sdk.checkout.sessions.retrieve(session.id, {"expand": ["payment_intent.latest_charge"]})

    assert (failed.status, failed.payment_status) == ("complete", "unpaid")
    assert failed.payment_intent.status == "requires_payment_method"
    assert failed.payment_intent.last_payment_error.code == "insufficient_funds"
    charge = failed.payment_intent.latest_charge
    assert (charge.status, charge.balance_transaction) == ("failed", None)
    assert _told(local, session.id)[-3:] == [
        "charge.failed",
        "payment_intent.payment_failed",
        "checkout.session.async_payment_failed",
    ]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("bank_email", "Give an e-mail address"),
        ("account_number", "not a test account"),
        ("routing_number", "110000000"),
    ],
)
def test_a_debit_that_cannot_be_right_says_why(local: LocalStripe, field: str, words: str) -> None:
    session = local.session()
    answer = http.post(session.url, data=DEBIT | {field: "no"})

    assert (answer.status_code, "<details open>" in answer.text) == (400, True)
    assert words in answer.text
    assert local.sdk.checkout.sessions.retrieve(session.id).status == "open"


def test_a_debit_is_offered_in_dollars_and_where_the_merchant_has_not_chosen_otherwise(local: LocalStripe) -> None:
    for line in (_line("eur"), _line("usd")):
        chosen = {"payment_method_types": ["card"]} if line["price_data"]["currency"] == "usd" else {}
        session = local.sdk.checkout.sessions.create(
            {"mode": "payment", "success_url": "http://shop.test/", "line_items": [line], **chosen}
        )
        assert "Debit" not in http.get(session.url).text
        assert http.post(session.url, data=DEBIT).status_code == 400
    with pytest.raises(stripe.InvalidRequestError, match="is in usd"):
        local.sdk.checkout.sessions.create(
            {
                "mode": "payment",
                "success_url": "http://shop.test/",
                "line_items": [_line("eur")],
                "payment_method_types": ["us_bank_account"],
            }
        )
