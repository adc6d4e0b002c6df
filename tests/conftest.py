"""Whom the tests are about: alice and bob contribute, carol buys, mallory must see nothing."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.hashers import PBKDF2PasswordHasher
from django.core.cache import cache


def _person(name: str) -> Any:
    from marketplace.models import User
    from marketplace.services.parties import create_party

    user = User.objects.create_user(f"{name}@example.org", "correct horse battery staple")
    party = create_party(user=user, name=name.title(), country="DE")
    party.user = user  # whom the tests sign in to act for it
    return party


@pytest.fixture
def alice(db: None) -> Any:
    return _person("alice")


@pytest.fixture
def bob(db: None) -> Any:
    return _person("bob")


@pytest.fixture
def carol(db: None) -> Any:
    return _person("carol")


@pytest.fixture
def mallory(db: None) -> Any:
    return _person("mallory")


@pytest.fixture(autouse=True, scope="session")
def cheap_passwords() -> None:
    """A password's hash is slow on purpose, but no test is about that; any process can still check these."""
    PBKDF2PasswordHasher.iterations = 1


@pytest.fixture(autouse=True)
def media(tmp_path: Path, settings: Any) -> Iterator[Path]:
    """Object storage of this test's own, and no memory of earlier rate limits."""
    root = tmp_path / "media"
    settings.MEDIA_ROOT = str(root)
    settings.STORAGES = settings.STORAGES | {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(root)}}
    }
    settings.EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
    cache.clear()
    yield root


@pytest.fixture
def superuser_url() -> str:
    return os.environ["SUPERUSER_DATABASE_URL"]
