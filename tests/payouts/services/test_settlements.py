"""Events that could not be applied, settled by two of the staff; and money that is for nothing that we sell, given back."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, transaction

from marketplace import clock
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, Order, User
from marketplace.money import Money
from payouts import gateway, ledger, tasks
from payouts.errors import AlreadyDecided, FourEyes, NotRefundable, SettlementNotPossible
from payouts.models import (
    EventSettlement,
    Movement,
    Payment,
    ReconciliationRun,
    Refund,
    StripeEvent,
    SurplusCharge,
)
from payouts.services import closing, manual_entries, proving, refunds, sales, settlements
from payouts.services.bookings import book_checkout
from payouts.services.events import sweep_events
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile, request_reconciliation, settle_funds
from tests.factories.marketplace import OrderFactory, UserFactory
from tests.payouts.services.test_refunds import BACK, clean, run

EXPLAINED, REFUND = EventSettlement.Act.EXPLAINED, EventSettlement.Act.REFUND


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def ben(db: Any) -> User:
    return UserFactory(is_staff=True)


def hear_all() -> None:
    sweep_events()
    for row in StripeEvent.objects.filter(status="queued").order_by("pk"):
        tasks.apply_stripe_event(row.pk)


def paid_twice(stripe: Any, carol: Any, *, card: str = "4242424242424242") -> Order:
    """Two pages of one order, both paid: the first one's number was lost between Stripe and us."""
    order = OrderFactory(buyer=carol)
    stripe.pay(sales.start_checkout(order=order, **BACK))
    Payment.objects.update(checkout_id=None, checkout_attempt=2)
    stripe.pay(sales.start_checkout(order=order, **BACK), card=card)
    book_checkout(
        next(one["id"] for one in stripe.objects("checkout/sessions") if one["id"] != Payment.objects.get().checkout_id)
    )
    hear_all()
    return order


def paid_for_a_cancelled_order(stripe: Any, carol: Any) -> Order:
    order = OrderFactory(buyer=carol)
    stripe.pay(sales.start_checkout(order=order, **BACK))
    Order.objects.update(status=Order.Status.CANCELLED)  # which no service does to an order with a page that is paid
    hear_all()
    return order


def failed() -> StripeEvent:
    event = StripeEvent.unsettled().filter(type="checkout.session.completed").get()
    assert event.error_code in ("payment_mismatch", "order_not_payable")
    return event


def refund_surplus(ann: User, ben: User) -> Refund:
    proposal = settlements.propose(event=failed(), act=REFUND, reason="It was paid twice.", user=ann)
    settlements.confirm(settlement=proposal, user=ben)
    return Refund.objects.get()


@pytest.mark.parametrize("happened", [paid_twice, paid_for_a_cancelled_order])
def test_money_that_is_for_nothing_is_booked_and_goes_back_when_two_have_said_so(
    stripe: Any, carol: Any, ann: User, ben: User, happened: Any
) -> None:
    order = happened(stripe, carol)
    before = ledger.balances()
    codes = {difference.code for difference in reconcile().differences}
    assert {"event_not_applied", "charge_not_booked", "cash_differs"} <= codes

    proposal = settlements.propose(event=failed(), act=REFUND, reason="It was paid twice.", user=ann)
    assert proposal.amount == Money(100_000_000, "USD") and ledger.balances() == before  # nothing is booked yet
    settlements.confirm(settlement=proposal, user=ben)
    settlements.confirm(settlement=proposal, user=ben)  # a second click

    refund = Refund.objects.get()
    assert (refund.reason, refund.state, refund.requested_by, refund.note) == (
        "surplus",
        "intended",
        ben,
        "It was paid twice.",
    )
    assert ledger.balance("refunding:USD") == -100_000_000 and ledger.balance("surplus:USD") == 0
    assert check_books().findings == []
    assert run(refund).state == Refund.State.SENT
    hear_all()

    assert set(StripeEvent.objects.values_list("status", flat=True)) == {"done"}
    assert Order.objects.get(pk=order.pk).status == ("paid" if happened is paid_twice else "cancelled")
    for what in (stripe.advance(days=3), settle_funds()):
        assert what is None or what
    clean()
    # What it cost is Stripe's fee of the charge, which it does not give back.
    assert ledger.balance("expense:stripe_fees:USD") - before.get("expense:stripe_fees:USD", 0) == 3_200_000
    assert [one.action for one in AuditEvent.objects.filter(action__startswith="stripe_event").order_by("pk")] == [
        "stripe_event.settlement_proposed",
        "stripe_event.settlement_confirmed",
    ]


def test_after_the_settlement_the_look_is_clean_and_the_month_closes_by_itself(
    client: Any, stripe: Any, carol: Any, ann: User, ben: User
) -> None:
    paid_for_a_cancelled_order(stripe, carol)
    look = request_reconciliation(key="before")
    tasks.execute_reconciliation(look.pk)
    assert client.get("/booksz").status_code == 503

    run(refund_surplus(ann, ben))
    hear_all()
    for what in (clock.advance(timedelta(days=40)), stripe.advance(days=40), settle_funds()):
        assert what is None or what
    look = request_reconciliation(key="after")
    tasks.execute_reconciliation(look.pk)
    tasks.execute_proof(proving.request_proof(key="after").pk)

    assert ReconciliationRun.objects.get(key="after").n_differences == 0
    assert client.get("/booksz").status_code == 200
    assert closing.close_what_is_over()


