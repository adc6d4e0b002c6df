"""The ledger beside django-hordak 2.0 and beside the same tables without rules, on one server, turn by turn.

    python -m benchmarks.payouts.ledger            everything: ten minutes, half of them for an account with ten million postings
    python -m benchmarks.payouts.ledger --quick    fewer rounds, and a million postings
    python -m benchmarks.payouts.ledger --only balance [--postings 1000000]    the balance of an account that has so many, alone

Where `TEST_DATABASE_URL` and `TEST_REDIS_URL` name servers they are used, otherwise the embedded ones. hordak runs in a virtual
environment of its own, made in var/hordak from peers-requirements.txt. "Bare" are the ledger's two tables with the same columns and a
primary key and nothing else, filled by the same statements.

Times are the wall's; a round takes each contender in turn and the table gives the median, so that what else the machine does falls on all.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from benchmarks.payouts import scratch

HERE = Path(__file__).parent
PEER = scratch.ROOT / "var" / "hordak"
TWO, BATCHES, BATCH, WIDE, LEGS = 200, 4, 500, 4, 1_000
PROCESSES = (1, 4, 16)
HOT = 400  # entries, however many processes share them
READS = 1_000
HOT_SECONDS = 30  # how often beat takes snapshots


class Hordak:
    """The peer's process."""

    def __init__(self, url: str) -> None:
        python = Path(os.environ.get("HORDAK_PYTHON", PEER / "bin" / "python"))
        if not python.exists():
            venv.create(PEER, with_pip=True)
            requirements = str(HERE / "peers-requirements.txt")
            subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", "-r", requirements], check=True)
        # A database beside ours on the same server: both are Django's, and would share its table of migrations.
        self._url, self._server = f"{url}_hordak", psycopg.connect(url, autocommit=True)
        self._name = sql.Identifier(self._url.rpartition("/")[2])
        self._server.execute(sql.SQL("CREATE DATABASE {}").format(self._name))
        self._process = subprocess.Popen(
            [python, HERE / "hordak_peer.py", self._url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(self._name))
        self._server.close()

    def do(self, command: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("django-hordak ended; see its error above")
        told: dict[str, Any] = json.loads(line)
        return told


BARE = """
CREATE TABLE bare_entry (id bigserial PRIMARY KEY, key varchar(160), kind varchar(16), currency varchar(3), n_legs int,
    booked_at timestamptz, created_at timestamptz, reverses_id bigint, txid xid8 DEFAULT pg_current_xact_id());
CREATE TABLE bare_posting (id bigserial PRIMARY KEY, entry_id bigint, leg int, account_id bigint, amount_micros bigint);
CREATE TABLE bare_account (id bigserial PRIMARY KEY, code varchar(80));
"""


def bare_post(cursor: Any, drafts: list[tuple[str, dict[str, int]]]) -> None:
    """What `ledger.post_many` sends, to tables that refuse nothing."""
    from django.utils import timezone

    now = timezone.now()
    n = len(drafts)
    columns = [
        [key for key, _ in drafts],
        ["sale"] * n,
        ["USD"] * n,
        [len(legs) for _, legs in drafts],
        [now] * n,
        [now] * n,
    ]
    cursor.execute(
        """INSERT INTO bare_entry (key, kind, currency, n_legs, booked_at, created_at, reverses_id)
        SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::timestamptz[], %s::timestamptz[], %s::bigint[])
        RETURNING key, id""",
        [*columns, [None] * n],
    )
    made = dict(cursor.fetchall())
    codes = sorted({code for _, legs in drafts for code in legs})
    cursor.execute("SELECT code, id FROM payouts_account WHERE code = ANY(%s)", [codes])
    accounts = dict(cursor.fetchall())
    rows = [
        (made[key], number, accounts[code], micros)
        for key, legs in drafts
        for number, (code, micros) in enumerate(legs.items())
    ]
    cursor.execute(
        """INSERT INTO bare_posting (entry_id, leg, account_id, amount_micros)
        SELECT * FROM unnest(%s::bigint[], %s::int[], %s::bigint[], %s::bigint[])""",
        [list(column) for column in zip(*rows, strict=True)],
    )


TWO_LEGS = {"cash:pending:USD": 1_000_000, "revenue:platform_fee:USD": -1_000_000}


def wide_legs() -> dict[str, int]:
    return {"cash:pending:USD": (LEGS - 1) * 10_000} | {f"pool:{n}:USD": -10_000 for n in range(1, LEGS)}


class Contenders:
    """Each does the same work; the key says that it is new."""

    def __init__(self, hordak: Hordak) -> None:
        self.hordak = hordak
        self._number = 0

    def _key(self) -> str:
        self._number += 1
        return f"bench:{os.getpid()}:{self._number}"

    def ours(self, n: int, batch: int, legs: dict[str, int]) -> float:
        from django.utils import timezone

        from payouts import ledger
        from payouts.models import JournalEntry

        now = timezone.now()  # the demo's movable clock is a query, and no part of the ledger
        started = time.perf_counter()
        for _ in range(n):
            if batch == 1:
                ledger.post(key=self._key(), kind=JournalEntry.Kind.SALE, postings=legs, booked_at=now)
            else:
                ledger.post_many([ledger.Draft(self._key(), JournalEntry.Kind.SALE, legs, now) for _ in range(batch)])
        return time.perf_counter() - started

    def bare(self, n: int, batch: int, legs: dict[str, int]) -> float:
        from django.db import connection, transaction

        started = time.perf_counter()
        for _ in range(n):
            with transaction.atomic(), connection.cursor() as cursor:
                bare_post(cursor, [(self._key(), legs) for _ in range(batch)])
        return time.perf_counter() - started

    def theirs(self, command: str) -> float:
        return float(self.hordak.do(command)["seconds"])


def compare(rounds: int, contenders: Contenders, console: Console) -> None:
    rows = []
    for name, n, batch, legs, command in (
        ("two legs, one per transaction", TWO, 1, TWO_LEGS, f"two {TWO}"),
        (f"two legs, {BATCH} per transaction", BATCHES, BATCH, TWO_LEGS, f"batch {BATCHES} {BATCH}"),
        ("the same, hordak by bulk_create", BATCHES, BATCH, TWO_LEGS, f"bulk {BATCHES} {BATCH}"),
        (f"{LEGS:,} legs, one per transaction", WIDE, 1, wide_legs(), f"wide {WIDE} {LEGS}"),
    ):
        taken: dict[str, list[float]] = {"ours": [], "hordak": [], "bare": []}
        for number in range(rounds + 1):
            took = {
                "ours": contenders.ours(n, batch, legs),
                "hordak": contenders.theirs(command),
                "bare": contenders.bare(n, batch, legs),
            }
            if number:  # the first warms caches and prepared plans
                for who, seconds in took.items():
                    taken[who].append(seconds)
        entries, of = n * batch, "legs/s" if len(legs) > 2 else "entries/s"
        amount = entries * len(legs) if len(legs) > 2 else entries
        rows.append((name, of, {who: amount / statistics.median(seconds) for who, seconds in taken.items()}))
    rate_alone = rows[0][2]["hordak"]
    console.print(
        f"Batches of {BATCH}: {rows[1][2]['ours'] / rate_alone:.1f} x hordak's entries one per transaction in the table below"
    )
    table = Table(title=f"Median of {rounds} rounds")
    for column in ("", "", "ours", "hordak 2.0", "bare", "ours ÷ hordak", "ours ÷ bare"):
        table.add_column(column, justify="left" if not column else "right")
    for name, of, rate in rows:
        table.add_row(
            name,
            of,
            *(f"{rate[who]:,.0f}" for who in ("ours", "hordak", "bare")),
            f"{rate['ours'] / rate['hordak']:.2f}",
            f"{rate['ours'] / rate['bare']:.2f}",
        )
    console.print(table)


def _hot(number: int, n: int, start: Any) -> None:
    import django
    from django.db import connection

    django.setup()
    from payouts import ledger
    from payouts.models import JournalEntry

    connection.ensure_connection()
    start.wait()
    for entry in range(n):
        ledger.post(key=f"hot:{os.getpid()}:{number}:{entry}", kind=JournalEntry.Kind.SALE, postings=TWO_LEGS)


def hot_account(console: Console) -> None:
    """The same number of entries on the same two accounts, by more and more processes."""
    from django.db import connections

    connections.close_all()
    context = multiprocessing.get_context("spawn")
    table = Table(title=f"{HOT} entries on two hot accounts")
    for column in ("processes", "entries/s", "÷ one process", "deadlocks, failures"):
        table.add_column(column, justify="right")
    alone = 0.0
    for processes in PROCESSES:
        barrier = context.Barrier(processes + 1)
        workers = [
            context.Process(target=_hot, args=(number, HOT // processes, barrier)) for number in range(processes)
        ]
        for worker in workers:
            worker.start()
        barrier.wait()
        started = time.perf_counter()
        for worker in workers:
            worker.join()
        rate = HOT / (time.perf_counter() - started)
        alone = alone or rate
        failed = sum(worker.exitcode != 0 for worker in workers)
        table.add_row(str(processes), f"{rate:,.0f}", f"{rate / alone:.2f}", str(failed))
    console.print(table)


def changes(hordak: Hordak, console: Console) -> None:
    from django.db import DatabaseError, connection, transaction

    theirs = hordak.do("changes")
    table = Table(title="A posted leg, changed by the owner of the tables")
    for column in ("", "ours", "hordak 2.0"):
        table.add_column(column)
    for name, statement in (
        ("UPDATE", "UPDATE payouts_posting SET account_id = (SELECT max(id) FROM payouts_account)"),
        ("DELETE", "DELETE FROM payouts_posting WHERE entry_id = (SELECT max(entry_id) FROM payouts_posting)"),
    ):
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(statement)
            said = "accepted"
        except DatabaseError as error:
            said = f"refused: {str(error).splitlines()[0]}"
        table.add_row(name, said, theirs[name])
    console.print(table)


def width(console: Console) -> None:
    """An entry of 1,000 to 16,000 legs in one statement; the check that allows 1,000 is dropped for it, in this database only."""
    from django.db import connection, transaction

    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE payouts_journalentry DROP CONSTRAINT entry_has_2_to_1000_legs")
        cursor.execute(
            "INSERT INTO payouts_account (code, kind, currency, created_at)"
            " SELECT 'pool:' || n || ':USD', 'liability', 'USD', now() FROM generate_series(1, 16000) n ON CONFLICT DO NOTHING"
        )
    table = Table(title="One entry, by its legs")
    for column in ("legs", "ms", "µs a leg"):
        table.add_column(column, justify="right")
    for legs in (1_000, 2_000, 4_000, 8_000, 16_000):
        took = []
        for number in range(3):
            started = time.perf_counter()
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(
                    "INSERT INTO payouts_journalentry (key, kind, currency, n_legs, booked_at, created_at)"
                    " VALUES (%s, 'sale', 'USD', %s, now(), now()) RETURNING id",
                    [f"wide:{legs}:{number}", legs],
                )
                (entry,) = cursor.fetchone()
                cursor.execute(
                    "INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros)"
                    " SELECT %(entry)s, 0, id, %(rest)s FROM payouts_account WHERE code = 'cash:pending:USD' UNION ALL"
                    " SELECT %(entry)s, row_number() OVER (ORDER BY id), id, -1 FROM ("
                    "SELECT id FROM payouts_account WHERE code LIKE 'pool:%%' ORDER BY id LIMIT %(rest)s) pools",
                    {"entry": entry, "rest": legs - 1},
                )
            took.append(time.perf_counter() - started)
        seconds = statistics.median(took)
        table.add_row(f"{legs:,}", f"{seconds * 1e3:,.0f}", f"{seconds / legs * 1e6:.1f}")
    console.print(table)


ENTRIES = """
INSERT INTO payouts_journalentry (key, kind, currency, n_legs, booked_at, created_at)
SELECT 'fill:' || lpad(n::text, 9, '0'), 'settle', 'USD', 2, now(), now() FROM generate_series(%(first)s, %(last)s) n
"""
LEGS_OF_ENTRIES = """
INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros)
SELECT e.id, legs.leg, legs.account_id, legs.amount_micros FROM payouts_journalentry e, (
    SELECT 0 AS leg, id AS account_id, 1000000 AS amount_micros FROM payouts_account WHERE code = 'cash:available:USD'
    UNION ALL SELECT 1, id, -1000000 FROM payouts_account WHERE code = 'in_transit:USD'
) legs
WHERE e.id > %(after)s ORDER BY e.id, legs.leg
"""
INDEXES = """
SELECT c.conname, c.conrelid::regclass::text, pg_get_constraintdef(c.oid), true FROM pg_constraint c
WHERE c.conrelid IN ('payouts_journalentry'::regclass, 'payouts_posting'::regclass) AND c.contype = 'u'
UNION ALL SELECT i.indexrelid::regclass::text, i.indrelid::regclass::text, pg_get_indexdef(i.indexrelid), false FROM pg_index i
WHERE i.indrelid IN ('payouts_journalentry'::regclass, 'payouts_posting'::regclass)
    AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid AND c.contype IN ('p', 'u'))
"""


def fill(postings: int) -> None:
    """Entries of two legs, so many of them, as a bulk load makes them: triggers off and indexes built at the end, in this database only."""
    from django.db import connection, transaction

    with connection.cursor() as cursor:
        cursor.execute("SET maintenance_work_mem = '512MB'")
        cursor.execute(INDEXES)
        indexes = cursor.fetchall()
        for table in ("payouts_journalentry", "payouts_posting"):
            cursor.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        for name, table, _, is_constraint in indexes:
            cursor.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}" if is_constraint else f"DROP INDEX {name}")
        cursor.execute("SELECT coalesce(max(id), 0) FROM payouts_journalentry")
        (after,) = cursor.fetchone()
        step = 1_000_000
        for first in range(1, postings + 1, step):
            with transaction.atomic():
                cursor.execute(ENTRIES, {"first": first, "last": min(first + step - 1, postings)})
                cursor.execute(LEGS_OF_ENTRIES, {"after": after})
                cursor.execute("SELECT max(id) FROM payouts_journalentry")
                (after,) = cursor.fetchone()
        for name, table, definition, is_constraint in indexes:
            cursor.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}" if is_constraint else definition)
        for table in ("payouts_journalentry", "payouts_posting"):
            cursor.execute(f"ALTER TABLE {table} ENABLE TRIGGER ALL")


def old_account(postings: int, console: Console) -> None:
    """The balance of an account with very many postings, by how many came after its snapshot, beside a new account's and an empty statement."""
    from django.db import connection

    from payouts import ledger
    from payouts.models import JournalEntry

    def post(key: str, n: int, legs: dict[str, int]) -> None:
        ledger.post_many([ledger.Draft(f"{key}:{number}", JournalEntry.Kind.SETTLE, legs) for number in range(n)])

    def empty() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            return int(cursor.fetchone()[0])

    hot = {"cash:available:USD": 1, "in_transit:USD": -1}
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (backend,) = cursor.fetchone()
    post("open", 1, hot)
    post("one", 1, {"cash:pending:USD": 5, "in_transit:USD": -5})
    started = time.perf_counter()
    fill(postings)
    filled = time.perf_counter() - started
    started = time.perf_counter()
    assert ledger.take_snapshots() == 2
    summed = time.perf_counter() - started
    table = Table(title=f"Balance of an account with {postings:,} postings, {READS:,} reads each")
    for column in ("", "median ms", "p99 ms", "÷ SELECT 1", "p99 ÷ SELECT 1's", "CPU ms, both sides"):
        table.add_column(column, justify="right" if column else "left")
    floor: list[float] = []
    n_later = 0
    for name, later, read in (
        ("SELECT 1", 0, empty),
        ("a new account's, one posting", 0, lambda: ledger.balance("cash:pending:USD")),
        ("nothing after its snapshot", 0, lambda: ledger.balance("cash:available:USD")),
        (f"{ledger.SNAPSHOT_POSTINGS - 1:,} after it", 999, lambda: ledger.balance("cash:available:USD")),
        (
            f"{HOT_SECONDS * 200:,} after it: {HOT_SECONDS} s of a payout run at 100/s",
            HOT_SECONDS * 200,
            lambda: ledger.balance("cash:available:USD"),
        ),
    ):
        while n_later < later:
            post(f"later:{n_later}", n := min(1_000, later - n_later), hot)
            n_later += n
        took, found = [], 0
        cpu = time.process_time() + scratch.backend_cpu_seconds(backend)
        for _ in range(READS):
            started = time.perf_counter()
            found = read()
            took.append(time.perf_counter() - started)
        cpu = time.process_time() + scratch.backend_cpu_seconds(backend) - cpu
        took.sort()
        median, p99 = statistics.median(took), took[len(took) * 99 // 100]
        floor = floor or [median, p99]
        assert found == (
            1 if read is empty else 5 if not later and "new" in name else postings * 1_000_000 + 1 + n_later
        )
        table.add_row(
            name,
            f"{median * 1e3:.2f}",
            f"{p99 * 1e3:.2f}",
            f"{median / floor[0]:.0f}",
            f"{p99 / floor[1]:.0f}",
            f"{cpu / READS * 1e3:.2f}",
        )
    console.print(table)
    console.print(
        f"Filled in {filled:,.0f} s in bulk (triggers off, in this database only); the first snapshot summed it up in {summed:.0f} s; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--postings", type=int, default=0, help="of the account whose balance is read; 10,000,000 by default"
    )
    parser.add_argument("--only", choices=["compare", "hot", "changes", "width", "balance"], help="one part")
    arguments = parser.parse_args()
    console = Console(width=110)
    with scratch.database("ledger") as url:
        from django.db import connection

        with psycopg.connect(url) as version:
            console.print(
                f"PostgreSQL {version.info.server_version // 10_000}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
            )
        with connection.cursor() as cursor:
            cursor.execute(BARE)
        parts: dict[str, Callable[[], None]] = {
            "hot": lambda: hot_account(console),
            "width": lambda: width(console),
        }
        if arguments.only in (None, "compare", "changes"):
            with Hordak(url) as hordak:
                if arguments.only in (None, "compare"):
                    compare(3 if arguments.quick else 7, Contenders(hordak), console)
                if arguments.only in (None, "changes"):
                    changes(hordak, console)
        for name, part in parts.items():
            if arguments.only in (None, name):
                part()
        if arguments.only in (None, "balance"):
            old_account(arguments.postings or (1_000_000 if arguments.quick else 10_000_000), console)


if __name__ == "__main__":
    sys.exit(main())
