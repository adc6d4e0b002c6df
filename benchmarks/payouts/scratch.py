"""A migrated database of the benchmark's own, on the server that `TEST_DATABASE_URL` names or on an embedded one, dropped afterwards."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def database(name: str) -> Iterator[str]:
    """Django is set up on it; gives the superuser's URL of the scratch database."""
    with ExitStack() as held:
        superuser, redis = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
        sys.path.insert(0, str(ROOT))
        from portal import embedded
        from portal.environment import role_url

        if not (superuser and redis):
            urls = held.enter_context(embedded.servers(ROOT / "var" / "bench"))
            superuser, redis = urls.database, urls.redis
        scratch = f"bench_{name}_{os.getpid()}"
        var = tempfile.mkdtemp(prefix="residual-bench-")
        held.callback(shutil.rmtree, var, ignore_errors=True)
        with psycopg.connect(superuser, autocommit=True) as server:
            server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(scratch)))
        url = role_url(superuser, "postgres", scratch)
        os.environ.update(
            RESIDUAL_MODE="demo",
            RESIDUAL_VAR=var,
            SECRET_KEY="only-for-benchmarks-" + "0" * 40,
            DATABASE_URL=url,
            REDIS_URL=f"{redis.rpartition('/')[0]}/1",
            STRIPE_API_KEY="sk_test_bench",
            DJANGO_SETTINGS_MODULE="portal.settings",
            LOG_LEVEL="WARNING",
        )
        try:
            import django

            django.setup()
            import logging

            logging.disable(logging.INFO)
            from django.core.management import call_command
            from django.db import connections

            call_command("migrate", verbosity=0)
            yield url
            connections.close_all()
        finally:
            with psycopg.connect(superuser, autocommit=True) as server:
                server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(scratch)))


def backend_cpu_seconds(pid: int) -> float:
    """CPU time of a PostgreSQL backend on this machine; 0 where it is not to be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def backend_peak_bytes(pid: int) -> int:
    """The most memory that a PostgreSQL backend of this machine held, the shared buffers that it touched included."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
