"""Refunds: full and partial, before and after division, before and after the transfer; and what never happens."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, ProgrammingError, connection, connections, transaction
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketplace import clock, jobs
from marketplace.errors import DomainError, InvalidInput, KeyReused, NotAllowed
from marketplace.models import AuditEvent, License, Order, User
from marketplace.money import Money
from marketplace.services.downloads import LicenseNotLive, note_first_download
from payouts import chart, gateway, ledger
from payouts.errors import NothingOwed, NotRefundable
from payouts.models import (
    Clawback,
    JournalEntry,
    Movement,
    Payment,
    Payout,
    PayoutRun,
    Refund,
    RoyaltyPool,
    TransferReversal,
)
from payouts.services import attempts, clawbacks, events, recoveries, refunds, royalties, transfers
from payouts.services.proofs import check_books
from payouts.services.reconciliation import Difference, reconcile, settle_funds
from payouts.services.sales import start_checkout
from payouts.services.transfers import request_payout_run
from portal.environment import role_url
from portal.roles import APP
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell

ROOT = Path(__file__).resolve().parents[3]
BACK = {"success_url": "http://shop.test/done", "cancel_url": "http://shop.test/order"}
DOLLAR = 1_000_000


@pytest.fixture
def staff(db: Any) -> User:
    return User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)


def order_of(version: Any, *, buyer: Any = None, price: int = 100, **offer: Any) -> Order:
    """10 % fee, 30 % upfront and 60 % pooled, unless told otherwise."""
    terms = {"price_micros": price * DOLLAR, "platform_fee_bps": 1_000, "upfront_bps": 3_000, "pool_bps": 6_000} | offer
    order: Order = OrderFactory(offers=[OfferFactory(version=version, **terms)], **({"buyer": buyer} if buyer else {}))
    return order


def run(refund: Refund) -> Refund:
    """As the task does, once the pause after a failure is over."""
    Refund.objects.filter(pk=refund.pk).update(due_at=timezone.now())
    try:
        with jobs.claimed(Refund, refund.pk) as held:
            if held:
                refunds.execute_refund(held)
    finally:
        refund.refresh_from_db()
    return refund


def pay_out(key: str) -> None:
    requested = request_payout_run(currency="USD", key=key)
    with jobs.claimed(PayoutRun, requested.pk) as held:
        assert held
        transfers.execute_payout_run(held)


def back(payment: Payment, amount: int, staff: User, key: str = "one", **given: Any) -> Refund:
    reason = given.pop("reason", Refund.Reason.GOODWILL)
    return refunds.request_refund(
        payment=payment, amount=Money(amount, "USD"), reason=reason, note="asked by mail", user=staff, key=key, **given
    )


def clean() -> None:
    """The books prove themselves and are Stripe's."""
    assert check_books().findings == []
    assert reconcile().differences == []


def balances(*names: str) -> dict[str, int]:
    return {code: micros for name in names for code, micros in ledger.balances(prefix=name).items()}


class Told:
    """Stripe's word on refunds, told by the test; it keeps what it made by mark, as a charge's list of refunds does."""

    def __init__(self) -> None:
        self.made: dict[str, gateway.Refund] = {}
        self.keys: list[str] = []
        self.answers: list[Exception | None] = []
        self.after = False  # whether the exception comes after the refund was made

    def create_refund(self, *, charge: str, amount_minor: int, reason: str, key: str, metadata: Any) -> gateway.Refund:
        self.keys.append(key)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None and not self.after:
            raise answer
        mark = metadata["refund"]
        if mark not in self.made:
            self.made[mark] = refund_answer(charge, amount_minor, mark)
        if answer is not None:
            raise answer
        return self.made[mark]

    def find_refund(self, *, charge: str, mark: str) -> gateway.Refund | None:
        return self.made.get(mark)


def refund_answer(charge: str, amount_minor: int, mark: str, *, status: str = "succeeded") -> gateway.Refund:
    def movement(kind: str, amount: int) -> gateway.BalanceTransaction:
        return gateway.BalanceTransaction(
            id=f"txn_{kind}_{mark}",
            kind=kind,
            source=f"re_{mark}",
            amount_minor=amount,
            fee_minor=0,
            net_minor=amount,
            currency="USD",
            is_available=True,
            available_on=timezone.now(),
            created_at=timezone.now(),
        )

    return gateway.Refund(
        id=f"re_{mark}",
        charge=charge,
        amount_minor=amount_minor,
        currency="USD",
        status=status,
        taken=movement("refund", -amount_minor),
        returned=movement("refund_failure", amount_minor) if status == "failed" else None,
        failure_reason="lost_or_stolen_card" if status == "failed" else "",
        created_at=timezone.now(),
        metadata={"refund": mark},
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    stripe = Told()
    monkeypatch.setattr(gateway, "create_refund", stripe.create_refund)
    monkeypatch.setattr(gateway, "find_refund", stripe.find_refund)
    monkeypatch.setattr(attempts.time, "sleep", lambda seconds: None)
    return stripe


def uncertain(status: int | None, *, spent: bool) -> gateway.StripeUncertain:
    return gateway.StripeUncertain("?", http_status=status, retry_after_seconds=None, is_key_spent=spent)


TIMEOUT, SERVER_ERROR = uncertain(None, spent=False), uncertain(500, spent=True)


# --- what it takes from whom ------------------------------------------------------------------------------------------


def test_a_full_refund_before_division_leaves_every_account_of_the_sale_at_zero(
    told: Told, staff: User, alice: Any, bob: Any, carol: Any
) -> None:
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 2, bob: 1}), buyer=carol))

    refund = run(back(payment, 100 * DOLLAR, staff))

    assert refund.state == Refund.State.SENT
    assert balances("payable", "pool", "receivable", "refunding", "revenue", "clearing") == {}
    assert ledger.balances(prefix="expense") == {"expense:stripe_fees:USD": 3_200_000}  # is not returned
    assert sum(ledger.balances(prefix="cash").values()) == -3_200_000
    assert Order.objects.get().status == Order.Status.REFUNDED
    assert License.objects.get().revoked_at is not None
    assert check_books().findings == []


