"""The only writer of money: balanced entries, each exactly once.

PostgreSQL refuses what must not be (migration `0002_ledger_rules`); what is checked here as well is checked for a better
message. Debits are positive, credits negative. A balance is the account's latest snapshot and the postings after it.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models import Sum
from django.utils import timezone

from marketplace import clock
from marketplace.errors import DomainError
from payouts import chart
from payouts.errors import PeriodClosed
from payouts.models import Account, JournalEntry, Posting
from payouts.models.ledger import MAX_LEGS

__all__ = [
    "ACCOUNTS",
    "MAX_LEGS",
    "Draft",
    "EntryKeyReused",
    "balance",
    "balances",
    "balances_of",
    "batches",
    "post",
    "post_many",
    "post_split",
    "postings_between",
    "reverse",
    "take_snapshots",
]

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: An account gets a snapshot once so many postings have come after its last one.
SNAPSHOT_POSTINGS = 1_000
#: Held shared by every transaction that makes an entry (migration `0002_ledger_rules`), alone by whoever takes snapshots.
LEDGER_LOCK = 1_818_584_935
LOCK_WAIT_MILLISECONDS = 250  # whoever makes an entry meanwhile waits behind it
ROOM = "256MB"
PERIOD_RULE = "entry_in_open_period"  # what PostgreSQL calls it (migration `0017_closing_rules`)


class EntryKeyReused(DomainError):
    """The key names an entry with other contents; nothing was booked."""

    code = "entry_key_reused"


@dataclass(frozen=True)
class Draft:
    """An entry as it is asked for; see `post`."""

    key: str
    kind: JournalEntry.Kind
    postings: Mapping[str, int]
    booked_at: datetime | None = None
    reverses: JournalEntry | None = None


def post(
    *,
    key: str,
    kind: JournalEntry.Kind,
    postings: Mapping[str, int],
    booked_at: datetime | None = None,
    reverses: JournalEntry | None = None,
) -> JournalEntry:
    """Write one balanced entry, exactly once per key; the second call finds the first one's.

    Args:
        postings: account code → micros, debits positive. Zero amounts are left out; accounts are opened as needed.
        booked_at: business time; now, by default.

    Raises:
        EntryKeyReused: the key was used before for something else.
        PeriodClosed: nothing is booked at that time any more.
        ValueError: the postings do not sum to zero, mix currencies, or are fewer than two or more than `MAX_LEGS`.
    """
    return post_many([Draft(key, kind, postings, booked_at, reverses)])[0]


@transaction.atomic
def post_many(drafts: Sequence[Draft]) -> list[JournalEntry]:
    """Write many entries in one transaction and one statement, each exactly once per key, as `post` writes one.

    Returns:
        The entries in the order of the drafts.

    Raises:
        EntryKeyReused, PeriodClosed, ValueError: see `post`; nothing was booked. Two drafts with one key are a ValueError.
    """
    legs = {draft.key: _checked_legs(draft) for draft in drafts}
    if len(legs) != len(drafts):
        raise ValueError("Two of the entries have one key")
    if not drafts:
        return []
    wall = timezone.now()
    now = clock.now() if any(draft.booked_at is None for draft in drafts) else wall  # the demo's clock is a query
    in_order = sorted(
        drafts, key=lambda draft: draft.key
    )  # two writers of the same keys wait for each other, not in a ring
    entries = {
        draft.key: JournalEntry(
            key=draft.key,
            kind=draft.kind,
            currency=chart.currency_of(next(iter(legs[draft.key]))),
            n_legs=len(legs[draft.key]),
            booked_at=draft.booked_at or now,
            created_at=wall,
            reverses=draft.reverses,
        )
        for draft in in_order
    }
    columns = zip(
        *(
            (e.key, str(e.kind), e.currency, e.n_legs, e.booked_at, e.created_at, e.reverses_id)
            for e in entries.values()
        ),
        strict=True,
    )
    rows = [(key, leg, code, micros) for key in entries for leg, (code, micros) in enumerate(legs[key].items())]
    with connection.cursor() as cursor:
        # One statement for what is nearly always so: the keys are new and the accounts are open.
        with _told_of_closed_months():
            cursor.execute(_POST, [list(column) for column in (*columns, *zip(*rows, strict=True))])
        told, unopened = cursor.fetchone()
        made: dict[str, int] = json.loads(told)
        if len(made) < len(entries):
            entries |= _found_before([draft for draft in in_order if draft.key not in made], legs)
        if unopened:
            accounts = _open_accounts(unopened)
            rest = [
                (made[key], leg, accounts[code], micros)
                for key, leg, code, micros in rows
                if key in made and code in accounts
            ]
            cursor.execute(_POST_REST, [list(column) for column in zip(*rest, strict=True)])
    for key, pk in made.items():
        entries[key].pk = pk
        entries[key]._state.adding = False
    return [entries[draft.key] for draft in drafts]


# The triggers of a statement fire at its end, so they see the entries that it made before the legs.
_POST = """
WITH made AS (
    INSERT INTO payouts_journalentry (key, kind, currency, n_legs, booked_at, created_at, reverses_id)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::timestamptz[], %s::timestamptz[], %s::bigint[])
    ON CONFLICT (key) DO NOTHING RETURNING key, id
), legs AS (
    SELECT made.id AS entry_id, g.leg, g.code, a.id AS account_id, g.micros
    FROM unnest(%s::text[], %s::int[], %s::text[], %s::bigint[]) AS g (key, leg, code, micros)
    JOIN made ON made.key = g.key LEFT JOIN payouts_account a ON a.code = g.code
), posted AS (
    INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros)
    SELECT entry_id, leg, account_id, micros FROM legs WHERE account_id IS NOT NULL ORDER BY entry_id, leg
)
SELECT (SELECT coalesce(jsonb_object_agg(key, id), '{}') FROM made),
    (SELECT array_agg(DISTINCT code) FROM legs WHERE account_id IS NULL)
