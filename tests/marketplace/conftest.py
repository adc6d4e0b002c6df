import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import connections
from psycopg import sql


@pytest.fixture
def committed_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[str]:
    """A database of this test's own, where transactions really commit: for what several connections do at once.

    A clone, because evidence refuses the TRUNCATE by which Django would clean up.
    """
    default = connections["default"]
    original = default.settings_dict["NAME"]
    clone = f"{original}_clone"
    with psycopg.connect(os.environ["SUPERUSER_DATABASE_URL"], autocommit=True) as server, django_db_blocker.unblock():
        default.close()  # a template must not be in use
        server.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(clone)))
        server.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(clone), sql.Identifier(original))
        )
        default.settings_dict["NAME"] = clone  # the one dictionary that every thread's connection is made from
        try:
            yield clone
        finally:
            default.close()
            default.settings_dict["NAME"] = original
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(clone)))