def test_a_partial_refund_takes_the_fee_in_proportion_and_the_pool_first(told: Told, staff: User, alice: Any) -> None:
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 1})))

    run(back(payment, 40 * DOLLAR, staff))

    assert balances("payable", "pool", "revenue") == {
        chart.payable(alice, "USD"): -30 * DOLLAR,
        chart.royalty_pool(RoyaltyPool.objects.get()): -24 * DOLLAR,  # 60 − (40 − 4)
        "revenue:platform_fee:USD": -6 * DOLLAR,
    }
    assert (Order.objects.get().status, License.objects.get().revoked_at) == (Order.Status.PAID, None)
    clock.advance(timedelta(days=400))
    royalties.divide_what_is_ready()
    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -54 * DOLLAR}
    assert check_books().findings == []


def test_a_second_partial_refund_takes_the_rest_of_the_pool_and_then_each_payee_in_proportion(
    told: Told, staff: User, alice: Any, bob: Any
) -> None:
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 2, bob: 1})))
    run(back(payment, 40 * DOLLAR, staff, "one"))

    run(back(payment, 30 * DOLLAR, staff, "two"))

    # 70 back: 7 of the fee, 60 of the pool, 3 of alice's 20 and bob's 10.
    assert balances("payable", "pool", "receivable", "revenue") == {
        chart.payable(alice, "USD"): -18 * DOLLAR,
        chart.payable(bob, "USD"): -9 * DOLLAR,
        "revenue:platform_fee:USD": -3 * DOLLAR,
    }
    assert royalties.divide_what_is_ready() == 0
    clock.advance(timedelta(days=400))
    assert royalties.divide_what_is_ready() == 0  # nothing is left to release
    assert check_books().findings == []


def test_after_division_the_payees_give_back_what_the_pool_gave_them(
    told: Told, staff: User, alice: Any, bob: Any
) -> None:
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 2, bob: 1})))
    clock.advance(timedelta(days=400))
    royalties.divide_what_is_ready()

    run(back(payment, 50 * DOLLAR, staff, "half"))

    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -30 * DOLLAR,
        chart.payable(bob, "USD"): -15 * DOLLAR,
    }
    run(back(payment, 50 * DOLLAR, staff, "rest"))
    assert balances("payable", "pool", "receivable", "revenue") == {}
    assert check_books().findings == []


def test_a_line_of_an_order_is_refunded_by_itself(told: Told, staff: User, alice: Any, bob: Any) -> None:
    first, second = (PublishedVersionFactory(contributions={party: 1}) for party in (alice, bob))
    terms = {"price_micros": 50 * DOLLAR, "platform_fee_bps": 1_000, "upfront_bps": 9_000, "pool_bps": 0}
    order = OrderFactory(offers=[OfferFactory(version=version, **terms) for version in (first, second)])
    payment = sell(order)
    line = order.lines.get(version=first)

    run(back(payment, 50 * DOLLAR, staff, line=line.pk))

    assert ledger.balances(prefix="payable") == {chart.payable(bob, "USD"): -45 * DOLLAR}
    assert [bool(one.revoked_at) for one in License.objects.order_by("order_line")] == [True, False]
    assert Order.objects.get().status == Order.Status.PAID
    with pytest.raises(NotRefundable):
        back(payment, DOLLAR, staff, "again", line=line.pk)
    with pytest.raises(InvalidInput):
        back(payment, DOLLAR, staff, "unknown", line=line.pk + 1_000)
    assert check_books().findings == []


# --- after the transfer -----------------------------------------------------------------------------------------------


class Transfers:
    """A Stripe that makes every transfer and reversal it is asked for, or refuses the reversals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses = False
        monkeypatch.setattr(gateway, "create_transfer", self.create_transfer)
        monkeypatch.setattr(gateway, "create_reversal", self.create_reversal)
        monkeypatch.setattr(gateway, "find_reversal", lambda **asked: None)

    def create_transfer(self, *, key: str, **params: Any) -> gateway.Transfer:
        return gateway.Transfer(
            id=f"tr_{key}",
            amount_minor=params["amount_minor"],
            currency=params["currency"],
            destination=params["destination"],
            transfer_group=params["transfer_group"],
            destination_payment="py_1",
            balance_transaction="txn_1",
            reversed_minor=0,
            created_at=timezone.now(),
            metadata={},
        )

    def create_reversal(self, *, transfer: str, amount_minor: int, key: str, metadata: Any) -> gateway.Reversal:
        if self.refuses:
            raise gateway.StripeRefused("balance_insufficient", "The account has not got it.", 400)
        mark = metadata["reversal"]
        taken = refund_answer("ch", -amount_minor, mark).taken
        return gateway.Reversal(f"trr_{mark}", transfer, amount_minor, "USD", taken, {"reversal": mark})


@pytest.fixture
def paid_out(told: Told, monkeypatch: pytest.MonkeyPatch, alice: Any) -> tuple[Payment, Transfers]:
    """Alice's 90 of a sale of 100 have been sent; cash is there for what follows."""
    stripe = Transfers(monkeypatch)
    PayeeAccountFactory(party=alice)
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0))
    settle(payment)
    clock.advance(timedelta(days=31))
    pay_out("first")
    assert Payout.objects.get().status == Payout.Status.SENT
    return payment, stripe


def settle(payment: Payment) -> None:
    assert payment.fee_micros is not None
    net = payment.amount_micros - payment.fee_micros
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": net, "cash:pending:USD": -net},
    )
    Payment.objects.filter(pk=payment.pk).update(settled_at=clock.now())


