"""Exact copies, by fingerprint: within a version, and against everything published before it.

Within a version two label events on one item (one content, one rights holder, two labellers) are no copies of each
other; whatever else repeats a content is a copy of the first row that has it. Against published versions, whatever
repeats a content is a copy of its first registrant: of that version's label events on the item the one by the same
labeller, otherwise the first. An original is never itself a copy, so there are no chains to follow.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from django.db import connection

from marketplace.ingest.normalise import FINGERPRINT_ROW
from marketplace.models import Contribution, DatasetVersion, RecordCopy
from marketplace.planning import hash_joins, index_lookups

#: Serialises publications, so that "first" means something: copies are looked for while nobody else registers.
PUBLICATION_LOCK = 0x7265_7369
COPY_ROWS = 50_000

_COPY = "COPY marketplace_recordfingerprint (version_id, row, fingerprint, holder, labeller) FROM STDIN (FORMAT BINARY)"
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)  # no flags, no extension
_COPY_TRAILER = b"\xff\xff"
_COPY_ROW = np.dtype(
    [
        ("n_fields", ">i2"),
        *(
            part
            for name, type_ in (
                ("version", ">i8"),
                ("row", ">i8"),
                ("fingerprint", FINGERPRINT_ROW["fingerprint"]),
                ("holder", ">i4"),
                ("labeller", ">i4"),
            )
            for part in ((f"{name}_bytes", ">i4"), (name, type_))
        ),
    ]
)

# Sets, not a lookup per record: a content that was registered a million times must not be met a million times a million.
# The version's own records become a temporary table, because only of that can PostgreSQL know in time how large it is:
# they were written a moment ago, in this very transaction.
_TABLES = ("copies_mine", "copies_found", "copies_named", "copies_registered")
_MINE = """
CREATE TEMPORARY TABLE copies_mine ON COMMIT DROP AS
WITH named AS (
    SELECT f.row, f.fingerprint, f.holder, f.labeller, holder.party_id AS holder_party, labeller.party_id AS labeller_party
    FROM marketplace_recordfingerprint f
    JOIN marketplace_contribution holder
        ON holder.version_id = f.version_id AND holder.role = 'rights_holder' AND holder.number = f.holder
    LEFT JOIN marketplace_contribution labeller
        ON labeller.version_id = f.version_id AND labeller.role = 'labeller' AND labeller.number = f.labeller
    WHERE f.version_id = %(version)s
), first AS (
    SELECT *,
        first_value(row) OVER content AS first_row,
        first_value(holder_party) OVER content AS first_holder_party,
        first_value(labeller_party) OVER content AS first_labeller_party,
        holder = first_value(holder) OVER content AND labeller >= 0 AND first_value(labeller) OVER content >= 0 AS is_event,
        min(row) OVER (PARTITION BY fingerprint, holder, labeller) AS first_same_row
    FROM named
    WINDOW content AS (PARTITION BY fingerprint ORDER BY row)
)
SELECT row, fingerprint, labeller_party,
    CASE WHEN is_event THEN first_same_row ELSE first_row END AS original_row,
    first_holder_party AS original_holder_party,
    CASE WHEN is_event THEN labeller_party ELSE first_labeller_party END AS original_labeller_party
FROM first
"""

# Each content is looked up by itself, in the index: joined as sets, the planner may walk through all that is registered.
_FOUND = """
CREATE TEMPORARY TABLE copies_found ON COMMIT DROP AS
SELECT o.*
FROM (SELECT DISTINCT fingerprint FROM copies_mine) mine
CROSS JOIN LATERAL (
    SELECT fingerprint, version_id, row, holder, labeller FROM marketplace_recordfingerprint
    WHERE fingerprint = mine.fingerprint AND version_id <> %(version)s
    OFFSET 0
) o
"""

_NAMED = """
CREATE TEMPORARY TABLE copies_named ON COMMIT DROP AS
SELECT o.fingerprint, o.version_id, o.row, v.published_at,
    holder.party_id AS holder_party, labeller.party_id AS labeller_party
FROM copies_found o
JOIN marketplace_datasetversion v ON v.id = o.version_id AND v.status = 'published'
JOIN marketplace_contribution holder
    ON holder.version_id = o.version_id AND holder.role = 'rights_holder' AND holder.number = o.holder
LEFT JOIN marketplace_contribution labeller
    ON labeller.version_id = o.version_id AND labeller.role = 'labeller' AND labeller.number = o.labeller
