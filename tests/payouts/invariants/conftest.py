import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from django.db import connection

from payouts.local_stripe import process
from payouts.services import attempts, transfers
from tests.payouts.conftest import StripeWorld
from tests.payouts.invariants.world import Network, World, cloned_database


@pytest.fixture
def makes_worlds(
    template_database: str,
    superuser_url: str,
    django_db_blocker: Any,
    tmp_path: Path,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """What makes a world: a clone of the migrated database, and a local Stripe on an empty folder."""
    hurried = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(attempts, "time", hurried)
    monkeypatch.setattr(transfers, "time", hurried, raising=False)
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    real = requests.Session.request
    current: list[Network] = []
    monkeypatch.setattr(
        requests.Session,
        "request",
        lambda session, method, url, **given: current[-1].request(real, session, method, url, **given),
    )

    @contextmanager
    def make() -> Iterator[World]:
        name = f"history_{secrets.token_hex(6)}"
        with django_db_blocker.unblock(), cloned_database(template_database, superuser_url, name):
            handle = process.start(tmp_path / name, secret_key="sk_test_of_histories", payout_days=1)
            settings.STRIPE_API_BASE, settings.STRIPE_API_KEY = handle.url, handle.secret_key
            current.append(Network(handle.url))
            try:
                yield World(StripeWorld(handle), current[-1])
            finally:
                handle.kill()
                connection.close()

    yield make
