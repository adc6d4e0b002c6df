"""One pool over a million payees and ten million records' values: shares, lines, entries and statement totals.

    python -m benchmarks.payouts.division                          1,000,000 payees, 10,000,000 records
    python -m benchmarks.payouts.division --payees 100000          a tenth of both
    python -m benchmarks.payouts.division --records 1000000 --payees 100000    and so on; memory must not follow --records

The values (float64, as `shares` writes them) and each record's owner lie in files and are read in one pass, in blocks. What is
measured ends with the commit: every trigger, constraint and index of the ledger is on. Parties, a version and a sold order line are
there before; that the result's shares are published in between (rows of `attribution`, by COPY) is not counted. It checks that the lines sum to the pool to the micro, that largest remainder gave each line (against
`allocation.allocate` on a sample's bounds), that every entry balances, and that statement totals sum to the pool.

Says the seconds of the wall, of this process's CPU and of the PostgreSQL backend's, and the peak memory of both.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.payouts import scratch

BLOCK = 1 << 20  # records in memory at once
PPQ = 10**15
POOL = 600_000_000_000  # micros: 600,000.00


def records(folder: Path, *, n_records: int, n_payees: int) -> tuple[Path, Path]:
    """Values, a third of them harmful, and owners: everybody owns some, a few own very many."""
    values, owners = folder / "values.npy", folder / "owner.npy"
    rng = np.random.default_rng(0)
    value = np.lib.format.open_memmap(values, mode="w+", dtype=np.float64, shape=(n_records,))
    owner = np.lib.format.open_memmap(owners, mode="w+", dtype=np.int64, shape=(n_records,))
    for start in range(0, n_records, BLOCK):
        end = min(start + BLOCK, n_records)
        value[start:end] = rng.normal(0.4, 1.0, end - start)
        owner[start:end] = np.minimum((n_payees * rng.random(end - start) ** 1.5).astype(np.int64), n_payees - 1)
    owner[: min(n_payees, n_records)] = np.arange(min(n_payees, n_records))
    value.flush()
    owner.flush()
    return values, owners


def shares_of(values: Path, owners: Path, *, n_payees: int) -> tuple[np.ndarray, np.ndarray]:
    """Owners' paid parts per quadrillion and their records, in one pass over both files.

    The sums are float64, negatives are floored, and the integers are by largest remainder over the floats' exact ratio to the
    nearest part, which is where floats end.
    """
    value, owner = np.load(values, mmap_mode="r"), np.load(owners, mmap_mode="r")
    sums, counts = np.zeros(n_payees), np.zeros(n_payees, np.int64)
    for start in range(0, len(value), BLOCK):
        block = owner[start : start + BLOCK]
        sums += np.bincount(block, weights=value[start : start + BLOCK], minlength=n_payees)
        counts += np.bincount(block, minlength=n_payees)
    sums = np.maximum(sums, 0)
    exact = sums / sums.sum() * PPQ  # below 2**53, so a float holds each floor exactly
    ppq = np.floor(exact).astype(np.int64)
    leftover = PPQ - int(ppq.sum())
    order = np.lexsort((np.arange(n_payees), -(exact - ppq)))
    ppq[order[: max(leftover, 0)]] += 1
    assert leftover >= 0 and int(ppq.sum()) == PPQ
    return ppq, counts


@contextmanager
def step(name: str, console: Console, taken: dict[str, tuple[float, float]]) -> Iterator[None]:
    started, cpu = time.perf_counter(), time.process_time()
    yield
    taken[name] = time.perf_counter() - started, time.process_time() - cpu
    console.print(f"{name}: {taken[name][0]:.1f} s")


def world(n_payees: int) -> tuple[Any, Any, list[int]]:
    """A published version and a sold line's pool of it, and the parties; their contributions are not needed by a measured division."""
    from django.db import connection

    sys.path.insert(0, str(scratch.ROOT))
    from marketplace.money import Money
    from tests.factories.payouts import PoolFactory

    pool = PoolFactory(amount=Money(POOL, "USD"))
    with connection.cursor() as cursor:
        cursor.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'marketplace_party'")
        columns = [name for (name,) in cursor.fetchall() if name not in ("id", "public_id", "name")]
        quoted = ", ".join(f'"{name}"' for name in columns)
        cursor.execute(
            f"INSERT INTO marketplace_party (public_id, name, {quoted})"  # noqa: S608
            f" SELECT gen_random_uuid(), 'Payee ' || n, {quoted} FROM generate_series(1, %s) n,"
            " (SELECT * FROM marketplace_party ORDER BY id LIMIT 1) one RETURNING id",
            [n_payees],
        )
        parties = [pk for (pk,) in cursor.fetchall()]
        cursor.execute("ANALYZE marketplace_party")
    return pool, pool.version, parties


