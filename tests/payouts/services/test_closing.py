import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from marketplace import clock
from marketplace.models import AuditEvent, User
from payouts import ledger
from payouts.errors import NotClosable, PeriodClosed
from payouts.models import (
    BankReceipt,
    BooksProof,
    ClosedBalance,
    ClosedPeriod,
    JournalEntry,
    Payment,
    RailExport,
    ReconciliationRun,
    StatementRun,
)
from payouts.services.closing import close_period, close_what_is_over, find_next_period
from payouts.services.proofs import check_books
from tests.factories.marketplace import OrderFactory, UserFactory

MARCH, APRIL = date(2028, 3, 1), date(2028, 4, 1)


def book(key: str, *, at: datetime | None = None, micros: int = 5) -> JournalEntry:
    legs = {"cash:pending:USD": micros, "revenue:platform_fee:USD": -micros}
    return ledger.post(key=key, kind=JournalEntry.Kind.SALE, postings=legs, booked_at=at)


def looked(n_differences: int = 0, *, is_full: bool = True, at: datetime | None = None) -> None:
    """A look at Stripe's books that ended."""
    ReconciliationRun.objects.create(
        key=f"look {ReconciliationRun.objects.count()}",
        status="done",
        n_differences=n_differences,
        is_full=is_full,
        covers_until=at or clock.now(),
    )


def proved(n_findings: int = 0, *, at: datetime | None = None) -> None:
    BooksProof.objects.create(
        key=f"proof {BooksProof.objects.count()}", status="done", n_findings=n_findings, covers_until=at or clock.now()
    )


def reconciled() -> None:
    """Both, just now."""
    looked()
    proved()


