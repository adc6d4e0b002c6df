"""A pytest plugin: the real PostgreSQL and Redis that the tests run on, before Django reads its settings.

`TEST_DATABASE_URL` (a superuser's) and `TEST_REDIS_URL` name servers that are there; without them the embedded ones run
for as long as the tests do.
"""

import atexit
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

ROOT = Path(__file__).resolve().parent.parent
_servers = ExitStack()


def _provide() -> None:
    from portal import embedded
    from portal.environment import role_url
    from portal.roles import create_roles

    name = urlsplit(os.environ.get("DATABASE_URL", "/residual")).path.strip("/")  # two runs at once need two names
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw-1")
    database, redis = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    if not (database and redis):
        urls = _servers.enter_context(embedded.servers(ROOT / "var" / "tests"))
        database, redis = urls.database, urls.redis
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(7)")  # two xdist workers make the roles at once
        create_roles(connection)
        major = connection.info.server_version // 10_000
    var = tempfile.mkdtemp(prefix="residual-")
    atexit.register(shutil.rmtree, var, ignore_errors=True)
    Path(var, "static").mkdir()  # whitenoise misses it aloud
    os.environ.update(
        RESIDUAL_MODE="demo",
        RESIDUAL_VAR=var,
        SECRET_KEY="only-for-tests-" + "0" * 40,
        SUPERUSER_DATABASE_URL=database,
        DATABASE_URL=role_url(database, "postgres", name),
        REDIS_URL=f"{redis.rpartition('/')[0]}/{int(worker.removeprefix('gw')) % 14 + 2}",
        STRIPE_API_KEY="sk_test_local",
        STRIPE_WEBHOOK_SECRET="whsec_platform",
        STRIPE_CONNECT_WEBHOOK_SECRET="whsec_connect",
        OMP_NUM_THREADS="1",
    )
    print(f"PostgreSQL {major}, Redis {os.environ['REDIS_URL'].rpartition('@')[2]}")  # noqa: T201


def pytest_unconfigure() -> None:
    _servers.close()


_provide()