"""
_POST_REST = """
INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros)
SELECT * FROM unnest(%s::bigint[], %s::int[], %s::bigint[], %s::bigint[])
"""


@contextmanager
def _told_of_closed_months() -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        told = getattr(error.__cause__, "diag", None)
        if told is None or told.constraint_name != PERIOD_RULE:
            raise
        raise PeriodClosed(
            f"Its month is closed; book it in an open one. PostgreSQL: {told.message_primary}."
        ) from error


@contextmanager
def room_to_sort() -> Iterator[Any]:
    """A cursor whose statements, inside this transaction, may sort a million rows in memory rather than on disk."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"SET LOCAL work_mem = '{ROOM}'")
        yield cursor
        cursor.execute("SET LOCAL work_mem TO DEFAULT")


def post_split(
    *,
    key: str,
    kind: JournalEntry.Kind,
    source: str,
    currency: str,
    booked_at: datetime,
    dues: str,
    parameters: Mapping[str, Any],
) -> int:
    """Move one amount from a source to many payables, as entries `key:0`, `key:1`, … of up to `MAX_LEGS` legs.

    The parties are cut into entries in the order of their ids. Inside a transaction, and once: its caller's own key says so.

    Args:
        dues: a statement of ours that selects (party, micros), each party once and all micros above 0.

    Returns:
        How many entries.

    Raises:
        EntryKeyReused: there is an entry under the first key; nothing was booked.
        PeriodClosed: nothing is booked at that time any more.
    """
    if JournalEntry.objects.filter(key=f"{key}:0").exists():
        raise EntryKeyReused(f"The key {key}:0 was used before.")
    with room_to_sort() as cursor:
        cursor.execute(f"{dues} LIMIT {MAX_LEGS}", parameters)
        few = dict(cursor.fetchall())
        if len(few) < MAX_LEGS:  # with the source's leg they fit into one
            postings = {source: sum(few.values())}
            postings |= {chart.payable(party, currency): -micros for party, micros in sorted(few.items())}
            return len(post_many([Draft(f"{key}:0", kind, postings, booked_at)]))
        _open_accounts([source])
        cursor.execute(
            f"CREATE TEMPORARY TABLE ledger_split ON COMMIT DROP AS {_NUMBERED.format(dues=dues)}", parameters
        )
        cursor.execute("ANALYZE ledger_split")
        given = {
            "key": key,
            "kind": str(kind),
            "source": source,
            "currency": currency,
            "booked_at": booked_at,
            "now": timezone.now(),
            "size": MAX_LEGS - 1,
        }
        cursor.execute(_OPEN_PAYABLES, given)
        with _told_of_closed_months():
            cursor.execute(_SPLIT_ENTRIES, given)
        n_entries = int(cursor.rowcount)
        cursor.execute(_SPLIT_POSTINGS, given)
        cursor.execute("DROP TABLE ledger_split")
    return n_entries


