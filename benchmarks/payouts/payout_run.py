"""A payout run against the local Stripe: limited by the configured rate, killed half-way, resumed, and what it costs itself.

    python -m benchmarks.payouts.payout_run                              5,000 payees at 50 requests a second
    python -m benchmarks.payouts.payout_run --payees 100000 --rate 100   the whole thing: seventeen minutes and the kill
    python -m benchmarks.payouts.payout_run --workers 2 --no-kill

The payees' connected accounts are written into the local Stripe's file before it starts, and their counts beside the version, for
what is measured is the run. The sale is real: paid at the local Stripe, settled, divided, past its hold. The local Stripe
answers 429 to whatever exceeds the rate by a fifth. Half-way a worker is killed with SIGKILL; the run goes on when its lease
has run out. At the end every transfer is compared with Stripe's, both ways.

Own cost: CPU seconds of the workers, of their PostgreSQL backends and of the snapshots of balances that beat takes meanwhile, per wall
second of the run (the wait for the lease left out). A busy machine makes the wall longer and so that part smaller: what it costs for a
payee, and what that is at Stripe's 100 a second, is said beside it.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.payouts import scratch

EACH = 5  # whole units for each payee
CARD = {"email": "b@example.org", "card_number": "4242424242424242", "expiry": "12/34", "cvc": "123", "name": "B"}
SNAPSHOT_SECONDS = 30.0  # beat's
HEADROOM = 1.2  # of the local Stripe's limit over the configured rate


def accounts_at_stripe(folder: Path, n: int) -> list[str]:
    """Connected accounts that can be paid, as onboarding would leave them."""
    from payouts.local_stripe import objects, store
    from payouts.local_stripe.store import Store

    folder.mkdir(parents=True, exist_ok=True)
    file, made = Store(folder / "stripe.sqlite3"), []
    given = {"country": "US", "capabilities": {"transfers": {"requested": True}}}
    with file.transaction() as db:
        for _ in range(n):
            account = objects.account(given, now=store.now(db))
            account |= {
                "details_submitted": True,
                "payouts_enabled": True,
                "capabilities": {"transfers": "active"},
                "requirements": objects.requirements([]),
                "_bank": "ba_bench",
                "_bank_refuses": "",
            }
            store.insert(db, "account", account)
            made.append(account["id"])
    file.close()
    return made


def payees(accounts: list[str]) -> Any:
    """A party for each account, and a published version of which each owns a record."""
    from django.db import connection

    from tests.factories.marketplace import PartyFactory, PublishedVersionFactory

    party = PartyFactory()
    version = PublishedVersionFactory(contributions={party: 1})
    with connection.cursor() as cursor:
        cursor.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'marketplace_party'")
        columns = ", ".join(f'"{name}"' for (name,) in cursor.fetchall() if name not in ("id", "public_id", "name"))
        cursor.execute(
            f"INSERT INTO marketplace_party (public_id, name, {columns}) SELECT gen_random_uuid(), 'Payee ' || n, {columns}"  # noqa: S608
            " FROM generate_series(1, %s) n, (SELECT * FROM marketplace_party WHERE id = %s) one RETURNING id",
            [len(accounts), party.pk],
        )
        parties = [pk for (pk,) in cursor.fetchall()]
        cursor.execute(
            "INSERT INTO payouts_payeeaccount (party_id, stripe_account_id, details_submitted, transfers_active, payouts_enabled,"
            " requirements, created_at, updated_at) SELECT *, true, true, true, '[]', now(), now()"
            " FROM unnest(%s::bigint[], %s::text[])",
            [parties, accounts],
        )
        cursor.execute(
            "INSERT INTO payouts_payeecount (version_id, role, party_id, n_records)"
            " SELECT %s, role, party, 1 FROM unnest(%s::bigint[]) party, unnest(ARRAY['rights_holder', 'labeller']) role",
            [version.pk, parties],
        )
    return version


def sell(version: Any, n_payees: int, stripe: Any) -> None:
    """Paid at the local Stripe, settled, divided at once, and past the hold of new payees."""
    from marketplace import clock
    from payouts import ledger
    from payouts.services import events
    from payouts.services.reconciliation import settle_funds
    from payouts.services.sales import start_checkout
    from tests.factories.marketplace import OfferFactory, OrderFactory

    price = n_payees * EACH * 1_000_000 * 10 // 9
    price = -(-price // 10_000) * 10_000
    offer = OfferFactory(version=version, price_micros=price, currency="USD", upfront_bps=9_000, pool_bps=0)
    order = OrderFactory(offers=[offer])
    answer = httpx.post(
        start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"), data=CARD
    )
    assert answer.status_code == 303, answer.text
    events.book_checkout(order.payment.checkout_id)
    control(stripe, "clock", advance_seconds=3 * 24 * 3600)
    settle_funds()
    clock.advance(timedelta(days=31))
    ledger.take_snapshots()


def control(stripe: Any, what: str, **given: Any) -> dict[str, Any]:
    answer = httpx.post(f"{stripe.url}/_control/{what}", auth=(stripe.secret_key, ""), json=given, timeout=60)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def of_snapshots() -> float:
    """Take them; returns the CPU seconds of this process and its PostgreSQL backend."""
    from django.db import connection

    from payouts import ledger

    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (backend,) = cursor.fetchone()
    before = time.process_time() + scratch.backend_cpu_seconds(backend)
    ledger.take_snapshots()
    return time.process_time() + scratch.backend_cpu_seconds(backend) - before


def work(run_id: int, report: Path) -> None:
    """What a payments worker does: whatever of the run is due, until the run has ended."""
    import django

    django.setup()
    import logging

    from django.db import connection
    from django.utils import timezone

    from payouts import gateway, tasks
    from payouts.models import PayoutRun, PayoutShard

    logging.disable(logging.WARNING)
    refused, create = [0], gateway.create_transfer

    def counted(**params: Any) -> gateway.Transfer:
        try:
            return create(**params)
        except gateway.StripeUncertain as error:
            refused[0] += error.http_status == 429
            raise

    gateway.create_transfer = counted
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (backend,) = cursor.fetchone()

    usage = resource.getrusage(resource.RUSAGE_SELF)
    start = usage.ru_utime + usage.ru_stime

    def tell() -> None:
        """Twice a second, so that what a killed worker has cost is not lost."""
        while True:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            cpu, of_backend = usage.ru_utime + usage.ru_stime, scratch.backend_cpu_seconds(backend)
            partial = report.with_suffix(".partial")
            partial.write_text(
                json.dumps({"cpu": cpu, "start": start, "backend": of_backend, "busy": refused[0]}), encoding="utf-8"
            )
            partial.replace(report)
            time.sleep(0.5)

    threading.Thread(target=tell, daemon=True).start()
    while not PayoutRun.objects.get(pk=run_id).is_finished:
        wall = timezone.now()
        for model, task in ((PayoutShard, tasks.execute_payout_shard), (PayoutRun, tasks.execute_payout_run)):
            rows = model.objects.filter(run=run_id) if model is PayoutShard else model.objects.filter(pk=run_id)
            due = rows.filter(status="queued", due_at__lte=wall) | rows.filter(
                status="running", lease_expires_at__lt=wall
            )
            for pk in due.order_by("pk").values_list("pk", flat=True):
                task(pk)
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payees", type=int, default=5_000)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--no-kill", action="store_true")
    arguments = parser.parse_args()
    console = Console(width=110)
    os.environ |= {"STRIPE_REQUESTS_PER_SECOND": str(arguments.rate), "PAYOUT_RUN_APPROVAL_ABOVE": "1000000000"}
    with tempfile.TemporaryDirectory() as folder, scratch.database("payout_run"):
        from django.conf import settings
        from django.db import connections

        from payouts.local_stripe import process
        from payouts.models import Payout, PayoutRun
        from payouts.services.reconciliation import reconcile
        from payouts.services.transfers import request_payout_run

        data = Path(folder) / "stripe"
        accounts = accounts_at_stripe(data, arguments.payees)
        with process.start(data, secret_key="sk_test_of_the_benchmark", validate=False) as stripe:  # noqa: S106
            os.environ |= {"STRIPE_API_BASE": stripe.url, "STRIPE_API_KEY": stripe.secret_key}
            settings.STRIPE_API_BASE, settings.STRIPE_API_KEY = stripe.url, stripe.secret_key
            started = time.perf_counter()
            sell(payees(accounts), arguments.payees, stripe)
            console.print(
                f"{arguments.payees:,} payees are owed {EACH}.00 each, after {time.perf_counter() - started:.0f} s"
            )
            control(stripe, "limits", requests_per_second=arguments.rate * HEADROOM)
            run = request_payout_run(currency="USD", key="bench")
            connections.close_all()
            context = multiprocessing.get_context("spawn")

            def worker(number: int) -> tuple[Any, Path]:
                report = Path(folder) / f"report{number}"
                report.write_text('{"cpu": 0, "start": 0, "backend": 0, "busy": 0}')
                made = context.Process(target=work, args=(run.pk, report))
                made.start()
                return made, report

            workers = [worker(number) for number in range(arguments.workers)]
            started, paused, is_killed, first_sent = time.perf_counter(), 0.0, arguments.no_kill, 0.0
            stopped_at = n_before = 0.0
            snapshots, next_round = 0.0, time.perf_counter() + SNAPSHOT_SECONDS
            while any(one.is_alive() for one, _ in workers):
                time.sleep(2.0 if arguments.payees > 10_000 else 0.5)
                if time.perf_counter() > next_round:  # as beat does
                    next_round += SNAPSHOT_SECONDS
                    snapshots += of_snapshots()
                n_sent = Payout.objects.filter(transfer_id__isnull=False).count()
                first_sent = first_sent or (time.perf_counter() if n_sent else 0.0)
                if not is_killed and n_sent >= arguments.payees // 2:
                    os.kill(workers[0][0].pid, signal.SIGKILL)
                    workers[0][0].join()
                    is_killed, stopped_at, n_before = True, time.perf_counter(), n_sent
                    console.print(f"killed a worker after {n_sent:,} transfers")
                    workers.append(worker(len(workers)))
                if stopped_at and arguments.workers == 1 and not paused and n_sent > n_before:
                    paused = time.perf_counter() - stopped_at
            wall = time.perf_counter() - started
            run = PayoutRun.objects.get(pk=run.pk)
            told = [json.loads(report.read_text()) for _, report in workers]
            ours, backends = sum(one["cpu"] for one in told), sum(one["backend"] for one in told)
            sent = Payout.objects.filter(status="sent").count()
            assert run.status == "done" and sent == arguments.payees, (run.status, run.error_message, sent)
            control(stripe, "limits", requests_per_second=None)
            differences = reconcile().differences
            assert not differences, differences[:3]
            server = scratch.backend_cpu_seconds(stripe.process.pid) + sum(
                scratch.backend_cpu_seconds(int(child))
                for child in Path(f"/proc/{stripe.process.pid}/task/{stripe.process.pid}/children").read_text().split()
            )
            moving = wall - paused
            table = Table(
                title=f"{arguments.payees:,} payees, {arguments.rate:.0f} requests/s, {arguments.workers} worker(s)"
            )
            for column in ("", ""):
                table.add_column(column, justify="right" if table.columns else "left")
            ours += snapshots
            moved = (ours + backends - sum(one["start"] for one in told)) / arguments.payees
            for name, value in (
                ("wall, without the wait for the killed worker's lease", f"{moving:.0f} s"),
                ("at the configured rate alone", f"{arguments.payees / arguments.rate:.0f} s"),
                ("transfers a second", f"{arguments.payees / moving:.1f}"),
                ("wait for the lease", f"{paused:.0f} s"),
                ("workers' CPU, their start included", f"{ours - snapshots:.1f} s"),
                ("their PostgreSQL backends' CPU", f"{backends:.1f} s"),
                (f"CPU of a snapshot of balances every {SNAPSHOT_SECONDS:.0f} s", f"{snapshots:.1f} s"),
                ("own cost, of the wall", f"{(ours + backends) / moving:.1%}"),
                ("own cost for a payee, without the workers' start", f"{moved * 1e3:.2f} ms"),
                ("the same, of the wall at Stripe's 100/s", f"{moved * 100:.1%}"),
                ("the local Stripe's CPU", f"{server:.0f} s"),
                ("answers 429", str(sum(one["busy"] for one in told))),
                ("differences from Stripe's books", str(len(differences))),
            ):
                table.add_row(name, value)
            console.print(table)
            console.print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