def test_what_was_sent_is_owed_and_later_earnings_pay_it_first(paid_out: Any, staff: User, alice: Any) -> None:
    payment, _ = paid_out
    run(back(payment, 50 * DOLLAR, staff))
    assert balances("payable", "receivable") == {chart.receivable(alice, "USD"): 45 * DOLLAR}
    assert recoveries.owing() == {(alice.pk, "USD"): Money(45 * DOLLAR, "USD")}
    assert check_books().findings == []

    again = sell(order_of(PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0))
    settle(again)
    assert recoveries.net_what_became_payable() == 1
    assert recoveries.net_what_became_payable() == 0
    assert balances("payable", "receivable") == {chart.payable(alice, "USD"): -45 * DOLLAR}
    assert transfers.due_micros(party_id=alice.pk, currency="USD", until=clock.now()) == -45 * DOLLAR
    clock.advance(timedelta(days=31))
    assert transfers.due_micros(party_id=alice.pk, currency="USD", until=clock.now()) == 45 * DOLLAR
    pay_out("second")

    assert [payout.amount_micros for payout in Payout.objects.order_by("pk")] == [90 * DOLLAR, 45 * DOLLAR]
    assert balances("payable", "receivable") == {}
    assert check_books().findings == []


def test_a_run_nets_a_debt_by_itself(paid_out: Any, staff: User, alice: Any) -> None:
    payment, _ = paid_out
    run(back(payment, 100 * DOLLAR, staff))
    settle(sell(order_of(PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0)))
    clock.advance(timedelta(days=31))

    pay_out("second")  # 90 owed, 90 earned

    assert Payout.objects.count() == 1
    assert balances("payable", "receivable") == {}
    assert check_books().findings == []


def test_of_a_payee_who_was_sent_a_part_the_rest_is_taken_first(
    told: Told, staff: User, paid_out: Any, alice: Any
) -> None:
    payment, _ = paid_out
    other = sell(order_of(PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0))  # on hold

    run(back(other, 100 * DOLLAR, staff))
    assert balances("payable", "receivable") == {}  # what was not sent

    run(back(payment, 10 * DOLLAR, staff, "sent"))
    assert balances("payable", "receivable") == {chart.receivable(alice, "USD"): 9 * DOLLAR}
    assert check_books().findings == []


def test_a_transfer_is_reversed_as_a_courtesy_and_never_beyond_the_debt(paid_out: Any, staff: User, alice: Any) -> None:
    payment, stripe = paid_out
    payout = Payout.objects.get()
    ask: Callable[[int], TransferReversal] = lambda amount: recoveries.request_reversal(  # noqa: E731
        payout=payout, amount=Money(amount, "USD"), user=staff, note="refund of order 1"
    )
    with pytest.raises(NothingOwed):
        ask(10_000)
    run(back(payment, 50 * DOLLAR, staff))
    with pytest.raises(NothingOwed):
        ask(45 * DOLLAR + 10_000)
    with pytest.raises(InvalidInput):
        ask(45 * DOLLAR + 1)

    reversal = ask(20 * DOLLAR)
    with pytest.raises(NothingOwed):
        ask(30 * DOLLAR)  # 20 are asked for already
    with jobs.claimed(TransferReversal, reversal.pk) as held:
        assert held
        recoveries.execute_reversal(held)

    assert ledger.balances(prefix="receivable") == {chart.receivable(alice, "USD"): 25 * DOLLAR}
    assert check_books().findings == []
    stripe.refuses = True
    refused = ask(25 * DOLLAR)
    with jobs.claimed(TransferReversal, refused.pk) as held:
        assert held
        recoveries.execute_reversal(held)
    refused.refresh_from_db()
    assert (refused.state, refused.refusal_code) == ("refused", "balance_insufficient")
    assert ledger.balances(prefix="receivable") == {chart.receivable(alice, "USD"): 25 * DOLLAR}
    assert check_books().findings == []


def test_what_nobody_expects_any_more_is_written_off_with_a_reason(paid_out: Any, staff: User, alice: Any) -> None:
    payment, _ = paid_out
    run(back(payment, 100 * DOLLAR, staff))
    owed = Money(90 * DOLLAR, "USD")
    for amount, reason, refusal in [
        (Money(91 * DOLLAR, "USD"), "closed", NothingOwed),
        (Money(0, "USD"), "closed", InvalidInput),
        (owed, "  ", InvalidInput),
    ]:
        with pytest.raises(refusal):
            recoveries.write_off(party=alice, amount=amount, user=staff, reason=reason)

    recoveries.write_off(party=alice, amount=owed, user=staff, reason="The account was closed.")

    assert balances("receivable", "expense:losses") == {"expense:losses:USD": 90 * DOLLAR}
    assert transfers.due_micros(party_id=alice.pk, currency="USD", until=clock.now()) == 0
    assert AuditEvent.objects.filter(action="debt.written_off", actor=staff).count() == 1
    assert check_books().findings == []


