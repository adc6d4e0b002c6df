import pytest
from django.db import OperationalError, connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from portal import health


def test_a_living_process_says_so_and_asks_nobody(client, django_assert_num_queries, db):
    with django_assert_num_queries(0):
        response = client.get("/healthz")

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_ready_means_database_migrations_and_broker(client, db):
    response = client.get("/readyz")

    assert (response.status_code, response["Content-Type"]) == (200, "application/json")
    assert response.json() == {"status": "ready", "checked": ["postgresql", "migrations", "redis"]}
    assert "no-store" in response["Cache-Control"]


def test_a_missing_migration_is_named(client, db):
    (last,) = MigrationLoader(connection).graph.leaf_nodes("payouts")
    MigrationRecorder(connection).record_unapplied(*last)

    response = client.get("/readyz")

    assert response.status_code == 503
    assert response.json()["missing"] == {"migrations": f"not applied: {'.'.join(last)}"}


def test_a_broker_that_is_away_is_named_without_its_address(client, db, settings):
    settings.REDIS_URL = "redis://:secret@127.0.0.1:1/0"

    response = client.get("/readyz")

    assert response.status_code == 503
    assert response.json()["missing"] == {"redis": "does not answer (ConnectionError)"}
    assert "secret" not in response.content.decode()


def test_a_database_that_is_away_is_named(client, db, monkeypatch):
    def refuse():
        raise OperationalError("connection to server at 10.0.0.7 failed")

    with monkeypatch.context() as away:
        away.setattr(connection, "cursor", refuse)
        response = client.get("/readyz")

    assert response.status_code == 503
    assert response.json()["missing"]["postgresql"] == "does not answer (OperationalError)"
    assert "10.0.0.7" not in response.content.decode()


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_read_only(client, db, path):
    assert client.post(path).status_code == 405
    assert health.TIMEOUT_SECONDS <= 5
