"""A long run of real work, while whatever it runs on is killed at random: at the end nothing is lost and nothing was paid twice.

Buyers pay, payees onboard, staff refund, days go by and payout runs are asked for, while another thread sends SIGKILL to the web
processes, the workers, beat, the local Stripe, Redis and PostgreSQL, each at a moment nobody chose. Answers are lost after they
were given, webhooks are refused, jobs die in every state.

`KILLS=400 ./run test tests/stories/test_chaos.py -n0` makes it a night's work.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psycopg
import pytest
import redis
from django.db import InterfaceError, OperationalError, connection

from marketplace import clock
from marketplace.errors import DomainError
from marketplace.jobs import Job
from marketplace.models import Order, User
from marketplace.money import Money
from payouts import gateway
from payouts.errors import StripeUnavailable
from payouts.models import PayeeAccount, Payment, Payout, Refund
from payouts.services import payees, refunds, royalties, sales, transfers
from payouts.services.events import retry_failed_events, sweep_events
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile, settle_funds
from portal import embedded
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.payouts.conftest import BANK, CARD, StripeWorld
from tests.payouts.invariants.world import WORK, charges, nobody_was_paid_twice
from tests.stories.running import Story, running_story

N_KILLS = int(os.environ.get("KILLS", "24"))
PROCESSES = ("web", "payments", "default", "beat", "local-stripe")
SERVERS = ("postgres", "redis")
#: What a client of a system that is being killed meets; it tries again, under the same key.
BROKEN = (
    OperationalError,
    InterfaceError,
    StripeUnavailable,
    gateway.StripeUncertain,
    httpx.HTTPError,
)
PATIENCE_SECONDS = 90
T = TypeVar("T")
pytestmark = pytest.mark.story


def insist(on: Callable[[], T]) -> T:
    """Try until it is done or definitely refused."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return on()
        except BROKEN:
            if time.monotonic() > deadline:
                raise
            connection.close()
            time.sleep(0.2)


class Killer:
    """Kills one thing after another, and starts again what does not come back by itself."""

    def __init__(self, story: Story, servers: embedded.Urls) -> None:
        self.story, self.servers = story, servers
        self.rng = random.Random(7)
        self.killed: Counter[str] = Counter()
        self.ended = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            victims = [*PROCESSES, *SERVERS, "payments", "local-stripe"]
            for number in range(N_KILLS):
                if number % len(victims) == 0:
                    self.rng.shuffle(victims)
                time.sleep(self.rng.uniform(0.5, 2.5))
                self.kill(victims[number % len(victims)])
                self.restart_what_ended()
            time.sleep(3)
            self.restart_what_ended()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.ended.set()

    def kill(self, victim: str) -> None:
        if victim in SERVERS:
            pid = self._pid_of(victim)
            if pid is None:
                return  # it is being started again
            os.kill(pid, signal.SIGKILL)  # its guardian starts it again
        else:
            supervisor = self.story.site.supervisor
            supervisor.kill(victim)
            time.sleep(self.rng.uniform(0, 1.5))
            supervisor.restart(victim, wait=False)
        self.killed[victim] += 1

    def restart_what_ended(self) -> None:
        """As `Supervisor.run_forever` does: a worker may end by itself when its broker is gone for a moment."""
        for name, child in list(self.story.site.supervisor.children.items()):
            if not child.is_running():
                self.story.site.supervisor.restart(name, wait=False)

    def _pid_of(self, server: str) -> int | None:
        try:
            if server == "redis":
                with redis.Redis.from_url(self.servers.redis, socket_timeout=2) as client:
                    return int(client.info("server")["process_id"])
            with psycopg.connect(self.servers.database, connect_timeout=2) as asked:
                row = asked.execute("SELECT setting FROM pg_settings WHERE name = 'data_directory'").fetchone()
            assert row is not None
            return int(Path(row[0], "postmaster.pid").read_text().split()[0])
        except (OSError, redis.RedisError, psycopg.OperationalError):
            return None


@pytest.fixture
def own_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, embedded.Urls]]:
    """Servers that may be killed; those that the other tests use may not."""
    if os.environ.get("TEST_DATABASE_URL"):
        pytest.skip(
            "this machine's own PostgreSQL and Redis are not ours to kill; the embedded ones are, in the other pass"
        )
    var = tmp_path_factory.mktemp("chaos")
    try:
        with embedded.servers(var) as urls:
            yield var, urls
    finally:
        embedded.remove(var)


@pytest.fixture
def story(
    own_servers: tuple[Path, embedded.Urls], django_db_blocker: Any, media: Path, settings: Any
) -> Iterator[Story]:
    var, urls = own_servers
    default = settings.STORAGES["default"] | {"OPTIONS": {"location": str(var / "media")}}
    settings.STORAGES = settings.STORAGES | {"default": default}
    with django_db_blocker.unblock(), running_story(var, None, servers=urls) as running:
        for name, value in running.site.environment.stripe.items():
            setattr(settings, name, value)
        yield running


