import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.models import Party
from marketplace.money import Money
from payouts import chart, gateway, ledger
from payouts.models import JournalEntry, PayeeAccount, Payout, PayoutRun
from payouts.services import events, transfers
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile, settle_funds
from payouts.services.sales import start_checkout
from payouts.services.transfers import request_payout_run
from portal.environment import role_url
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell

ROOT = Path(__file__).resolve().parents[3]
INTENT, SENT, REVERSAL = (
    JournalEntry.Kind.PAYOUT_INTENT,
    JournalEntry.Kind.PAYOUT_SENT,
    JournalEntry.Kind.PAYOUT_REVERSAL,
)


def execute(run: PayoutRun) -> PayoutRun:
    """As the task does, once the pause after a failure is over."""
    PayoutRun.objects.filter(pk=run.pk).update(due_at=timezone.now())
    try:
        with jobs.claimed(PayoutRun, run.pk) as held:
            if held:
                transfers.execute_payout_run(held)
    finally:
        run.refresh_from_db()
    return run


def earn(contributions: dict[Party, int], *, price: str = "100", **offer: Any) -> None:
    """A sale whose money is settled and due."""
    version = PublishedVersionFactory(contributions=contributions)
    terms = {"price_micros": Money.parse(price, "USD").micros, "upfront_bps": 9_000, "pool_bps": 0} | offer
    payment = sell(OrderFactory(offers=[OfferFactory(version=version, **terms)]))
    assert payment.fee_micros is not None
    net = payment.amount_micros - payment.fee_micros
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": net, "cash:pending:USD": -net},
    )
    type(payment).objects.filter(pk=payment.pk).update(settled_at=clock.now())
    clock.advance(timedelta(days=31))


class Stripe:
    """Stripe's word on transfers, told by the test; it keeps what it made by key and by group, as Stripe does."""

    def __init__(self) -> None:
        self.made: dict[str, gateway.Transfer] = {}
        self.keys: list[str] = []
        self.answers: list[Exception | None] = []  # an exception, before or after the transfer was made
        self.after: bool = False

    def create_transfer(self, *, key: str, transfer_group: str, **params: Any) -> gateway.Transfer:
        self.keys.append(key)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None and not self.after:
            raise answer
        if transfer_group not in self.made:
            self.made[transfer_group] = gateway.Transfer(
                id=f"tr_{len(self.made)}",
                amount_minor=params["amount_minor"],
                currency=params["currency"],
                destination=params["destination"],
                transfer_group=transfer_group,
                destination_payment="py_1",
                balance_transaction="txn_1",
                reversed_minor=0,
                created_at=timezone.now(),
                metadata={},
            )
        if answer is not None:
            raise answer
        return self.made[transfer_group]

    def find_transfer(self, transfer_group: str) -> gateway.Transfer | None:
        return self.made.get(transfer_group)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Stripe:
    """The answers that no local Stripe gives on demand: time-outs, 5xx, refusals."""
    stripe = Stripe()
    monkeypatch.setattr(gateway, "create_transfer", stripe.create_transfer)
    monkeypatch.setattr(gateway, "find_transfer", stripe.find_transfer)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return stripe


def uncertain(status: int | None, *, spent: bool) -> gateway.StripeUncertain:
    return gateway.StripeUncertain("?", http_status=status, retry_after_seconds=None, is_key_spent=spent)


TIMEOUT = uncertain(None, spent=False)
SERVER_ERROR = uncertain(500, spent=True)


# --- intent -----------------------------------------------------------------------------------------------------------


