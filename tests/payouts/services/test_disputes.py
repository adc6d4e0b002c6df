"""Disputes: frozen while open, thawed when won, taken back when lost; told in any order, or found."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import License, Order, TrainedModel, User
from marketplace.money import Money
from marketplace.services.downloads import LicenseNotLive, signed_download_url
from payouts import chart, gateway, ledger, tasks
from payouts.errors import DisputeNotAnswerable, NotRefundable, PaymentMismatch
from payouts.models import Dispute, DisputeAnswer, Division, Payment, Payout, PayoutRun, Refund, RoyaltyPool
from payouts.services import clawbacks, disputes, events, reconciliation, recoveries, refunds, royalties, transfers
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile, settle_funds
from payouts.services.sales import start_checkout
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import PoolFactory, collect
from tests.payouts.conftest import switch_off
from tests.payouts.services.test_refunds import BACK, DOLLAR, back, balances, buy, clean, order_of, pay_out, run, staff

__all__ = ["staff"]  # a fixture
DISPUTES, INQUIRES = "4000000000000259", "4000000000001976"
TOLD = ["created", "funds_withdrawn", "updated", "funds_reinstated", "closed"]


def dispute_events(stripe: Any) -> list[dict[str, Any]]:
    return [event for kind in TOLD for event in stripe.events(f"charge.dispute.{kind}")]


def hear(stripe: Any) -> None:
    for event in dispute_events(stripe):
        events.apply_event(stripe.received(event))


def decide(stripe: Any, verdict: str) -> None:
    stripe.dispute(dispute=Dispute.objects.latest("pk").dispute_id, verdict=verdict)


def paid_with(stripe: Any, card: str, parties: dict[Any, int], **offer: Any) -> Payment:
    return buy(stripe, PublishedVersionFactory(contributions=parties), card=card, **offer)


def test_an_open_dispute_freezes_the_pool_the_payables_and_the_downloads(stripe: Any, alice: Any, bob: Any) -> None:
    payment = paid_with(stripe, DISPUTES, {alice: 2, bob: 1})

    hear(stripe)

    dispute = Dispute.objects.get()
    assert (dispute.status, dispute.reason, dispute.amount_micros) == ("needs_response", "fraudulent", 100 * DOLLAR)
    assert balances("payable", "pool", "receivable", "dispute", "expense:dispute_fees") == {
        chart.dispute(dispute): 10 * DOLLAR,  # the platform's own fee: 30 and 60 are frozen
        "expense:dispute_fees:USD": 15 * DOLLAR,
    }
    assert ledger.balances(prefix="cash") == {"cash:pending:USD": 96_800_000 - 115 * DOLLAR}
    with pytest.raises(LicenseNotLive, match="disputed"):
        signed_download_url(license=License.objects.get())
    assert payment.order is not None
    with pytest.raises(NotRefundable, match="disputed"):
        refunds.refund_of_right(order=payment.order, user=None)
    clock.advance(timedelta(days=400))
    assert royalties.divide_what_is_ready() == 0
    clean()
    stripe.advance(days=3)
    settle_funds()
    clean()


def test_a_won_dispute_thaws_everything_and_costs_the_fee(stripe: Any, alice: Any) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    decide(stripe, "won")

    hear(stripe)

    dispute = Dispute.objects.get()
    assert (dispute.status, dispute.closed_at is not None) == ("won", True)
    assert balances("payable", "pool", "dispute", "expense", "revenue") == {
        chart.payable(alice, "USD"): -30 * DOLLAR,
        chart.royalty_pool(RoyaltyPool.objects.get()): -60 * DOLLAR,
        "expense:dispute_fees:USD": 15 * DOLLAR,
        "expense:stripe_fees:USD": 3_200_000,
        "revenue:platform_fee:USD": -10 * DOLLAR,
    }
    assert License.objects.get().suspended_at is None
    assert signed_download_url(license=License.objects.get()).url
    clean()
    clock.advance(timedelta(days=400))
    assert royalties.divide_what_is_ready() == 1
    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -90 * DOLLAR}
    clean()


def test_a_royalty_is_not_disputed_because_its_licenses_order_is(stripe: Any, alice: Any) -> None:
    """It names the same order line, and is divided out of a payment of its own."""
    paid_with(stripe, DISPUTES, {alice: 1})
    license = License.objects.get()
    PublishedResultFactory(version=license.version, license=license, shares={alice: 1}, grade="declared")
    invoice = royalties.report_revenue(
        licensee=license.licensee,
        model=TrainedModel.objects.get(),
        period_start=clock.today() - timedelta(days=40),
        period_end=clock.today() - timedelta(days=11),
        revenue=Money(1_000 * DOLLAR, "USD"),
        key="royalty",
    )
    stripe.pay(royalties.start_invoice_checkout(invoice=invoice, **BACK))
    events.book_checkout(Payment.objects.get(invoice=invoice).checkout_id or "")
    earned = Division.objects.get(source=Division.Source.ROYALTY).amount_micros

    hear(stripe)

    assert earned and ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -earned}
    assert not clawbacks.disputed_payments_of(party=alice.pk, currency="USD").exclude(order=Order.objects.get())
    clean()


def test_a_lost_dispute_is_taken_back_as_a_refund_is(stripe: Any, staff: User, alice: Any) -> None:
    payment = paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    decide(stripe, "lost")

    hear(stripe)

    assert balances("payable", "pool", "receivable", "dispute", "revenue") == {}
    assert ledger.balances(prefix="expense") == {
        "expense:dispute_fees:USD": 15 * DOLLAR,
        "expense:stripe_fees:USD": 3_200_000,
    }
    assert (Order.objects.get().status, License.objects.get().is_live(clock.now())) == (Order.Status.REFUNDED, False)
    with pytest.raises(NotRefundable):
        back(payment, DOLLAR, staff)
    clean()


@pytest.mark.parametrize("verdict", ["won", "lost"])
def test_the_events_may_come_in_any_order_twice_and_late(stripe: Any, alice: Any, verdict: str) -> None:
    payment = paid_with(stripe, DISPUTES, {alice: 1})
    (told,) = stripe.events("charge.dispute.created")
    stripe.dispute(dispute=told["data"]["object"]["id"], verdict=verdict)
    told = dispute_events(stripe)
    assert len(told) >= 3

    seen = set()
    for order in itertools.islice(itertools.permutations(told), 0, None, 7):
        with transaction.atomic():
            savepoint = transaction.savepoint()
            for event in (*order, *order):
                events.apply_event(stripe.received(event))
            seen.add(str(ledger.balances(prefix="payable") | ledger.balances(prefix="cash")))
            clean()
            transaction.savepoint_rollback(savepoint)

    assert len(seen) == 1
    assert payment.disputes.count() == 0


def test_a_dispute_that_no_event_told_of_is_found(stripe: Any, alice: Any) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    assert [one.code for one in reconcile().differences] == ["cash_differs", "dispute_not_booked"]

    assert disputes.sweep_disputes() == 1
    assert disputes.sweep_disputes() == 0
    clean()
    decide(stripe, "won")
    assert disputes.sweep_disputes() == 1
    assert Dispute.objects.get().status == "won"
    clean()


def test_a_dispute_may_come_before_the_sale_was_booked(stripe: Any, alice: Any) -> None:
    order = order_of(PublishedVersionFactory(contributions={alice: 1}))
    stripe.pay(start_checkout(order=order, **BACK), card=DISPUTES)

    hear(stripe)

    assert Payment.objects.get().status == Payment.Status.PAID
    assert Dispute.objects.get().is_open
    clean()


def test_a_dispute_about_a_charge_of_somebody_elses_is_for_a_person(stripe: Any, monkeypatch: Any, alice: Any) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    switch_off("keep_payment", table="payouts_payment")
    Payment.objects.update(charge_id="ch_of_somebody_else")
    monkeypatch.setattr(gateway, "charge_marks", lambda charge: {})

    with pytest.raises(PaymentMismatch):
        hear(stripe)
    assert Dispute.objects.count() == 0


def test_one_that_needs_a_person_keeps_no_other_from_being_found_nor_the_books_from_being_compared(
    stripe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, alice: Any
) -> None:
    for _ in range(2):
        paid_with(stripe, DISPUTES, {alice: 1})
    unknown = Payment.objects.latest("pk")  # its dispute is the newest, so it has the first turn
    charge = unknown.charge_id
    assert charge is not None
    switch_off("keep_payment", table="payouts_payment")
    Payment.objects.filter(pk=unknown.pk).update(charge_id="ch_of_somebody_else")
    with monkeypatch.context() as patched:
        patched.setattr(gateway, "charge_marks", lambda charge: {})
        patched.setattr(reconciliation, "GRACE", timedelta(0))  # its movement is not too young to be missed
        tasks.reconcile()

        assert Dispute.objects.get().payment_id != unknown.pk
        assert "Reconciliation found dispute_not_written_down" in caplog.text
        assert "Reconciliation found dispute_not_booked" in caplog.text
        with pytest.raises(PaymentMismatch):
            disputes.sweep_disputes()

    Payment.objects.filter(pk=unknown.pk).update(charge_id=charge)
    assert disputes.sweep_disputes() == 1
    clean()


def test_what_was_sent_before_a_dispute_stays_until_it_is_lost_and_is_then_owed(
    stripe: Any, alice: Any, bob: Any
) -> None:
    stripe.onboard(alice)  # bob's part waits for him
    payment = paid_with(stripe, "4242424242424242", {alice: 2, bob: 1}, upfront_bps=9_000, pool_bps=0)
    buy(stripe, PublishedVersionFactory())  # other money, that the dispute's fee comes from
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    pay_out("first")
    assert Payout.objects.get().amount_micros == 60 * DOLLAR

    stripe.dispute(charge=payment.charge_id)
    hear(stripe)
    assert balances("receivable") == {}
    assert chart.payable(bob, "USD") not in ledger.balances(prefix="payable")
    stripe.onboard(bob)
    pay_out("second")
    assert Payout.objects.count() == 1  # bob's is frozen
    clean()

    decide(stripe, "lost")
    hear(stripe)

    assert recoveries.owing() == {(alice.pk, "USD"): Money(60 * DOLLAR, "USD")}
    assert chart.payable(bob, "USD") not in ledger.balances(prefix="payable")
    clean()


def test_a_stolen_card_that_buys_its_own_upload_is_not_paid_out_before_the_dispute(stripe: Any, mallory: Any) -> None:
    """The hold of a new payee outlasts the weeks until the card's owner looks at the bill."""
    stripe.onboard(mallory)
    payment = paid_with(stripe, "4242424242424242", {mallory: 1}, price=5_000, upfront_bps=9_000, pool_bps=0)
    for day in (6, 12, 18, 24):
        stripe.advance(days=6)
        clock.advance(timedelta(days=6))
        settle_funds()
        pay_out(f"day {day}")
    assert Payout.objects.count() == 0

    stripe.dispute(charge=payment.charge_id)
    hear(stripe)
    stripe.advance(days=12)
    clock.advance(timedelta(days=12))
    pay_out("after the hold")
    hear(stripe)  # nobody answered: lost
    pay_out("after the dispute")

    assert Dispute.objects.get().status == "lost"
    assert Payout.objects.count() == 0
    assert balances("payable", "receivable", "dispute") == {}
    assert ledger.balances(prefix="expense")["expense:dispute_fees:USD"] == 15 * DOLLAR
    clean()


