"""Documents, billing, corrections and quotes by the API."""

from typing import Any

from payouts.models import Document, RoyaltyReport
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.payouts.api.test_royalties import REPORTS, body, client_of, model, post

QUOTES = "/api/v1/royalty-quotes/"
ADDRESS = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE", "vat_id": "DE136695976"}

__all__ = ["model"]


def test_an_order_is_invoiced_and_read_as_json_and_pdf(carol: Any, mallory: Any) -> None:
    order = OrderFactory(buyer=carol, offers=[OfferFactory()])
    client = client_of(carol, "read", "buy")
    ask = f"/api/v1/orders/{order.public_id}/invoice/"
    assert post(client, ask, {}).status_code == 422  # nobody said yet whom it names
    assert client.put("/api/v1/billing/", ADDRESS, format="json").status_code == 200

    made, again = (post(client, ask, {"purchase_order": "PO-1"}) for _ in range(2))

    assert (made.status_code, made.json()) == (201, again.json())
    told = made.json()
    assert (told["purchase_order"], told["vat_id"], told["due_on"] is not None) == ("PO-1", "DE136695976", True)
    where = f"/api/v1/documents/{told['reference']}/"
    assert client.get(where).json() == told
    assert client.get("/api/v1/documents/").json() == [told]
    assert client.get(f"{where}pdf/").content.startswith(b"%PDF-")
    assert client_of(mallory).get(where).status_code == 404
    assert client_of(mallory).get("/api/v1/documents/").json() == []


def test_a_report_is_corrected_and_strangers_see_none(model: Any, carol: Any, mallory: Any) -> None:
    client = client_of(carol)
    first = post(client, REPORTS, body(model, purchase_order="PO-2")).json()
    assert (first["invoice"]["purchase_order"], first["replaces"]) == ("PO-2", None)
    change = {"revenue": {"amount": "1200.00", "currency": "USD"}, "note": "A late sale."}
    where = f"{REPORTS}{first['id']}/correct/"

    made, again = (post(client, where, change, key="two") for _ in range(2))

    assert (made.status_code, made.json()) == (201, again.json())
    assert (made.json()["replaces"], made.json()["invoice"]["total"]["amount"]) == (first["id"], "60.00")
    assert post(client, where, change, key="three").json()["code"] == "report_not_correctable"
    assert post(client_of(mallory), where, change).status_code == 404
    assert RoyaltyReport.objects.count() == 2
    assert [document.kind for document in Document.objects.order_by("pk")] == ["INV", "CN", "INV"]


def test_a_quote_is_of_a_model_or_of_a_selection(model: Any, carol: Any, alice: Any, mallory: Any) -> None:
    revenue = {"amount": "1000.00", "currency": "USD"}
    offers = [
        OfferFactory(version=PublishedVersionFactory(contributions={alice: 4}), royalty_bps=rate)
        for rate in (1_000, 200)
    ]
    client = client_of(carol)

    of_model = client.post(QUOTES, {"revenue": revenue, "model": model.slug}, format="json").json()
    planned = {"revenue": revenue, "offers": [offer.pk for offer in offers], "records": [3, 1]}
    of_plan = client.post(QUOTES, planned, format="json").json()

    assert of_model["total"]["amount"] == "50.00"
    figures = {name: of_plan[name]["amount"] for name in ("total", "least", "most")}
    assert figures == {"total": "80.00", "least": "20.00", "most": "100.00"}
    for wrong in (
        {"revenue": revenue},
        {"revenue": revenue, "offers": []},
        planned | {"records": [1]},
        planned | {"records": [5, 1]},
        planned | {"revenue": {"amount": "-1", "currency": "USD"}},
    ):
        assert client.post(QUOTES, wrong, format="json").status_code in (400, 422)
    assert client_of(mallory).post(QUOTES, {"revenue": revenue, "model": model.slug}, format="json").status_code in (
        400,
        422,
    )


def test_what_is_due_is_listed(model: Any, carol: Any) -> None:
    assert client_of(carol).get("/api/v1/royalty-reports/due/").json() == []
