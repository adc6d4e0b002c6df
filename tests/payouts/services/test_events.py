"""Events that no webhook brought: found in Stripe's own lists, stored, and applied as if they had come."""

from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.utils import timezone

from marketplace import clock
from marketplace.models import Order
from payouts import gateway, tasks
from payouts.models import EventSweep, PayeeAccount, Payment, Payout, StripeEvent
from payouts.services import events, payees
from payouts.services.events import sweep_events
from payouts.services.reconciliation import Difference, settle_funds
from payouts.services.sales import start_checkout
from payouts.standing import standings_of
from tests.factories.marketplace import PublishedVersionFactory
from tests.payouts.conftest import BANK
from tests.payouts.services.test_refunds import BACK, buy, clean, order_of, pay_out

REGRETS = "000888888883"  # the local Stripe's account whose bank sends back what it had taken


def apply_all() -> None:
    for row in StripeEvent.objects.filter(status="queued").order_by("pk"):
        tasks.apply_stripe_event(row.pk)


def test_a_payment_whose_events_were_lost_is_found_and_booked_once(db: Any, stripe: Any) -> None:
    order = order_of(PublishedVersionFactory())
    stripe.pay(start_checkout(order=order, **BACK))

    n_missed = sweep_events()
    apply_all()

    assert n_missed == StripeEvent.objects.count() >= 2  # the session's and the charge's
    assert Order.objects.get(pk=order.pk).status == Order.Status.PAID
    assert set(StripeEvent.objects.values_list("status", "endpoint", "account")) == {("done", "platform", "")}
    assert sweep_events() == 0
    clean()


def test_an_event_that_a_webhook_brought_is_not_taken_twice(db: Any, stripe: Any) -> None:
    buy(stripe, PublishedVersionFactory())
    (told,) = stripe.events("checkout.session.completed")
    brought = stripe.received(told)

    sweep_events()

    assert StripeEvent.objects.get(event_id=told["id"]).pk == brought.pk
    assert StripeEvent.objects.filter(type="checkout.session.completed").count() == 1


def test_a_payout_that_reached_the_bank_unheard_is_found_once_it_is_late(db: Any, stripe: Any, alice: Any) -> None:
    buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    account = stripe.onboard(alice).stripe_account_id
    for what in (clock.advance(timedelta(days=31)), stripe.advance(days=31), settle_funds()):
        assert what is None or what
    pay_out("now")
    stripe.advance(days=2)
    assert sweep_events() >= 0
    assert not EventSweep.objects.filter(account=account).exists()  # it is not late yet, so nobody was asked

    clock.advance(timedelta(days=4))
    sweep_events()
    apply_all()

    assert Payout.objects.get().status == Payout.Status.PAID
    assert set(StripeEvent.objects.filter(account=account).values_list("endpoint", flat=True)) == {"connect"}
    assert sweep_events() == 0


def test_a_payout_that_the_bank_sent_back_after_it_was_paid_is_found_though_its_event_was_lost(
    db: Any, stripe: Any, alice: Any
) -> None:
    buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    account = stripe.onboard(alice, country="US", account_number=REGRETS, routing_number="110000000").stripe_account_id
    for what in (clock.advance(timedelta(days=31)), stripe.advance(days=31), settle_funds()):
        assert what is None or what
    pay_out("now")
    stripe.advance(days=2)
    for told in stripe.objects("events?type=payout.paid", **{"Stripe-Account": account}):
        row = stripe.received(told, endpoint="connect")
        StripeEvent.objects.filter(pk=row.pk).update(account=account)
        tasks.apply_stripe_event(row.pk)
    assert Payout.objects.get().status == Payout.Status.PAID

    for what in (clock.advance(timedelta(days=4)), stripe.advance(days=4)):
        assert what is None or what
    sweep_events()
    apply_all()

    failed = Payout.objects.get()
    assert (failed.status, failed.bank_failure_code, failed.paid_at) == ("sent", "account_closed", None)
    assert "Your bank refused" in " ".join(standing.sentence for standing in standings_of(alice))
    assert not PayeeAccount.objects.get().payouts_enabled  # Stripe asks for another bank account
    assert StripeEvent.objects.filter(type="payout.failed", status="done").count() == 1
    clean()