def test_a_partial_dispute_takes_its_part_and_the_license_lives_on(stripe: Any, alice: Any) -> None:
    payment = paid_with(stripe, "4242424242424242", {alice: 1})
    stripe.dispute(charge=payment.charge_id, amount=4_000, reason="product_unacceptable")
    hear(stripe)
    assert balances("payable", "pool") == {}
    decide(stripe, "lost")

    hear(stripe)

    assert balances("payable", "pool", "revenue") == {
        chart.payable(alice, "USD"): -30 * DOLLAR,
        chart.royalty_pool(RoyaltyPool.objects.get()): -24 * DOLLAR,
        "revenue:platform_fee:USD": -6 * DOLLAR,
    }
    assert License.objects.get().is_live(clock.now())
    clean()


def test_what_was_refunded_before_and_is_lost_again_is_the_platforms_loss(stripe: Any, staff: User, alice: Any) -> None:
    payment = paid_with(stripe, "4242424242424242", {alice: 1})
    buy(stripe, PublishedVersionFactory())
    run(back(payment, 70 * DOLLAR, staff))
    stripe.dispute(charge=payment.charge_id)  # of everything, the refund notwithstanding
    hear(stripe)
    clean()
    decide(stripe, "lost")

    hear(stripe)

    assert ledger.balances(prefix="expense")["expense:losses:USD"] == 70 * DOLLAR
    assert ledger.balances(prefix="dispute") == {}
    clean()