def test_a_run_pays_whole_cents_of_what_is_due_and_keeps_the_rest(told: Stripe, db: Any, alice: Any, bob: Any) -> None:
    earn({alice: 2, bob: 1}, price="10")  # 9 USD at 2:1 are 6 and 3
    earn({alice: 2, bob: 1}, price="10.01", upfront_bps=8_999, pool_bps=1, platform_fee_bps=1_000)
    PayeeAccountFactory(party=alice)
    PayeeAccountFactory(party=bob)

    run = execute(request_payout_run(currency="USD", key="one"))

    amounts = dict(Payout.objects.values_list("party", "amount_micros"))
    earned = {alice.pk: 6_000_000 + 6_005_333, bob.pk: 3_000_000 + 3_002_666}
    assert run.status == "done"
    assert amounts == {party: micros // 10_000 * 10_000 for party, micros in earned.items()}
    assert ledger.balances(prefix="in_transit") == {}
    assert all(-10_000 < micros < 0 for micros in ledger.balances(prefix="payable").values())
    assert check_books().findings == []


def test_only_ready_payees_are_paid_and_only_what_is_due(
    told: Stripe, db: Any, alice: Any, bob: Any, carol: Any
) -> None:
    earn({alice: 1, bob: 1, carol: 1}, price="30")
    PayeeAccountFactory(party=alice)
    PayeeAccountFactory(party=bob, transfers_active=False)
    sell(OrderFactory(offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}))]))  # held still

    execute(request_payout_run(currency="USD", key="one"))
    execute(request_payout_run(currency="USD", key="one"))
    execute(request_payout_run(currency="USD", key="two"))
    execute(request_payout_run(currency="EUR", key="euro"))

    assert list(Payout.objects.values_list("party", "amount_micros", "status")) == [(alice.pk, 9_000_000, "sent")]
    assert check_books().findings == []


def test_a_payout_waits_for_available_funds(told: Stripe, db: Any, alice: Any, bob: Any) -> None:
    earn({alice: 1}, price="20")
    version = PublishedVersionFactory(contributions={bob: 1})
    sell(OrderFactory(offers=[OfferFactory(version=version, upfront_bps=9_000, pool_bps=0)]))  # pending at Stripe
    clock.advance(timedelta(days=31))
    PayeeAccountFactory(party=bob)
    PayeeAccountFactory(party=alice)

    execute(request_payout_run(currency="USD", key="one"))

    assert list(Payout.objects.values_list("party", flat=True)) == [alice.pk]
    assert ledger.balance("cash:available:USD") == 19_120_000 - 18_000_000


def test_the_intent_is_booked_before_stripe_is_asked(told: Stripe, db: Any, alice: Any) -> None:
    earn({alice: 1}, price="20")
    PayeeAccountFactory(party=alice)
    told.answers = [TIMEOUT] * 3

    with pytest.raises(transfers.StillUncertain):
        execute(request_payout_run(currency="USD", key="one"))

    payout = Payout.objects.get()
    assert payout.status == Payout.Status.INTENDED
    assert ledger.balances(prefix="in_transit") == {"in_transit:USD": -18_000_000}
    assert ledger.balances(prefix="payable") == {}
    assert [entry.kind for entry in JournalEntry.objects.filter(key__startswith="payout:")] == [INTENT]
    assert check_books().findings == []


# --- outcomes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def due(told: Stripe, db: Any, alice: Any) -> PayoutRun:
    earn({alice: 1}, price="20")
    PayeeAccountFactory(party=alice)
    return request_payout_run(currency="USD", key="one")


def kinds() -> list[str]:
    return list(JournalEntry.objects.filter(key__startswith="payout:").order_by("pk").values_list("kind", flat=True))


def test_after_a_time_out_the_same_key_is_used(told: Stripe, due: PayoutRun) -> None:
    told.answers = [TIMEOUT, uncertain(409, spent=False), uncertain(429, spent=False)]
    with pytest.raises(transfers.StillUncertain):
        execute(due)

    run = execute(due)

    pk = Payout.objects.get().pk
    assert told.keys == [f"payout:{pk}:1"] * 4
    assert (run.status, run.attempt, Payout.objects.get().status) == ("done", 2, "sent")
    assert kinds() == [INTENT, SENT]


def test_a_transfer_that_was_made_before_the_time_out_is_found_and_not_made_again(told: Stripe, due: PayoutRun) -> None:
    told.after, told.answers = True, [TIMEOUT] * 3
    with pytest.raises(transfers.StillUncertain):
        execute(due)
    calls = len(told.keys)

    execute(due)

    assert len(told.keys) == calls  # the look-up was enough
    assert len(told.made) == 1
    assert kinds() == [INTENT, SENT]


def test_after_a_server_error_it_is_looked_up_before_a_new_attempt(told: Stripe, due: PayoutRun) -> None:
    told.answers = [SERVER_ERROR]

    execute(due)

    pk = Payout.objects.get().pk
    assert told.keys == [f"payout:{pk}:1", f"payout:{pk}:2"]
    assert (Payout.objects.get().status, Payout.objects.get().attempt) == ("sent", 2)