def test_an_account_is_asked_once_a_day_while_its_bank_may_send_a_payout_back_and_then_no_more(
    db: Any, stripe: Any, alice: Any
) -> None:
    buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    account = stripe.onboard(alice).stripe_account_id
    for what in (clock.advance(timedelta(days=31)), stripe.advance(days=31), settle_funds()):
        assert what is None or what
    pay_out("now")
    Payout.objects.update(status=Payout.Status.PAID, paid_at=clock.now())

    sweep_events()
    asked_at = EventSweep.objects.get(account=account).swept_at
    sweep_events()
    assert EventSweep.objects.get(account=account).swept_at == asked_at  # not twice in an hour
    EventSweep.objects.update(swept_at=timezone.now() - timedelta(hours=2))
    sweep_events()
    assert EventSweep.objects.get(account=account).swept_at < timezone.now() - timedelta(hours=1)  # nor in a day
    EventSweep.objects.update(swept_at=timezone.now() - timedelta(days=2))
    sweep_events()
    assert EventSweep.objects.get(account=account).swept_at > timezone.now() - timedelta(hours=1)

    clock.advance(timedelta(days=11))
    EventSweep.objects.update(swept_at=timezone.now() - timedelta(days=2))
    sweep_events()
    assert EventSweep.objects.get(account=account).swept_at < timezone.now() - timedelta(days=1)


def test_an_onboarding_that_was_finished_unheard_is_found(db: Any, stripe: Any, alice: Any) -> None:
    url = payees.start_onboarding(party=alice, return_url="http://shop.test/", refresh_url="http://shop.test/")
    assert httpx.post(url, data=BANK).status_code == 303

    sweep_events()
    apply_all()

    assert PayeeAccount.objects.get().is_ready


def test_one_account_that_cannot_be_read_does_not_hide_the_others(
    db: Any, stripe: Any, alice: Any, bob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for party in (alice, bob):
        payees.start_onboarding(party=party, return_url="http://shop.test/", refresh_url="http://shop.test/")
    first, second = PayeeAccount.objects.order_by("pk").values_list("stripe_account_id", flat=True)
    listed = gateway.events_since

    def breaks(moment: Any, *, types: Any, account: str | None = None) -> Any:
        if account == first:
            raise gateway.StripeRefused("account_invalid", "It is closed.", 403)
        return listed(moment, types=types, account=account)

    monkeypatch.setattr(gateway, "events_since", breaks)
    found: list[Difference] = []

    sweep_events(failures=found)

    assert [one.code for one in found] == ["events_not_listed"]
    assert set(EventSweep.objects.values_list("account", flat=True)) == {"", second}
    with pytest.raises(gateway.StripeRefused):
        sweep_events()


def test_a_reading_that_breaks_off_is_repeated_from_where_it_began(
    db: Any, stripe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_of(PublishedVersionFactory())
    stripe.pay(start_checkout(order=order, **BACK))
    listed = gateway.events_since

    def breaks_off(*given: Any, **named: Any) -> Any:
        yield next(listed(*given, **named))
        raise gateway.StripeUncertain("gone", http_status=None, retry_after_seconds=None, is_key_spent=False)

    with monkeypatch.context() as patched:
        patched.setattr(gateway, "events_since", breaks_off)
        with pytest.raises(gateway.StripeUncertain):
            sweep_events()
    assert StripeEvent.objects.count() == 1 and not EventSweep.objects.exists()

    sweep_events()
    apply_all()

    assert Payment.objects.get().status == Payment.Status.PAID


def test_what_was_listed_is_not_read_again_from_the_beginning(
    db: Any, stripe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    buy(stripe, PublishedVersionFactory())
    sweep_events()
    asked: list[Any] = []
    monkeypatch.setattr(gateway, "events_since", lambda moment, **named: asked.append(moment) or iter(()))

    sweep_events()

    swept = EventSweep.objects.get(account="")
    assert asked == [swept.swept_until - events.LISTED_WITHIN]
    assert asked[0] > timezone.now() - timedelta(hours=2)
