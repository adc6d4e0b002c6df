"""Attempts to break each rule of the ledger in SQL, as the application's role and as the owner of the tables."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, ProgrammingError, connection, transaction

from payouts import ledger
from payouts.models import DivisionLine, JournalEntry
from portal.roles import APP
from tests.factories.marketplace import OrderFactory
from tests.factories.payouts import sell

ENTRY = (
    "INSERT INTO payouts_journalentry (key, kind, currency, n_legs, booked_at, created_at)"
    " VALUES (%s, 'sale', 'USD', %s, now(), now()) RETURNING id"
)
LEG = "INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros) VALUES (%s, %s, %s, %s)"
EVIDENCE = [
    "payouts_account",
    "payouts_journalentry",
    "payouts_posting",
    "payouts_balancesnapshot",
    "payouts_payeecount",
    "payouts_division",
    "payouts_divisionline",
    "payouts_royaltyreport",
    "payouts_royaltyinvoiceline",
    "payouts_clawback",
    "payouts_clawbackundo",
    "payouts_clawbackline",
    "payouts_reclaim",
    "payouts_writeoff",
]


def sql(statement: str, *args: Any) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(statement, args)
        return cursor.fetchone() if cursor.description else None


def commit_would_pass() -> None:
    sql("SET CONSTRAINTS ALL IMMEDIATE")
    sql("SET CONSTRAINTS ALL DEFERRED")


@contextmanager
def undone() -> Iterator[None]:
    """What is tried leaves nothing behind that the end of the test would have to check."""
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


@pytest.fixture(params=[APP, None], ids=["app", "owner"])
def role(request: Any, db: Any) -> Iterator[str | None]:
    """The ledger holds one entry; what follows is tried as this role."""
    ledger.post(key="sale:1", kind=JournalEntry.Kind.SALE, postings={"cash:pending:USD": 5, "pool:7:USD": -5})
    ledger.post(key="sale:2", kind=JournalEntry.Kind.SALE, postings={"cash:pending:EUR": 5, "pool:8:EUR": -5})
    commit_would_pass()
    if request.param:
        sql(f'SET ROLE "{request.param}"')
    yield request.param
    sql("RESET ROLE")


def accounts() -> tuple[int, int, int]:
    ids = [sql("SELECT id FROM payouts_account WHERE code = %s", code)[0] for code in CODES]
    return ids[0], ids[1], ids[2]


CODES = ("cash:pending:USD", "pool:7:USD", "cash:pending:EUR")


def test_an_honest_entry_passes(role: str | None) -> None:
    cash, pool, _ = accounts()

    (entry,) = sql(ENTRY, "sale:3", 2)
    sql(LEG, entry, 0, cash, 7)
    with transaction.atomic():  # a savepoint is still the same transaction
        sql(LEG, entry, 1, pool, -7)
    commit_would_pass()

    assert ledger.balance("pool:7:USD") == -12


@pytest.mark.parametrize(
    ("n_legs", "legs", "why"),
    [
        (2, [], "declares 2 legs and has 0"),
        (2, [(0, 0, 5)], "declares 2 legs and has 1"),
        (3, [(0, 0, 5), (1, 1, -5)], "declares 3 legs and has 2"),
        (2, [(0, 0, 5), (1, 1, -4)], "sum to 1, not 0"),
        (2, [(0, 0, 5), (1, 2, -5)], "its leg 1 is in EUR, not in USD"),
    ],
    ids=["empty", "one leg", "fewer than declared", "unbalanced", "two currencies"],
)
def test_what_is_no_balanced_entry_does_not_commit(role: str | None, n_legs: int, legs: Any, why: str) -> None:
    ids = accounts()

    with pytest.raises(IntegrityError, match=why), transaction.atomic():
        (entry,) = sql(ENTRY, "sale:3", n_legs)
        for leg, account, micros in legs:
            sql(LEG, entry, leg, ids[account], micros)
        commit_would_pass()

    assert ledger.balances() == {"cash:pending:EUR": 5, "cash:pending:USD": 5, "pool:7:USD": -5, "pool:8:EUR": -5}


def test_currencies_are_checked_for_each_leg_of_a_statement(role: str | None) -> None:
    """Whichever leg of however many entries it is; an entry in one currency whose accounts are both in another balances, too."""
    cash, pool, euro = accounts()
    (euros,) = sql("SELECT id FROM payouts_account WHERE code = 'pool:8:EUR'")

    with (
        pytest.raises(IntegrityError, match="entry sale:4 refused: its leg 0 is in EUR, not in USD"),
        transaction.atomic(),
    ):
        (right,), (wrong,) = sql(ENTRY, "sale:3", 2), sql(ENTRY, "sale:4", 2)
        sql(
            "INSERT INTO payouts_posting (entry_id, leg, account_id, amount_micros) VALUES"
            " (%s, 0, %s, 1), (%s, 1, %s, -1), (%s, 0, %s, 1), (%s, 1, %s, -1)",
            *(right, cash, right, pool, wrong, euro, wrong, euros),
        )

    assert ledger.balances() == {"cash:pending:EUR": 5, "cash:pending:USD": 5, "pool:7:USD": -5, "pool:8:EUR": -5}


def test_an_account_is_of_a_party_that_there_is(role: str | None) -> None:
    with pytest.raises(IntegrityError, match="there is no party 999999"), transaction.atomic():
        sql(
            "INSERT INTO payouts_account (code, kind, currency, party_id, created_at)"
            " VALUES ('payable:999999:USD', 'liability', 'USD', 999999, now())"
        )

    assert sql("SELECT count(*) FROM payouts_account WHERE party_id IS NOT NULL") == (0,)


@pytest.mark.parametrize("missing", ["division", "party"])
def test_a_line_is_of_a_division_and_a_party_that_there_are(role: str | None, missing: str) -> None:
    sql("RESET ROLE")
    paid = sell(OrderFactory())
    assert paid.order is not None
    line = DivisionLine.objects.filter(division__order_line__order=paid.order).latest("pk")
    n_lines = DivisionLine.objects.count()
    if role:
        sql(f'SET ROLE "{role}"')

    with pytest.raises(IntegrityError, match=f"there is no {missing} 999999"), transaction.atomic():
        sql(
            "INSERT INTO payouts_divisionline (division_id, party_id, role, n_records, weight, amount_micros, due_at, created_at)"
            " SELECT coalesce(%s, division_id), coalesce(%s, party_id),"
            " 'labeller', 1, 1, 1, now(), now() FROM payouts_divisionline WHERE id = %s",
            999_999 if missing == "division" else None,
            999_999 if missing == "party" else None,
            line.pk,
        )

    assert DivisionLine.objects.count() == n_lines


@pytest.mark.parametrize("n_legs", [0, 1, 1_001])
def test_an_entry_has_2_to_1000_legs(role: str | None, n_legs: int) -> None:
    with pytest.raises(IntegrityError, match="entry_has_2_to_1000_legs"), transaction.atomic():
        sql(ENTRY, "sale:3", n_legs)


def test_a_key_is_used_once(role: str | None) -> None:
    with pytest.raises(IntegrityError, match="duplicate key"), transaction.atomic():
        sql(ENTRY, "sale:1", 2)


def test_no_leg_joins_an_entry_that_was_checked_in_the_same_transaction(role: str | None) -> None:
    cash, pool, euro = accounts()
    (entry,) = sql(ENTRY, "sale:3", 2)
    sql(LEG, entry, 0, cash, 7)
    sql(LEG, entry, 1, pool, -7)
    commit_would_pass()  # checked early; the check at commit will not come again

    for leg, why in ((2, "declares 2 legs"), (1, "one_posting_per_leg"), (-1, "leg")):
        with pytest.raises(IntegrityError, match=why), transaction.atomic():
            sql(LEG, entry, leg, euro, 1_000_000)


def test_a_zero_leg_and_a_second_leg_on_one_account_are_refused(role: str | None) -> None:
    cash, _, _ = accounts()
    with undone():
        (entry,) = sql(ENTRY, "sale:3", 2)

        with pytest.raises(IntegrityError, match="posting_not_zero"), transaction.atomic():
            sql(LEG, entry, 0, cash, 0)
        sql(LEG, entry, 0, cash, 1)
        with pytest.raises(IntegrityError, match="one_posting_per_account"), transaction.atomic():
            sql(LEG, entry, 1, cash, -1)


@pytest.mark.parametrize("table", EVIDENCE)
def test_evidence_is_never_changed_deleted_or_truncated(role: str | None, table: str) -> None:
    refusal = ProgrammingError if role == APP else DatabaseError
    why = "permission denied" if role == APP else "append-only|foreign key constraint"

    for statement in (
        f"UPDATE {table} SET id = id + 1000",  # noqa: S608
        f"DELETE FROM {table}",  # noqa: S608
        f"TRUNCATE {table}",
        f"TRUNCATE {table} CASCADE",
    ):
        is_empty = not sql(f"SELECT 1 FROM {table} LIMIT 1")  # noqa: S608
        if role is None and is_empty and not statement.startswith("TRUNCATE"):
            continue  # a row trigger has nothing to refuse; the role's test and the next one cover the table
        with pytest.raises(refusal, match=why), transaction.atomic():
            sql(statement)


@pytest.mark.parametrize("table", EVIDENCE)
def test_every_evidence_table_has_triggers_that_no_session_can_switch_off(db: Any, table: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT tgname, tgenabled FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal", [table]
        )
        found = dict(cursor.fetchall())

    assert {"append_only", "never_truncated"} <= set(found)
    assert set(found.values()) == {"A"}  # ALWAYS, also under session_replication_role = replica


def test_a_temporary_table_does_not_stand_in_for_the_ledger(role: str | None) -> None:
    sql("CREATE TEMP TABLE payouts_posting (entry_id bigint, account_id bigint, amount_micros bigint) ON COMMIT DROP")
    sql(
        "INSERT INTO pg_temp.payouts_posting SELECT g, a.id, g * 2 - 1"
        " FROM generate_series(0, 1) g, public.payouts_account a WHERE a.code = 'pool:7:USD'"
    )

    with pytest.raises(IntegrityError, match="declares 2 legs and has 0"), transaction.atomic():
        sql(ENTRY, "sale:3", 2)
        commit_would_pass()


def test_the_application_cannot_forge_the_transaction_of_an_entry(role: str | None) -> None:
    with undone():
        (entry,) = sql(
            "INSERT INTO payouts_journalentry (key, kind, currency, n_legs, booked_at, created_at, txid)"
            " VALUES ('forged', 'sale', 'USD', 2, now(), now(), '999999999') RETURNING id"
        )

        assert sql("SELECT txid = pg_current_xact_id() FROM payouts_journalentry WHERE id = %s", entry) == (True,)


def test_the_application_owns_no_ledger_table_and_cannot_switch_its_rules_off(db: Any) -> None:
    sql(f'SET ROLE "{APP}"')
    for table in EVIDENCE:
        with pytest.raises(ProgrammingError, match="must be owner"), transaction.atomic():
            sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    for statement, why in (
        ("SET session_replication_role = replica", "permission denied"),
        ("DROP FUNCTION payouts_refuse_change() CASCADE", "must be owner"),
    ):
        with pytest.raises(ProgrammingError, match=why), transaction.atomic():
            sql(statement)
    sql("RESET ROLE")


@pytest.mark.parametrize("as_role", [APP, None], ids=["app", "owner"])
def test_no_leg_joins_an_entry_of_an_earlier_transaction(committed_db: str, as_role: str | None) -> None:
    entry = ledger.post(key="sale:1", kind=JournalEntry.Kind.SALE, postings={"cash:pending:USD": 5, "pool:7:USD": -5})
    ledger.post(key="other", kind=JournalEntry.Kind.SALE, postings={"pool:8:USD": 5, "pool:7:USD": -5})
    cash, other = (
        sql("SELECT id FROM payouts_account WHERE code = %s", code)[0] for code in ("cash:pending:USD", "pool:8:USD")
    )
    if as_role:
        sql(f'SET ROLE "{as_role}"')

    for leg, account, why in (
        (0, cash, "already exists"),
        (1, other, "already exists"),
        (2, cash, "already exists"),
        (2, other, "was not made in this transaction"),
    ):
        with pytest.raises(IntegrityError, match=why):
            sql(LEG, entry.pk, leg, account, 1)


def test_two_writers_of_one_key_make_one_entry(committed_db: str) -> None:
    postings = {"cash:pending:USD": 5, "pool:7:USD": -5}
    start = threading.Barrier(8)

    def write() -> int:
        try:
            start.wait(timeout=10)
            return ledger.post(key="sale:1", kind=JournalEntry.Kind.SALE, postings=postings).pk
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        entries = {future.result(timeout=30) for future in [pool.submit(write) for _ in range(8)]}

    assert len(entries) == 1
    assert ledger.balances() == postings
