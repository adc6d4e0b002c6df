"""Stripe's document, as the local Stripe reads it."""

import json

import pytest

from payouts.local_stripe import endpoints, schema
from payouts.local_stripe.errors import StripeError
from payouts.local_stripe.openapi import reduce
from payouts.local_stripe.schema import SchemaMismatch


def test_every_endpoint_of_the_document_is_played_and_no_other() -> None:
    assert set(endpoints.ENDPOINTS) == set(schema.operations())


def test_every_played_parameter_is_stripes() -> None:
    for key, endpoint in endpoints.ENDPOINTS.items():
        known = set(schema.operations()[key].request["properties"])
        assert {name.split(".")[0] for name in endpoint.plays} - {"expand"} <= known


def test_reducing_the_reduced_document_changes_nothing() -> None:
    text = schema.DOCUMENT.read_text(encoding="utf-8")

    assert reduce.written(reduce.reduce(json.loads(text))) == text


def test_forms_are_decoded_and_read_as_the_schemas_types() -> None:
    form = [
        ("mode", "payment"),
        ("line_items[1][quantity]", "3"),
        ("line_items[0][quantity]", "2"),
        ("line_items[0][price_data][currency]", "usd"),
        ("line_items[0][price_data][unit_amount]", "500"),
        ("metadata[1]", "2"),
        ("allow_promotion_codes", "true"),
        ("expand[]", "line_items"),
    ]

    assert schema.validate_request("POST", "/v1/checkout/sessions", form=form) == {
        "mode": "payment",
        "line_items": [{"quantity": 2, "price_data": {"currency": "usd", "unit_amount": 500}}, {"quantity": 3}],
        "metadata": {"1": "2"},
        "allow_promotion_codes": True,
        "expand": ["line_items"],
    }


@pytest.mark.parametrize("name", ["a[", "a]b", "[a]", "a[b]c", "a[b", "a[[b]]"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(StripeError) as refused:
        schema.decode([(name, "1")])

    assert refused.value.param == name


def test_one_name_cannot_be_two_things() -> None:
    for pairs in ([("a", "1"), ("a[b]", "1")], [("a[b]", "1"), ("a", "1")]):
        with pytest.raises(StripeError):
            schema.decode(pairs)


def test_an_answer_with_a_key_that_stripe_does_not_have_is_found() -> None:
    amount = {"amount": 1, "currency": "usd"}
    balance = {"object": "balance", "available": [amount], "pending": [], "livemode": False}
    schema.validate_response("GET", "/v1/balance", 200, balance)

    for broken in (
        {**balance, "colour": "red"},
        {**balance, "available": [{**amount, "colour": "red"}]},
        {**balance, "available": [{**amount, "amount": "1"}]},
        {name: value for name, value in balance.items() if name != "pending"},
    ):
        with pytest.raises(SchemaMismatch):
            schema.validate_response("GET", "/v1/balance", 200, broken)


def test_null_is_allowed_only_where_stripe_sends_it() -> None:
    link = {"object": "account_link", "created": 1, "expires_at": 2, "url": None}

    with pytest.raises(SchemaMismatch, match="url"):
        schema.validate_response("POST", "/v1/account_links", 200, link)


def test_an_event_is_checked_down_to_its_object() -> None:
    balance = {"object": "balance", "available": [], "pending": [], "livemode": False}
    event = {
        "id": "evt_1",
        "object": "event",
        "created": 1,
        "livemode": False,
        "pending_webhooks": 0,
        "type": "balance.available",
        "data": {"object": balance},
    }
    schema.validate_event(event)

    for broken in (
        {**event, "type": "balance.lost"},
        {**event, "data": {"object": {**balance, "pending": None}}},
        {**event, "data": {"object": {"object": "unicorn"}}},
    ):
        with pytest.raises(SchemaMismatch):
            schema.validate_event(broken)
