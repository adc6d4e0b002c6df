"""What PostgreSQL must be told about a statement because its statistics cannot know it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connection, transaction


@contextmanager
def hash_joins() -> Iterator[Any]:
    """A cursor whose statements join whole sets: by hash or merge, not by a lookup per row.

    For joins within one version. Statistics have not heard of a version that is new, so the planner takes it for one
    row, nests its loops, and a million records meet a million others one by one.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_nestloop = off")
        yield cursor
        cursor.execute("SET LOCAL enable_nestloop TO DEFAULT")  # a refusal above rolls it back by itself
