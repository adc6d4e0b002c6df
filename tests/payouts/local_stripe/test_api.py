"""The manners of the API: keys, versions, parameters, lists, expansion, accounts."""

import pytest
import stripe

from payouts.local_stripe import schema

from .conftest import KEY, LocalStripe, http


@pytest.mark.parametrize("auth", [{}, {"Authorization": "Bearer sk_test_another_key"}, {"Authorization": "Basic eDo="}])
def test_a_wrong_key_is_refused_before_anything_else(local: LocalStripe, auth: dict[str, str]) -> None:
    answer = http.get(f"{local.url}/v1/balance", headers=auth)

    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "invalid_request_error")
    assert KEY not in answer.text


def test_every_answer_carries_a_request_id_and_the_version(local: LocalStripe) -> None:
    answers = [local.get("/v1/balance"), local.get("/v1/charges/ch_none"), local.get("/v1/nothing")]

    assert [answer.status_code for answer in answers] == [200, 404, 404]
    assert len({answer.headers["Request-Id"] for answer in answers}) == 3
    assert {answer.headers["Stripe-Version"] for answer in answers} == {schema.API_VERSION}


def test_another_version_is_refused(local: LocalStripe) -> None:
    answer = local.get("/v1/balance", **{"Stripe-Version": "2020-08-27"})

    assert answer.status_code == 400
    assert "2020-08-27" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        ({"foo": "1"}, "parameter_unknown", "foo"),
        ({"destination": "acct_1", "currency": "usd", "metadata[a][b]": "1"}, None, "metadata"),
        ({"description": "x", "currency": "usd", "amount": "5"}, "parameter_missing", "destination"),
        ({"destination": "acct_1", "currency": "usd", "amount": "5.5"}, "parameter_invalid_integer", "amount"),
        ({"destination": "acct_1", "currency": "usd", "amount": "0"}, "parameter_invalid_integer", "amount"),
        ({"destination": "acct_1", "currency": "xxx", "amount": "5"}, None, "currency"),
        ({"destination": "acct_1", "currency": "usd"}, "parameter_missing", "amount"),
        ({"destination": "acct_1", "currency": "usd", "amount": "5"}, "resource_missing", "destination"),
        (
            {"destination": "acct_1", "currency": "usd", "amount": "5", "source_transaction": "ch_1"},
            "parameter_unknown",
            "source_transaction",
        ),
    ],
)
def test_a_bad_parameter_is_named(local: LocalStripe, data: dict[str, str], code: str | None, param: str) -> None:
    answer = local.post("/v1/transfers", data)
    schema.validate_response("POST", "/v1/transfers", answer.status_code, answer.json())
    error = answer.json()["error"]

    assert answer.status_code == 400
    assert error.get("code") == code
    assert error["param"].startswith(param)


def test_metadata_has_stripes_limits(local: LocalStripe) -> None:
    for metadata in ({"k" * 41: "v"}, {"k": "v" * 501}, {f"k{number}": "v" for number in range(51)}):
        with pytest.raises(stripe.InvalidRequestError, match=r"[Mm]etadata"):
            local.sdk.customers.create({"metadata": metadata})


def test_customers_live_and_end(local: LocalStripe) -> None:
    customer = local.sdk.customers.create({"email": "a@example.org", "metadata": {"party": "1", "old": "x"}})
    local.sdk.customers.update(customer.id, {"name": "A", "metadata": {"old": "", "new": "y"}})
    changed = local.sdk.customers.retrieve(customer.id)

    assert (changed.name, changed.metadata.to_dict()) == ("A", {"party": "1", "new": "y"})
    assert local.sdk.customers.list({"email": "a@example.org"}).data[0].id == customer.id
    assert local.sdk.customers.delete(customer.id).deleted is True
    with pytest.raises(stripe.InvalidRequestError) as gone:
        local.sdk.customers.retrieve(customer.id)
    assert (gone.value.http_status, gone.value.code) == (404, "resource_missing")


