"""Which database role, broker and secrets each process of the product gets (DESIGN §2).

In demo mode the embedded servers stand in for whatever the environment does not name; in production every variable is
given, process by process, by whoever deploys it.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from portal import embedded
from portal.roles import APP, OWNER, WORKER, create_roles

DATABASE = "residual"


def var_dir() -> Path:
    return Path(os.environ.get("RESIDUAL_VAR") or Path(__file__).resolve().parent.parent / "var").resolve()


@dataclass(frozen=True)
class Environment:
    """The variables of each kind of process; a worker that parses or measures never sees the app's role or a Stripe key."""

    owner: dict[str, str]
    app: dict[str, str]
    worker: dict[str, str]
    stripe: dict[str, str] = field(default_factory=dict)

    def of(self, process: str) -> dict[str, str]:
        """The whole environment of web, ingest, attribution, default, payments or beat."""
        role = self.worker if process in ("ingest", "attribution") else self.app
        secrets = self.stripe if process in ("web", "payments") else {}
        # A worker that runs Django's checks imports every view, and with them torch; the migration has run them.
        skip = {} if process == "web" else {"CELERY_SKIP_CHECKS": "1"}
        return _inherited() | role | secrets | skip | {"RESIDUAL_PROCESS": process}


def _inherited() -> dict[str, str]:
    secret = ("DATABASE_", "STRIPE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(secret)}


@contextmanager
def demo_environment(var: Path | None = None) -> Iterator[Environment]:
    """What the environment names, and embedded servers for what it does not: `DATABASE_URL` and `REDIS_URL` each by itself.

    In the embedded PostgreSQL the database and its roles are made where they are missing.

    Raises:
        EmbeddedError: a server did not start.
    """
    var = var or var_dir()
    common = {
        "RESIDUAL_MODE": "demo",
        "RESIDUAL_VAR": str(var),
        "SECRET_KEY": os.environ.get("SECRET_KEY") or embedded.demo_secret_key(var),
    }
    database, redis = os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL")
    with ExitStack() as stack:
        if not (database and redis):
            urls = stack.enter_context(embedded.servers(var))
            redis = redis or urls.redis
        common["REDIS_URL"] = redis
        if database:
            given = {
                "owner": os.environ.get("DATABASE_OWNER_URL", database),
                "app": database,
                "worker": os.environ.get("DATABASE_WORKER_URL", database),
            }
        else:
            make_database(urls.database, DATABASE)
            given = {role: role_url(urls.database, f"residual_{role}", DATABASE) for role in ("owner", "app", "worker")}
        yield environment_of(common, **given)


def environment_of(common: dict[str, str], *, owner: str, app: str, worker: str) -> Environment:
    return Environment(
        owner=common | {"DATABASE_URL": owner},
        app=common | {"DATABASE_URL": app},
        worker=common | {"DATABASE_URL": worker},
    )


def make_database(superuser_url: str, name: str, *, template: str | None = None) -> None:
    """Make the roles and the database, owned by the owner's role, unless they are there."""
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        create_roles(connection)
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            return
        make = sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(OWNER))
        if template:
            make += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        connection.execute(make)


def role_url(superuser_url: str, role: str, database: str) -> str:
    """The same server, for another role and database; both servers of ours trust a role without a password."""
    assert role in (OWNER, APP, WORKER, "postgres")
    parts = urlsplit(superuser_url)
    address = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{role}@{address}", path=f"/{database}").geturl()
