"""Same key, same answer, errors included; other parameters, an error; two at once, one of them waits its turn."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import httpx
import pytest
import stripe

from .conftest import DAY, LocalStripe


def test_the_same_key_gives_the_same_answer_once(local: LocalStripe) -> None:
    first = local.post("/v1/customers", {"email": "once@example.org"}, **{"Idempotency-Key": "once"})
    again = local.post("/v1/customers", {"email": "once@example.org"}, **{"Idempotency-Key": "once"})

    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    assert "Idempotent-Replayed" not in first.headers
    assert (again.headers["Idempotent-Replayed"], again.headers["Original-Request"]) == (
        "true",
        first.headers["Request-Id"],
    )
    assert len(local.sdk.customers.list({"email": "once@example.org"}).data) == 1


def test_the_same_key_with_other_parameters_is_an_error(local: LocalStripe) -> None:
    options = {"idempotency_key": "other"}
    local.sdk.customers.create({"email": "other@example.org"}, options)
    with pytest.raises(stripe.IdempotencyError) as refused:
        local.sdk.customers.create({"email": "another@example.org"}, options)

    assert (refused.value.http_status, refused.value.error.type) == (400, "idempotency_error")
    assert local.sdk.customers.list({"email": "another@example.org"}).data == []


def test_a_refusal_is_remembered_even_when_its_reason_has_gone(local: LocalStripe) -> None:
    payee = local.onboarded()
    wanted = {"amount": local.funds()[1] + 5_000, "currency": "usd", "destination": payee}
    with pytest.raises(stripe.InvalidRequestError):
        local.sdk.transfers.create(wanted, {"idempotency_key": "too-soon"})
    local.paid(50_000, card="4000000000000077")

    again = local.post("/v1/transfers", wanted, **{"Idempotency-Key": "too-soon"})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "balance_insufficient")
    assert again.headers["Idempotent-Replayed"] == "true"
    assert local.sdk.transfers.create(wanted, {"idempotency_key": "now"}).amount == wanted["amount"]


def test_a_request_that_was_never_executed_is_not_remembered(local: LocalStripe) -> None:
    with pytest.raises(stripe.InvalidRequestError):
        local.sdk.customers.create({"colour": "red"}, {"idempotency_key": "typo"})

    assert (
        local.sdk.customers.create({"email": "typo@example.org"}, {"idempotency_key": "typo"}).email
        == "typo@example.org"
    )


def test_keys_are_forgotten_after_a_day(local: LocalStripe) -> None:
    first = local.sdk.customers.create({"email": "day@example.org"}, {"idempotency_key": "day"})
    local.advance(DAY - 120)
    same = local.sdk.customers.create({"email": "day@example.org"}, {"idempotency_key": "day"})
    local.advance(121)
    other = local.sdk.customers.create({"email": "day@example.org"}, {"idempotency_key": "day"})

    assert same.id == first.id
    assert other.id != first.id


def test_two_at_once_under_one_key_are_one(local: LocalStripe) -> None:
    def create(_: int) -> httpx.Response:
        return local.post("/v1/customers", {"email": "race@example.org"}, **{"Idempotency-Key": "race"})

    # While another process holds the file's write lock, the first request waits for it and the second must not.
    holder = sqlite3.connect(local.handle.data_dir / "stripe.sqlite3", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(create, number) for number in range(2)]
        wait(pending, timeout=30, return_when=FIRST_COMPLETED)
        holder.execute("ROLLBACK")
        answers = sorted((request.result() for request in pending), key=lambda answer: answer.status_code)
    holder.close()

    assert [answer.status_code for answer in answers] == [200, 409]
    assert answers[1].json()["error"]["code"] == "idempotency_key_in_use"
    assert create(0).json()["id"] == answers[0].json()["id"]
    assert len(local.sdk.customers.list({"email": "race@example.org"}).data) == 1


def test_many_at_once_spend_the_balance_once(own: Callable[..., LocalStripe]) -> None:
    local = own()
    payee = local.onboarded()
    local.paid(10_000, card="4000000000000077")  # 9,680 after the fee: three transfers fit

    def send(number: int) -> int:
        data = {"amount": "3000", "currency": "usd", "destination": payee}
        return local.post("/v1/transfers", data, **{"Idempotency-Key": f"many-{number}"}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(send, range(10))) == [200] * 3 + [400] * 7
    assert local.funds() == (0, 680)
    assert local.funds(account=payee) == (0, 9_000)