def test_a_server_error_after_success_does_not_pay_twice(told: Stripe, due: PayoutRun) -> None:
    told.after, told.answers = True, [SERVER_ERROR]

    execute(due)

    assert told.keys == [f"payout:{Payout.objects.get().pk}:1"]
    assert (len(told.made), kinds()) == (1, [INTENT, SENT])


def test_a_key_that_stripe_may_have_forgotten_is_not_used_again(told: Stripe, due: PayoutRun) -> None:
    told.answers = [TIMEOUT] * 3
    with pytest.raises(transfers.StillUncertain):
        execute(due)
    Payout.objects.update(first_tried_at=timezone.now() - timedelta(hours=23, minutes=1))

    execute(due)

    assert told.keys[-1] == f"payout:{Payout.objects.get().pk}:2"
    assert kinds() == [INTENT, SENT]


def test_a_definite_refusal_is_booked_back_and_the_next_run_tries_anew(
    told: Stripe, due: PayoutRun, alice: Any
) -> None:
    told.answers = [gateway.StripeRefused("account_closed", "The account is closed.", 400)]

    run = execute(due)

    refused = Payout.objects.get()
    assert (run.status, refused.status, refused.refusal_code) == ("done", "refused", "account_closed")
    assert kinds() == [INTENT, REVERSAL]
    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -18_000_000}
    assert check_books().findings == []
    execute(request_payout_run(currency="USD", key="two"))
    assert Payout.objects.latest("pk").status == Payout.Status.SENT
    assert check_books().findings == []


def test_when_stripe_refuses_us_and_not_the_payout_the_intent_stays(told: Stripe, due: PayoutRun) -> None:
    told.answers = [gateway.StripeRefused("api_key_expired", "Expired API key", 401)]

    with pytest.raises(gateway.StripeRefused):
        execute(due)

    assert (due.status, Payout.objects.get().status, kinds()) == ("queued", "intended", [INTENT])
    execute(due)
    assert Payout.objects.get().status == Payout.Status.SENT


def test_a_later_run_brings_to_an_end_what_a_failed_one_left(told: Stripe, due: PayoutRun) -> None:
    told.answers = [TIMEOUT] * 3 * jobs.MAX_FAILURES
    for _ in range(jobs.MAX_FAILURES):
        with pytest.raises(transfers.StillUncertain):
            execute(due)
    assert due.status == "failed"

    execute(request_payout_run(currency="USD", key="two"))

    assert list(Payout.objects.values_list("run__key", "status")) == [("one", "sent")]


def test_a_transfer_that_was_made_after_its_refusal_is_found_before_the_money_is_sent_again(
    told: Stripe, due: PayoutRun, alice: Any
) -> None:
    """A worker was suspended in the middle of its call; its successor was refused; then it woke."""
    told.answers, told.after = [gateway.StripeRefused("rate", "Refused.", 400)], True
    execute(due)
    assert (Payout.objects.get().status, len(told.made)) == ("refused", 1)

    told.after = False
    execute(request_payout_run(currency="USD", key="two"))

    payout = Payout.objects.get()  # and no second one
    assert (payout.status, payout.transfer_id) == ("sent", "tr_0")
    assert kinds() == [INTENT, REVERSAL, INTENT, SENT]
    assert ledger.balances(prefix="payable") == {}
    assert check_books().findings == []


