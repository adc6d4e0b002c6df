"""Webhooks: who hears what, the signature, another try, and what a kill -9 leaves behind."""

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import stripe

from payouts.local_stripe import schema

from .conftest import CARD, DAY, LocalStripe, Receiver, http


def _endpoint(
    local: LocalStripe, to: Receiver, *, events: tuple[str, ...] = ("*",), connect: bool = False
) -> stripe.WebhookEndpoint:
    endpoint: stripe.WebhookEndpoint = local.sdk.webhook_endpoints.create(
        {"url": to.url, "enabled_events": list(events), "connect": connect}
    )
    return endpoint


def test_each_endpoint_hears_what_it_asked_for_signed_with_its_own_secret(
    own: Callable[..., LocalStripe], receiver: Callable[[], Receiver]
) -> None:
    local = own()
    platform, connect, narrow = receiver(), receiver(), receiver()
    secrets = [_endpoint(local, platform).secret, _endpoint(local, connect, connect=True).secret]
    secrets.append(_endpoint(local, narrow, events=("checkout.session.completed",)).secret)
    payee = local.onboarded()
    session = local.paid(20_000)
    local.advance(2 * DAY)
    local.sdk.transfers.create({"amount": 5_000, "currency": "usd", "destination": payee})
    local.advance(3 * DAY)
    connect.wait("account.updated", "payout.created", "payout.paid")
    platform.wait("balance.available", "transfer.created")

    assert [event["type"] for event in platform.events()] == [
        "payment_intent.created",
        "charge.succeeded",
        "payment_intent.succeeded",
        "checkout.session.completed",
        "charge.updated",
        "balance.available",
        "transfer.created",
    ]
    assert [event["type"] for event in connect.events()] == [
        "account.external_account.created",
        "account.updated",
        "payout.created",
        "payout.paid",
    ]
    assert [event["data"]["object"]["id"] for event in narrow.events()] == [session.id]
    assert {event.get("account") for event in platform.events()} == {None}
    assert {event["account"] for event in connect.events()} == {payee}
    for taker, secret in zip((platform, connect, narrow), secrets, strict=True):
        for payload, header in taker.got:
            event = stripe.Webhook.construct_event(payload, header, secret)
            schema.validate_event(json.loads(payload))
            assert event.api_version == schema.API_VERSION

    # The charge is known to have succeeded before Stripe has booked it.
    by_type = {event["type"]: event["data"] for event in platform.events()}
    assert by_type["charge.succeeded"]["object"]["balance_transaction"] is None
    assert by_type["charge.updated"]["object"]["balance_transaction"].startswith("txn_")
    assert by_type["charge.updated"]["previous_attributes"] == {"balance_transaction": None}
    kept = local.sdk.events.retrieve(platform.events()[0]["id"])
    assert (kept.type, kept.pending_webhooks) == ("payment_intent.created", 0)
    assert local.get("/_control/webhooks").json() == {"pending": 0, "delivered": 12, "abandoned": 0}


def test_a_refused_webhook_comes_again(local: LocalStripe, receiver: Callable[[], Receiver]) -> None:
    flaky = receiver()
    flaky.status = 500
    endpoint = _endpoint(local, flaky, events=("customer.created",))
    customer = local.sdk.customers.create({"email": "again@example.org"})
    flaky.wait("customer.created")
    flaky.status = 302  # a redirect is not followed: the signature was meant for this address
    _wait_until(lambda: len(flaky.got) >= 2)
    flaky.status = 204
    taken = len(flaky.got)
    _wait_until(lambda: len(flaky.got) > taken)
    local.sdk.webhook_endpoints.delete(endpoint.id)

    assert {json.loads(payload)["data"]["object"]["id"] for payload, _ in flaky.got} == {customer.id}
    assert len({json.loads(payload)["id"] for payload, _ in flaky.got}) == 1
    _wait_until(lambda: local.sdk.events.list({"type": "customer.created"}).data[0].pending_webhooks == 0)


def test_a_kill_loses_no_state_and_no_webhook(
    own: Callable[..., LocalStripe], receiver: Callable[[], Receiver]
) -> None:
    local, taker = own(), receiver()
    taker.status = 503
    _endpoint(local, taker, events=("checkout.session.completed",))
    local.advance(3600)
    session = local.session(10_000)
    assert http.post(session.url, data=CARD).status_code == 303
    first = local.post("/v1/customers", {"email": "k@example.org"}, **{"Idempotency-Key": "k"})
    taker.wait("checkout.session.completed")
    local.handle.kill()

    assert local.handle.process.returncode == -9
    taker.got.clear()
    taker.status = 200
    again = own(port=local.handle.port)

    assert again.url == local.url
    assert taker.wait("checkout.session.completed")[0]["data"]["object"]["id"] == session.id
    assert again.funds() == (9_680, 0)
    assert again.get("/_control/clock").json()["offset_seconds"] == 3600
    assert again.sdk.checkout.sessions.retrieve(session.id).payment_status == "paid"
    replayed = again.post("/v1/customers", {"email": "k@example.org"}, **{"Idempotency-Key": "k"})
    assert (replayed.content, replayed.headers["Idempotent-Replayed"]) == (first.content, "true")


def test_a_kill_in_the_middle_of_payments_leaves_whole_payments(own: Callable[..., LocalStripe]) -> None:
    local = own()
    sessions = [local.session(10_000) for _ in range(12)]
    answered: list[str] = []

    def pay(session: stripe.checkout.Session) -> None:
        with contextlib.suppress(httpx.TransportError):  # the kill
            http.post(str(session.url), data=CARD | {"card_number": "4000000000000077"}, timeout=10)
            answered.append(session.id)

    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(pay, session) for session in sessions]
        _wait_until(lambda: len(answered) >= 3)
        local.handle.kill()
    assert not any(request.exception() for request in pending)

    local = own()
    listed = list(local.sdk.checkout.sessions.list({"limit": 100}).auto_paging_iter())
    paid = {session.id for session in listed if session.payment_status == "paid"}
    assert set(answered) <= paid
    assert len(paid) < len(sessions)
    assert local.funds() == (0, 9_680 * len(paid))
    completed = local.sdk.events.list({"type": "checkout.session.completed", "limit": 100}).data
    assert {event.data.object.id for event in completed} == paid


def _wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