def test_lists_page_both_ways_newest_first(local: LocalStripe) -> None:
    made = [local.sdk.customers.create({"email": "page@example.org"}).id for _ in range(5)]
    newest_first = made[::-1]
    mine = {"email": "page@example.org"}

    first = local.sdk.customers.list({**mine, "limit": 2})
    second = local.sdk.customers.list({**mine, "limit": 2, "starting_after": first.data[-1].id})
    last = local.sdk.customers.list({**mine, "limit": 2, "starting_after": second.data[-1].id})
    back = local.sdk.customers.list({**mine, "limit": 2, "ending_before": second.data[0].id})
    before_last = local.sdk.customers.list({**mine, "limit": 2, "ending_before": last.data[0].id})

    assert [[item.id for item in page.data] for page in (first, second, last, back, before_last)] == [
        newest_first[:2],
        newest_first[2:4],
        newest_first[4:],
        newest_first[:2],
        newest_first[2:4],
    ]
    assert [page.has_more for page in (first, second, last, back, before_last)] == [True, True, False, False, True]
    assert [item.id for item in local.sdk.customers.list({**mine, "limit": 2}).auto_paging_iter()] == newest_first
    assert first.url == "/v1/customers"


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "starting_after=cus_none", "expand[]=charge", "shape=round"])
def test_a_bad_list_is_refused(local: LocalStripe, query: str) -> None:
    answer = local.get(f"/v1/customers?{query}")

    assert answer.status_code in (400, 404)
    schema.validate_response("GET", "/v1/customers", answer.status_code, answer.json())


def test_what_cannot_be_expanded_is_refused(local: LocalStripe) -> None:
    session = local.paid()
    for path in ("amount_total", "payment_intent.amount", "payment_intent.latest_charge.balance_transaction.source.id"):
        with pytest.raises(stripe.InvalidRequestError, match="expand"):
            local.sdk.checkout.sessions.retrieve(session.id, {"expand": [path]})


def test_an_unknown_account_is_no_account_of_ours(local: LocalStripe) -> None:
    with pytest.raises(stripe.PermissionError) as refused:
        local.sdk.balance.retrieve({}, {"stripe_account": "acct_none"})

    assert (refused.value.http_status, refused.value.error.code) == (403, "account_invalid")


def test_an_account_sees_only_what_is_its_own(local: LocalStripe) -> None:
    account = local.onboarded()
    charge = local.paid().payment_intent.latest_charge.id

    with pytest.raises(stripe.InvalidRequestError) as hidden:
        local.sdk.charges.retrieve(charge, {}, {"stripe_account": account})
    assert hidden.value.code == "resource_missing"
    assert local.sdk.charges.list({}, {"stripe_account": account}).data == []


def test_webhook_endpoints_tell_their_secret_once(local: LocalStripe) -> None:
    made = local.sdk.webhook_endpoints.create({"url": "http://shop.test/h", "enabled_events": ["payout.paid"]})
    listed = local.sdk.webhook_endpoints.list().data
    kept = local.sdk.webhook_endpoints.retrieve(made.id)
    local.sdk.webhook_endpoints.delete(made.id)

    assert made.secret.startswith("whsec_")
    assert [hasattr(endpoint, "secret") for endpoint in (kept, *listed)] == [False] * (1 + len(listed))
    assert made.id not in [endpoint.id for endpoint in local.sdk.webhook_endpoints.list().data]


def test_an_event_that_stripe_does_not_send_cannot_be_asked_for(local: LocalStripe) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="enabled_events"):
        local.sdk.webhook_endpoints.create({"url": "http://shop.test/h", "enabled_events": ["payment.created"]})


@pytest.mark.parametrize("seconds", [-1, 1.5, "soon", None, True, 10**12])
def test_the_clock_only_goes_forward(local: LocalStripe, seconds: object) -> None:
    before = local.now()
    answer = http.post(f"{local.url}/_control/clock", json={"advance_seconds": seconds}, auth=(KEY, ""))

    assert answer.status_code == 400
    assert 0 <= local.now() - before <= 2


def test_the_controls_need_the_key(local: LocalStripe) -> None:
    assert http.get(f"{local.url}/_control/clock").status_code == 401
    assert http.post(f"{local.url}/_control/clock", json={"advance_seconds": 5}).status_code == 401