def write_shares(result: Any, version: Any, parties: list[int], ppq: np.ndarray, counts: np.ndarray) -> None:
    """COPY the shares of both partitions: the labellers' are the rights holders', so there is one pot."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE attribution_share DISABLE TRIGGER USER")  # the result was published empty
        for partition in ("rights_holder", "labeller"):
            statement = "COPY attribution_share (result_id, version_id, party_id, partition, n_records, count_ppq, paid_ppq) FROM STDIN"
            with cursor.copy(statement) as copy:
                for party, share, count in zip(parties, ppq.tolist(), counts.tolist(), strict=True):
                    copy.write_row((result.pk, version.pk, party, partition, count, 0, share))
        cursor.execute("ALTER TABLE attribution_share ENABLE TRIGGER USER")
        cursor.execute("ANALYZE attribution_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payees", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=0, help="ten times the payees by default")
    arguments = parser.parse_args()
    n_payees, n_records = arguments.payees, arguments.records or 10 * arguments.payees
    console, taken = Console(width=110), {}
    with tempfile.TemporaryDirectory() as folder, scratch.database("division"):
        from django.db import connection, transaction

        values, owners = records(Path(folder), n_records=n_records, n_payees=n_payees)
        pool, version, parties = world(n_payees)
        from attribution.models import AttributionResult
        from marketplace.models import License
        from payouts import ledger
        from payouts.models import Division, DivisionLine, JournalEntry
        from payouts.services import royalties
        from tests.factories.attribution import PublishedResultFactory

        license = License.objects.get(order_line=pool.order_line)
        result = PublishedResultFactory(license=license, shares={license.licensee: 1})
        assert result.status == AttributionResult.Status.PUBLISHED
        with connection.cursor() as cursor:  # only what is measured divides
            cursor.execute("ALTER TABLE attribution_share DISABLE TRIGGER ALL")
            cursor.execute("DELETE FROM attribution_share WHERE result_id = %s", [result.pk])
            cursor.execute("ALTER TABLE attribution_share ENABLE TRIGGER ALL")
            cursor.execute("SELECT pg_backend_pid()")
            (backend,) = cursor.fetchone()
        before = scratch.backend_cpu_seconds(backend)
        ours_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with step("records' values to shares, one pass", console, taken):
            ppq, counts = shares_of(values, owners, n_payees=n_payees)
        started = scratch.backend_cpu_seconds(backend)
        write_shares(result, version, parties, ppq, counts)
        publishing = scratch.backend_cpu_seconds(backend) - started
        with step("division: lines, entries, commit", console, taken):
            royalties.release_pool(pool=pool, result=result)
        with step("statement totals", console, taken), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(
                """SELECT count(*), sum(micros), sum(lines) FROM (
                    SELECT l.party_id, sum(l.amount_micros) AS micros, count(*) AS lines, sum(l.n_records)
                    FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
                    WHERE d.divided_at >= date_trunc('month', %s::timestamptz) GROUP BY l.party_id
                ) statements""",
                [Division.objects.latest("pk").divided_at],
            )
            n_statements, totals, n_lines = cursor.fetchone()
        cpu = scratch.backend_cpu_seconds(backend) - before - publishing
        backend_memory = scratch.backend_peak_bytes(backend)
        ours_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        division = Division.objects.latest("pk")
        entries = JournalEntry.objects.filter(key__startswith=f"{division.key}:")
        with connection.cursor() as cursor:
            cursor.execute(
                """SELECT count(*) FROM (SELECT e.id FROM payouts_journalentry e JOIN payouts_posting p ON p.entry_id = e.id
                GROUP BY e.id, e.n_legs HAVING sum(p.amount_micros) <> 0 OR count(*) <> e.n_legs) wrong"""
            )
            (unbalanced,) = cursor.fetchone()
            cursor.execute(
                """SELECT count(*) FROM payouts_divisionline WHERE division_id = %(d)s
                AND abs(amount_micros - %(pool)s::numeric * weight / %(total)s) >= 1""",
                {"d": division.pk, "pool": division.amount_micros, "total": division.holders_weight},
            )
            (off,) = cursor.fetchone()
        assert totals == division.amount_micros == POOL, (totals, division.amount_micros)
        assert ledger.balance(f"pool:{pool.pk}:USD") == 0
        assert (unbalanced, off) == (0, 0), (unbalanced, off)
        assert n_lines == DivisionLine.objects.filter(division=division).count()

        table = Table(
            title=f"{n_payees:,} payees, {n_records:,} records: {n_lines:,} lines, {entries.count():,} entries"
        )
        for column in ("", "wall s", "this process, CPU s"):
            table.add_column(column, justify="right" if column else "left")
        for name, (wall, ours) in taken.items():
            table.add_row(name, f"{wall:.1f}", f"{ours:.1f}")
        table.add_row(
            "all", f"{sum(wall for wall, _ in taken.values()):.1f}", f"{sum(ours for _, ours in taken.values()):.1f}"
        )
        console.print(table)
        console.print(
            f"PostgreSQL's backend: {cpu:.1f} CPU s, {backend_memory / 1e6:,.0f} MB at its peak, shared buffers included; this process: peak "
            f"{ours_memory / 1e6:,.0f} MB, of which {ours_before / 1e6:,.0f} MB before; load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores; {n_statements:,} statements sum to the pool, every entry balances, no line is a micro off"
        )


if __name__ == "__main__":
    main()
