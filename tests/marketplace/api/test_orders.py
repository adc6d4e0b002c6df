from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace.models import Order
from marketplace.services.orders import cancel_order
from tests.factories.marketplace import OfferFactory, OrderFactory, PaidOrderFactory


def ask(offers, amount="100.00", **changes):
    return {
        "offers": [offer.pk for offer in offers],
        "expected_total": {"amount": amount, "currency": "USD"},
        "accepted_name": "Carol Chen",
    } | changes


def place(client, body, key="order-1"):
    return client.post("/api/v1/orders/", body, format="json", headers={"Idempotency-Key": key})


def test_an_order_is_placed_and_read_back(api, carol):
    client, offer = api(carol, "read", "buy"), OfferFactory()

    placed = place(client, ask([offer]))

    order = Order.objects.get()
    assert placed.status_code == 201
    assert placed.json() == {
        "id": str(order.public_id),
        "status": "placed",
        "total": {"amount": "100.00", "currency": "USD"},
        "accepted_name": "Carol Chen",
        "placed_at": order.placed_at.isoformat().replace("+00:00", "Z"),
        "expires_at": (order.placed_at + timedelta(hours=24)).isoformat().replace("+00:00", "Z"),
        "paid_at": None,
        "lines": [
            {
                "dataset": offer.dataset.slug,
                "title": offer.dataset.title,
                "version": 1,
                "merkle_root": offer.version.merkle_root,
                "offer": offer.pk,
                "price": {"amount": "100.00", "currency": "USD"},
                "license": None,
            }
        ],
    }
    assert client.get(f"/api/v1/orders/{order.public_id}/").json() == placed.json()
    assert (order.buyer, order.api_key) == (carol, client.key)


def test_a_retry_is_the_same_order_and_another_body_a_refusal(api, carol):
    client, offer, other = api(carol, "read", "buy"), OfferFactory(), OfferFactory()

    first, again = place(client, ask([offer])), place(client, ask([offer]))
    refused = place(client, ask([other]))

    assert first.json() == again.json()
    assert (refused.status_code, refused.json()["code"]) == (409, "idempotency_key_reused")
    assert Order.objects.count() == 1


def test_an_order_needs_an_idempotency_key(api, carol):
    refused = api(carol, "buy").post("/api/v1/orders/", ask([OfferFactory()]), format="json")

    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input")
    assert refused.json()["errors"] == [{"pointer": "Idempotency-Key", "detail": "missing"}]
    assert not Order.objects.exists()


def test_a_changed_price_is_a_problem_with_both_amounts(api, carol):
    refused = place(api(carol, "buy"), ask([OfferFactory()], "90.00"))

    assert refused["Content-Type"] == "application/problem+json"
    assert (refused.status_code, refused.json()["code"]) == (409, "price_changed")
    assert "100.00 USD, not 90.00 USD" in refused.json()["detail"]
    assert refused.json()["errors"] == [{"pointer": "/expected_total", "detail": "is 90.00 USD, should be 100.00 USD"}]
    assert not Order.objects.exists()


@pytest.mark.parametrize(
    "amount", ["-1", "0.0000001", "1e30", "NaN", "Infinity", "", "abc", "100.001", 100, 100.0, None]
)
def test_an_amount_that_is_none_is_refused_by_its_field(api, carol, amount):
    refused = place(api(carol, "buy"), ask([OfferFactory()], amount))

    assert refused.status_code == 422
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/expected_total"]
    assert not Order.objects.exists()


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"offers": []}, "/offers"),
        ({"offers": [999_999]}, "/offers"),
        ({"offers": ["x"]}, "/offers"),
        ({"offers": [True]}, "/offers"),
        ({"offers": [2**70]}, "/offers/0"),
        ({"offers": list(range(1, 202))}, "/offers"),
        ({"accepted_name": ""}, "/accepted_name"),
        ({"accepted_name": "x" * 121}, "/accepted_name"),
        ({"expected_total": {"amount": "100.00", "currency": "XYZ"}}, "/expected_total"),
        ({"expected_total": {"amount": "100.00"}}, "/expected_total"),
        ({"expected_total": "100.00"}, "/expected_total"),
    ],
)
def test_a_wrong_field_is_named(api, carol, changes, pointer):
    refused = place(api(carol, "buy"), ask([OfferFactory()]) | changes)

    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"].startswith(pointer)
    assert not Order.objects.exists()


