"""A debit that the buyer's bank takes days to confirm: waited for, paid or refused, and never a reason for an order to be stuck."""

from datetime import timedelta
from typing import Any

import pytest
from django.core import mail

from marketplace import clock
from marketplace.models import Order
from payouts import gateway, tasks
from payouts.errors import PaymentUnderWay
from payouts.models import DebitRefusal, Payment, StripeEvent
from payouts.services import sales
from payouts.services.events import sweep_events
from payouts.services.reconciliation import settle_funds
from tests.factories.marketplace import OrderFactory
from tests.payouts.services.test_refunds import BACK, clean

REFUSED = "000222222227"


def hear_all() -> None:
    """What the webhooks, or the sweep in their place, bring."""
    sweep_events()
    for row in StripeEvent.objects.filter(status="queued").order_by("pk"):
        tasks.apply_stripe_event(row.pk)
    assert not StripeEvent.objects.exclude(status="done").exists()


def days_go_by(stripe: Any, days: float) -> None:
    clock.advance(timedelta(days=days))
    stripe.advance(days=days)


def test_a_debit_is_waited_for_beyond_the_orders_deadline_and_then_paid(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    stripe.debit(sales.start_checkout(order=order, **BACK))
    hear_all()
    payment = Payment.objects.get()
    assert (payment.status, payment.awaits_bank_since is not None) == ("open", True)
    for again in (sales.start_checkout, sales.start_checkout):
        with pytest.raises(PaymentUnderWay, match="up to five working days"):
            again(order=order, **BACK)

    days_go_by(stripe, 2)
    assert sales.cancel_expired_orders() == 0  # its deadline is over, its money is on its way
    days_go_by(stripe, 2.1)
    hear_all()

    assert Order.objects.get().status == Order.Status.PAID
    payment.refresh_from_db()
    assert (payment.status, payment.awaits_bank_since, payment.fee_micros) == ("paid", None, 800_000)  # 0.8 %
    settle_funds()
    clean()


def test_an_order_whose_debit_was_refused_can_be_paid_otherwise(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    first = sales.start_checkout(order=order, **BACK)
    stripe.debit(first, account=REFUSED)
    hear_all()
    days_go_by(stripe, 4.1)
    hear_all()

    payment = Payment.objects.get()
    assert (payment.status, payment.awaits_bank_since) == ("open", None)
    assert payment.bank_refusal == "The customer's account has insufficient funds to cover this payment."
    order.refresh_from_db()
    assert order.expires_at > clock.now() + timedelta(hours=12)  # time to pay otherwise
    second = sales.start_checkout(order=order, **BACK)
    assert second != first
    payment.refresh_from_db()
    assert (payment.checkout_attempt, payment.bank_refused_at) == (2, None)
    stripe.pay(second)
    hear_all()

    assert Order.objects.get().status == Order.Status.PAID
    settle_funds()
    clean()


def mails() -> list[str]:
    """Send what is queued, as the workers do."""
    for refusal in DebitRefusal.objects.order_by("pk"):
        tasks.send_debit_refusal(refusal.pk)
    return [f"{sent.to[0]}: {sent.subject}" for sent in mail.outbox]


def test_each_refused_debit_is_mailed_about_once_however_often_it_is_heard_of(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    stripe.debit(sales.start_checkout(order=order, **BACK), account=REFUSED)
    hear_all()
    assert mails() == []  # the bank has not answered
    days_go_by(stripe, 4.1)
    hear_all()
    heard = StripeEvent.objects.latest("pk")
    assert heard.type == "checkout.session.async_payment_failed"
    for number in range(2):  # Stripe tells it again, and we ask by ourselves
        again = {"endpoint": heard.endpoint, "type": heard.type, "payload": heard.payload}
        StripeEvent.objects.create(event_id=f"evt_again_{number}", **again)
    hear_all()
    sales.cancel_expired_orders()

    for _ in range(2):
        sent = mails()

    payment, refusal = Payment.objects.get(), DebitRefusal.objects.get()
    assert sent == [f"{carol.user.email}: Your bank refused the debit of {payment.amount}"]
    assert refusal.mailed_at is not None and refusal.reason == payment.bank_refusal
    order.refresh_from_db()
    (letter,) = mail.outbox
    for told in (letter.body, str(letter.alternatives[0].content)):
        assert "insufficient funds" in told and f"{order.expires_at:%-d %B %Y, %H:%M} UTC" in told
        assert f"/orders/{order.public_id}/" in told
    stripe.debit(sales.start_checkout(order=order, **BACK), account=REFUSED)
    days_go_by(stripe, 4.1)
    hear_all()
    assert len(mails()) == 2  # another debit, another refusal


def test_who_has_paid_otherwise_meanwhile_gets_no_mail(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    stripe.debit(sales.start_checkout(order=order, **BACK), account=REFUSED)
    days_go_by(stripe, 4.1)
    hear_all()
    stripe.pay(sales.start_checkout(order=order, **BACK))
    hear_all()

    assert Payment.objects.get().status == "paid"
    assert mails() == [] and DebitRefusal.objects.get().mailed_at is None


def test_a_refused_debit_whose_events_were_all_lost_does_not_block_its_order(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    stripe.debit(sales.start_checkout(order=order, **BACK), account=REFUSED)
    days_go_by(stripe, 4.1)

    assert sales.cancel_expired_orders() == 0  # this is how it is heard of: the buyer gets time to pay otherwise
    assert Payment.objects.get().bank_refused_at is not None
    assert sales.start_checkout(order=order, **BACK)
    days_go_by(stripe, 2)
    assert sales.cancel_expired_orders() == 1
    assert Order.objects.get().status == Order.Status.CANCELLED


def test_a_late_word_about_an_earlier_debit_changes_nothing(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    stripe.debit(sales.start_checkout(order=order, **BACK), account=REFUSED)
    days_go_by(stripe, 4.1)
    sales.cancel_expired_orders()
    second = sales.start_checkout(order=order, **BACK)
    stripe.debit(second)
    hear_all()  # of both pages, in the order in which Stripe lists them

    payment = Payment.objects.get()
    assert (payment.awaits_bank_since is not None, payment.bank_refused_at) == (True, None)
    days_go_by(stripe, 4.1)
    hear_all()
    assert Order.objects.get().status == Order.Status.PAID


def test_orders_that_cannot_be_cancelled_do_not_keep_the_others_waiting(
    db: Any, stripe: Any, carol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sales, "MAX_CANCELLED_AT_ONCE", 2)
    stuck = [OrderFactory(buyer=carol) for _ in range(2)]
    others = [OrderFactory(buyer=carol) for _ in range(3)]
    for order in stuck:
        stripe.debit(sales.start_checkout(order=order, **BACK))
    for order in others:
        sales.start_checkout(order=order, **BACK)
    days_go_by(stripe, 1.1)

    assert [sales.cancel_expired_orders() for _ in range(3)] == [0, 2, 1]
    assert set(Order.objects.filter(status="placed")) == set(stuck)


def test_what_stripe_says_of_a_page_is_told_apart(db: Any, stripe: Any, carol: Any) -> None:
    urls = [sales.start_checkout(order=OrderFactory(buyer=carol), **BACK) for _ in range(4)]
    stripe.pay(urls[1])
    stripe.debit(urls[2])
    stripe.debit(urls[3], account=REFUSED)

    def states() -> list[tuple[str, bool, bool, bool]]:
        ids = Payment.objects.order_by("pk").values_list("checkout_id", flat=True)
        known = [gateway.get_checkout(one) for one in ids]
        return [(one.status, one.is_paid, one.awaits_bank, one.has_failed) for one in known]

    open_, paid, waits = (
        ("open", False, False, False),
        ("complete", True, False, False),
        ("complete", False, True, False),
    )
    assert states() == [open_, paid, waits, waits]
    stripe.advance(days=4.1)
    assert states() == [("expired", False, False, False), paid, paid, ("complete", False, False, True)]