def test_one_transfer_is_not_taken_for_the_money_of_two_disputed_payments(stripe: Any, alice: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 1})
    first, second = (buy(stripe, version, price=price) for price in (100, 200))
    stripe.onboard(alice)
    clock.advance(timedelta(days=31))
    stripe.advance(days=31)
    settle_funds()
    stripe.dispute(charge=first.charge_id, is_inquiry=True)
    hear(stripe)
    pay_out("of the second")  # 60 of it; the first is frozen
    stripe.dispute(charge=second.charge_id, is_inquiry=True)
    hear(stripe)
    assert ledger.balances(prefix="payable") == {}

    with transaction.atomic():  # as when a refund of it is refused
        clawbacks.freeze_again(Payment.objects.select_for_update(of=("self",)).get(pk=first.pk))

    assert ledger.balances(prefix="payable") == {}
    clean()


def test_an_inquiry_freezes_and_may_be_answered_by_a_refund(stripe: Any, staff: User, alice: Any) -> None:
    payment = paid_with(stripe, INQUIRES, {alice: 1})
    hear(stripe)
    dispute = Dispute.objects.get()
    assert (dispute.is_inquiry, dispute.movements.count()) == (True, 0)
    assert balances("payable", "pool") == {}

    run(back(payment, 50 * DOLLAR, staff))
    assert balances("payable", "pool") == {}  # what is left is frozen again
    assert ledger.balances(prefix="dispute") == {chart.dispute(dispute): -45 * DOLLAR}
    clean()
    stripe.advance(days=11)
    hear(stripe)

    dispute.refresh_from_db()
    assert dispute.status == "warning_closed"
    assert balances("payable", "pool") == {
        chart.payable(alice, "USD"): -30 * DOLLAR,
        chart.royalty_pool(RoyaltyPool.objects.get()): -15 * DOLLAR,
    }
    settle_funds()
    clean()