_NUMBERED = (
    "SELECT row_number() OVER (ORDER BY party) - 1 AS position, party, micros FROM ({dues}) dues (party, micros)"
)
_OPEN_PAYABLES = """
INSERT INTO payouts_account (code, kind, currency, party_id, created_at)
SELECT 'payable:' || party || ':' || %(currency)s, 'liability', %(currency)s, party, %(now)s
FROM ledger_split s
WHERE NOT EXISTS (SELECT FROM payouts_account a WHERE a.code = 'payable:' || s.party || ':' || %(currency)s)
ORDER BY 1 ON CONFLICT (code) DO NOTHING
"""
_SPLIT_ENTRIES = """
INSERT INTO payouts_journalentry (key, kind, currency, n_legs, booked_at, created_at)
SELECT %(key)s || ':' || position / %(size)s, %(kind)s, %(currency)s, count(*) + 1, %(booked_at)s, %(now)s
FROM ledger_split GROUP BY position / %(size)s ORDER BY position / %(size)s
"""
_SPLIT_POSTINGS = """
WITH numbered AS MATERIALIZED (
    SELECT n.batch, e.id AS entry_id, n.micros
    FROM (SELECT position / %(size)s AS batch, sum(micros)::bigint AS micros FROM ledger_split GROUP BY 1) n
    JOIN payouts_journalentry e ON e.key = %(key)s || ':' || n.batch
)
INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros)
SELECT entry_id, leg, account_id, micros FROM (
    SELECT n.entry_id, 0 AS leg, a.id AS account_id, n.micros
    FROM numbered n, payouts_account a WHERE a.code = %(source)s
    UNION ALL
    SELECT n.entry_id, s.position %% %(size)s + 1, a.id, -s.micros
    FROM ledger_split s JOIN numbered n ON n.batch = s.position / %(size)s
    JOIN payouts_account a ON a.code = 'payable:' || s.party || ':' || %(currency)s
) legs ORDER BY entry_id, leg
"""


def _checked_legs(draft: Draft) -> dict[str, int]:
    legs = {code: micros for code, micros in draft.postings.items() if micros != 0}
    total = sum(legs.values())
    currencies = {chart.parse(code).currency for code in legs}
    if len(currencies) != 1 or total != 0 or not 2 <= len(legs) <= MAX_LEGS:
        raise ValueError(f"{draft.key}: {len(legs)} legs in {sorted(currencies)} that sum to {total}")
    return legs


def _found_before(drafts: list[Draft], legs: Mapping[str, dict[str, int]]) -> dict[str, JournalEntry]:
    """The entries that the keys made before, if they say the same."""
    found = JournalEntry.objects.in_bulk([draft.key for draft in drafts], field_name="key")
    for draft in drafts:
        entry = found[draft.key]
        is_same = entry.kind == draft.kind and entry.reverses_id == (draft.reverses and draft.reverses.pk)
        if not is_same or postings_of(entry) != legs[draft.key]:
            raise EntryKeyReused(f"The key {draft.key} was used before, for another entry of kind {entry.kind}.")
    return found


def reverse(
    entry: JournalEntry,
    *,
    key: str,
    kind: JournalEntry.Kind = JournalEntry.Kind.REVERSAL,
    booked_at: datetime | None = None,
) -> JournalEntry:
    """Book an entry back, once; the entry itself stays.

    Raises:
        EntryKeyReused: see `post`.
    """
    postings = {code: -micros for code, micros in postings_of(entry).items()}
    return post(key=key, kind=kind, postings=postings, booked_at=booked_at, reverses=entry)


def postings_of(entry: JournalEntry) -> dict[str, int]:
    return dict(entry.postings.order_by("leg").values_list("account__code", "amount_micros"))


def balance(code: str, *, before: datetime | None = None) -> int:
    """The sum of an account's postings in micros, of those booked before a business time if one is given.

    Raises:
        ValueError: no such account can exist.
    """
    chart.parse(code)
    if before is None:
        with connection.cursor() as cursor:
            cursor.execute(f"{_BALANCES} WHERE code = %s", [code])
            found = cursor.fetchone()
        return int(found[1]) if found else 0
    postings = Posting.objects.filter(account__code=code, entry__booked_at__lt=before)
    return int(postings.aggregate(sum=Sum("amount_micros"))["sum"] or 0)


def balances(*, prefix: str = "") -> dict[str, int]:
    """Micros by code, in order of codes, of every account under a prefix ("payable", "cash:pending") that is not at zero."""
    with connection.cursor() as cursor:
        cursor.execute(f"{_BALANCES} WHERE starts_with(code, %s)", [prefix and f"{prefix}:"])
        found = {code: int(micros) for code, micros in cursor.fetchall() if micros}
    return dict(sorted(found.items()))


def postings_between(account: str, after: str, until: str = str(2**63 - 1)) -> str:
    """A table expression, in SQL: an account's postings behind one id up to another, each an expression over other tables' rows.

    However many there are elsewhere, what is read is these. PostgreSQL cannot know how few come after a snapshot: with two plain
    conditions it chose the primary key and read what all accounts were posted since. Only the index of an account's postings finds
    pairs, and has them in this order. (That it need not look into the table, either, is vacuum's work: migration `0020_vacuum_postings`.)
    """
    return (
        f"(SELECT id, amount_micros FROM payouts_posting WHERE (account_id, id) > ({account}, {after})"  # noqa: S608
        f" AND (account_id, id) <= ({account}, {until}) ORDER BY account_id, id OFFSET 0) postings"
    )


