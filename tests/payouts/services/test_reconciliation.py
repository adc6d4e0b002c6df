from datetime import timedelta
from io import StringIO
from typing import Any

import httpx
import pytest
from django.core.management import call_command
from django.db import DatabaseError, transaction
from django.utils import timezone

from marketplace.money import Money
from payouts import gateway, ledger
from payouts.models import (
    JournalEntry,
    Payment,
    ReconciliationDifference,
    ReconciliationRun,
    StripeEvent,
)
from payouts.services.events import book_checkout
from payouts.services.manual_entries import approve, propose
from payouts.services.proofs import check_books
from payouts.services.reconciliation import GRACE, reconcile, request_reconciliation, settle_funds
from payouts.services.sales import start_checkout
from payouts.tasks import execute_reconciliation
from tests.factories.marketplace import OfferFactory, OrderFactory, UserFactory
from tests.factories.payouts import pay_out, sell
from tests.payouts.conftest import switch_off

BACK = {"success_url": "http://shop.test/done", "cancel_url": "http://shop.test/order"}


def buy(stripe: Any, **offer: Any) -> Payment:
    order = OrderFactory(offers=[OfferFactory(**offer)])
    stripe.pay(start_checkout(order=order, **BACK))
    payment = book_checkout(order.payment.checkout_id)
    assert payment is not None
    return payment


def agrees() -> bool:
    """Pending and available, by the ledger and by Stripe, to the micro."""
    held = gateway.balance()
    ours = ledger.balances(prefix="cash")
    theirs = {
        f"cash:{side}:{currency}": minor * (1_000_000 if currency == "JPY" else 10_000)
        for currency, sides in held.items()
        for side, minor in zip(("pending", "available"), sides, strict=True)
        if minor
    }
    return ours == theirs


def test_the_ledgers_cash_is_stripes_balance_at_every_quiet_moment(db: Any, stripe: Any) -> None:
    buy(stripe)
    assert agrees()
    stripe.advance(days=1)
    buy(stripe, price_micros=7_010_000)
    buy(stripe, price_micros=11_330_000, currency="EUR")
    buy(stripe, price_micros=900_000_000, currency="JPY")
    assert settle_funds() == 0
    assert agrees()
    stripe.advance(days=1.1)
    assert not agrees()  # Stripe's clock is ahead until the next look
    assert settle_funds() == 1
    assert agrees()
    stripe.advance(days=1)
    assert settle_funds() == 3
    assert settle_funds() == 0

    assert agrees()
    assert reconcile().differences == []
    assert reconcile().n_transactions == 4
    assert check_books().findings == []


def test_reconcile_names_what_only_stripe_has(db: Any, stripe: Any) -> None:
    order = OrderFactory()
    stripe.pay(start_checkout(order=order, **BACK))  # and its webhook never came

    found = reconcile()

    assert [difference.code for difference in found.differences] == ["cash_differs", "charge_not_booked"]
    assert not found.agrees


def test_reconcile_names_what_only_we_have(db: Any, stripe: Any) -> None:
    payment = sell(OrderFactory())

    differences = reconcile().differences

    assert [difference.code for difference in differences] == ["cash_differs", "charge_not_at_stripe"]
    assert str(payment.balance_transaction_id) in differences[1].detail


def test_reconcile_names_a_fee_that_we_booked_wrongly(db: Any, stripe: Any) -> None:
    payment = buy(stripe)
    switch_off("keep_payment", table="payouts_payment")
    Payment.objects.filter(pk=payment.pk).update(fee_micros=1)

    assert [difference.code for difference in reconcile().differences] == ["charge_differs"]


def test_reconcile_names_old_intents_and_events_that_failed(db: Any, stripe: Any, alice: Any) -> None:
    for minutes in (14, 16):
        created_at = timezone.now() - timedelta(minutes=minutes)
        pay_out(alice, Money(10_000, "USD"), is_owed=False, created_at=created_at)
    StripeEvent.objects.create(
        event_id="evt_1", endpoint="platform", type="x", payload="{}", status="failed", error_message="paid twice"
    )

    differences = reconcile().differences

    assert [difference.code for difference in differences] == ["in_transit_too_long", "event_not_applied"]
    assert "for 16 minutes" in differences[0].detail


def test_the_command_prints_and_exits_1_on_a_difference(db: Any, stripe: Any) -> None:
    buy(stripe)
    out = StringIO()
    call_command("reconcile", stdout=out)
    assert "1 transactions compared, 0 differences" in out.getvalue()

    ledger.post(
        key="planted", kind=JournalEntry.Kind.SALE, postings={"cash:pending:USD": 1, "revenue:platform_fee:USD": -1}
    )
    with pytest.raises(SystemExit) as ended:
        call_command("reconcile", stdout=out)

    assert ended.value.code == 1
    assert "DIFFERENCE cash_differs" in out.getvalue()


