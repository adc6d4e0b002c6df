"""What PostgreSQL must be told about a statement because its statistics cannot know it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from django.db import connection, transaction


def hash_joins() -> AbstractContextManager[Any]:
    """A cursor whose statements join whole sets: by hash or merge, not by a lookup per row.

    For joins within one version. Statistics have not heard of a version that is new, so the planner takes it for one
    row, nests its loops, and a million records meet a million others one by one.
    """
    return _without("enable_nestloop")


def index_lookups() -> AbstractContextManager[Any]:
    """A cursor whose statements look rows up in an index where there is one, and never walk through a table for each."""
    return _without("enable_seqscan")


@contextmanager
def _without(method: str) -> Iterator[Any]:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"SET LOCAL {method} = off")
        yield cursor
        cursor.execute(f"SET LOCAL {method} TO DEFAULT")  # a refusal above rolls it back by itself
