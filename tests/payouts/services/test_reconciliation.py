from datetime import timedelta
from io import StringIO
from typing import Any

import httpx
import pytest
from django.core.management import call_command
from django.db import DatabaseError, transaction
from django.utils import timezone

from marketplace import clock
from marketplace.money import Money
from payouts import gateway, ledger
from payouts.models import (
    Dispute,
    JournalEntry,
    Movement,
    Payment,
    ReconciliationDifference,
    ReconciliationRun,
    StripeEvent,
)
from payouts.services import pacing, reconciliation
from payouts.services.events import book_checkout
from payouts.services.manual_entries import approve, propose
from payouts.services.proofs import check_books
from payouts.services.reconciliation import (
    FULL_LOOK_AGAIN,
    GRACE,
    OVERLAP,
    reconcile,
    request_by_the_clock,
    request_reconciliation,
    settle_funds,
)
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


@pytest.mark.as_owner
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


# --- looks at what is new ---------------------------------------------------------------------------------------------


def look(*, is_full: bool = False, days_ago: float = 0) -> ReconciliationRun:
    """One of the stored looks, as if it had been made days ago."""
    run = request_reconciliation(key=f"look {ReconciliationRun.objects.count()}", is_full=is_full)
    execute_reconciliation.run(run.pk)
    ago = timezone.now() - timedelta(days=days_ago)
    ReconciliationRun.objects.filter(pk=run.pk).update(compared_until=ago, finished_at=ago)
    run.refresh_from_db()
    return run


def codes(run: ReconciliationRun) -> list[str]:
    return [difference.code for difference in run.differences.all()]


@pytest.fixture
def proved(db: Any, stripe: Any) -> Payment:
    """An old payment, newer ones, all settled; everything was looked at four days ago and just now, and there was no difference."""
    old = buy(stripe)
    stripe.advance(days=10)
    settle_funds()
    buy(stripe)
    stripe.advance(days=3)
    settle_funds()
    look(is_full=True, days_ago=4)
    look(is_full=True)
    return old


def test_a_look_reads_what_is_new_and_says_so(proved: Payment, stripe: Any) -> None:
    buy(stripe, price_micros=7_010_000)

    run = look()

    anchor = ReconciliationRun.objects.get(key="look 0")
    assert (run.is_full, run.since, run.n_differences) == (False, anchor.newest_at - OVERLAP, 0)
    assert run.n_transactions == 2  # not the old one
    assert run.last_entry_id == JournalEntry.objects.latest("pk").pk
    assert look(is_full=True).n_transactions == 3


def test_the_first_looks_are_full(db: Any, stripe: Any) -> None:
    buy(stripe)
    for _ in range(2):
        assert look().is_full  # there is none to begin from, then none that is old enough


def test_a_look_at_what_is_new_proves_both_sides(proved: Payment, stripe: Any) -> None:
    ours = sell(OrderFactory())
    Payment.objects.filter(pk=ours.pk).update(settled_at=clock.now())
    stripe.pay(start_checkout(order=OrderFactory(), **BACK))  # its webhook never came
    stripe.advance(days=0.1)

    found = reconcile(is_full=False)

    assert found.since is not None
    assert [one.code for one in found.differences] == ["charge_not_booked", "charge_not_at_stripe"]
    assert found.differences[1].subject == ours.balance_transaction_id