def test_an_inquiry_that_escalates_becomes_a_dispute(stripe: Any, alice: Any) -> None:
    paid_with(stripe, INQUIRES, {alice: 1})
    hear(stripe)
    decide(stripe, "escalated")
    hear(stripe)
    assert (Dispute.objects.get().status, Dispute.objects.get().movements.count()) == ("needs_response", 1)
    clean()
    decide(stripe, "lost")
    hear(stripe)
    assert balances("payable", "pool", "dispute") == {}
    clean()


# --- what comes back while it is open -------------------------------------------------------------------------------------


def held(party: Any, payment: Payment) -> dict[str, int]:
    """What a party is owed and owes, and the payment's pools; without what stands at nothing."""
    codes = [chart.payable(party, "USD"), chart.receivable(party, "USD")]
    codes += [chart.royalty_pool(pool) for pool in RoyaltyPool.objects.filter(order_line__order=payment.order_id)]
    return {code: micros for code, micros in ledger.balances_of(codes).items() if micros}


def test_what_a_refused_refund_gives_back_during_a_dispute_is_frozen(stripe: Any, staff: User, alice: Any) -> None:
    """The buyer disputes before the worker has asked Stripe for the refund."""
    payment = paid_with(stripe, "4242424242424242", {alice: 1})
    buy(stripe, PublishedVersionFactory())
    refund = back(payment, 100 * DOLLAR, staff)
    stripe.dispute(charge=payment.charge_id)
    hear(stripe)
    dispute = Dispute.objects.get()
    assert dispute.clawbacks.get().amount_micros == 0

    run(refund)

    assert (refund.state, refund.refusal_code) == ("refused", "charge_disputed")
    assert (held(alice, payment), ledger.balance(chart.dispute(dispute))) == ({}, 10 * DOLLAR)
    clean()
    clock.advance(timedelta(days=400))
    assert royalties.divide_what_is_ready() == 1  # of the other sale
    decide(stripe, "won")
    hear(stripe)
    assert held(alice, payment) == {
        chart.payable(alice, "USD"): -30 * DOLLAR,
        chart.royalty_pool(RoyaltyPool.objects.get(order_line__order=payment.order_id)): -60 * DOLLAR,
    }
    clean()