def test_a_charge_that_is_being_booked_is_no_difference_until_the_grace_is_over(db: Any, stripe: Any) -> None:
    order = OrderFactory()
    stripe.pay(start_checkout(order=order, **BACK))

    found = reconcile(grace=GRACE)
    assert (found.differences, found.n_on_their_way, [held.agrees for held in found.cash]) == ([], 1, [True])
    book_checkout(order.payment.checkout_id)
    assert reconcile(grace=GRACE).n_on_their_way == 0


def test_what_is_booked_while_stripes_list_is_read_is_no_difference(db: Any, stripe: Any, monkeypatch: Any) -> None:
    """The list is read, then a sale is paid and booked, then our rows are read."""
    buy(stripe)
    real = gateway.newest_balance_transactions

    def read_before_the_sale() -> Any:
        listed = list(real())
        buy(stripe, price_micros=7_010_000)
        return iter(listed)

    monkeypatch.setattr(gateway, "newest_balance_transactions", read_before_the_sale)

    found = reconcile()

    assert (found.differences, found.n_transactions) == ([], 1)


def test_what_is_booked_between_two_readings_of_cash_is_no_difference(db: Any, stripe: Any, monkeypatch: Any) -> None:
    buy(stripe)
    real, calls = gateway.balance, []

    def sold_meanwhile() -> Any:
        calls.append(1)
        if len(calls) == 1:
            buy(stripe, price_micros=7_010_000)
        return real()

    monkeypatch.setattr(gateway, "balance", sold_meanwhile)

    assert [one.code for one in reconcile().differences] == []
    assert len(calls) >= 1


def test_each_look_is_kept_with_the_cause_and_the_day_since_which_a_difference_is_known(
    db: Any, stripe: Any, caplog: Any
) -> None:
    payment = sell(OrderFactory())
    for key in ("one", "two"):
        execute_reconciliation.run(request_reconciliation(key=key).pk)
        request_reconciliation(key=key)

    first, second = ReconciliationRun.objects.order_by("pk")
    assert (first.status, first.n_differences, second.n_differences) == ("done", 2, 2)
    (before,) = first.differences.filter(code="charge_not_at_stripe")
    (after,) = second.differences.filter(code="charge_not_at_stripe")
    assert before.subject == payment.balance_transaction_id and before.happened_at == payment.paid_at
    assert after.first_seen_at == before.first_seen_at < second.compared_until
    assert "without Stripe's word" in after.cause
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic():
        ReconciliationDifference.objects.update(detail="nothing")


def test_what_stripe_moved_by_itself_is_settled_by_a_manual_entry_of_two_people(db: Any, stripe: Any) -> None:
    buy(stripe)
    stripe.advance(days=3)
    settle_funds()
    answer = httpx.post(
        f"{stripe.handle.url}/v1/payouts",
        auth=(stripe.handle.secret_key, ""),
        data={"amount": 1_000, "currency": "usd"},
    )
    assert answer.status_code == 200, answer.text
    (moved,) = [one for one in stripe.objects("balance_transactions") if one["type"] == "payout"]
    assert "unknown_movement" in [one.code for one in reconcile().differences]

    ann, ben = UserFactory(is_staff=True), UserFactory(is_staff=True)
    legs = {"bank:USD": 10_000_000, "cash:available:USD": -10_000_000}
    manual = propose(user=ann, key="k", legs=legs, reason="Own revenue", balance_transaction_id=moved["id"])
    assert "unknown_movement" in [one.code for one in reconcile().differences]  # nobody approved it yet
    approve(manual=manual, user=ben)

    assert reconcile().differences == []


def test_a_manual_entry_of_another_amount_or_of_nothing_at_stripe_is_named(db: Any, stripe: Any) -> None:
    ann, ben = UserFactory(is_staff=True), UserFactory(is_staff=True)
    legs = {"expense:stripe_fees:USD": 1_000_000, "cash:available:USD": -1_000_000}
    manual = propose(user=ann, key="k", legs=legs, reason="A fee", balance_transaction_id="txn_nowhere")
    approve(manual=manual, user=ben)

    assert [one.code for one in reconcile().differences] == ["cash_differs", "manual_not_at_stripe"]


def test_funds_that_nobody_settles_for_a_day_are_named(db: Any, stripe: Any, monkeypatch: Any) -> None:
    buy(stripe)
    stripe.advance(days=3)
    assert reconcile().differences == []  # the settling job comes in seconds
    monkeypatch.setattr(timezone, "now", lambda now=timezone.now: now() + timedelta(days=5))

    assert [one.code for one in reconcile().differences] == ["settle_late"]