@pytest.mark.timeout(600 + 10 * N_KILLS)
def test_nothing_is_lost_and_nothing_paid_twice_whatever_is_killed(
    story: Story, own_servers: tuple[Path, embedded.Urls]
) -> None:
    stripe = StripeWorld(_Handle(story))  # type: ignore[arg-type]
    market = Market(story, stripe)
    killer = Killer(story, own_servers[1])
    thread = threading.Thread(target=killer.run, name="killer")
    thread.start()
    turn = 0
    while not killer.ended.is_set():
        market.turn(turn)
        turn += 1
    thread.join()
    assert killer.failure is None
    assert sum(killer.killed.values()) >= N_KILLS * 0.8 and set(killer.killed) == {*PROCESSES, *SERVERS}
    story.site.supervisor.wait_until_ready(deadline_seconds=120)

    market.come_to_rest()

    # By Stripe's word: what was paid there is booked here, once; what we sent was sent once.
    paid = {charge["id"]: charge["amount"] * 10_000 for charge in charges(stripe) if charge["status"] == "succeeded"}
    assert dict(Payment.objects.filter(status="paid").values_list("charge_id", "amount_micros")) == paid
    assert Order.objects.filter(status=Order.Status.PAID).count() + Order.objects.filter(
        status=Order.Status.REFUNDED
    ).count() == len(paid)
    assert market.accepted <= set(Refund.objects.values_list("key", flat=True))  # none that was promised is forgotten
    assert nobody_was_paid_twice(stripe) == []
    assert check_books().findings == []
    assert [str(difference) for difference in reconcile().differences] == []
    assert Payout.objects.filter(status__in=["sent", "paid"]).exists() and Refund.objects.filter(state="sent").exists()


class _Handle:
    def __init__(self, story: Story) -> None:
        self.url, self.secret_key = story.site.stripe_url, story.site.stripe_key


class Market:
    """The people: each insists on what they came for."""

    def __init__(self, story: Story, stripe: StripeWorld) -> None:
        self.story, self.stripe = story, stripe
        self.rng = random.Random(11)
        self.staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
        self.payees = [PartyFactory(name=f"Payee {number}") for number in range(6)]
        self.lab = PartyFactory(name="Lab")
        version = PublishedVersionFactory(contributions=dict.fromkeys(self.payees, 3))
        self.offer = OfferFactory(version=version, upfront_bps=8_000, pool_bps=1_000)
        self.accepted: set[str] = set()

    def turn(self, number: int) -> None:
        if number < len(self.payees):
            self.onboard(number)
        self.buy()
        if number % 3 == 1:
            self.refund(f"{number}")
        if number % 4 == 3:
            self.let_days_go_by(33)
            insist(lambda: transfers.request_payout_run(currency="USD", key=f"run:{number}"))

    def buy(self) -> None:
        order = insist(lambda: OrderFactory(buyer=self.lab, offers=[self.offer]))
        url = insist(lambda: sales.start_checkout(order=order, success_url=self.story.url, cancel_url=self.story.url))
        insist(lambda: httpx.post(url, data=CARD, timeout=30))  # paid once: a second try meets a paid page

    def onboard(self, number: int) -> None:
        def start() -> str:
            return payees.start_onboarding(
                party=self.payees[number], return_url=self.story.url, refresh_url=self.story.url
            )

        insist(lambda: httpx.post(start(), data=BANK, timeout=30))

    def refund(self, key: str) -> None:
        payment = insist(lambda: Payment.objects.filter(status="paid").order_by("?").first())
        if payment is None:
            return
        amount = Money(self.rng.randrange(1, 2_000) * 10_000, "USD")

        def ask() -> Refund:
            return refunds.request_refund(
                payment=payment,
                amount=amount,
                reason=Refund.Reason.GOODWILL,
                note="as agreed",
                user=self.staff,
                key=key,
            )

        try:
            self.accepted.add(insist(ask).key)
        except DomainError:
            return  # nothing was left of it

    def let_days_go_by(self, days: int) -> None:
        insist(lambda: clock.advance(timedelta(days=days)))
        insist(lambda: self.stripe.advance(days=days))

    def come_to_rest(self) -> None:
        """What beat does within the next hour, and the workers after it, until nothing is left to do."""
        deadline = time.monotonic() + 240
        while True:
            self.let_days_go_by(3)
            for step in (retry_failed_events, sweep_events, refunds.retry_unended, refunds.sweep_refunds):
                insist(step)  # type: ignore[arg-type]
            insist(royalties.divide_what_is_ready)
            insist(settle_funds)
            if not self.unfinished():
                return
            assert time.monotonic() < deadline, f"still at work: {self.unfinished()}"
            time.sleep(2)

    def unfinished(self) -> dict[str, int]:
        found = {
            model.__name__: model._default_manager.exclude(status__in=[Job.Status.DONE, Job.Status.FAILED]).count()
            for model in WORK
        }
        found["failed"] = sum(model._default_manager.filter(status=Job.Status.FAILED).count() for model in WORK)
        found["not ready"] = PayeeAccount.objects.filter(transfers_active=False).count()
        return {name: n for name, n in found.items() if n}
