from datetime import date, timedelta
from typing import Any

import pytest
from rest_framework.test import APIClient

from marketplace import clock
from marketplace.api.keys import create_api_key
from payouts.models import RoyaltyInvoice, RoyaltyReport
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import sell

REPORTS, INVOICES = "/api/v1/royalty-reports/", "/api/v1/royalty-invoices/"


def client_of(party: Any, *scopes: str) -> APIClient:
    _, text = create_api_key(party=party, user=party.user, name="test", scopes=list(scopes) or ["read", "report"])
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {text}")
    return client


@pytest.fixture
def model(db: Any, alice: Any, carol: Any) -> Any:
    """Carol's measured model; October 2026 is over."""
    if clock.today() < date(2026, 11, 2):
        clock.advance(timedelta(days=(date(2026, 11, 2) - clock.today()).days))
    version = PublishedVersionFactory(contributions={alice: 1})
    license = LicenseFactory(licensee=carol, offer=OfferFactory(version=version, royalty_bps=500))
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
    return PublishedResultFactory(version=version, disclosure=disclosure, shares={alice: 1}).model


def body(model: Any, /, **changes: Any) -> dict[str, Any]:
    return {
        "model": model.slug,
        "period_start": "2026-10-01",
        "period_end": "2026-10-31",
        "revenue": {"amount": "1000.00", "currency": "USD"},
    } | changes


def post(client: APIClient, url: str, data: Any = None, *, key: str | None = "one") -> Any:
    return client.post(url, data, format="json", headers={"Idempotency-Key": key} if key else {})


def test_a_report_answers_with_its_invoice_and_a_retry_with_the_same(model: Any, carol: Any) -> None:
    client = client_of(carol)

    first, again = (post(client, REPORTS, body(model)) for _ in range(2))

    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    invoice = first.json()["invoice"]
    assert (invoice["total"], invoice["status"]) == ({"amount": "50.00", "currency": "USD"}, "open")
    assert [(line["amount"], line["rate_bps"], line["is_capped"]) for line in invoice["lines"]] == [
        ("50.000000", 500, False)
    ]
    assert client.get(REPORTS).json()["results"] == [first.json()]
    assert client.get(f"{INVOICES}{invoice['id']}/").json() == invoice


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"model": "somebody-elses"}, "/model"),
        ({"revenue": {"amount": "-1", "currency": "USD"}}, "/revenue"),
        ({"revenue": {"amount": "1e30", "currency": "USD"}}, "/revenue"),
        ({"revenue": {"amount": 5, "currency": "USD"}}, "/revenue"),
        ({"revenue": {"amount": "5", "currency": "CHF"}}, "/revenue"),
        ({"period_end": "2026-09-30"}, "/period_end"),
        ({"period_end": "2999-01-01"}, "/period_end"),
        ({"period_start": "yesterday"}, "/period_start"),
    ],
)
def test_bad_input_is_a_problem_that_names_the_field_and_leaves_nothing(
    model: Any, carol: Any, changes: dict[str, Any], pointer: str
) -> None:
    answer = post(client_of(carol), REPORTS, body(model, **changes))

    assert (answer.status_code, answer["Content-Type"]) == (422, "application/problem+json")
    assert pointer in {error["pointer"] for error in answer.json()["errors"]}
    assert RoyaltyReport.objects.count() == 0


def test_another_partys_model_and_invoice_do_not_exist(model: Any, carol: Any, mallory: Any) -> None:
    post(client_of(carol), REPORTS, body(model))
    invoice = RoyaltyInvoice.objects.get()
    stranger = client_of(mallory)

    assert post(stranger, REPORTS, body(model)).status_code == 422
    assert stranger.get(f"{INVOICES}{invoice.pk}/").status_code == 404
    assert post(stranger, f"{INVOICES}{invoice.pk}/checkout/").status_code == 404
    assert stranger.get(REPORTS).json()["results"] == stranger.get(INVOICES).json()["results"] == []
    assert RoyaltyReport.objects.count() == 1


def test_keys_scopes_and_idempotency_keys_are_asked_for(model: Any, carol: Any) -> None:
    assert post(APIClient(), REPORTS, body(model)).status_code == 401
    assert post(client_of(carol, "read"), REPORTS, body(model)).status_code == 403
    assert post(client_of(carol), REPORTS, body(model), key=None).status_code == 422
    post(client_of(carol), REPORTS, body(model))
    reused = post(client_of(carol), REPORTS, body(model, revenue={"amount": "2", "currency": "USD"}))
    overlap = post(client_of(carol), REPORTS, body(model), key="two")

    assert (reused.status_code, reused.json()["code"]) == (409, "idempotency_key_reused")
    assert (overlap.status_code, overlap.json()["code"]) == (409, "period_overlaps")
    assert RoyaltyReport.objects.count() == 1


def test_an_invoice_is_paid_at_the_address_that_its_checkout_gives(model: Any, carol: Any, stripe: Any) -> None:
    client = client_of(carol)
    invoice = post(client, REPORTS, body(model)).json()["invoice"]

    answers = [post(client, f"{INVOICES}{invoice['id']}/checkout/") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["url"].startswith(stripe.handle.url)


def test_a_silent_stripe_is_a_problem_and_not_an_error_page(model: Any, carol: Any, settings: Any) -> None:
    settings.STRIPE_API_BASE = "http://127.0.0.1:9"
    client = client_of(carol)
    invoice = post(client, REPORTS, body(model)).json()["invoice"]

    answer = post(client, f"{INVOICES}{invoice['id']}/checkout/")

    assert (answer.status_code, answer.json()["code"]) == (503, "stripe_unavailable")


@pytest.mark.parametrize("n_reports", [1, 3])
def test_the_list_costs_the_same_queries_at_one_row_and_at_three(
    model: Any, carol: Any, n_reports: int, django_assert_num_queries: Any
) -> None:
    client = client_of(carol)
    for month in range(1, n_reports + 1):
        post(
            client,
            REPORTS,
            body(model, period_start=f"2026-{month:02}-01", period_end=f"2026-{month:02}-28"),
            key=str(month),
        )

    with django_assert_num_queries(8):
        assert len(client.get(REPORTS).json()["results"]) == n_reports


def test_statements_and_earnings_are_the_partys_own(db: Any, alice: Any, mallory: Any) -> None:
    sell(OrderFactory(offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}))]))
    month = f"{clock.now():%Y-%m}"

    mine, theirs = client_of(alice), client_of(mallory)

    (found,) = mine.get(f"/api/v1/statements/{month}/").json()["currencies"]
    assert (found["opening"]["amount"], found["earned"]["amount"], found["closing"]["amount"]) == (
        "0.00",
        "30.00",
        "30.00",
    )
    assert found["lines"][0]["weight"] == found["lines"][0]["weight_total"] == 1
    text = mine.get(f"/api/v1/statements/{month}/csv/")
    assert text["Content-Type"].startswith("text/csv")
    assert len(text.getvalue().decode().splitlines()) == 4
    assert [row["earned"]["amount"] for row in mine.get("/api/v1/earnings/").json()] == ["30.00"]
    assert theirs.get(f"/api/v1/statements/{month}/").json()["currencies"] == []
    assert theirs.get("/api/v1/earnings/").json() == []


@pytest.mark.parametrize("month", ["2026-13", "2026", "26-01", "٢٠٢٦-01", "2026-01-01"])
def test_what_is_no_month_is_refused(db: Any, alice: Any, month: str) -> None:
    answer = client_of(alice).get(f"/api/v1/statements/{month}/")

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/month")
