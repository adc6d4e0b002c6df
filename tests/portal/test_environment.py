"""Each server that the environment does not name has the embedded one for it, whatever is said of the other."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from portal import embedded, environment
from portal.environment import demo_environment


@pytest.fixture
def embedded_urls(monkeypatch: Any) -> embedded.Urls:
    """What the embedded servers would be called; the tests' own servers play them, and no variable names any."""
    urls = embedded.Urls(database=os.environ["SUPERUSER_DATABASE_URL"], redis=os.environ["REDIS_URL"])

    @contextmanager
    def servers(var: Path) -> Iterator[embedded.Urls]:
        yield urls

    monkeypatch.setattr(embedded, "servers", servers)
    for name in ("DATABASE_URL", "DATABASE_OWNER_URL", "DATABASE_WORKER_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    return urls


@pytest.fixture
def database(monkeypatch: Any, embedded_urls: embedded.Urls) -> Iterator[str]:
    """The name of the database that the demo makes; dropped afterwards."""
    name = f"demo_{secrets.token_hex(4)}"
    monkeypatch.setattr(environment, "DATABASE", name)
    yield name
    with psycopg.connect(embedded_urls.database, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))


def test_a_database_without_a_redis_is_used(embedded_urls: embedded.Urls, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://app@db.internal/residual")

    with demo_environment(tmp_path) as found:
        assert found.app["DATABASE_URL"] == found.owner["DATABASE_URL"] == "postgres://app@db.internal/residual"
        assert found.app["REDIS_URL"] == embedded_urls.redis


def test_a_redis_without_a_database_is_used(
    embedded_urls: embedded.Urls, database: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://redis.internal:6379/0")

    with demo_environment(tmp_path) as found:
        assert found.worker["REDIS_URL"] == "redis://redis.internal:6379/0"
        assert found.app["DATABASE_URL"] == environment.role_url(embedded_urls.database, "residual_app", database)


def test_where_both_are_named_no_embedded_server_starts(monkeypatch: Any, tmp_path: Path) -> None:
    def servers(var: Path) -> Any:
        raise AssertionError("an embedded server was started")

    monkeypatch.setattr(embedded, "servers", servers)
    monkeypatch.setenv("DATABASE_URL", "postgres://app@db.internal/residual")
    monkeypatch.setenv("DATABASE_WORKER_URL", "postgres://worker@db.internal/residual")
    monkeypatch.setenv("REDIS_URL", "redis://redis.internal:6379/0")

    with demo_environment(tmp_path) as found:
        assert found.worker["DATABASE_URL"] == "postgres://worker@db.internal/residual"
