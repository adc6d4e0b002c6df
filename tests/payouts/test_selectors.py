from datetime import timedelta
from typing import Any

from marketplace import clock, jobs
from marketplace.money import Money
from payouts import ledger
from payouts.models import JournalEntry, Payout, PayoutRun
from payouts.selectors import (
    earnings_of,
    lines_of,
    next_payout,
    open_months_of,
    payouts_of,
    royalty_invoices_of,
    waiting_pools_of,
)
from payouts.services.transfers import _intend, request_payout_run
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell


def usd(amount: str) -> Money:
    return Money.parse(amount, "USD")


def test_earnings_say_where_every_micro_is(db: Any, alice: Any, bob: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 2, bob: 1})
    offer = OfferFactory(version=version, price_micros=10_000_000, upfront_bps=9_000, pool_bps=0)
    payment = sell(OrderFactory(offers=[offer]))
    (before,) = earnings_of(alice)
    assert (before.earned, before.pending, before.due) == (usd("6"), usd("6"), usd("0"))
    assert [(wait.amount, wait.n_lines) for wait in before.waits] == [(usd("6"), 1)]
    assert [coming.amount for coming in next_payout(alice)] == [usd("6")]
    assert "Set up payouts" in before.reason

    clock.advance(timedelta(days=31))
    net = payment.amount_micros - (payment.fee_micros or 0)
    ledger.post(
        key="settle", kind=JournalEntry.Kind.SETTLE, postings={"cash:available:USD": net, "cash:pending:USD": -net}
    )
    payee = PayeeAccountFactory(party=alice)
    held = jobs.claim(PayoutRun, request_payout_run(currency="USD", key="run").pk)
    assert held is not None
    _intend(held, [payee.party_id])
    sell(OrderFactory(offers=[offer]))

    for status, where in (("intended", "in_transit"), ("sent", "sent"), ("paid", "paid")):
        Payout.objects.update(status=status, transfer_id="tr_1")
        (now,) = earnings_of(alice)
        parts = {name: getattr(now, name) for name in ("pending", "due", "in_transit", "sent", "paid")}
        assert parts == {
            "pending": usd("6"),
            "due": usd("0"),
            "in_transit": usd("0"),
            "sent": usd("0"),
            "paid": usd("0"),
        } | {where: usd("6")}
        assert sum(part.micros for part in parts.values()) == now.earned.micros


def test_earnings_cost_the_same_queries_at_one_line_and_at_three(
    db: Any, alice: Any, django_assert_num_queries: Any
) -> None:
    version = PublishedVersionFactory(contributions={alice: 1})
    for n_sales in (1, 2):
        for _ in range(n_sales):
            sell(OrderFactory(offers=[OfferFactory(version=version)]))
        with django_assert_num_queries(11):
            earnings_of(alice)
        with django_assert_num_queries(1):
            assert [line.division.version.dataset.title for line in lines_of(alice)]


def test_a_contributor_sees_the_pools_that_wait(db: Any, alice: Any, mallory: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 1})
    sell(OrderFactory(offers=[OfferFactory(version=version)]))

    assert [pool.amount for pool in waiting_pools_of(alice)] == [usd("60")]
    assert [(year, month) for year, month in open_months_of(alice)] == [(clock.now().year, clock.now().month)]
    assert not waiting_pools_of(mallory).exists()


def test_a_stranger_sees_nothing(db: Any, alice: Any, mallory: Any) -> None:
    sell(OrderFactory(offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}))]))

    assert earnings_of(mallory) == []
    assert next_payout(mallory) == []
    assert open_months_of(mallory) == []
    for rows in (lines_of(mallory), payouts_of(mallory), royalty_invoices_of(mallory)):
        assert list(rows) == []
