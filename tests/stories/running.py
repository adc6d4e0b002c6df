"""The running product for a story: real processes on a database of its own.

TRUNCATE is refused by the ledger's tables, so a story does not clean up after itself: it runs on a clone of the migrated
test database, which is dropped when it ends. Inside the story Django's default connection is the clone's, as the app's role.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from django.conf import settings as django_settings
from django.db import connections
from environ import Env
from psycopg import sql

from portal import embedded
from portal.environment import environment_of, make_database, role_url
from portal.processes import Supervisor, free_port
from portal.site import Site, start_site


@dataclass(frozen=True)
class Story:
    """A running site and the folder it keeps its things in."""

    site: Site
    var: Path

    @property
    def url(self) -> str:
        return self.site.url

    def wait_for(self, what: str, happened: Callable[[], Any], *, seconds: float = 60) -> Any:
        """Poll until `happened()` is true; its value.

        Raises:
            AssertionError: it did not happen in time; a process that died says why.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := happened():
                return value
            time.sleep(0.1)
        self.site.supervisor.check()
        raise AssertionError(f"{what} did not happen within {seconds:g} s")


@contextmanager
def running_story(var: Path, template: str | None, *, servers: embedded.Urls | None = None) -> Iterator[Story]:
    """Clone the template database, start every process on the clone, and drop it at the end.

    Args:
        template: None: the new database is migrated from nothing.
        servers: what it runs on, in place of the servers that the tests share.
    """
    superuser = servers.database if servers else os.environ["SUPERUSER_DATABASE_URL"]
    name = f"story_{secrets.token_hex(6)}"
    connections.close_all()  # a database with sessions cannot be a template
    make_database(superuser, name, template=template)
    common = {
        "RESIDUAL_MODE": "demo",
        "RESIDUAL_VAR": str(var),
        "MEDIA_ROOT": str(var / "media"),
        "SECRET_KEY": django_settings.SECRET_KEY,
        "REDIS_URL": servers.redis if servers else django_settings.REDIS_URL,
        "OMP_NUM_THREADS": "1",
        "ATTRIBUTION_BUDGET": "150",  # trainings' worth: enough to tell the careless labeller from the others
    }
    urls = {role: role_url(superuser, f"residual_{role}", name) for role in ("owner", "app", "worker")}
    # The clone's tables belong to the superuser who made the template, so it migrates (there is nothing to do).
    environment = environment_of(common, **urls | {"owner": role_url(superuser, "postgres", name)})
    default = connections["default"]
    before = dict(default.settings_dict)
    address = Env.db_url_config(urls["app"])
    default.settings_dict.update({part: address.get(part, "") for part in ("NAME", "USER", "HOST", "PORT")})
    default.settings_dict["OPTIONS"] = default.settings_dict["OPTIONS"] | address.get("OPTIONS", {})
    try:
        with Supervisor(log_dir=var / "log") as supervisor:
            site = start_site(supervisor, environment, var, port=free_port(), payout_days=0)
            yield Story(site=site, var=var)
    finally:
        connections.close_all()
        default.settings_dict.update(before)
        with psycopg.connect(superuser, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