def test_a_payout_that_needs_a_person_holds_up_nobody_else(
    told: Stripe, db: Any, alice: Any, bob: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for party in (alice, bob):
        PayeeAccountFactory(party=party)
    earn({alice: 1, bob: 1})
    real = told.create_transfer

    def wrong_for_alice(**params: Any) -> gateway.Transfer:
        made = real(**params)
        is_hers = params["destination"] == alice.payee_account.stripe_account_id
        return dataclasses.replace(made, amount_minor=1) if is_hers else made

    gateway.create_transfer = wrong_for_alice  # type: ignore[assignment] # `told` puts the real one back
    run = execute(request_payout_run(currency="USD", key="one"))

    assert (run.status, run.error_code) == ("failed", "transfer_mismatch")
    assert "correct it at Stripe" in run.error_message
    assert {p.party: p.status for p in Payout.objects.all()} == {alice: "intended", bob: "sent"}


def test_an_attempt_that_lost_its_lease_writes_nothing(told: Stripe, due: PayoutRun) -> None:
    held = jobs.claim(PayoutRun, due.pk)
    assert held is not None
    PayoutRun.objects.filter(pk=due.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    assert jobs.claim(PayoutRun, due.pk) is not None

    with pytest.raises(jobs.LostLease):
        transfers.execute_payout_run(held)

    assert (Payout.objects.count(), kinds(), told.keys) == (0, [], [])


def test_no_run_for_a_currency_without_a_balance(db: Any) -> None:
    with pytest.raises(ValueError, match="No balance"):
        request_payout_run(currency="CHF", key="one")


# --- at the local Stripe ----------------------------------------------------------------------------------------------


@pytest.fixture
def funded(stripe: Any, db: Any, alice: Any, bob: Any, carol: Any) -> Iterator[Callable[[], PayoutRun]]:
    """Alice and bob are onboarded, and carol's order of 100 USD is paid, settled and past its hold."""
    for party in (alice, bob):
        stripe.onboard(party)
    version = PublishedVersionFactory(contributions={alice: 2, bob: 1})
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version, upfront_bps=9_000, pool_bps=0)])
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    events.book_checkout(order.payment.checkout_id)
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    yield lambda: request_payout_run(currency="USD", key="run:USD:test")


def test_money_reaches_the_bank_and_the_books_agree_with_stripe(funded: Any, stripe: Any, alice: Any, bob: Any) -> None:
    execute(funded())
    assert reconcile().differences == []
    assert set(Payout.objects.values_list("status", flat=True)) == {"sent"}
    stripe.advance(days=3)

    assert stripe.events("payout.paid") == []  # only the connected accounts hear of it
    for payee in PayeeAccount.objects.all():
        (bank_payout,) = stripe.objects("payouts", **{"Stripe-Account": payee.stripe_account_id})
        arrived = transfers.confirm_in_bank(account=payee.stripe_account_id, bank_payout=bank_payout["id"])
        assert [payout.party for payout in arrived] == [payee.party]
        assert transfers.confirm_in_bank(account=payee.stripe_account_id, bank_payout=bank_payout["id"]) == []

    assert dict(Payout.objects.values_list("party", "amount_micros")) == {alice.pk: 60_000_000, bob.pk: 30_000_000}
    assert set(Payout.objects.values_list("status", flat=True)) == {"paid"}
    assert gateway.balance() == {"USD": (0, 680)}  # 100 less 3.20 less 90
    assert reconcile().differences == []
    assert check_books().findings == []


def test_only_what_may_still_have_been_sent_is_looked_up_for_a_bank_payout(
    funded: Any, monkeypatch: pytest.MonkeyPatch, alice: Any
) -> None:
    run = funded()
    with jobs.claimed(PayoutRun, run.pk) as held:
        assert held
        transfers._intend(held, [alice.pk])
    payout = Payout.objects.get()
    asked: list[str] = []
    monkeypatch.setattr(gateway, "transfers_in_payout", lambda **_: ["tr_of_nobody"])
    monkeypatch.setattr(gateway, "find_transfer", asked.append)

    def look_up() -> int:
        asked.clear()
        transfers.confirm_in_bank(account=payout.destination, bank_payout="po_1")
        return len(asked)

    wall = timezone.now()
    assert look_up() == 1  # intended
    Payout.objects.update(status=Payout.Status.REFUSED, first_tried_at=wall - timedelta(hours=1))
    assert look_up() == 1
    Payout.objects.update(first_tried_at=wall - transfers.LATE)
    assert look_up() == 0