def test_what_was_settled_otherwise_is_named_no_more(stripe: Any, carol: Any, ann: User, ben: User) -> None:
    event = StripeEvent.objects.create(
        event_id="evt_1",
        type="charge.dispute.created",
        endpoint="platform",
        payload='{"data": {"object": {"id": "dp_1", "object": "dispute"}}}',
        status="failed",
        error_code="payment_mismatch",
        error_message="It is about a charge that we do not know.",
    )
    assert [one.code for one in reconcile().differences] == ["event_not_applied"]
    proposal = settlements.propose(event=event, act=EXPLAINED, reason="Of our other shop.", user=ann)
    assert settlements.propose(event=event, act=EXPLAINED, reason="Of our other shop.", user=ann) == proposal
    assert [one.code for one in reconcile().differences] == ["event_not_applied"]

    settlements.confirm(settlement=proposal, user=ben, note="I looked too.")

    assert reconcile().differences == []
    assert not settlements.retry(event=event, user=ann)
    assert settlements.settled_objects() == {"dp_1"}
    with pytest.raises(SettlementNotPossible, match="needs no settlement"):
        settlements.propose(event=event, act=EXPLAINED, reason="Once more.", user=ann)


def test_four_eyes_see_every_settlement(stripe: Any, carol: Any, ann: User, ben: User, alice: Any) -> None:
    paid_for_a_cancelled_order(stripe, carol)
    with pytest.raises(NotAllowed, match="Only staff"):
        settlements.propose(event=failed(), act=REFUND, reason="Please.", user=alice.user)
    with pytest.raises(InvalidInput, match="Say why"):
        settlements.propose(event=failed(), act=REFUND, reason="  ", user=ann)
    proposal = settlements.propose(event=failed(), act=REFUND, reason="Paid after it was cancelled.", user=ann)
    with pytest.raises(SettlementNotPossible, match="to be decided first"):
        settlements.propose(event=failed(), act=EXPLAINED, reason="Or so.", user=ben)

    for user, refusal, match in ((ann, FourEyes, "You proposed it"), (alice.user, NotAllowed, "Only staff")):
        with pytest.raises(refusal, match=match):
            settlements.confirm(settlement=proposal, user=user)
    with pytest.raises(IntegrityError), transaction.atomic():
        EventSettlement.objects.update(status="confirmed", decided_by=ann, decided_at=clock.now())
    with pytest.raises(DatabaseError, match="keeps what was proposed"), transaction.atomic():
        EventSettlement.objects.update(amount_micros=1)
    with pytest.raises(DatabaseError, match="only staff"), transaction.atomic():
        left = UserFactory(is_staff=True, is_active=False)
        EventSettlement.objects.update(status="confirmed", decided_by=left, decided_at=clock.now())
    with pytest.raises(DatabaseError, match="waits for a second person"), transaction.atomic():
        EventSettlement.objects.create(
            event=failed(),
            act=EXPLAINED,
            reason="Both at once.",
            proposed_by=ann,
            status="confirmed",
            decided_by=ben,
            decided_at=clock.now(),
        )
    assert not SurplusCharge.objects.exists() and not Refund.objects.exists()

    with pytest.raises(InvalidInput, match="why it is rejected"):
        settlements.reject(settlement=proposal, user=ben, note="")
    settlements.reject(settlement=proposal, user=ben, note="Ask the buyer first.")
    with pytest.raises(AlreadyDecided, match="has rejected it"):
        settlements.confirm(settlement=proposal, user=UserFactory(is_staff=True))
    assert "event_not_applied" in {one.code for one in reconcile().differences}
    assert settlements.propose(event=failed(), act=REFUND, reason="They agreed.", user=ben).pk != proposal.pk


def test_an_event_is_tried_again_when_its_cause_has_passed(stripe: Any, carol: Any, ann: User, alice: Any) -> None:
    order = paid_for_a_cancelled_order(stripe, carol)
    Order.objects.filter(pk=order.pk).update(status=Order.Status.PLACED)
    event = failed()
    with pytest.raises(NotAllowed):
        settlements.retry(event=event, user=alice.user)

    assert settlements.retry(event=event, user=ann)
    assert not settlements.retry(event=event, user=ann)  # it is queued
    hear_all()

    assert Order.objects.get().status == Order.Status.PAID
    (logged,) = AuditEvent.objects.filter(action="stripe_event.retried")
    assert (logged.actor, logged.detail["before"]["error_code"]) == (ann, "order_not_payable")


