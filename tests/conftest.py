"""Whom the tests are about: alice and bob contribute, carol buys, mallory must see nothing."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from django.contrib.auth.hashers import PBKDF2PasswordHasher
from django.core.cache import cache
from django.db import connection, connections
from django.test.utils import setup_databases, teardown_databases
from psycopg import sql


def _person(name: str) -> Any:
    from allauth.account.models import EmailAddress

    from marketplace.models import User
    from marketplace.services.parties import create_party

    user = User.objects.create_user(f"{name}@example.org", "correct horse battery staple")
    EmailAddress.objects.create(user=user, email=user.email, verified=True, primary=True)
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


@pytest.fixture(scope="session")
def template_database(django_db_setup: None, django_db_blocker: Any, django_db_keepdb: bool) -> Iterator[str]:
    """The name of the migrated test database, to be cloned.

    pytest-django has made it if any collected test asks for `db`; where none does, it is made here.
    """
    if connection.settings_dict["NAME"] != urlsplit(os.environ["DATABASE_URL"]).path.strip("/"):
        yield connection.settings_dict["NAME"]
        return
    with django_db_blocker.unblock():
        made = setup_databases(verbosity=0, interactive=False, aliases={"default"}, keepdb=django_db_keepdb)
    yield connection.settings_dict["NAME"]
    if not django_db_keepdb:
        with django_db_blocker.unblock():
            teardown_databases(made, verbosity=0)


@pytest.fixture
def committed_db(template_database: str, django_db_blocker: Any, superuser_url: str) -> Iterator[str]:
    """A clone of the test database, for what several connections do at once; dropped afterwards. Gives its name.

    Evidence refuses the TRUNCATE by which Django would clean up.
    """
    original = template_database
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