def test_what_the_cards_bank_sends_back_during_a_dispute_is_frozen(stripe: Any, staff: User, alice: Any) -> None:
    payment = paid_with(stripe, "4000000000005126", {alice: 1})  # a refund to it fails a day later
    buy(stripe, PublishedVersionFactory())
    refund = run(back(payment, 50 * DOLLAR, staff))
    stripe.dispute(charge=payment.charge_id)
    hear(stripe)
    clean()

    stripe.advance(days=1.1)
    for told in stripe.events("refund.failed"):
        events.apply_event(stripe.received(told))

    refund.refresh_from_db()
    assert refund.state == "failed"
    assert held(alice, payment) == {}
    assert sum(one.amount_micros for one in Dispute.objects.get().clawbacks.filter(undo=None)) == 90 * DOLLAR
    clean()
    decide(stripe, "lost")
    hear(stripe)
    assert (held(alice, payment), ledger.balances(prefix="dispute")) == ({}, {})
    clean()


def test_a_payout_that_is_refused_during_a_dispute_comes_back_frozen(
    stripe: Any, monkeypatch: pytest.MonkeyPatch, alice: Any
) -> None:
    stripe.onboard(alice)
    payment = paid_with(stripe, "4242424242424242", {alice: 1}, upfront_bps=9_000, pool_bps=0)
    buy(stripe, PublishedVersionFactory())
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))

    def disputed_meanwhile(**params: Any) -> gateway.Transfer:
        stripe.dispute(charge=payment.charge_id)
        hear(stripe)
        raise gateway.StripeRefused("account_closed", "The account is closed.", 400)

    with monkeypatch.context() as patched:
        patched.setattr(gateway, "create_transfer", disputed_meanwhile)
        pay_out("first")
    assert Payout.objects.get().status == Payout.Status.REFUSED
    assert (held(alice, payment), ledger.balances(prefix="in_transit")) == ({}, {})
    clean()

    pay_out("second")
    assert Payout.objects.count() == 1
    decide(stripe, "won")
    hear(stripe)
    pay_out("third")
    assert [one.amount_micros for one in Payout.objects.filter(status="sent")] == [90 * DOLLAR]
    clean()


def test_an_intent_that_a_dispute_overtakes_is_not_sent(
    stripe: Any, monkeypatch: pytest.MonkeyPatch, alice: Any
) -> None:
    stripe.onboard(alice)
    payment = paid_with(stripe, "4242424242424242", {alice: 1}, upfront_bps=9_000, pool_bps=0)
    other = paid_with(stripe, "4242424242424242", {alice: 1}, upfront_bps=9_000, pool_bps=0, price=50)
    buy(stripe, PublishedVersionFactory())
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))

    def dies(*_: Any) -> None:
        raise KeyError("the worker died")

    with monkeypatch.context() as patched:
        patched.setattr(transfers, "_send_batch", dies)
        with pytest.raises(KeyError):
            pay_out("first")
    stripe.dispute(charge=payment.charge_id)
    hear(stripe)
    clean()

    PayoutRun.objects.update(due_at=timezone.now())
    pay_out("first")

    assert (Payout.objects.get().status, Payout.objects.get().refusal_code) == ("refused", "disputed")
    assert stripe.objects("transfers") == []
    assert held(alice, payment) == {chart.payable(alice, "USD"): -45 * DOLLAR}
    clean()
    pay_out("second")  # the dispute is older than this intent
    assert [one.amount_micros for one in Payout.objects.filter(status="sent")] == [45 * DOLLAR]
    assert other.disputes.count() == 0
    clean()


# --- answering ----------------------------------------------------------------------------------------------------------


def send(answer: DisputeAnswer) -> None:
    """As the task does."""
    with jobs.claimed(DisputeAnswer, answer.pk) as held:
        if held:
            disputes.send_answer(held)


