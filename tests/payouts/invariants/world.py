"""A database, a local Stripe and a network between them that loses answers: what a random history of money happens in."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psycopg
import requests
from django.db import connection, connections
from django.utils import timezone
from psycopg import sql

from marketplace import clock, jobs
from marketplace.errors import DomainError
from marketplace.jobs import Job
from marketplace.models import User
from payouts import gateway, tasks
from payouts.models import (
    BankDetailsNotice,
    BooksProof,
    DebitRefusal,
    DisputeAnswer,
    EventSweep,
    Payout,
    PayoutRun,
    PayoutShard,
    ReconciliationRun,
    Refund,
    Reminder,
    StatementNotice,
    StatementRun,
    StripeEvent,
    TransferReversal,
)
from payouts.services import (
    attempts,
    checkouts,
    closing,
    disputes,
    events,
    refunds,
    royalties,
    sales,
)
from payouts.services.proofs import check_books
from portal.environment import make_database
from tests.payouts.conftest import StripeWorld

#: Each kind of work, by the task that a worker would run.
WORK: dict[type[Job], Callable[[int], None]] = {
    StripeEvent: tasks.apply_stripe_event,
    PayoutRun: tasks.execute_payout_run,
    PayoutShard: tasks.execute_payout_shard,
    Refund: tasks.execute_refund,
    TransferReversal: tasks.execute_reversal,
    DisputeAnswer: tasks.send_dispute_answer,
    Reminder: tasks.send_reminder,
    ReconciliationRun: tasks.execute_reconciliation,
    BooksProof: tasks.execute_proof,
    StatementRun: tasks.issue_statements,
    StatementNotice: tasks.send_statement_notice,
    BankDetailsNotice: tasks.send_bank_details_notice,
    DebitRefusal: tasks.send_debit_refusal,
}
#: What a task may end with and come back for.
COMES_BACK = (
    attempts.StillUncertain,
    gateway.StripeUncertain,
    gateway.StripeRefused,
    checkouts.NotBookedByStripe,
)
MAX_ROUNDS = 40


class Killed(BaseException):
    """The process dies here; nothing of it runs on, so nothing catches this."""


@dataclass
class Network:
    """What stands between us and Stripe. Each fault happens once, at one of the next calls that change something there."""

    base: str
    faults: list[str] = field(default_factory=list)
    remembered: dict[str, int] = field(default_factory=dict)  # key → the 5xx that Stripe repeats for a day
    happened: Counter[str] = field(default_factory=Counter)  # fault → how often

    def request(self, real: Callable[..., requests.Response], session: Any, method: str, url: str, **given: Any) -> Any:
        if not url.startswith(self.base) or method.lower() != "post":
            return real(session, method, url, **given)
        key = (given.get("headers") or {}).get("Idempotency-Key", "")
        if key in self.remembered:
            return _answer(self.remembered[key], {"Idempotent-Replayed": "true"})
        fault = self.faults.pop(0) if self.faults else ""
        self.happened[fault or "answered"] += 1
        if fault == "killed before":
            raise Killed
        if fault == "no connection":
            raise requests.exceptions.ConnectionError("refused")
        if fault == "429":
            return _answer(429, {"Retry-After": "0"})
        if fault == "500 before":
            self.remembered[key] = 500
            return _answer(500, {})
        answer = real(session, method, url, **given)
        if fault == "killed after":
            raise Killed
        if fault == "answer lost":
            raise requests.exceptions.ReadTimeout("timed out after success")
        if fault == "500 after" and answer.status_code == 200:
            self.remembered[key] = 500
            return _answer(500, {})
        return answer


FAULTS = ("killed before", "killed after", "no connection", "answer lost", "429", "500 before", "500 after")


def _answer(status: int, headers: dict[str, str]) -> requests.Response:
    answer = requests.Response()
    answer.status_code = status
    answer.headers.update({"Content-Type": "application/json", "Request-Id": "req_test", **headers})
    answer._content = json.dumps({"error": {"type": "api_error", "message": "A fault of the test's."}}).encode()
    return answer


@dataclass
class World:
    """Everything that an act may touch."""

    stripe: StripeWorld
    network: Network

    def advance(self, days: float) -> None:
        """Both clocks, as time goes by."""
        clock.advance(timedelta(days=days))
        self.stripe.advance(days=days)

    def close_months(self, by: User) -> None:
        """Close every month that is over, whatever is open in it: what comes later is booked in an open one."""
        while (coming := closing.find_next_period()) is not None and coming.is_over:
            closing.close_period(starts_on=coming.starts_on, by=by, note="A test's")

    def work(self, model: type[Job], pk: int) -> None:
        """One delivery of the message that wakes the job. A death leaves the lease, which then runs out."""
        type_rows = model._default_manager.filter(pk=pk)
        type_rows.filter(status=Job.Status.QUEUED).update(due_at=timezone.now() - timedelta(seconds=1))
        try:
            WORK[model](pk)
        except Killed:
            long_ago = timezone.now() - timedelta(seconds=1)
            type_rows.filter(status=Job.Status.RUNNING).update(lease_expires_at=long_ago)
        except COMES_BACK:
            pass  # the row is in the queue again, or failed and reopened by the sweep

    def unfinished(self) -> list[tuple[type[Job], int]]:
        return [
            (model, pk)
            for model in WORK
            for pk in model._default_manager.exclude(status__in=[Job.Status.DONE, Job.Status.FAILED])
            .order_by("pk")
            .values_list("pk", flat=True)
        ]

    def sweep(self) -> None:
        """What beat does, all of it, a day later."""
        EventSweep.objects.update(swept_at=timezone.now() - timedelta(days=2))
        steps: list[Callable[[], object]] = [
            events.retry_failed_events,
            events.sweep_events,
            refunds.retry_unended,
            refunds.sweep_refunds,
            disputes.sweep_disputes,
            sales.cancel_expired_orders,
            royalties.divide_what_is_ready,
            tasks.settle_funds,
        ]
        for step in steps:
            with contextlib.suppress(Killed, *COMES_BACK):
                step()
        for model in WORK:
            for job in model._default_manager.filter(status=Job.Status.FAILED, error_code__in=model.reopened_codes):
                jobs.reopen(job)

    def settle_up(self) -> None:
        """Let everything that is under way come to its end, with the network whole."""
        self.network.faults.clear()
        for _ in range(MAX_ROUNDS):
            self.sweep()
            waiting = self.unfinished()
            for model, pk in waiting:
                self.work(model, pk)
            if all(_waits_for_funds(model, pk) for model, pk in waiting):
                return
        raise AssertionError(f"Still at work after {MAX_ROUNDS} rounds: {self.unfinished()}")


def _waits_for_funds(model: type[Job], pk: int) -> bool:
    """A run that has paid whom the funds reach goes on when buyers pay more, which nobody may ever do."""
    return model is PayoutRun and PayoutRun.objects.filter(pk=pk, state=PayoutRun.State.SHORT_OF_FUNDS).exists()


def faults_in_order() -> list[str]:
    """After anything at all: the books prove themselves, by every rule that there is."""
    return [str(finding) for finding in check_books().findings]


def nobody_was_paid_twice(stripe: StripeWorld) -> list[str]:
    """By Stripe's own list: one transfer for each payout, and none that no payout of ours intended."""
    groups = [transfer["transfer_group"] for transfer in _all(stripe, "transfers")]
    return sorted({group for group in groups if groups.count(group) > 1})


