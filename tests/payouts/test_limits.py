"""What the services refuse, PostgreSQL refuses to whoever goes past them (migration `0012_limits_of_the_services`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from marketplace import clock
from marketplace.models import User
from marketplace.money import Money
from payouts.models import (
    ClawbackLine,
    ClawbackUndo,
    DivisionLine,
    Payment,
    Payout,
    PayoutRun,
    Reclaim,
    Refund,
    RoyaltyPool,
    TransferReversal,
)
from payouts.services import refunds
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PoolFactory, pay_out, sell

DOLLAR = 1_000_000


@contextmanager
def refused(why: str) -> Iterator[None]:
    with pytest.raises(IntegrityError, match=why), transaction.atomic():
        yield
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")


@pytest.fixture
def refund(db: Any, alice: Any) -> Refund:
    """60 of 100 USD go back: 6 of the fee and 54 of what alice was given."""
    offer = OfferFactory(
        version=PublishedVersionFactory(contributions={alice: 1}),
        price_micros=100 * DOLLAR,
        upfront_bps=9_000,
        pool_bps=0,
    )
    payment = sell(OrderFactory(offers=[offer]))
    staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
    made = refunds.request_refund(
        payment=payment,
        amount=Money(60 * DOLLAR, "USD"),
        user=staff,
        reason=Refund.Reason.GOODWILL,
        note="Late.",
        key="k",
    )
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED")
    return made


def test_a_reclaim_is_of_what_its_clawback_takes_and_not_more(refund: Refund, bob: Any) -> None:
    line = ClawbackLine.objects.get(clawback=refund.clawback)
    other = sell(OrderFactory(offers=[OfferFactory(version=PublishedVersionFactory(contributions={bob: 1}))]))
    theirs = DivisionLine.objects.filter(division__order_line__order=other.order).first()

    with refused("was not divided from"):
        Reclaim.objects.create(clawback_line=line, division_line=theirs, amount_micros=1)
    mine = Reclaim.objects.get(clawback_line=line)
    assert mine.amount_micros == 54 * DOLLAR
    again = ClawbackLine.objects.create(
        clawback=refund.clawback, order_line=line.order_line, amount_micros=10, fee_micros=0, pool_micros=0
    )
    with refused("more than the 0 they give is too much"):
        Reclaim.objects.create(clawback_line=again, division_line=mine.division_line, amount_micros=11)


def test_a_refund_that_stands_is_not_given_back(refund: Refund) -> None:
    with refused("undo refused: the refund of clawback"):
        ClawbackUndo.objects.create(clawback=refund.clawback, undone_at=clock.now())


def test_nothing_is_asked_back_from_whoever_owes_nothing(db: Any, alice: Any) -> None:
    payout = pay_out(alice, Money(DOLLAR, "USD"), status="sent", is_owed=False)

    with refused("party .* owes 0"):
        TransferReversal.objects.create(payout=payout, amount_micros=10_000, currency="USD", intended_at=clock.now())
    with refused("is in USD, not in EUR"):
        TransferReversal.objects.create(payout=payout, amount_micros=10_000, currency="EUR", intended_at=clock.now())


def test_a_payment_covers_what_it_is_for_and_stays_what_it_was(db: Any) -> None:
    order = OrderFactory()
    with refused("is less than"):
        Payment.objects.create(order=order, currency="USD", amount_micros=order.total_micros - 10_000)
    with refused("is less than"):
        Payment.objects.create(order=order, currency="EUR", amount_micros=order.total_micros)
    unpaid = Payment.objects.create(order=OrderFactory(), currency="USD", amount_micros=order.total_micros)
    with refused("is less than"):
        Payment.objects.filter(pk=unpaid.pk).update(amount_micros=unpaid.amount_micros - 1)
    payment = sell(order)
    Payment.objects.filter(pk=payment.pk).update(settled_at=timezone.now())

    for changes in (
        {"amount_micros": 1},
        {"fee_micros": 1},
        {"status": "open"},
        {"charge_id": "ch_x"},
        {"settled_at": None},
    ):
        with refused("keeps what it is about"):
            Payment.objects.filter(pk=payment.pk).update(**changes)


def test_a_pool_is_at_most_its_price_and_is_released_once(db: Any) -> None:
    pool = PoolFactory()
    RoyaltyPool.objects.update(released_at=clock.now())

    for changes in ({"amount_micros": 1}, {"currency": "EUR"}, {"released_at": None}):
        with refused("keeps what it is about"):
            RoyaltyPool.objects.filter(pk=pool.pk).update(**changes)
    with refused("its pool cannot be"):
        RoyaltyPool.objects.filter(pk=pool.pk).update(amount_micros=10**15)


def test_a_payout_keeps_what_it_is_about_and_only_goes_forward(db: Any, alice: Any) -> None:
    run = PayoutRun.objects.create(currency="USD", due_until=clock.now(), key="one")
    given = {"run": run, "party": alice, "destination": "acct_1", "currency": "USD", "intended_at": clock.now()}
    pay_out(alice, Money(DOLLAR, "USD"), run=run, is_owed=False)

    for changes in ({"amount_micros": 1}, {"destination": "acct_2"}):
        with refused("keeps what it is about"):
            Payout.objects.update(**changes)
    with refused("does not go from intended to paid"):
        Payout.objects.update(status="paid", transfer_id="tr_1")
    with refused("is in USD, not in EUR"):
        Payout.objects.create(**given | {"currency": "EUR"}, amount_micros=1)
    with refused("is append-only"):
        Payout.objects.all().delete()