def test_what_was_refunded_in_stripes_dashboard_is_not_refunded_again(
    stripe: Any, carol: Any, ann: User, ben: User
) -> None:
    paid_for_a_cancelled_order(stripe, carol)
    (session,) = stripe.objects("checkout/sessions")
    charge = gateway.get_checkout(session["id"]).charge
    assert charge is not None
    gateway.create_refund(charge=charge, amount_minor=4_000, reason="duplicate", key="by hand")
    hear_all()

    refund_surplus_of = settlements.propose(event=failed(), act=REFUND, reason="Cancelled.", user=ann)
    settlements.confirm(settlement=refund_surplus_of, user=ben)
    by_hand, ours = Refund.objects.order_by("amount_micros")
    assert (by_hand.state, by_hand.reason, by_hand.amount_micros) == ("sent", "at_stripe", 40_000_000)
    assert (ours.state, ours.amount_micros) == ("intended", 60_000_000)
    run(ours)
    hear_all()

    clean()
    with pytest.raises(NotRefundable), transaction.atomic():
        refunds.refund_surplus(
            surplus=SurplusCharge.objects.get(), amount=Money(10_000, "USD"), note="", user=ann, key="more"
        )
    with pytest.raises(DatabaseError, match="too much"), transaction.atomic():
        Refund.objects.create(
            surplus=SurplusCharge.objects.get(),
            amount_micros=10_000,
            currency="USD",
            reason="surplus",
            key="more",
            intended_at=clock.now(),
        )


def test_a_refund_that_comes_back_waits_for_another_decision(stripe: Any, carol: Any, ann: User, ben: User) -> None:
    paid_twice(stripe, carol, card="4000000000005126")  # its bank sends a refund back a day later
    settlements.confirm(settlement=settlements.propose(event=failed(), act=REFUND, reason="Twice.", user=ann), user=ben)
    run(Refund.objects.get())
    for what in (stripe.advance(days=3), hear_all()):
        assert what is None
    settle_funds()

    assert Refund.objects.get().state == Refund.State.FAILED
    assert ledger.balance("surplus:USD") == -100_000_000
    assert check_books().findings == []
    assert [one.code for one in reconcile().differences] == ["surplus_money"]
    event = SurplusCharge.objects.get().event
    again = settlements.propose(event=event, act=REFUND, reason="Once more.", user=ben)
    settlements.confirm(settlement=again, user=ann)
    assert Refund.objects.filter(state="intended").count() == 1 and reconcile().differences == []

    run(Refund.objects.filter(state="intended").get())
    for what in (stripe.advance(days=3), hear_all()):
        assert what is None
    settle_funds()
    # The card takes nothing: it is returned by bank transfer, and two say so.
    settlements.confirm(
        settlement=settlements.propose(event=event, act=EXPLAINED, reason="By transfer 17.", user=ann), user=ben
    )
    legs = {"surplus:USD": 100_000_000, "bank:USD": -100_000_000}
    entry = manual_entries.propose(user=ann, key="k", legs=legs, reason="Transfer 17")
    manual_entries.approve(manual=entry, user=ben)
    assert reconcile().differences == []
    assert check_books().findings == []
    with pytest.raises(SettlementNotPossible):  # the card does not get it as well
        settlements.propose(event=event, act=REFUND, reason="Again.", user=ann)
    with pytest.raises(NotRefundable, match="manual entry"), transaction.atomic():
        refunds.refund_surplus(
            surplus=SurplusCharge.objects.get(), amount=Money(1_000_000, "USD"), note="again", user=ann, key="again"
        )


def test_a_charge_is_never_both_paid_and_surplus(stripe: Any, carol: Any, ann: User, ben: User) -> None:
    order = paid_for_a_cancelled_order(stripe, carol)
    proposal = settlements.propose(event=failed(), act=REFUND, reason="Cancelled.", user=ann)
    Order.objects.filter(pk=order.pk).update(status=Order.Status.PLACED)
    settlements.retry(event=failed(), user=ann)
    hear_all()  # it has paid the order meanwhile

    with pytest.raises(SettlementNotPossible, match="not what it was"):
        settlements.confirm(settlement=proposal, user=ben)
    assert not SurplusCharge.objects.exists()
    with pytest.raises(DatabaseError, match="paid something"), transaction.atomic():
        SurplusCharge.objects.create(
            charge_id=Payment.objects.get().charge_id,
            event=StripeEvent.objects.first(),
            amount_micros=1,
            currency="USD",
            booked_at=clock.now(),
        )


def test_an_order_whose_page_took_another_amount_can_be_paid_once_that_went_back(
    stripe: Any, carol: Any, ann: User, ben: User
) -> None:
    order = OrderFactory(buyer=carol)
    stripe.pay(sales.start_checkout(order=order, **BACK))
    Payment.objects.update(amount_micros=110_000_000)
    hear_all()
    run(refund_surplus(ann, ben))
    Payment.objects.update(amount_micros=100_000_000)

    stripe.pay(sales.start_checkout(order=order, **BACK))
    hear_all()

    assert Order.objects.get().status == Order.Status.PAID
    assert Movement.objects.filter(kind="surplus").count() == 1
    clean()