#: A table expression, in SQL: every account with its balance in `micros`; what is asked of it is pushed into it.
ACCOUNTS = f"""(
    SELECT a.id, a.code, a.party_id, a.currency, coalesce(s.balance_micros, 0) + coalesce(later.micros, 0) AS micros
    FROM payouts_account a
    LEFT JOIN LATERAL (
        SELECT up_to, balance_micros FROM payouts_balancesnapshot WHERE account_id = a.id ORDER BY up_to DESC LIMIT 1
    ) s ON true
    LEFT JOIN LATERAL (
        SELECT sum(amount_micros) AS micros FROM {postings_between("a.id", "coalesce(s.up_to, 0)")}
    ) later ON true
) accounts"""  # noqa: S608
_BALANCES = f"SELECT code, micros FROM {ACCOUNTS}"  # noqa: S608


def take_snapshots() -> int:
    """Sum up the accounts that many postings have reached since their last snapshot; returns how many.

    While the lock is held alone no entry is being made, so every posting up to the highest id is there, and none with a
    lower id comes later. Somebody's long transaction is not waited for: the next call tries again.
    """
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = {LOCK_WAIT_MILLISECONDS}")
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LEDGER_LOCK])
            cursor.execute("SELECT coalesce(max(id), 0) FROM payouts_posting")
            (up_to,) = cursor.fetchone()
    except OperationalError as error:
        logger.info("Took no snapshots: the ledger is being written to error=%s", type(error).__name__)
        return 0
    with connection.cursor() as cursor:
        cursor.execute(_TAKE_SNAPSHOTS, {"up_to": up_to, "least": SNAPSHOT_POSTINGS})
        taken: int = cursor.rowcount
    logger.info("Took snapshots=%s up_to=%s", taken, up_to)
    return taken


# Only accounts that have been posted to since the last round are looked at. The account of the last posting gets a snapshot whatever
# it has, if the round saw many: so the next round begins where this one ended, also when no account was posted to often.
_TAKE_SNAPSHOTS = f"""
INSERT INTO payouts_balancesnapshot (account_id, up_to, balance_micros, taken_at)
WITH changed AS MATERIALIZED (
    SELECT account_id, count(*) AS n, max(id) AS last FROM payouts_posting
    WHERE id > (SELECT coalesce(max(up_to), 0) FROM payouts_balancesnapshot) AND id <= %(up_to)s GROUP BY account_id
)
SELECT changed.account_id, %(up_to)s, coalesce(s.balance_micros, 0) + later.micros, now()
FROM changed
LEFT JOIN LATERAL (
    SELECT up_to, balance_micros FROM payouts_balancesnapshot
    WHERE account_id = changed.account_id ORDER BY up_to DESC LIMIT 1
) s ON true
CROSS JOIN LATERAL (
    SELECT sum(amount_micros) AS micros, count(*) AS n
    FROM {postings_between("changed.account_id", "coalesce(s.up_to, 0)", "%(up_to)s")}
) later
WHERE later.n >= %(least)s OR changed.last = %(up_to)s AND (SELECT sum(n) FROM changed) >= %(least)s
ON CONFLICT DO NOTHING
"""  # noqa: S608


def batches(dues: Mapping[int, T], *, size: int) -> Iterator[dict[int, T]]:
    """Cut a division into parts that fit an entry, in order of keys, so that every re-run cuts it alike."""
    items = iter(sorted(dues.items()))
    while batch := dict(islice(items, size)):
        yield batch


def _open_accounts(codes: Iterable[str]) -> dict[str, int]:
    """The accounts' ids by code; those that are missing are made, in order of codes so that two writers wait, not deadlock."""
    wanted = sorted(codes)
    known = _ids_of(wanted)
    missing = [code for code in wanted if code not in known]
    if not missing:
        return known
    parsed = {code: chart.parse(code) for code in missing}
    Account.objects.bulk_create(
        [
            Account(
                code=code,
                kind=of.purpose.kind,
                currency=of.currency,
                party_id=of.party,
            )
            for code, of in parsed.items()
        ],
        ignore_conflicts=True,  # another writer may have opened it meanwhile
    )
    return _ids_of(wanted)


def _ids_of(codes: list[str]) -> dict[str, int]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT code, id FROM payouts_account WHERE code = ANY(%s)", [codes])
        return dict(cursor.fetchall())


def balances_of(codes: Iterable[str]) -> dict[str, int]:
    """Micros by code of the accounts named; those that stand at zero, or are not opened yet, are left out."""
    with connection.cursor() as cursor:
        cursor.execute(f"{_BALANCES} WHERE code = ANY(%s)", [list(codes)])
        return {code: int(micros) for code, micros in cursor.fetchall() if micros}
