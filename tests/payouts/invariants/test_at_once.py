"""Thirty-two clients selling, refunding, reporting and paying the same few accounts at once."""

import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
from django.db import connection
from django.db.models import Sum

from marketplace import clock
from marketplace.jobs import LostLease
from marketplace.models import Party, TrainedModel, User
from marketplace.money import Money
from payouts import ledger
from payouts.errors import PeriodOverlaps
from payouts.models import JournalEntry, Payment, PayoutRun, Posting, Refund, RoyaltyInvoice, RoyaltyReport
from payouts.services import events, recoveries, refunds, royalties, sales, transfers
from payouts.services.reconciliation import reconcile, settle_funds
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.payouts.conftest import CARD
from tests.payouts.invariants.world import World, act, faults_in_order, nobody_was_paid_twice

N_CLIENTS = 32
N_ACTS = 5
PATIENCE_SECONDS = 300  # for all of them together
BACK = {"success_url": "http://shop.test/done", "cancel_url": "http://shop.test/order"}


class Market:
    """Two datasets of the same four payees, two buyers, two models: everybody meets on the same rows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
        self.payees = [PartyFactory(name=name) for name in ("Ann", "Ben", "Cat", "Dan")]
        self.buyers = [PartyFactory(name=name) for name in ("Lab", "Firm")]
        versions = [PublishedVersionFactory(contributions=dict.fromkeys(self.payees, 2)) for _ in range(2)]
        self.offers = [OfferFactory(version=version, upfront_bps=6_000, pool_bps=3_000) for version in versions]
        for party in self.payees:
            account = world.stripe.onboard(party)
            assert account.is_ready
        for buyer in self.buyers:
            license_order = self.buy(buyer)
            license = license_order.lines.get(offer=self.offers[0]).license
            PublishedResultFactory(version=license.version, license=license, shares=dict.fromkeys(self.payees, 1))
        self.models = list(TrainedModel.objects.order_by("pk"))

    def buy(self, buyer: Party) -> Any:
        order = OrderFactory(buyer=buyer, offers=self.offers)
        self.pay(sales.start_checkout(order=order, **BACK))
        events.book_checkout(Payment.objects.get(order=order).checkout_id or "")
        return order

    def pay(self, url: str) -> None:
        answer = httpx.post(url, data=CARD, timeout=60)
        assert answer.status_code == 303, answer.text

    # --- what a client does, each by chance

    def sell(self, rng: random.Random, key: str) -> None:
        self.buy(rng.choice(self.buyers))

    def report(self, rng: random.Random, key: str) -> None:
        model = rng.choice(self.models)
        start = clock.today() - timedelta(days=rng.randrange(30, 4_000, 30))
        try:
            invoice = royalties.report_revenue(
                licensee=model.owner,
                model=model,
                period_start=start,
                period_end=start + timedelta(days=20),
                revenue=Money(50_000_000_000, "USD"),
                key=key,
            )
        except PeriodOverlaps:
            return  # another client has reported it
        if invoice.status == RoyaltyInvoice.Status.OPEN:
            self.pay(royalties.start_invoice_checkout(invoice=invoice, **BACK))
            events.book_checkout(Payment.objects.get(invoice=invoice).checkout_id or "")

    def refund(self, rng: random.Random, key: str) -> None:
        payment = rng.choice(list(Payment.objects.filter(status=Payment.Status.PAID)))
        refund = refunds.request_refund(
            payment=payment,
            amount=Money(rng.randrange(1, 300) * 10_000, "USD"),
            reason=Refund.Reason.GOODWILL,
            note="as agreed",
            user=self.staff,
            key=key,
        )
        self.world.work(Refund, refund.pk)

    def pay_out(self, rng: random.Random, key: str) -> None:
        run = transfers.request_payout_run(currency="USD", key=rng.choice([key, f"shared {rng.randrange(3)}"]))
        self.world.work(PayoutRun, run.pk)

    def keep_house(self, rng: random.Random, key: str) -> None:
        steps = [
            royalties.divide_what_is_ready,
            settle_funds,
            recoveries.net_what_became_payable,
            ledger.take_snapshots,
        ]
        for step in rng.sample(steps, len(steps)):
            step()


def waiting_on(clients: list[threading.Thread]) -> str:
    """Where each client that is still at work stands, and whom PostgreSQL says that it waits for."""
    frames = sys._current_frames()
    stuck = [
        f"{one.name}:\n{''.join(traceback.format_stack(frames[one.ident])[-12:])}"
        for one in clients
        if one.ident in frames and one.is_alive()
    ]
    if not stuck:
        return ""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid, state, wait_event_type, wait_event, pg_blocking_pids(pid), now() - xact_start, left(query, 200)"
            " FROM pg_stat_activity WHERE datname = current_database() ORDER BY xact_start"
        )
        stuck += [str(row) for row in cursor.fetchall()]
    return "\n".join(stuck)


def test_thirty_two_clients_on_the_same_accounts_meet_no_deadlock_and_the_books_are_exact(makes_worlds: Any) -> None:
    with makes_worlds() as world:
        market = Market(world)
        world.advance(40)
        settle_funds()
        began = threading.Barrier(N_CLIENTS)
        failures: list[str] = []
        done: Counter[str] = Counter()

        def client(number: int) -> None:
            rng = random.Random(number)
            kinds: list[Callable[[random.Random, str], None]] = [
                market.sell,
                market.report,
                market.refund,
                market.pay_out,
                market.keep_house,
            ]
            try:
                began.wait(60)
                for turn in range(N_ACTS):
                    does = kinds[(number + turn) % len(kinds)]
                    try:
                        act(lambda does=does, turn=turn: does(rng, f"{number}:{turn}"))  # type: ignore[misc]
                        done[does.__name__] += 1
                    except LostLease:
                        pass  # another client has the job
                    except Exception as error:  # noqa: BLE001 (whatever reaches a client is what this looks for)
                        failures.append(f"{does.__name__}: {type(error).__name__}: {error}"[:300])
            finally:
                connection.close()

        clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(N_CLIENTS)]
        for one in clients:
            one.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for one in clients:
            one.join(max(0.0, deadline - time.monotonic()))

        assert waiting_on(clients) == "", "clients hang"
        assert failures == []
        assert set(done) == {"sell", "report", "refund", "pay_out", "keep_house"}
        assert sum(done.values()) == N_CLIENTS * N_ACTS
        world.settle_up()
        assert faults_in_order() == []
        assert [str(difference) for difference in reconcile().differences] == []
        assert nobody_was_paid_twice(world.stripe) == []
        sold = Payment.objects.filter(status=Payment.Status.PAID).aggregate(sum=Sum("amount_micros"))["sum"]
        taken = Posting.objects.filter(entry__kind__in=["sale", "royalty"], amount_micros__gt=0)
        assert taken.aggregate(sum=Sum("amount_micros"))["sum"] == sold
        assert RoyaltyReport.objects.exists() and JournalEntry.objects.filter(kind="payout_sent").exists()
