"""Services act as the app's role: what it may not do fails here, and not with the first customer."""

import pytest
from django.db import connection

from portal import roles


@pytest.fixture(autouse=True)
def as_app(request: pytest.FixtureRequest) -> None:
    """Until the end of the test's transaction. Tests that commit have connections of their own; some tamper, as an owner could."""
    if "db" not in request.fixturenames or request.node.get_closest_marker("as_owner"):
        return
    request.getfixturevalue("db")
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('role', %s, true)", [roles.APP])