def test_a_bank_payout_may_be_heard_of_before_its_transfer_was_booked(funded: Any, stripe: Any, alice: Any) -> None:
    run = funded()
    with jobs.claimed(PayoutRun, run.pk) as held:
        assert held
        for payee in PayeeAccount.objects.order_by("pk"):
            transfers._intend(held, [payee.party_id])
    payout = Payout.objects.get(party=alice)
    gateway.create_transfer(
        amount_minor=payout.amount.to_minor(),
        currency="USD",
        destination=payout.destination,
        transfer_group=transfers.group_of(payout),
        key=f"payout:{payout.pk}:1",
    )
    stripe.advance(days=3)
    (bank_payout,) = stripe.objects("payouts", **{"Stripe-Account": payout.destination})

    transfers.confirm_in_bank(account=payout.destination, bank_payout=bank_payout["id"])

    payout.refresh_from_db()
    assert payout.status == Payout.Status.PAID
    assert ledger.balance("in_transit:USD") == -30_000_000  # bob's


def test_insufficient_funds_at_stripe_are_a_definite_refusal(funded: Any, stripe: Any, alice: Any) -> None:
    run = funded()
    taken = gateway.create_transfer(
        amount_minor=9_000,
        currency="USD",
        destination=PayeeAccount.objects.earliest("pk").stripe_account_id,
        transfer_group="by hand",
        key="by hand",
    )
    assert taken.id

    execute(run)

    assert set(Payout.objects.values_list("status", "refusal_code")) == {("refused", "balance_insufficient")}
    assert ledger.balances(prefix="in_transit") == {}
    assert [difference.code for difference in reconcile().differences] == ["cash_differs", "transfer_not_booked"]


WORKER = textwrap.dedent(
    """
    import os, signal, sys
    import django
    django.setup()
    from payouts import gateway, tasks
    from payouts.services import transfers
    original = gateway.create_transfer
    calls = 0
    def then_die(**params):
        global calls
        calls += 1
        when = os.environ.get("DIE")
        if when == "before" and calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = original(**params)
        if when == "after" and calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    gateway.create_transfer = then_die
    if os.environ.get("DIE") == "planning":
        intend = transfers._intend
        batches = 0
        def once(run, *payees):
            global batches
            batches += 1
            if batches == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return intend(run, *payees)
        transfers._intend, transfers.AT_ONCE = once, 1
    tasks.execute_payout_run(int(sys.argv[1]))
    """
)


@pytest.mark.parametrize("when", ["planning", "before", "after"])
def test_a_killed_worker_is_succeeded_and_each_transfer_happens_once(
    committed_db: str, stripe: Any, settings: Any, when: str
) -> None:
    from tests.factories.marketplace import PartyFactory

    parties = [PartyFactory() for _ in range(3)]
    for party in parties:
        stripe.onboard(party)
    version = PublishedVersionFactory(contributions=dict.fromkeys(parties, 1))
    order = OrderFactory(offers=[OfferFactory(version=version, upfront_bps=9_000, pool_bps=0)])
    stripe.pay(start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    events.book_checkout(order.payment.checkout_id)
    stripe.advance(days=3)
    settle_funds()
    clock.advance(timedelta(days=31))
    run = request_payout_run(currency="USD", key="killed")
    environment = os.environ | {
        "DATABASE_URL": role_url(os.environ["SUPERUSER_DATABASE_URL"], "postgres", committed_db),
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "STRIPE_API_BASE": settings.STRIPE_API_BASE,
        "STRIPE_API_KEY": settings.STRIPE_API_KEY,
        "STRIPE_CONNECTIONS": "1",  # one call after the other, so that the second is the one it dies in
    }
    connections.close_all()

    def work(**extra: str) -> int:
        command = [sys.executable, "-c", WORKER, str(run.pk)]
        return subprocess.run(command, cwd=ROOT, env=environment | extra, timeout=60).returncode

    assert work(DIE=when) == -signal.SIGKILL
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("running", 1)
    assert jobs.claim(PayoutRun, run.pk) is None  # its lease has not run out
    PayoutRun.objects.filter(pk=run.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    assert work() == 0

    run.refresh_from_db()
    assert (run.status, run.attempt) == ("done", 2)
    made = stripe.objects("transfers?limit=100")
    assert sorted(transfer["amount"] for transfer in made) == [3_000, 3_000, 3_000]
    assert {transfer["id"] for transfer in made} == set(Payout.objects.values_list("transfer_id", flat=True))
    assert set(Payout.objects.values_list("status", "attempt")) == {("sent", 1)}
    assert reconcile().differences == []
    assert check_books().findings == []
