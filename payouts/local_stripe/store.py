"""The remote company's file: one SQLite database, one writer, every commit on disk before it is answered.

Whatever a request changes, and the events, webhook deliveries and idempotent answer that follow from it, is one
transaction: after a kill -9 all of it is there or none of it.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Body = dict[str, Any]

PLATFORM = ""  # the account column of what belongs to the platform itself
KEYS_FORGOTTEN_AFTER = 24 * 3600  # seconds of the company's clock, as Stripe does

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which lists show them
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    account TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS objects_listed ON objects (kind, account, seq);
CREATE INDEX IF NOT EXISTS objects_by_group ON objects (kind, json_extract(body, '$.transfer_group'));
CREATE INDEX IF NOT EXISTS objects_by_source ON objects (kind, json_extract(body, '$.source'));
CREATE INDEX IF NOT EXISTS objects_by_intent ON objects (kind, json_extract(body, '$.payment_intent'));
CREATE INDEX IF NOT EXISTS funds ON objects (
    account, json_extract(body, '$.currency'), json_extract(body, '$.status'), json_extract(body, '$.net')
) WHERE kind = 'balance_transaction';

-- What each account holds, kept by the database beside the balance transactions: a sum over all of them for every transfer
-- would make a run of n transfers cost n * n.
CREATE TABLE IF NOT EXISTS holdings (
    account TEXT NOT NULL, currency TEXT NOT NULL, status TEXT NOT NULL, net INTEGER NOT NULL,
    PRIMARY KEY (account, currency, status)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS booked AFTER INSERT ON objects WHEN NEW.kind = 'balance_transaction' BEGIN
    INSERT INTO holdings VALUES (NEW.account, json_extract(NEW.body, '$.currency'), json_extract(NEW.body, '$.status'),
        json_extract(NEW.body, '$.net'))
    ON CONFLICT DO UPDATE SET net = net + excluded.net;
END;
CREATE TRIGGER IF NOT EXISTS became_available AFTER UPDATE OF body ON objects
WHEN NEW.kind = 'balance_transaction' AND json_extract(NEW.body, '$.status') <> json_extract(OLD.body, '$.status') BEGIN
    UPDATE holdings SET net = net - json_extract(OLD.body, '$.net')
    WHERE account = OLD.account AND currency = json_extract(OLD.body, '$.currency')
        AND status = json_extract(OLD.body, '$.status');
    INSERT INTO holdings VALUES (NEW.account, json_extract(NEW.body, '$.currency'), json_extract(NEW.body, '$.status'),
        json_extract(NEW.body, '$.net'))
    ON CONFLICT DO UPDATE SET net = net + excluded.net;
END;
-- A file from before this table.
INSERT INTO holdings
SELECT account, json_extract(body, '$.currency'), json_extract(body, '$.status'), SUM(json_extract(body, '$.net'))
FROM objects WHERE kind = 'balance_transaction' AND NOT EXISTS (SELECT 1 FROM holdings) GROUP BY 1, 2, 3;

CREATE TABLE IF NOT EXISTS agenda (  -- what falls due as the clock moves
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    due_at INTEGER NOT NULL,
    task TEXT NOT NULL,
    target TEXT NOT NULL,
    UNIQUE (task, target)
);
CREATE INDEX IF NOT EXISTS agenda_due ON agenda (due_at, seq);

CREATE TABLE IF NOT EXISTS answers (  -- by idempotency key
    account TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    answered_at INTEGER NOT NULL,
    request_id TEXT NOT NULL,
    status INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (account, key)
);
CREATE INDEX IF NOT EXISTS answers_by_age ON answers (answered_at);  -- every request forgets the old ones

CREATE TABLE IF NOT EXISTS deliveries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    event TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    first_at REAL NOT NULL,
    next_at REAL NOT NULL,  -- wall time: a moved clock must not make retries come sooner
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'abandoned')),
    last_error TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS deliveries_pending ON deliveries (endpoint, next_at) WHERE state = 'pending';
CREATE INDEX IF NOT EXISTS deliveries_by_event ON deliveries (event);
"""


class Store:
    """One connection behind one lock. Requests take milliseconds, so they simply take turns."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        # A timeout of a minute: another process may look at the file, and nobody is told "database is locked" for that.
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The writer's turn: committed on leaving, undone on any exception."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def now(db: sqlite3.Connection) -> int:
    """The company's clock: wall time and however far it was moved."""
    return int(time.time()) + clock_offset(db)