@pytest.fixture
def staff(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def april(db: Any) -> None:
    """An entry stands in March, and it is the second of April."""
    clock.advance(datetime(2028, 3, 10, tzinfo=UTC) - clock.now())
    book("march")
    clock.advance(datetime(2028, 4, 2, tzinfo=UTC) - clock.now())
    reconciled()


def test_nothing_posts_into_a_closed_month_by_the_service_or_by_sql(april: None, staff: User) -> None:
    period = close_period(starts_on=MARCH, by=staff)

    with pytest.raises(PeriodClosed, match=r"month is closed.*entry late refused.*everything before 2028-04-01"):
        book("late", at=datetime(2028, 3, 31, 23, 59, 59, tzinfo=UTC))
    with pytest.raises(DatabaseError, match="everything before 2028-04-01"), transaction.atomic():
        JournalEntry.objects.create(
            key="late", kind="sale", currency="USD", n_legs=2, booked_at=datetime(2028, 3, 31, tzinfo=UTC)
        )
    assert not JournalEntry.objects.filter(key="late").exists()
    book("first moment of april", at=period.ends_at)
    assert book("march").key == "march"  # what was booked before is found again, not booked again


def test_closing_keeps_the_trial_balance_queues_the_statements_and_is_logged_once(april: None, staff: User) -> None:
    for _ in range(2):
        period = close_period(starts_on=MARCH, by=staff)

    kept = {(one.purpose, one.currency): (one.debit_micros, one.credit_micros) for one in ClosedBalance.objects.all()}
    assert kept == {("cash:pending", "USD"): (5, 0), ("revenue:platform_fee", "USD"): (0, 5)}
    assert StatementRun.objects.get().period == period
    assert [(one.actor, one.target) for one in AuditEvent.objects.filter(action="period.closed")] == [
        (staff, "period:2028-03")
    ]


@pytest.mark.as_owner
def test_a_kept_balance_that_was_changed_is_found(april: None, staff: User) -> None:
    close_period(starts_on=MARCH, by=staff)
    assert [one.code for one in check_books().findings] == []
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_closedbalance DISABLE TRIGGER USER")
        cursor.execute("UPDATE payouts_closedbalance SET debit_micros = 6 WHERE purpose = 'cash:pending'")

    (found,) = check_books().findings
    assert str(found) == "closed_month_differs: 2028-03, ('USD', 'cash:pending'): kept (6, 0), booked (5, 0)"


def test_months_are_closed_one_after_the_other_and_only_when_over(april: None, staff: User) -> None:
    with pytest.raises(NotClosable, match="2028-04 cannot be closed: the next one is 2028-03"):
        close_period(starts_on=APRIL, by=staff)
    close_period(starts_on=MARCH, by=staff)
    with pytest.raises(NotClosable, match="2028-04 ends on 30 April 2028"):
        close_period(starts_on=APRIL, by=staff)

    assert ClosedPeriod.objects.count() == 1


def test_a_month_that_is_not_clean_needs_a_reason_which_is_kept(april: None, staff: User) -> None:
    looked(2)

    with pytest.raises(NotClosable, match="found 2 differences") as refused:
        close_period(starts_on=MARCH, by=staff)
    assert refused.value.pointers == {"/note": "missing"}
    assert not ClosedPeriod.objects.exists()

    assert close_period(starts_on=MARCH, by=staff, note="Two cents of Stripe's, known.").note.startswith("Two cents")


def test_what_is_clean_is_closed_by_itself_three_days_after_its_end(april: None) -> None:
    assert close_what_is_over() == []
    clock.advance(timedelta(days=3))
    assert [str(period) for period in close_what_is_over()] == ["2028-03"]
    assert close_what_is_over() == []
    clock.advance(timedelta(days=70))
    reconciled()
    looked(1)
    assert close_what_is_over() == []  # waits for a person
    assert (coming := find_next_period()) is not None and coming.month == "2028-04" and coming.is_over


def obstacles() -> list[tuple[str, str]]:
    coming = find_next_period()
    assert coming is not None
    return [(one.about, one.text) for one in coming.obstacles]


def test_a_month_is_not_closed_on_evidence_that_is_older_than_its_end(april: None, staff: User) -> None:
    """Whoever looked on 20 March saw nothing of what was booked on the 31st."""
    early = datetime(2028, 3, 20, tzinfo=UTC)
    assert obstacles() == []
    proved(at=early)
    assert obstacles() == [("proof", "The books were not proved from their rows since its end.")]
    proved()
    looked(at=early)
    assert obstacles() == [("looks", "The latest reconciliation with Stripe began before its end.")]
    looked(is_full=False)
    assert obstacles() == [("looks", "The latest full reconciliation with Stripe began before its end.")]
    with pytest.raises(NotClosable, match="began before its end"):
        close_period(starts_on=MARCH, by=staff)
    looked()
    assert obstacles() == []


def test_a_full_look_that_found_something_stands_until_a_full_one_finds_nothing(april: None) -> None:
    looked(2)
    looked(is_full=False)
    assert obstacles() == [("looks", "The latest full reconciliation found 2 differences.")]
    looked()
    assert obstacles() == []


@pytest.mark.as_owner
def test_a_proof_that_found_something_and_none_at_all_are_obstacles(april: None) -> None:
    proved(3)
    assert obstacles() == [("proof", "The latest proof of the books found 3 things wrong.")]
    BooksProof.objects.all().delete()
    assert obstacles() == [("proof", "The books were not proved from their rows since its end.")]


def test_what_waits_for_its_second_person_is_an_obstacle_of_its_month_and_later_ones(april: None, staff: User) -> None:
    order = OrderFactory()
    payment = Payment.objects.create(order=order, currency="USD", amount_micros=order.total_micros)
    given = {"payment": payment, "amount_micros": order.total_micros, "currency": "USD", "recorded_by": staff}
    march, april_2 = datetime(2028, 3, 31, 23, tzinfo=UTC), clock.now()
    receipt = BankReceipt.objects.create(reference="B1", received_on=march, recorded_at=march, **given)
    for key, at in (("of march", march), ("of april", april_2)):
        RailExport.objects.create(key=key, currency="USD", proposed_by=staff, proposed_at=at)

    assert obstacles() == [
        ("receipts", "1 bank transfer of it waits for a second person."),
        ("rails", "1 export over another rail of it waits for a second person."),
    ]

    BankReceipt.objects.filter(pk=receipt.pk).update(
        status="rejected", decided_by=UserFactory(is_staff=True), decided_at=clock.now()
    )
    assert [about for about, _ in obstacles()] == ["rails"]


INSERT = "INSERT INTO payouts_closedperiod (starts_on, ends_at, closed_at, note) VALUES ('{}', '{} 00:00Z', now(), '')"
EVIDENCE = [
    ("UPDATE payouts_closedperiod SET note = 'x'", "append-only"),
    ("DELETE FROM payouts_closedbalance", "append-only"),
    ("TRUNCATE payouts_closedperiod CASCADE", "append-only"),
    (INSERT.format("2028-05-01", "2028-06-01"), "one after the other"),
    (INSERT.format("2028-04-02", "2028-05-02"), "one month in UTC"),
    (INSERT.format("2028-04-01", "2028-06-01"), "one month in UTC"),
]


@pytest.mark.as_owner
@pytest.mark.parametrize(("sql", "why"), EVIDENCE)
def test_the_database_refuses_to_change_a_closing_or_to_skip_a_month(
    april: None, staff: User, sql: str, why: str
) -> None:
    close_period(starts_on=MARCH, by=staff)
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending

    with pytest.raises(DatabaseError, match=why), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(sql)


def test_the_first_month_to_close_is_that_of_the_first_entry(april: None) -> None:
    with pytest.raises(DatabaseError, match="the first month to close"), transaction.atomic():
        ClosedPeriod.objects.create(
            starts_on=APRIL, ends_at=datetime(2028, 5, 1, tzinfo=UTC), closed_at=clock.now(), note=""
        )


def test_an_entry_and_a_closing_at_once_come_one_before_the_other(committed_db: str, django_db_blocker: Any) -> None:
    """An entry that is being made when the month is closed is in it, and its trial balance has it; a later one is refused."""
    with django_db_blocker.unblock():
        clock.advance(datetime(2028, 3, 10, tzinfo=UTC) - clock.now())
        book("march")
        clock.advance(datetime(2028, 4, 2, tzinfo=UTC) - clock.now())
        reconciled()
        posted, closing = threading.Event(), threading.Event()

        def slowly() -> None:
            with transaction.atomic():
                book("slow", at=datetime(2028, 3, 31, tzinfo=UTC), micros=7)
                posted.set()
                closing.wait(5)
                threading.Event().wait(0.3)
            connection.close()

        def close() -> None:
            posted.wait(5)
            closing.set()
            close_period(starts_on=MARCH, by=None)
            connection.close()

        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(slowly), pool.submit(close)]:
                job.result()

        assert int(ClosedBalance.objects.get(purpose="cash:pending").debit_micros) == 12
        with pytest.raises(PeriodClosed):
            book("after", at=datetime(2028, 3, 31, tzinfo=UTC))


def test_a_repeatable_read_cannot_overlook_a_closing(committed_db: str, django_db_blocker: Any) -> None:
    with (
        django_db_blocker.unblock(),
        pytest.raises(DatabaseError, match="READ COMMITTED"),
        transaction.atomic(),
    ):
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        book("sly")