def test_every_missing_offer_is_named_and_all_are_asked_for_at_once(api, carol):
    client = api(carol, "buy")
    offer = OfferFactory()

    with CaptureQueriesContext(connection) as queries:
        refused = place(client, ask([offer]) | {"offers": [999_998, offer.pk, *range(1_000_000, 1_000_150)]})

    errors = refused.json()["errors"]
    assert refused.status_code == 422
    assert errors[:2] == [
        {"pointer": "/offers/0", "detail": "There is no offer 999998."},
        {"pointer": "/offers/2", "detail": "There is no offer 1000000."},
    ]
    assert len(errors) == 151
    assert len(queries) == 3  # the key, its last use, the offers


def test_a_body_that_is_no_json_is_refused(api, carol):
    refused = api(carol, "buy").post("/api/v1/orders/", b"{", content_type="application/json")

    assert (refused.status_code, refused["Content-Type"]) == (400, "application/problem+json")


def test_a_key_spends_no_more_than_its_limit(api, carol):
    client = api(carol, "buy", spending_limit_micros=150_000_000)

    assert place(client, ask([OfferFactory()]), "1").status_code == 201
    refused = place(client, ask([OfferFactory()]), "2")

    assert (refused.status_code, refused.json()["code"]) == (403, "spending_limit_reached")
    assert Order.objects.count() == 1


def test_an_order_that_was_cancelled_is_not_spent(api, carol):
    client = api(carol, "buy", "read", spending_limit_micros=150_000_000)
    first = place(client, ask([OfferFactory()]), "1").json()
    cancel_order(order=Order.objects.get())

    assert client.get(f"/api/v1/orders/{first['id']}/").json()["status"] == "cancelled"
    assert place(client, ask([OfferFactory()]), "2").status_code == 201


def test_a_strangers_order_does_not_exist(api, carol, mallory):
    order = PaidOrderFactory(buyer=carol)
    stranger = api(mallory, "read", "buy")

    assert stranger.get("/api/v1/orders/").json()["results"] == []
    for path in (f"/api/v1/orders/{order.public_id}/", "/api/v1/orders/00000000-0000-4000-8000-000000000000/"):
        refused = stranger.get(path)
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
        assert "Carol" not in refused.content.decode()
    assert stranger.post(f"/api/v1/orders/{order.public_id}/checkout/").status_code == 404


def test_orders_come_in_pages_newest_first(api, carol):
    orders = [OrderFactory(buyer=carol) for _ in range(3)]
    client = api(carol)

    first = client.get("/api/v1/orders/?page_size=2").json()
    OrderFactory(buyer=carol)  # between the pages
    second = client.get(first["next"]).json()

    found = [order["id"] for order in first["results"] + second["results"]]
    assert found == [str(order.public_id) for order in reversed(orders)]


def test_a_list_of_orders_asks_as_much_for_three_as_for_one(api, carol):
    def n_queries():
        with CaptureQueriesContext(
            connection,
        ) as queries:
            assert client.get("/api/v1/orders/").status_code == 200
        return len(queries)

    client = api(carol)
    PaidOrderFactory(buyer=carol)
    one = n_queries()
    PaidOrderFactory(buyer=carol, offers=[OfferFactory(), OfferFactory()])
    OrderFactory(buyer=carol)

    assert (one, n_queries()) == (4, 4)  # the key, its last use, the orders, their lines