WHERE NOT EXISTS (SELECT FROM marketplace_recordcopy c WHERE c.version_id = o.version_id AND c.row = o.row)
"""

_REGISTERED = """
CREATE TEMPORARY TABLE copies_registered ON COMMIT DROP AS
WITH first AS (
    SELECT DISTINCT ON (fingerprint) fingerprint, version_id, row
    FROM copies_named ORDER BY fingerprint, published_at, version_id, row
)
SELECT DISTINCT ON (r.fingerprint, r.labeller_party) r.*, r.row = first.row AS is_first
FROM copies_named r JOIN first USING (fingerprint, version_id)
ORDER BY r.fingerprint, r.labeller_party, r.row
"""

_ORIGINALS = """
WITH originals AS (
    SELECT mine.row,
        CASE WHEN first.row IS NULL THEN %(version)s ELSE first.version_id END AS original_version,
        CASE WHEN first.row IS NULL THEN mine.original_row ELSE coalesce(same.row, first.row) END AS original_row,
        CASE
            WHEN first.row IS NULL THEN mine.original_holder_party
            ELSE coalesce(same.holder_party, first.holder_party)
        END AS payee,
        CASE
            WHEN first.row IS NULL THEN mine.original_labeller_party
            WHEN same.row IS NULL THEN first.labeller_party
            ELSE same.labeller_party
        END AS labeller
    FROM copies_mine mine
    LEFT JOIN copies_registered first ON first.fingerprint = mine.fingerprint AND first.is_first
    LEFT JOIN copies_registered same
        ON same.fingerprint = mine.fingerprint AND same.labeller_party = mine.labeller_party
    WHERE first.row IS NOT NULL OR mine.original_row <> mine.row
)
"""

_COUNT = f"""{_ORIGINALS}
SELECT count(*) FILTER (WHERE original_version = %(version)s), count(*) FILTER (WHERE original_version <> %(version)s)
FROM originals
"""  # noqa: S608

_INSERT = f"""{_ORIGINALS}
INSERT INTO marketplace_recordcopy (version_id, row, original_version_id, original_row, payee_id, labeller_id)
SELECT %(version)s, row, original_version, original_row, payee, labeller FROM originals ORDER BY row
"""  # noqa: S608

_COUNT_PER_CONTRIBUTION = """
UPDATE marketplace_contribution c SET n_copies = found.n
FROM (
    SELECT CASE %(role)s WHEN 'labeller' THEN f.labeller ELSE f.holder END AS number, count(*) AS n
    FROM marketplace_recordcopy r
    JOIN marketplace_recordfingerprint f ON f.version_id = r.version_id AND f.row = r.row
    WHERE r.version_id = %(version)s GROUP BY 1
) found
WHERE c.version_id = %(version)s AND c.role = %(role)s AND c.number = found.number
"""


@dataclass(frozen=True)
class CopyCounts:
    """Counts only: whose the originals are is not the uploader's to know."""

    within: int  # repeat an earlier row of the same version
    of_listed: int  # repeat a record that was published before

    @property
    def total(self) -> int:
        return self.within + self.of_listed


def write_fingerprints(*, version: DatasetVersion, path: Path) -> None:
    """Load a file of `FINGERPRINT_ROW`s by PostgreSQL's binary COPY, inside the caller's transaction."""
    row = 0
    with path.open("rb") as file, connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.write(_COPY_HEADER)
        while chunk := file.read(FINGERPRINT_ROW.itemsize * COPY_ROWS):
            records = np.frombuffer(chunk, dtype=FINGERPRINT_ROW)
            rows = np.empty(len(records), dtype=_COPY_ROW)
            rows["n_fields"] = 5
            for name in ("version", "row", "fingerprint", "holder", "labeller"):
                rows[f"{name}_bytes"] = _COPY_ROW[name].itemsize
            rows["version"] = version.pk
            rows["row"] = np.arange(row, row + len(records))
            for name in ("fingerprint", "holder", "labeller"):
                rows[name] = records[name]
            copy.write(rows.tobytes())
            row += len(records)
        copy.write(_COPY_TRAILER)
    if row != version.n_records:
        raise ValueError(f"{row} fingerprints for {version.n_records} records of version {version.pk}")


def count_copies(*, version: DatasetVersion) -> CopyCounts:
    """As things stand now; only `write_copies`, at publication, is final. Inside the caller's transaction."""
    _match(version)
    with hash_joins() as cursor:
        cursor.execute(_COUNT, {"version": version.pk})
        within, of_listed = cursor.fetchone()
    return CopyCounts(within=within, of_listed=of_listed)


def write_copies(*, version: DatasetVersion) -> CopyCounts:
    """Settle which records of a version repeat an earlier one, and whose they are.

    The caller holds the publication lock and publishes the version in the same transaction.
    """
    _match(version)
    with hash_joins() as cursor:
        cursor.execute(_INSERT, {"version": version.pk})
        for role in Contribution.Role.values:
            cursor.execute(_COUNT_PER_CONTRIBUTION, {"version": version.pk, "role": role})
    copies = RecordCopy.objects.filter(version=version)
    within = copies.filter(original_version=version).count()
    return CopyCounts(within=within, of_listed=copies.count() - within)


def _match(version: DatasetVersion) -> None:
    """Lay a version's records and what is registered of their content into temporary tables, which end with the transaction."""
    of_version = {"version": version.pk}
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE IF EXISTS {', '.join(f'pg_temp.{table}' for table in _TABLES)}")
    with hash_joins() as cursor:
        cursor.execute(_MINE, of_version)
        cursor.execute("ANALYZE copies_mine")
    with index_lookups() as cursor:
        cursor.execute(_FOUND, of_version)
        cursor.execute("ANALYZE copies_found")
    with connection.cursor() as cursor:
        cursor.execute(_NAMED)
        cursor.execute("ANALYZE copies_named")
    with hash_joins() as cursor:
        cursor.execute(_REGISTERED)
        cursor.execute("ANALYZE copies_registered")


def hold_publication_lock() -> None:
    """Wait for, and hold until the transaction ends, the right to be the next to publish."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [PUBLICATION_LOCK])