def clock_offset(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT value FROM meta WHERE name = 'clock_offset'").fetchone()
    return int(row[0]) if row else 0


def move_clock(db: sqlite3.Connection, seconds: int) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('clock_offset', ?)", (str(clock_offset(db) + seconds),))


def insert(db: sqlite3.Connection, kind: str, body: Body, *, account: str = PLATFORM) -> None:
    db.execute(
        "INSERT INTO objects (id, kind, account, body) VALUES (?, ?, ?, ?)",
        (body["id"], kind, account, json.dumps(body)),
    )


def update(db: sqlite3.Connection, body: Body) -> None:
    db.execute("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(body), body["id"]))


def delete(db: sqlite3.Connection, identifier: str) -> None:
    db.execute("DELETE FROM objects WHERE id = ?", (identifier,))


def find(db: sqlite3.Connection, kind: str, identifier: str, *, account: str | None) -> Body | None:
    """One object; `account=None` looks in every account."""
    row = db.execute("SELECT account, body FROM objects WHERE id = ? AND kind = ?", (identifier, kind)).fetchone()
    if row is None or (account is not None and row[0] != account):
        return None
    body: Body = json.loads(row[1])
    return body


def owner(db: sqlite3.Connection, identifier: str) -> str:
    """The account that an object belongs to."""
    (account,) = db.execute("SELECT account FROM objects WHERE id = ?", (identifier,)).fetchone()
    return str(account)


def position(db: sqlite3.Connection, kind: str, identifier: str, *, account: str) -> int | None:
    row = db.execute(
        "SELECT seq FROM objects WHERE id = ? AND kind = ? AND account = ?", (identifier, kind, account)
    ).fetchone()
    return row and int(row[0])


def listed(
    db: sqlite3.Connection,
    kind: str,
    *,
    account: str,
    where: list[tuple[str, str, Any]],
    limit: int,
    before: int | None = None,
    after: int | None = None,
) -> list[Body]:
    """Objects, newest first; with `after`, the oldest of those that are newer than it, as paging backwards needs.

    Args:
        where: (field, operator, value); fields and operators come from the code, never from a request.
        before: only those with a lower sequence number.
        after: only those with a higher one.
    """
    clauses = ["kind = ?", "account = ?"]
    values: list[Any] = [kind, account]
    for field, operator, value in where:
        if operator == "in":
            clauses.append(f"json_extract(body, '$.{field}') IN ({', '.join('?' * len(value))})")
            values.extend(value)
        else:
            clauses.append(f"json_extract(body, '$.{field}') {operator} ?")
            values.append(value)
    if before is not None:
        clauses.append("seq < ?")
        values.append(before)
    if after is not None:
        clauses.append("seq > ?")
        values.append(after)
    order = "ASC" if after is not None else "DESC"
    statement = f"SELECT body FROM objects WHERE {' AND '.join(clauses)} ORDER BY seq {order} LIMIT ?"  # noqa: S608
    rows = [json.loads(row[0]) for row in db.execute(statement, (*values, limit))]
    return rows[::-1] if after is not None else rows


def schedule(db: sqlite3.Connection, *, due_at: int, task: str, target: str) -> None:
    """Put something on the agenda, once: a second call for the same task and target changes nothing."""
    db.execute("INSERT OR IGNORE INTO agenda (due_at, task, target) VALUES (?, ?, ?)", (due_at, task, target))


def take_due(db: sqlite3.Connection, *, until: int) -> tuple[int, str, list[str]] | None:
    """Take the earliest moment that has come: (when, task, its targets), all of one kind at a time."""
    row = db.execute(
        "SELECT due_at, task FROM agenda WHERE due_at <= ? ORDER BY due_at, seq LIMIT 1", (until,)
    ).fetchone()
    if row is None:
        return None
    targets = db.execute(
        "SELECT target FROM agenda WHERE due_at = ? AND task = ? ORDER BY seq", (row[0], row[1])
    ).fetchall()
    db.execute("DELETE FROM agenda WHERE due_at = ? AND task = ?", (row[0], row[1]))
    return int(row[0]), str(row[1]), [str(target) for (target,) in targets]


def funds(db: sqlite3.Connection, account: str) -> dict[str, dict[str, int]]:
    """Currency → {"pending": minor, "available": minor}: the sum of the account's balance transactions."""
    found: dict[str, dict[str, int]] = {}
    for currency, status, net in db.execute("SELECT currency, status, net FROM holdings WHERE account = ?", (account,)):
        found.setdefault(currency, {"pending": 0, "available": 0})[status] = net
    return found


def remembered(db: sqlite3.Connection, *, account: str, key: str) -> sqlite3.Row | None:
    """The answer given under an idempotency key, unless a day has passed since."""
    db.execute("DELETE FROM answers WHERE answered_at <= ?", (now(db) - KEYS_FORGOTTEN_AFTER,))
    row: sqlite3.Row | None = db.execute(
        "SELECT fingerprint, status, body, request_id FROM answers WHERE account = ? AND key = ?", (account, key)
    ).fetchone()
    return row


def remember(
    db: sqlite3.Connection, *, account: str, key: str, fingerprint: str, request_id: str, status: int, body: str
) -> None:
    db.execute(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
        (account, key, fingerprint, now(db), request_id, status, body),
    )