def test_a_debt_that_was_forgiven_and_then_was_none_is_not_paid_out(
    told: Told, paid_out: Any, staff: User, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment, _ = paid_out
    assert payment.charge_id is not None
    refund = run(back(payment, 100 * DOLLAR, staff))
    recoveries.write_off(party=alice, amount=Money(90 * DOLLAR, "USD"), user=staff, reason="The account was closed.")
    mark = str(refund.pk)
    monkeypatch.setattr(
        gateway, "get_refund", lambda _: refund_answer(payment.charge_id or "", 10_000, mark, status="failed")
    )

    refunds.refresh_refund(f"re_{mark}")  # the card's bank sends it back

    assert balances("payable", "receivable", "expense:losses") == {}
    assert transfers.due_micros(party_id=alice.pk, currency="USD", until=clock.now()) == 0
    assert check_books().findings == []
    pay_out("second")
    assert Payout.objects.count() == 1


def test_only_what_was_forgiven_since_is_taken_back_and_only_as_far_as_nothing_is_owed(
    told: Told, paid_out: Any, staff: User, alice: Any
) -> None:
    payment, _ = paid_out
    run(back(payment, 50 * DOLLAR, staff, "first"))
    recoveries.write_off(party=alice, amount=Money(45 * DOLLAR, "USD"), user=staff, reason="Our own mistake.")
    clock.advance(timedelta(days=1))
    second = back(payment, 50 * DOLLAR, staff, "second")
    recoveries.write_off(party=alice, amount=Money(20 * DOLLAR, "USD"), user=staff, reason="Half of it is ours.")
    told.answers = [gateway.StripeRefused("no", "No.", 400)]

    run(second)

    assert balances("payable", "receivable", "expense:losses") == {"expense:losses:USD": 45 * DOLLAR}
    assert check_books().findings == []


def test_a_debt_that_is_being_fetched_is_not_written_off_and_only_staff_do_either(
    paid_out: Any, staff: User, alice: Any
) -> None:
    payment, _ = paid_out
    run(back(payment, 50 * DOLLAR, staff))
    given = {"payout": Payout.objects.get(), "amount": Money(30 * DOLLAR, "USD"), "note": "refund"}
    with pytest.raises(NotAllowed):
        recoveries.request_reversal(user=alice.user, **given)  # type: ignore[arg-type]
    with pytest.raises(NotAllowed):
        recoveries.write_off(party=alice, amount=Money(DOLLAR, "USD"), user=alice.user, reason="mine")
    recoveries.request_reversal(user=staff, **given)  # type: ignore[arg-type]

    with pytest.raises(NothingOwed):
        recoveries.write_off(party=alice, amount=Money(16 * DOLLAR, "USD"), user=staff, reason="closed")
    recoveries.write_off(party=alice, amount=Money(15 * DOLLAR, "USD"), user=staff, reason="closed")
    assert check_books().findings == []


# --- the right to it --------------------------------------------------------------------------------------------------


def test_the_refund_as_of_right_ends_at_the_first_download_and_takes_the_license(
    told: Told, alice: Any, carol: Any
) -> None:
    order = order_of(PublishedVersionFactory(contributions={alice: 1}), buyer=carol)
    with pytest.raises(NotRefundable, match="not been paid"):
        refunds.refund_of_right(order=order, user=carol.user)
    sell(order)

    refund = refunds.refund_of_right(order=order, user=carol.user)
    again = refunds.refund_of_right(order=order, user=carol.user)

    assert (refund.pk, refund.amount_micros, refund.reason) == (again.pk, 100 * DOLLAR, "of_right")
    assert (run(refund).state, Refund.objects.count(), len(told.made)) == ("sent", 1, 1)
    with pytest.raises(LicenseNotLive):
        note_first_download(license=License.objects.get())
    assert License.objects.get().first_downloaded_at is None
    assert check_books().findings == []


def test_after_a_download_only_staff_may_refund(told: Told, staff: User, alice: Any, carol: Any, mallory: Any) -> None:
    order = order_of(PublishedVersionFactory(contributions={alice: 1}), buyer=carol)
    payment = sell(order)
    with pytest.raises(NotAllowed):
        refunds.refund_of_right(order=order, user=mallory.user)
    note_first_download(license=License.objects.get())

    with pytest.raises(NotRefundable, match="ended with the first download"):
        refunds.refund_of_right(order=order, user=carol.user)
    with pytest.raises(NotAllowed):
        back(payment, DOLLAR, carol.user)
    assert (Refund.objects.count(), Clawback.objects.count()) == (0, 0)
    assert run(back(payment, 100 * DOLLAR, staff, reason=Refund.Reason.FAULTY_DATA)).state == "sent"
    assert check_books().findings == []


def test_of_an_order_only_what_was_not_downloaded_is_given_back_as_of_right(told: Told, carol: Any) -> None:
    order = OrderFactory(buyer=carol, offers=[OfferFactory(price_micros=price * DOLLAR) for price in (20, 30)])
    sell(order)
    note_first_download(license=License.objects.order_by("order_line")[0])

    refund = refunds.refund_of_right(order=order, user=carol.user)

    assert refund.amount_micros == 30 * DOLLAR
    assert [bool(one.revoked_at) for one in License.objects.order_by("order_line")] == [False, True]


@pytest.mark.parametrize(
    ("amount", "currency", "refusal"),
    [
        (100 * DOLLAR + 10_000, "USD", NotRefundable),
        (10**15, "USD", NotRefundable),
        (0, "USD", InvalidInput),
        (-DOLLAR, "USD", InvalidInput),
        (DOLLAR + 1, "USD", InvalidInput),
        (DOLLAR, "EUR", InvalidInput),
    ],
)
def test_an_amount_that_cannot_be_is_refused_and_leaves_nothing_behind(
    told: Told, staff: User, amount: int, currency: str, refusal: type[DomainError]
) -> None:
    payment = sell(order_of(PublishedVersionFactory()))
    before = ledger.balances()

    with pytest.raises(refusal):
        refunds.request_refund(
            payment=payment,
            amount=Money(amount, currency),
            reason=Refund.Reason.GOODWILL,
            note="because",
            user=staff,
            key="one",
        )
    assert (Refund.objects.count(), Clawback.objects.count(), ledger.balances()) == (0, 0, before)


def test_no_refund_without_a_reason_in_words_or_of_what_was_not_paid(told: Told, staff: User) -> None:
    order = order_of(PublishedVersionFactory())
    unpaid = Payment.objects.create(order=order, currency="USD", amount_micros=order.total_micros)
    with pytest.raises(NotRefundable, match="not been paid"):
        back(unpaid, DOLLAR, staff)
    paid = sell(order)
    with pytest.raises(InvalidInput, match="Say why"):
        refunds.request_refund(
            payment=paid, amount=Money(DOLLAR, "USD"), reason=Refund.Reason.GOODWILL, note=" ", user=staff, key="one"
        )


def test_the_same_key_asks_once_and_another_request_under_it_is_refused(told: Told, staff: User) -> None:
    payment = sell(order_of(PublishedVersionFactory()))

    assert back(payment, DOLLAR, staff).pk == back(payment, DOLLAR, staff).pk
    with pytest.raises(KeyReused):
        back(payment, 2 * DOLLAR, staff)
    assert payment.order is not None
    with pytest.raises(KeyReused):
        back(payment, DOLLAR, staff, line=payment.order.lines.get().pk)
    assert Refund.objects.count() == 1


# --- the database -----------------------------------------------------------------------------------------------------


@pytest.mark.as_owner
def test_postgresql_refuses_more_than_was_paid_and_any_change(told: Told, staff: User) -> None:
    payment = sell(order_of(PublishedVersionFactory()))
    refund = back(payment, 60 * DOLLAR, staff)
    more = {
        "payment": payment,
        "amount_micros": 41 * DOLLAR,
        "currency": "USD",
        "reason": "goodwill",
        "key": "by hand",
        "intended_at": clock.now(),
    }
    clawback = refund.clawback
    line = clawback.lines.get()
    order_line = line.order_line
    forbidden: list[Callable[[], Any]] = [
        lambda: Refund.objects.create(**more),
        lambda: Refund.objects.create(**more | {"amount_micros": DOLLAR, "currency": "EUR"}),
        lambda: Refund.objects.filter(pk=refund.pk).update(amount_micros=1),
        lambda: Refund.objects.filter(pk=refund.pk).update(state="failed"),
        lambda: Refund.objects.filter(pk=refund.pk)._raw_delete("default"),
        lambda: Clawback.objects.filter(pk=clawback.pk).update(amount_micros=1),
        lambda: clawback.lines.create(order_line=order_line, amount_micros=41 * DOLLAR, fee_micros=0, pool_micros=0),
        lambda: clawback.lines.create(
            order_line=order_line, amount_micros=7 * DOLLAR, fee_micros=0, pool_micros=7 * DOLLAR
        ),
    ]
    for act in forbidden:
        with pytest.raises(IntegrityError, match=r"refused|keeps|does not go"), transaction.atomic():
            act()
    assert check_books().findings == []


def test_the_applications_own_role_may_do_all_of_it_and_no_more(
    told: Told, paid_out: Any, staff: User, alice: Any
) -> None:
    payment, _ = paid_out
    with connection.cursor() as cursor:
        cursor.execute(f'SET LOCAL ROLE "{APP}"')
        assert run(back(payment, 50 * DOLLAR, staff)).state == "sent"
        told.answers = [gateway.StripeRefused("no", "No.", 400)]
        assert run(back(payment, 50 * DOLLAR, staff, "two")).state == "refused"
        recoveries.write_off(party=alice, amount=Money(DOLLAR, "USD"), user=staff, reason="closed")
        assert check_books().findings == []
        for table in ("clawback", "clawbackundo", "clawbackline", "reclaim", "writeoff", "refund", "movement"):
            for statement in (f"DELETE FROM payouts_{table}", f"TRUNCATE payouts_{table} CASCADE"):  # noqa: S608
                with pytest.raises(ProgrammingError, match="permission denied"), transaction.atomic():
                    cursor.execute(statement)
        cursor.execute("RESET ROLE")
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for table in ("clawback", "clawbackundo", "clawbackline", "reclaim", "writeoff", "refund", "movement"):
            for statement in (f"DELETE FROM payouts_{table}", f"TRUNCATE payouts_{table} CASCADE"):  # noqa: S608
                with pytest.raises(IntegrityError, match="is refused"), transaction.atomic():
                    cursor.execute(statement)


def test_two_refunds_at_once_cannot_exceed_what_was_paid(committed_db: str) -> None:
    payment = sell(order_of(PublishedVersionFactory()))
    staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
    outcomes: list[str] = []
    gate = threading.Barrier(4)

    def ask(number: int) -> None:
        try:
            gate.wait()
            back(payment, 40 * DOLLAR, staff, f"{number}")
            outcomes.append("intended")
        except NotRefundable:
            outcomes.append("refused")
        finally:
            connections.close_all()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["intended", "intended", "refused", "refused"]
    assert ledger.balances(prefix="refunding") == {"refunding:USD": -80 * DOLLAR}
    assert check_books().findings == []


# --- Stripe's answers ---------------------------------------------------------------------------------------------------


def test_after_a_time_out_the_same_key_is_used_and_a_refund_that_was_made_is_found(told: Told, staff: User) -> None:
    refund = back(sell(order_of(PublishedVersionFactory())), DOLLAR, staff)
    told.answers, told.after = [TIMEOUT] * 3, True
    with pytest.raises(attempts.StillUncertain):
        run(refund)
    assert (refund.state, told.keys) == ("intended", [f"refund:{refund.pk}:1"] * 3)
    assert ledger.balances(prefix="refunding") == {"refunding:USD": -DOLLAR}
    assert check_books().findings == []

    assert run(refund).state == "sent"

    assert (len(told.keys), len(told.made), Movement.objects.count()) == (3, 1, 1)
    assert check_books().findings == []


def test_after_a_server_error_it_is_looked_up_before_a_new_key(told: Told, staff: User) -> None:
    refund = back(sell(order_of(PublishedVersionFactory())), DOLLAR, staff)
    told.answers = [SERVER_ERROR]

    assert run(refund).state == "sent"
    assert told.keys == [f"refund:{refund.pk}:1", f"refund:{refund.pk}:2"]


def test_a_key_that_stripe_may_have_forgotten_is_not_used_again(told: Told, staff: User) -> None:
    refund = back(sell(order_of(PublishedVersionFactory())), DOLLAR, staff)
    Refund.objects.update(first_tried_at=timezone.now() - timedelta(hours=23, minutes=1))

    assert run(refund).state == "sent"
    assert told.keys == [f"refund:{refund.pk}:2"]


def test_a_definite_refusal_puts_everything_back(
    told: Told, paid_out: Any, staff: User, alice: Any, carol: Any
) -> None:
    payment, _ = paid_out
    before = ledger.balances()
    refund = back(payment, 100 * DOLLAR, staff)
    settle(sell(order_of(PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0)))
    recoveries.net_what_became_payable()  # the debt has been paid meanwhile
    assert balances("payable", "receivable") == {}
    told.answers = [gateway.StripeRefused("balance_insufficient", "Not enough.", 400)]

    run(refund)

    assert (refund.state, refund.refusal_code) == ("refused", "balance_insufficient")
    assert balances("payable", "receivable") == {chart.payable(alice, "USD"): -90 * DOLLAR}
    assert ledger.balances(prefix="revenue") == {"revenue:platform_fee:USD": -20 * DOLLAR}
    assert before["revenue:platform_fee:USD"] == -10 * DOLLAR
    assert payment.order is not None
    assert (License.objects.get(order_line__order=payment.order).revoked_at, payment.order.status) == (None, "paid")
    assert check_books().findings == []
    assert run(back(payment, 100 * DOLLAR, staff, "anew")).state == "sent"
    assert check_books().findings == []


def test_a_refund_that_was_made_after_its_refusal_is_booked_anew(
    told: Told, staff: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a worker that was suspended in the middle of its call and woke when its successor had been refused."""
    payment = sell(order_of(PublishedVersionFactory()))
    told.answers = [gateway.StripeRefused("balance_insufficient", "Not enough.", 400)]
    refund = run(back(payment, 40 * DOLLAR, staff))
    assert refund.state == "refused"
    assert payment.charge_id is not None
    made = refund_answer(payment.charge_id, 4_000, str(refund.pk))
    monkeypatch.setattr(gateway, "get_refund", lambda identifier: made)

    for _ in range(2):
        refunds.refresh_refund(made.id)

    assert list(Refund.objects.order_by("pk").values_list("state", "reason")) == [
        ("refused", "goodwill"),
        ("sent", "at_stripe"),
    ]
    assert ledger.balances(prefix="refunding") == {}
    assert check_books().findings == []


@pytest.mark.parametrize("status", ["failed", "canceled"])
def test_a_refund_that_ends_before_any_money_moved_is_booked_back(
    told: Told, staff: User, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    payment = sell(order_of(PublishedVersionFactory()))
    before = ledger.balances()
    refund = back(payment, 100 * DOLLAR, staff)
    ended = replace(refund_answer(payment.charge_id or "", 10_000, str(refund.pk), status=status), taken=None)
    told.made[str(refund.pk)] = replace(ended, returned=None)

    run(refund)

    assert (refund.state, refund.refusal_code, refund.refund_id) == ("refused", status, ended.id)
    assert (ledger.balances(), Movement.objects.count()) == (before, 0)
    monkeypatch.setattr(gateway, "refunds_since", lambda moment: [told.made[str(refund.pk)]])
    monkeypatch.setattr(gateway, "get_refund", lambda identifier: told.made[str(refund.pk)])
    refunds.refresh_refund(ended.id)
    assert (refunds.sweep_refunds(), Refund.objects.count()) == (0, 1)
    assert check_books().findings == []


def test_a_refund_that_failed_and_whose_money_did_not_come_back_is_named(
    told: Told, staff: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    refund = run(back(sell(order_of(PublishedVersionFactory())), DOLLAR, staff))
    failed = replace(told.made[str(refund.pk)], status="failed")
    monkeypatch.setattr(gateway, "refunds_since", lambda moment: [failed])
    found: list[Difference] = []

    refunds.sweep_refunds(failures=found)

    assert [one.code for one in found] == ["refund_failed_without_return"]
    assert check_books().findings == []


def test_when_stripe_refuses_us_and_not_the_refund_the_intent_stays(told: Told, staff: User) -> None:
    refund = back(sell(order_of(PublishedVersionFactory())), DOLLAR, staff)
    told.answers = [gateway.StripeRefused("api_key_expired", "Expired API key", 401)]
    with pytest.raises(gateway.StripeRefused):
        run(refund)
    assert (refund.state, refund.status) == ("intended", "queued")
    assert run(refund).state == "sent"


def test_what_stripe_was_silent_about_for_long_is_queued_again(told: Told, staff: User) -> None:
    refund = back(sell(order_of(PublishedVersionFactory())), DOLLAR, staff)
    told.answers = [TIMEOUT] * 3 * jobs.MAX_FAILURES
    for _ in range(jobs.MAX_FAILURES):
        with pytest.raises(attempts.StillUncertain):
            run(refund)
    assert refund.status == "failed"

    assert (refunds.retry_unended(), refunds.retry_unended()) == (1, 0)
    assert run(refund).state == "sent"


def test_what_comes_back_to_a_pool_after_its_release_is_divided_as_it_was(
    told: Told, staff: User, alice: Any, bob: Any
) -> None:
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 2, bob: 1})))
    refund = back(payment, 40 * DOLLAR, staff)
    clock.advance(timedelta(days=400))
    royalties.divide_what_is_ready()  # the 24 that the refund left
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -36 * DOLLAR,
        chart.payable(bob, "USD"): -18 * DOLLAR,
    }
    told.answers = [gateway.StripeRefused("charge_disputed", "No.", 400)]

    run(refund)

    assert balances("payable", "pool", "revenue") == {
        chart.payable(alice, "USD"): -60 * DOLLAR,
        chart.payable(bob, "USD"): -30 * DOLLAR,
        "revenue:platform_fee:USD": -10 * DOLLAR,
    }
    assert check_books().findings == []
    run(back(payment, 100 * DOLLAR, staff, "all"))
    assert balances("payable", "pool", "revenue", "receivable") == {}
    assert check_books().findings == []


def test_a_payout_that_is_refused_pays_the_debt_first(
    told: Told, monkeypatch: pytest.MonkeyPatch, staff: User, alice: Any
) -> None:
    stripe = Transfers(monkeypatch)
    PayeeAccountFactory(party=alice)
    payment = sell(order_of(PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0))
    settle(payment)
    clock.advance(timedelta(days=31))

    def refunded_meanwhile(**params: Any) -> gateway.Transfer:
        back(payment, 50 * DOLLAR, staff)
        raise gateway.StripeRefused("account_closed", "The account is closed.", 400)

    monkeypatch.setattr(gateway, "create_transfer", refunded_meanwhile)
    pay_out("first")

    assert Payout.objects.get().status == Payout.Status.REFUSED
    assert balances("payable", "receivable") == {chart.payable(alice, "USD"): -45 * DOLLAR}
    assert check_books().findings == []
    assert stripe.refuses is False


# --- at the local Stripe ----------------------------------------------------------------------------------------------


def buy(stripe: Any, version: Any, *, card: str = "", buyer: Any = None, **offer: Any) -> Payment:
    order = order_of(version, buyer=buyer, **offer)
    stripe.pay(start_checkout(order=order, **BACK), **({"card": card} if card else {}))
    payment = events.book_checkout(order.payment.checkout_id)
    assert payment is not None
    return payment


def hear(stripe: Any, *kinds: str) -> None:
    """Every event of these kinds as the webhooks bring them, newest first, and each twice."""
    for kind in kinds:
        for told_of in stripe.events(kind):
            for _ in range(2):
                events.apply_event(stripe.received(told_of))


def test_a_refund_at_stripe_while_the_charge_is_pending_and_after(stripe: Any, staff: User, alice: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 1})
    first, second = buy(stripe, version), buy(stripe, version)
    clean()
    run(back(first, 30 * DOLLAR, staff))
    assert Movement.objects.get().is_booked_available is False
    clean()
    stripe.advance(days=3)
    settle_funds()
    clean()

    assert run(back(second, 100 * DOLLAR, staff)).state == "sent"
    assert Movement.objects.latest("pk").is_booked_available
    hear(stripe, "charge.refunded", "refund.created")

    assert Refund.objects.count() == Movement.objects.count() == 2
    assert gateway.balance() == {"USD": (0, 9_680 * 2 - 13_000)}
    clean()


def test_a_refund_without_funds_is_refused_and_booked_back(stripe: Any, staff: User, alice: Any) -> None:
    payment = buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    stripe.advance(days=3)
    settle_funds()

    refund = run(back(payment, 100 * DOLLAR, staff))  # 96.80 are there

    assert (refund.state, refund.refusal_code) == ("refused", "balance_insufficient")
    assert Order.objects.get().status == Order.Status.PAID
    clean()


@pytest.mark.parametrize("card", ["4000000000007726", "4000000000005126"])
def test_a_refund_that_the_cards_bank_decides_later(stripe: Any, staff: User, alice: Any, card: str) -> None:
    payment = buy(stripe, PublishedVersionFactory(contributions={alice: 1}), card=card)
    before = ledger.balances(prefix="payable")
    refund = run(back(payment, 100 * DOLLAR, staff))
    fails = card.endswith("5126")
    assert refund.state == ("sent" if fails else "pending")
    clean()

    stripe.advance(days=1.1)
    hear(stripe, "refund.failed", "refund.updated", "charge.refund.updated")

    refund.refresh_from_db()
    assert refund.state == ("failed" if fails else "sent")
    assert Order.objects.get().status == (Order.Status.PAID if fails else Order.Status.REFUNDED)
    assert (License.objects.get().revoked_at is None) == fails
    if fails:
        assert ledger.balances(prefix="payable") == before
    stripe.advance(days=3)
    settle_funds()
    clean()


def test_a_refund_made_in_stripes_dashboard_is_booked_once_whether_heard_of_or_found(stripe: Any, alice: Any) -> None:
    payment = buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    assert payment.charge_id is not None
    gateway.create_refund(charge=payment.charge_id, amount_minor=2_500, reason="duplicate", key="by hand")
    assert [one.code for one in reconcile().differences] == ["cash_differs", "refund_not_booked"]

    assert refunds.sweep_refunds() == 1  # no event has come
    hear(stripe, "refund.created", "charge.refunded")
    assert refunds.sweep_refunds() == 0

    refund = Refund.objects.get()
    assert (refund.reason, refund.state, refund.status) == ("at_stripe", "sent", "done")
    assert len(stripe.objects("refunds")) == 1
    clean()


def test_a_second_refund_at_stripe_with_our_mark_is_booked_beside_the_first(
    stripe: Any, staff: User, alice: Any
) -> None:
    payment = buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    refund = run(back(payment, 10 * DOLLAR, staff))
    assert payment.charge_id is not None
    gateway.create_refund(
        charge=payment.charge_id,
        amount_minor=1_000,
        reason="requested_by_customer",
        key="a key of before",
        metadata={"refund": str(refund.pk)},
    )

    assert refunds.sweep_refunds() == 1
    hear(stripe, "refund.created", "charge.refunded")

    assert list(Refund.objects.order_by("pk").values_list("state", "reason")) == [
        ("sent", "goodwill"),
        ("sent", "at_stripe"),
    ]
    assert Movement.objects.count() == 2
    clean()


def test_an_event_may_be_faster_than_our_own_answer(stripe: Any, staff: User, alice: Any) -> None:
    payment = buy(stripe, PublishedVersionFactory(contributions={alice: 1}))
    refund = back(payment, 10 * DOLLAR, staff)
    assert payment.charge_id is not None
    gateway.create_refund(
        charge=payment.charge_id,
        amount_minor=1_000,
        reason="requested_by_customer",
        key=f"refund:{refund.pk}:1",
        metadata={"refund": str(refund.pk)},
    )
    assert "refund_not_booked" not in [one.code for one in reconcile().differences]  # it is on its way
    hear(stripe, "refund.created")

    assert run(refund).state == "sent"
    assert Movement.objects.count() == 1
    clean()


def test_a_transfer_is_reversed_at_stripe_while_the_payee_has_it(stripe: Any, staff: User, alice: Any) -> None:
    stripe.onboard(alice)
    payment = buy(stripe, PublishedVersionFactory(contributions={alice: 1}), upfront_bps=9_000, pool_bps=0)
    buy(stripe, PublishedVersionFactory())  # what the refund is made of
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    pay_out("first")
    run(back(payment, 50 * DOLLAR, staff))
    clean()

    reversal = recoveries.request_reversal(
        payout=Payout.objects.get(), amount=Money(30 * DOLLAR, "USD"), user=staff, note="refund"
    )
    with jobs.claimed(TransferReversal, reversal.pk) as held:
        assert held
        recoveries.execute_reversal(held)

    assert ledger.balances(prefix="receivable") == {chart.receivable(alice, "USD"): 15 * DOLLAR}
    clean()
    stripe.advance(days=2)  # to the bank
    rest = recoveries.request_reversal(
        payout=Payout.objects.get(), amount=Money(15 * DOLLAR, "USD"), user=staff, note="refund"
    )
    with jobs.claimed(TransferReversal, rest.pk) as held:
        assert held
        recoveries.execute_reversal(held)
    rest.refresh_from_db()
    assert (rest.state, rest.refusal_code) == ("refused", "balance_insufficient")
    clean()


WORKER = textwrap.dedent(
    """
    import os, signal, sys
    import django
    django.setup()
    from payouts import gateway, tasks
    original = gateway.create_refund
    def then_die(**params):
        if os.environ.get("DIE") == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = original(**params)
        if os.environ.get("DIE") == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    gateway.create_refund = then_die
    tasks.execute_refund(int(sys.argv[1]))
    """
)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_worker_is_succeeded_and_the_refund_happens_once(
    committed_db: str, stripe: Any, settings: Any, when: str
) -> None:
    staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
    payment = buy(stripe, PublishedVersionFactory())
    refund = back(payment, 40 * DOLLAR, staff)
    environment = os.environ | {
        "DATABASE_URL": role_url(os.environ["SUPERUSER_DATABASE_URL"], "postgres", committed_db),
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "STRIPE_API_BASE": settings.STRIPE_API_BASE,
        "STRIPE_API_KEY": settings.STRIPE_API_KEY,
    }
    connections.close_all()

    def work(**extra: str) -> int:
        command = [sys.executable, "-c", WORKER, str(refund.pk)]
        return subprocess.run(command, cwd=ROOT, env=environment | extra, timeout=120).returncode

    assert work(DIE=when) == -signal.SIGKILL
    refund.refresh_from_db()
    assert (refund.state, refund.status) == ("intended", "running")
    Refund.objects.filter(pk=refund.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    assert work() == 0

    refund.refresh_from_db()
    assert (refund.state, refund.status, refund.stripe_attempt) == ("sent", "done", 1)
    (made,) = stripe.objects("refunds")
    assert (made["id"], made["amount"]) == (refund.refund_id, 4_000)
    clean()


# --- any split, any refunds -------------------------------------------------------------------------------------------


@settings(
    max_examples=int(os.environ.get("RESIDUAL_TEST_EXAMPLES", "5")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    price=st.integers(500, 20_000),
    bps=st.tuples(st.integers(0, 9_000), st.integers(0, 10_000)).map(
        lambda pair: (pair[0], (9_000 - pair[0]) * pair[1] // 10_000)
    ),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    steps=st.lists(
        st.one_of(st.integers(1, 10_000), st.sampled_from(["release", "pay out", "refuse", "earn"])),
        min_size=1,
        max_size=6,
    ),
)
def test_books_balance_after_any_partial_refunds_of_any_split(
    told: Told, monkeypatch: pytest.MonkeyPatch, staff: User, price: int, bps: Any, weights: list[int], steps: list[Any]
) -> None:
    Transfers(monkeypatch)
    with transaction.atomic():
        savepoint = transaction.savepoint()
        parties = [PartyFactory() for _ in weights]
        for party in parties:
            PayeeAccountFactory(party=party)
        version = PublishedVersionFactory(contributions=dict(zip(parties, weights, strict=True)))
        offer = {
            "price_micros": price * 10_000,
            "upfront_bps": bps[0],
            "pool_bps": bps[1],
            "platform_fee_bps": 10_000 - sum(bps),
        }
        payment = sell(order_of(version, **offer))
        settle(payment)
        left = payment.amount_micros
        for number, step in enumerate(steps):
            if step == "release":
                clock.advance(timedelta(days=400))
                royalties.divide_what_is_ready()
            elif step == "pay out":
                clock.advance(timedelta(days=31))
                pay_out(f"{payment.pk}:{number}")
            elif step == "earn":
                settle(sell(order_of(version, **offer)))
            else:
                refuses = step == "refuse"
                wanted = left if refuses else left * step // 10_000 // 10_000 * 10_000
                if not wanted:
                    continue
                if refuses:
                    told.answers = [gateway.StripeRefused("no", "No.", 400)]
                refund = run(back(payment, wanted, staff, f"{number}"))
                assert refund.state == ("refused" if refuses else "sent")
                left -= 0 if refuses else wanted
            assert check_books().findings == []
        recoveries.net_what_became_payable()
        assert sum(part.left.micros for part in clawbacks.parts_left(payment)) == left
        if left:
            run(back(payment, left, staff, "all"))
        assert check_books().findings == []
        assert all(not part.left for part in clawbacks.parts_left(payment))
        transaction.savepoint_rollback(savepoint)
