import hashlib
import hmac
import json
import time
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from marketplace import jobs
from marketplace.models import License, Order
from payouts import ledger, tasks
from payouts.models import PayeeAccount, Payment, Payout, StripeEvent
from payouts.services.events import retry_failed_events
from payouts.services.proofs import check_books
from payouts.services.sales import start_checkout
from tests.factories.marketplace import OrderFactory

PLATFORM, CONNECT = "/webhooks/stripe/platform/", "/webhooks/stripe/connect/"
EVENT = {
    "id": "evt_1",
    "object": "event",
    "type": "customer.created",
    "created": 1,
    "data": {"object": {"id": "cus_1"}},
}


def signed(payload: bytes, secret: str, *, at: float | None = None) -> str:
    moment = int(at or time.time())
    mac = hmac.new(secret.encode(), f"{moment}.".encode() + payload, hashlib.sha256).hexdigest()
    return f"t={moment},v1={mac}"


def send(client: Client, url: str, event: Any, *, secret: str | None = None, signature: str | None = None) -> Any:
    payload = event if isinstance(event, bytes) else json.dumps(event).encode()
    secret = secret or ("whsec_platform" if url == PLATFORM else "whsec_connect")
    header = signed(payload, secret) if signature is None else signature
    return client.post(url, payload, content_type="application/json", headers={"Stripe-Signature": header})


def deliver(client: Client, url: str, event: dict[str, Any]) -> StripeEvent:
    """The webhook, and the worker that it wakes."""
    assert send(client, url, event).status_code == 200
    row = StripeEvent.objects.get(event_id=event["id"])
    tasks.apply_stripe_event(row.pk)
    row.refresh_from_db()
    return row


def test_a_verified_event_is_stored_raw_once(db: Any, client: Client) -> None:
    answers = [send(client, PLATFORM, EVENT).status_code for _ in range(3)]

    row = StripeEvent.objects.get()
    assert answers == [200, 200, 200]
    assert (row.event_id, row.type, row.endpoint, row.status) == ("evt_1", "customer.created", "platform", "queued")
    assert json.loads(row.payload) == EVENT


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": "whsec_connect"},  # of the other endpoint
        {"signature": ""},
        {"signature": "t=1,v1=00"},
        {"signature": signed(json.dumps(EVENT).encode(), "whsec_platform", at=time.time() - 3_600)},
        {"event": b"not json"},
        {"event": b"\xff\xfe"},
        {"event": {"id": "evt_2"}},
    ],
    ids=["wrong secret", "none", "wrong", "old", "no json", "no text", "no event"],
)
def test_a_wrong_signature_or_body_is_a_problem_and_leaves_no_trace(
    db: Any, client: Client, changes: dict[str, Any]
) -> None:
    given = {"event": EVENT} | changes

    answer = send(client, PLATFORM, given.pop("event"), **given)

    assert (answer.status_code, answer["Content-Type"]) == (400, "application/problem+json")
    assert answer.json()["code"] == "bad_signature"
    assert StripeEvent.objects.count() == 0


def test_only_posts_are_heard_and_no_csrf_token_is_asked(db: Any) -> None:
    strict = Client(enforce_csrf_checks=True)

    assert strict.get(PLATFORM).status_code == 405
    assert send(strict, CONNECT, EVENT).status_code == 200


def test_an_event_that_concerns_nobody_is_kept_and_done(db: Any, client: Client) -> None:
    row = deliver(client, CONNECT, EVENT | {"account": "acct_unknown", "type": "account.updated"})

    assert (row.status, row.account) == ("done", "acct_unknown")


def test_the_webhook_marks_the_order_paid_and_repeated_or_late_ones_change_nothing(
    db: Any, client: Client, stripe: Any, carol: Any
) -> None:
    order = OrderFactory(buyer=carol)
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    (event,) = stripe.events("checkout.session.completed")

    row = deliver(client, PLATFORM, event)
    before = ledger.balances()
    deliver(client, PLATFORM, event)
    deliver(client, PLATFORM, event | {"id": "evt_again"})  # the same news under another id
    for other in stripe.events("charge.updated"):
        deliver(client, PLATFORM, other)

    order.refresh_from_db()
    assert (row.status, order.status, License.objects.count()) == ("done", Order.Status.PAID, 1)
    assert ledger.balances() == before
    assert check_books().findings == []


