"""Stripe's events at the desk, and what a buyer reads while a bank confirms a debit."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from marketplace import clock
from marketplace.models import Order, User
from payouts.local_stripe import process
from payouts.models import EventSettlement, Payment, Refund, StripeEvent
from payouts.services import sales
from tests.factories.marketplace import OrderFactory, UserFactory
from tests.pages import assert_page, signed_in, with_second_factor
from tests.payouts.conftest import StripeWorld
from tests.payouts.services.test_settlements import BACK, hear_all, paid_for_a_cancelled_order


@pytest.fixture
def stripe(tmp_path: Path, settings: Any) -> Iterator[StripeWorld]:
    handle = process.start(tmp_path / "stripe", secret_key="sk_test_of_the_pages", payout_days=1)
    settings.STRIPE_API_BASE, settings.STRIPE_API_KEY = handle.url, handle.secret_key
    yield StripeWorld(handle)
    handle.kill()


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def desk(ann: User) -> Client:
    return with_second_factor(Client(), ann)


@pytest.fixture
def other_desk(db: Any) -> Client:
    return with_second_factor(Client(), UserFactory(is_staff=True))


def event_of(number: int, **given: Any) -> StripeEvent:
    event: StripeEvent = StripeEvent.objects.create(
        event_id=f"evt_{number}",
        endpoint="platform",
        payload='{"id": "evt", "data": {"object": {"id": "dp_1", "object": "dispute", "reason": "<b>fraud</b>"}}}',
        **({"type": "charge.dispute.created", "status": "done"} | given),
    )
    return event


def refused(number: int) -> StripeEvent:
    return event_of(number, status="failed", error_code="payment_mismatch", error_message="Of no payment of ours.")


def test_for_anyone_but_staff_there_are_no_events(client: Client, alice: Any) -> None:
    event = event_of(1)
    for page in ("/desk/events/", f"/desk/events/{event.pk}/"):
        assert signed_in(alice).get(page).status_code == 404
        assert signed_in(alice).post(page, {"act": "retry"}).status_code == 404


def test_events_are_found_by_their_state_and_by_what_they_are(desk: Client, ann: User) -> None:
    event_of(1)
    event_of(2, type="payout.failed", account="acct_7", status="queued")
    refused(3)
    settled = refused(4)
    EventSettlement.objects.create(event=settled, object_id="dp_1", act="explained", reason="r", proposed_by=ann)
    EventSettlement.objects.update(status="confirmed", decided_by=UserFactory(is_staff=True), decided_at=clock.now())

    def found(query: str) -> set[str]:
        text = assert_page(desk.get(f"/desk/events/?{query}"))
        return {f"evt_{number}" for number in range(1, 5) if f"evt_{number}" in text}

    assert found("") == {"evt_1", "evt_2", "evt_3", "evt_4"}
    assert found("state=failed") == {"evt_3"}
    assert found("state=settled") == {"evt_4"}
    assert found("state=waiting") == {"evt_2"}
    assert found("state=done") == {"evt_1"}
    assert found("state=proposed") == set()
    assert found("q=acct_7") == found("q=payout") == {"evt_2"}
    assert "No event is found" in assert_page(desk.get("/desk/events/?q=nothing"))
    assert "1 event of Stripe’s that could not be applied" in assert_page(desk.get("/desk/"))


@pytest.mark.parametrize("n_rows", [1, 3])
def test_the_list_asks_as_much_for_three_events_as_for_one(
    desk: Client, django_assert_num_queries: Any, n_rows: int
) -> None:
    for number in range(n_rows):
        refused(number)
    desk.get("/desk/events/")
    with django_assert_num_queries(7):
        desk.get("/desk/events/")


def test_an_event_is_settled_otherwise_by_two(desk: Client, other_desk: Client) -> None:
    event = refused(1)
    page = f"/desk/events/{event.pk}/"
    text = assert_page(desk.get(page))
    assert "&lt;b&gt;fraud&lt;/b&gt;" in text and "Of no payment of ours." in text
    assert "book it, and refund it" not in text  # there is no charge behind it

    assert "This field is required" in assert_page(desk.post(page, {"act": "propose", "how": "explained"}), 422)
    assert desk.post(page, {"act": "propose", "how": "explained", "reason": "Of our other shop."}).url == page
    assert "another one of the staff must confirm it" in assert_page(desk.get(page))
    assert "You proposed it" in assert_page(desk.post(page, {"act": "confirm"}), 422)
    assert "Of our other shop." in assert_page(other_desk.get(page))
    assert "why it is rejected" in assert_page(other_desk.post(page, {"act": "reject"}), 422)
    assert other_desk.post(page, {"act": "confirm", "note": "Seen."}).url == page

    assert "settled otherwise" in assert_page(desk.get(page))
    assert not StripeEvent.unsettled().exists()
    assert "decided already" in assert_page(other_desk.get(other_desk.post(page, {"act": "confirm"}).url))


def test_whoever_proposed_a_settlement_withdraws_it_and_another_rejects_it(desk: Client, other_desk: Client) -> None:
    page = f"/desk/events/{refused(1).pk}/"
    for decider, button, said in ((desk, "Withdraw", "withdrawn"), (other_desk, "Reject", "rejected")):
        desk.post(page, {"act": "propose", "how": "explained", "reason": "Of our other shop."})
        shown = assert_page(decider.get(page))
        assert button in shown and not {"Withdraw", "Reject"} - {button} <= set(shown.split())
        assert f"why it is {said}" in assert_page(decider.post(page, {"act": "reject"}), 422)

        answer = decider.post(page, {"act": "reject", "note": "No."}, follow=True)

        text = assert_page(answer)
        assert f"{said.capitalize()}." in text and f": {said}. No." in text


def test_an_event_is_tried_again(desk: Client) -> None:
    event = refused(1)
    assert desk.post(f"/desk/events/{event.pk}/", {"act": "retry"}).url == f"/desk/events/{event.pk}/"
    assert StripeEvent.objects.get().status == "queued"


def test_a_surplus_charge_goes_back_from_its_events_page(
    stripe: Any, carol: Any, desk: Client, other_desk: Client
) -> None:
    order = paid_for_a_cancelled_order(stripe, carol)
    event = StripeEvent.unsettled().get(type="checkout.session.completed")
    page = f"/desk/events/{event.pk}/"
    text = assert_page(desk.get(page))
    assert "Behind it is a charge of" in text and "$100.00" in text
    assert f"payment {Payment.objects.get().pk}" in text

    desk.post(page, {"act": "propose", "how": "refund", "reason": "It was cancelled."})
    assert other_desk.post(page, {"act": "confirm"}).url == page

    assert Refund.objects.get().state == "intended"
    assert "all of it on its way back" in assert_page(desk.get(page))
    assert f'href="/desk/events/{event.pk}/"' in desk.get("/desk/").content.decode()  # the refund leads there
    assert "refund on its way" in assert_page(signed_in(carol).get(f"/orders/{order.public_id}/"))


def test_a_stripe_that_is_silent_changes_nothing(
    stripe: Any, carol: Any, desk: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid_for_a_cancelled_order(stripe, carol)
    event = StripeEvent.unsettled().get(type="checkout.session.completed")
    stripe.handle.kill()

    page = f"/desk/events/{event.pk}/"
    assert "Stripe did not say" in assert_page(desk.get(page))
    assert "Select a valid choice" in assert_page(
        desk.post(page, {"act": "propose", "how": "refund", "reason": "It was cancelled."}), 422
    )
    assert not EventSettlement.objects.exists()


def test_a_buyer_reads_what_a_debit_waits_for_and_that_it_was_refused(stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    page = f"/orders/{order.public_id}/"
    stripe.debit(sales.start_checkout(order=order, **BACK), account="000222222227")
    hear_all()
    text = assert_page(signed_in(carol).get(f"{page}?from=checkout"))
    assert "Your bank is confirming the debit" in text and "up to five working days" in text
    assert "hx-trigger" not in text  # it takes days
    assert "five working days" in assert_page(signed_in(carol).post(f"{page}checkout/"), 409)

    for what in (clock.advance(timedelta(days=4.1)), stripe.advance(days=4.1), hear_all()):
        assert what is None or what
    text = assert_page(signed_in(carol).get(page))
    assert "Your bank refused the debit" in text and "insufficient funds" in text and "Pay at Stripe" in text
    assert Order.objects.get().status == Order.Status.PLACED