@pytest.mark.parametrize(("text", "outcome"), [("winning_evidence", "won"), ("losing_evidence", "lost")])
def test_staff_answer_once_and_the_bank_decides(stripe: Any, staff: User, alice: Any, text: str, outcome: str) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    dispute = Dispute.objects.get()
    evidence = {"uncategorized_text": text, "product_description": "Digits, 5,620 images"}

    answer = disputes.answer_dispute(dispute=dispute, user=staff, evidence=evidence)
    send(answer)
    send(answer)
    with pytest.raises(DisputeNotAnswerable):
        disputes.answer_dispute(dispute=dispute, user=staff, evidence=evidence)
    disputes.sweep_disputes()

    dispute.refresh_from_db()
    assert dispute.status == outcome
    (at_stripe,) = stripe.objects("disputes")
    assert at_stripe["evidence_details"]["submission_count"] == 1
    clean()


def test_an_answer_is_given_again_under_another_key_after_a_server_error(
    stripe: Any, door: Any, staff: User, alice: Any
) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    answer = disputes.answer_dispute(
        dispute=Dispute.objects.get(), user=staff, evidence={"uncategorized_text": "winning_evidence"}
    )
    door.refuse_with = 500
    with pytest.raises(gateway.StripeUncertain):
        send(answer)
    door.refuse_with = None
    DisputeAnswer.objects.update(due_at=timezone.now())

    send(answer)
    disputes.sweep_disputes()

    assert Dispute.objects.get().status == "won"
    clean()


def test_an_answer_that_stripe_refused_is_followed_by_another(
    stripe: Any, monkeypatch: pytest.MonkeyPatch, staff: User, alice: Any
) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    dispute = Dispute.objects.get()

    def refuses(**_: Any) -> gateway.Dispute:
        raise gateway.StripeRefused("invalid_request_error", "It is too long.", 400)

    with monkeypatch.context() as patched:
        patched.setattr(gateway, "submit_evidence", refuses)
        send(disputes.answer_dispute(dispute=dispute, user=staff, evidence={"uncategorized_text": "x"}))
    assert dispute.answer is not None
    assert (dispute.answer.was_refused, "too long" in dispute.answer.error_message) == (True, True)

    evidence = {"uncategorized_text": "winning_evidence"}
    send(disputes.answer_dispute(dispute=dispute, user=staff, evidence=evidence))
    disputes.sweep_disputes()

    dispute = Dispute.objects.get()
    assert (dispute.status, DisputeAnswer.objects.count()) == ("won", 2)
    assert dispute.answer is not None and dispute.answer.evidence == evidence
    with pytest.raises(DisputeNotAnswerable):
        disputes.answer_dispute(dispute=dispute, user=staff, evidence=evidence)
    with pytest.raises(IntegrityError), transaction.atomic():
        DisputeAnswer.objects.create(dispute=dispute, given_at=clock.now())
    clean()


def test_staff_may_give_in(stripe: Any, staff: User, alice: Any) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)

    send(disputes.answer_dispute(dispute=Dispute.objects.get(), user=staff, gives_in=True))

    assert Dispute.objects.get().status == "lost"
    clean()


def test_an_answer_that_cannot_be_is_refused_and_leaves_nothing_behind(
    stripe: Any, staff: User, alice: Any, carol: Any
) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    dispute = Dispute.objects.get()
    for user, given, refusal in [
        (carol.user, {"gives_in": True}, NotAllowed),
        (staff, {}, InvalidInput),
        (staff, {"evidence": {"uncategorized_text": "  "}}, InvalidInput),
        (staff, {"evidence": {"receipt": "file_1"}}, InvalidInput),
        (staff, {"evidence": {"uncategorized_text": "x" * 20_001}}, InvalidInput),
        (staff, {"evidence": {"uncategorized_text": "x"}, "gives_in": True}, InvalidInput),
    ]:
        with pytest.raises(refusal):
            disputes.answer_dispute(dispute=dispute, user=user, **given)  # type: ignore[arg-type]
    assert DisputeAnswer.objects.count() == 0

    decide(stripe, "lost")
    late = disputes.answer_dispute(dispute=dispute, user=staff, evidence={"uncategorized_text": "too late"})
    send(late)
    assert Dispute.objects.get().status == "lost"
    clean()