def test_an_event_about_money_that_is_not_ours_fails_for_a_person_to_see(
    db: Any, client: Client, stripe: Any, carol: Any
) -> None:
    order = OrderFactory(buyer=carol)
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    Payment.objects.update(amount_micros=100_010_000)  # as if the order had been changed behind the checkout's back
    (event,) = stripe.events("checkout.session.completed")

    row = deliver(client, PLATFORM, event)

    order.refresh_from_db()
    assert (row.status, row.error_code) == ("failed", "payment_mismatch")
    assert (order.status, ledger.balances()) == (Order.Status.PLACED, {})


def test_an_event_goes_back_to_the_queue_while_stripe_is_silent(
    db: Any, client: Client, stripe: Any, settings: Any
) -> None:
    order = OrderFactory()
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    (event,) = stripe.events("checkout.session.completed")
    there, settings.STRIPE_API_BASE = settings.STRIPE_API_BASE, "http://127.0.0.1:9"
    with pytest.raises(Exception, match="status None"):
        deliver(client, PLATFORM, event)
    row = StripeEvent.objects.get()
    assert (row.status, row.attempt, Order.objects.get().status) == (jobs.Job.Status.QUEUED, 1, Order.Status.PLACED)

    settings.STRIPE_API_BASE = there
    tasks.apply_stripe_event(row.pk)
    assert Order.objects.get().status == Order.Status.PLACED  # not before its pause is over
    make_due(row)
    tasks.apply_stripe_event(row.pk)

    assert Order.objects.get().status == Order.Status.PAID


def make_due(row: StripeEvent) -> None:
    StripeEvent.objects.filter(pk=row.pk).update(due_at=timezone.now())


def test_an_event_that_outlasted_its_attempts_is_tried_again_and_one_for_a_person_is_not(
    db: Any, client: Client, stripe: Any, settings: Any
) -> None:
    order = OrderFactory()
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    (event,) = stripe.events("checkout.session.completed")
    there, settings.STRIPE_API_BASE = settings.STRIPE_API_BASE, "http://127.0.0.1:9"
    send(client, PLATFORM, event)
    row = StripeEvent.objects.get()
    for _ in range(jobs.MAX_FAILURES):
        with pytest.raises(Exception, match="status None"):
            tasks.apply_stripe_event(row.pk)
        make_due(row)
    mismatched = StripeEvent.objects.create(
        event_id="evt_2", endpoint="platform", type="x", payload="{}", status="failed", error_code="payment_mismatch"
    )
    assert StripeEvent.objects.get(pk=row.pk).status == jobs.Job.Status.FAILED

    settings.STRIPE_API_BASE = there
    assert (retry_failed_events(), retry_failed_events()) == (1, 0)
    tasks.apply_stripe_event(row.pk)

    assert Order.objects.get().status == Order.Status.PAID
    mismatched.refresh_from_db()
    assert mismatched.status == jobs.Job.Status.FAILED


def test_account_updated_makes_a_payee_ready(db: Any, client: Client, stripe: Any, alice: Any) -> None:
    stripe.onboard(alice)
    PayeeAccount.objects.update(transfers_active=False, payouts_enabled=False)
    account = PayeeAccount.objects.get().stripe_account_id
    event = {**EVENT, "id": "evt_2", "type": "account.updated", "account": account, "data": {"object": {"id": account}}}

    assert deliver(client, CONNECT, event).status == "done"

    assert PayeeAccount.objects.get().is_ready


def test_payout_paid_says_that_the_money_is_in_the_bank(db: Any, client: Client, stripe: Any, alice: Any) -> None:
    from datetime import timedelta

    from marketplace import clock
    from payouts.services.reconciliation import settle_funds
    from payouts.services.transfers import request_payout_run
    from tests.factories.marketplace import OfferFactory, PublishedVersionFactory

    stripe.onboard(alice)
    version = PublishedVersionFactory(contributions={alice: 1})
    order = OrderFactory(offers=[OfferFactory(version=version)])
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    deliver(client, PLATFORM, stripe.events("checkout.session.completed")[0])
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    tasks.execute_payout_run(request_payout_run(currency="USD", key="run").pk)
    stripe.advance(days=3)
    account = PayeeAccount.objects.get().stripe_account_id
    (event,) = stripe.objects("events?type=payout.paid", **{"Stripe-Account": account})

    assert deliver(client, CONNECT, event).status == "done"

    payout = Payout.objects.get()
    assert (payout.status, payout.bank_payout_id) == (Payout.Status.PAID, event["data"]["object"]["id"])
    assert payout.paid_at is not None
