"""A database in which tests may commit: a clone of the test database, since what the ledger holds cannot be truncated."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection, connections
from psycopg import sql


@pytest.fixture
def committed_db(django_db_setup: Any, django_db_blocker: Any, superuser_url: str) -> Iterator[str]:
    """For tests with threads or second connections; the clone is dropped afterwards. Gives its name."""
    original = connection.settings_dict["NAME"]
    clone = f"{original}_clone"
    with django_db_blocker.unblock():
        connections.close_all()
        with psycopg.connect(superuser_url, autocommit=True) as server:
            server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(clone)))
            server.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(clone), sql.Identifier(original))
            )
        connection.settings_dict["NAME"] = clone
        try:
            yield clone
        finally:
            connections.close_all()
            connection.settings_dict["NAME"] = original
            with psycopg.connect(superuser_url, autocommit=True) as server:
                server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(clone)))