@pytest.mark.as_owner
def test_postgresql_keeps_a_dispute_and_what_it_decided(stripe: Any, alice: Any) -> None:
    paid_with(stripe, DISPUTES, {alice: 1})
    hear(stripe)
    decide(stripe, "won")
    hear(stripe)
    dispute = Dispute.objects.get()
    movement = dispute.movements.earliest("pk")
    for act in (
        lambda: Dispute.objects.update(status="lost"),
        lambda: Dispute.objects.update(amount_micros=1),
        lambda: Dispute.objects.filter(pk=dispute.pk)._raw_delete("default"),
        lambda: type(movement).objects.update(amount_micros=1),
        lambda: type(movement).objects.filter(pk=movement.pk)._raw_delete("default"),
        lambda: dispute.clawbacks.all()._raw_delete("default"),
    ):
        with pytest.raises(IntegrityError, match=r"refused|keeps|kept|closed"), transaction.atomic():
            act()
    assert Refund.objects.count() == 0
    clean()


# --- whatever is divided beside a dispute -----------------------------------------------------------------------------


def told_of(payment: Payment) -> gateway.Dispute:
    """What Stripe says of an inquiry into a payment that only our books know."""
    return gateway.Dispute(
        id="dp_told",
        charge=str(payment.charge_id),
        amount_minor=payment.amount.to_minor(),
        currency=payment.currency,
        reason="fraudulent",
        status="needs_response",
        opened_at=timezone.now(),
        evidence_due_at=None,
        movements=[],
    )


@pytest.mark.parametrize("first", ["release", "dispute"])
def test_a_pool_that_is_released_while_a_dispute_opens_is_frozen_whichever_comes_first(
    committed_db: str, django_db_blocker: Any, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Each holds the pool's row until it is committed; the other one then sees what it did."""
    alice = PartyFactory()
    pool = PoolFactory(amount=Money(60 * DOLLAR, "USD"), contributions={alice: 1})
    payment = Payment.objects.get(order=pool.order_line.order)
    monkeypatch.setattr(gateway, "get_dispute", lambda _: told_of(payment))
    holds, lets_go = threading.Event(), threading.Event()
    acts = {
        "release": lambda: royalties.release_pool(pool=pool, result=None),
        "dispute": lambda: disputes.refresh_dispute("dp_told"),
    }
    (second,) = acts.keys() - {first}

    def slowly() -> None:
        with transaction.atomic():
            acts[first]()
            holds.set()
            assert lets_go.wait(20)
        connection.close()

    def meanwhile() -> None:
        assert holds.wait(20)
        try:
            acts[second]()
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as threads:
        jobs_ = [threads.submit(slowly), threads.submit(meanwhile)]
        assert holds.wait(20)
        time.sleep(0.5)
        assert not jobs_[1].done()  # it waits for the first one's rows
        lets_go.set()
        for job in jobs_:
            job.result(timeout=30)

    assert Dispute.objects.get().is_open
    assert balances("payable", "pool") == {}
    assert [finding for finding in check_books().findings if finding.code == "disputed_not_frozen"] == []


def test_a_royalty_is_divided_with_its_payment_or_not_paid_at_all(
    db: Any, alice: Any, carol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So there is no paid royalty left to be divided after a dispute of its payment was opened."""
    version = PublishedVersionFactory(contributions={alice: 1})
    license = LicenseFactory(licensee=carol, offer=OfferFactory(version=version, royalty_bps=1_000))
    result = PublishedResultFactory(license=license, shares={alice: 1})
    yesterday = clock.today() - timedelta(days=1)
    invoice = royalties.report_revenue(
        licensee=carol, model=result.model, period_start=yesterday, period_end=yesterday, revenue=Money(1_000 * DOLLAR, "USD"), key="k"
    )  # fmt: skip
    before = ledger.balances()

    def fails(**_: Any) -> None:
        raise RuntimeError("The disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(royalties, "divide", fails)
        with pytest.raises(RuntimeError):
            collect(invoice)
    payment = Payment.objects.get(invoice=invoice)
    assert (payment.status, payment.charge_id, ledger.balances()) == ("open", None, before)

    payment = collect(invoice)
    assert payment.status == "paid" and invoice.lines.get().division.amount_micros == 90 * DOLLAR
    monkeypatch.setattr(gateway, "get_dispute", lambda _: told_of(payment))
    disputes.refresh_dispute("dp_told")
    assert royalties.divide_what_is_ready() == 0
    assert ledger.balances(prefix="payable") == {}
    assert [finding for finding in check_books().findings if finding.code == "disputed_not_frozen"] == []