def in_no_bank(stripe: StripeWorld) -> list[str]:
    """The payouts that we say are in the payee's bank, and that it has sent back; what it did before Stripe's list begins is lost."""
    since = int((clock.now() - events.BANK_MAY_RETURN).timestamp())
    found = []
    for payout in Payout.objects.filter(status=Payout.Status.PAID).order_by("pk"):
        of_account = {"Stripe-Account": payout.destination}
        sent_back = stripe.objects(f"events?type=payout.failed&created[gte]={since}&limit=100", **of_account)
        found += [f"{payout}" for told in sent_back if told["data"]["object"]["id"] == payout.bank_payout_id]
    return found


def charges(stripe: StripeWorld) -> list[dict[str, Any]]:
    return list(_all(stripe, "charges"))


def _all(stripe: StripeWorld, path: str) -> Iterator[dict[str, Any]]:
    after = ""
    while page := stripe.objects(f"{path}?limit=100{after}"):
        yield from page
        after = f"&starting_after={page[-1]['id']}"


def act(what: Callable[[], Any]) -> Any:
    """What a person or a worker does; a refusal is an answer, and a death leaves what was committed."""
    try:
        return what()
    except DomainError as error:
        return error
    except (Killed, *COMES_BACK):
        return None


@contextmanager
def cloned_database(template: str, superuser_url: str, name: str) -> Iterator[None]:
    """A database of its own for one history, as the app's role sees it; evidence refuses to be cleaned away."""
    before = dict(connection.settings_dict)
    connections.close_all()
    with psycopg.connect(superuser_url, autocommit=True) as server:
        server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    make_database(superuser_url, name, template=template)
    connection.settings_dict.update(NAME=name, USER="residual_app")
    try:
        yield
    finally:
        connections.close_all()
        connection.settings_dict.update(before)
        with psycopg.connect(superuser_url, autocommit=True) as server:
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