def test_what_was_made_before_and_booked_since_is_asked_for_by_its_id(
    db: Any, stripe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = OrderFactory()
    stripe.pay(start_checkout(order=order, **BACK))
    stripe.advance(days=10)
    buy(stripe)
    stripe.advance(days=3)
    settle_funds()
    for days_ago in (4, 0):
        look(is_full=True, days_ago=days_ago)
        ReconciliationRun.objects.update(n_differences=0)  # as if the webhook of the first had been in time
    late = book_checkout(order.payment.checkout_id)
    settle_funds()
    assert late is not None

    found = reconcile(is_full=False)
    assert (found.differences, found.n_transactions, found.since is None) == ([], 1, False)

    monkeypatch.setattr(reconciliation, "ASKED_ONE_BY_ONE", 0)
    found = reconcile(is_full=False)
    assert (found.differences, found.n_transactions, found.since) == ([], 2, None)  # too much to ask: all of it is read
    monkeypatch.undo()

    switch_off("keep_payment", table="payouts_payment")
    Payment.objects.filter(pk=late.pk).update(fee_micros=1)
    assert [one.code for one in reconcile(is_full=False).differences] == ["charge_differs"]


def test_what_is_still_pending_is_read_again_however_old_it_is(proved: Payment, stripe: Any) -> None:
    """It may have become available at Stripe, which would be a difference in cash that nothing explains."""
    switch_off("keep_payment", table="payouts_payment")
    Payment.objects.filter(pk=proved.pk).update(settled_at=None)
    net = proved.amount_micros - (proved.fee_micros or 0)
    ledger.post(
        key="unsettled",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": -net, "cash:pending:USD": net},
    )

    found = reconcile(is_full=False)

    assert found.since is not None and found.n_transactions == 2
    assert [held.agrees for held in found.cash] == [True]


def test_only_a_full_look_sees_what_was_changed_long_ago_and_only_a_full_one_clears_it(
    proved: Payment, stripe: Any
) -> None:
    switch_off("keep_payment", table="payouts_payment")
    fee = proved.fee_micros
    Payment.objects.filter(pk=proved.pk).update(fee_micros=1)
    assert codes(look()) == []
    today = {"key": f"day:{clock.today()}", "compared_until": timezone.now()}
    ReconciliationRun.objects.create(**today, status="done", n_differences=0)
    assert not request_by_the_clock().is_full
    full = look(is_full=True)
    assert codes(full) == ["charge_differs"]
    Payment.objects.filter(pk=proved.pk).update(fee_micros=fee)
    look()

    assert not request_by_the_clock().is_full  # a full one ended just now
    long_ago = timezone.now() - FULL_LOOK_AGAIN
    ReconciliationRun.objects.filter(pk=full.pk).update(finished_at=long_ago)
    assert request_by_the_clock().is_full


def test_the_clock_asks_for_one_full_look_each_business_day(db: Any) -> None:
    assert [request_by_the_clock().is_full for _ in range(3)] == [True, False, False]
    clock.advance(timedelta(days=1))
    assert [request_by_the_clock().is_full for _ in range(2)] == [True, False]


def test_every_question_to_stripe_keeps_the_pace(proved: Payment, stripe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    monkeypatch.setattr(pacing, "wait_for_turn", lambda: turns.append(1))
    monkeypatch.setattr(reconciliation, "LISTED_AT_ONCE", 1)

    reconcile()
    assert len(turns) == 4  # two transactions, the end of the list, and the balance
    turns.clear()
    buy(stripe)
    assert settle_funds() == 0
    assert len(turns) == 1


def test_settling_asks_for_one_movement_that_is_not_available_and_no_more(
    db: Any, stripe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment = buy(stripe)
    now = clock.now()
    dispute = Dispute.objects.create(
        dispute_id="dp_1", payment=payment, amount_micros=50_000, currency="USD", status="needs_response", opened_at=now
    )
    for number in range(5):
        Movement.objects.create(
            kind="dispute", balance_transaction_id=f"txn_m{number}", amount_micros=-10_000, fee_micros=0,
            currency="USD" if number < 3 else "EUR", available_on=now + timedelta(days=number), is_booked_available=False,
            booked_at=now, dispute=dispute,
        )  # fmt: skip
    asked: list[str] = []
    known = gateway.get_balance_transaction(str(payment.balance_transaction_id))

    def answered(identifier: str) -> Any:
        asked.append(identifier)
        return known

    monkeypatch.setattr(gateway, "get_balance_transaction", answered)

    assert settle_funds() == 0
    assert asked == [payment.balance_transaction_id, "txn_m3", "txn_m0"]
