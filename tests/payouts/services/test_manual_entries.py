from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from marketplace import clock
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import AuditEvent, User
from payouts import ledger
from payouts.errors import AlreadyDecided, BankShort, FourEyes
from payouts.models import JournalEntry, ManualDecision, ManualEntry, ManualLeg
from payouts.services.manual_entries import approve, propose, reject
from tests.factories.marketplace import UserFactory

LEGS = {"expense:other:USD": 3_000_000, "equity:owners:USD": -3_000_000}


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def ben(db: Any) -> User:
    return UserFactory(is_staff=True)


def proposed(by: User, **changes: Any) -> ManualEntry:
    return propose(user=by, **({"key": "k", "legs": LEGS, "reason": "Paper"} | changes))


def commit_would_pass() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED")


def test_a_proposal_books_nothing_until_another_person_approves_it_once(ann: User, ben: User) -> None:
    manual = proposed(ann)
    assert proposed(ann) == manual and ledger.balances() == {}

    decisions = {approve(manual=manual, user=ben).pk for _ in range(2)}
    commit_would_pass()

    assert len(decisions) == 1
    assert ledger.balances() == LEGS
    assert JournalEntry.objects.get().key == f"manual:{manual.pk}"
    assert [(one.action, one.actor) for one in AuditEvent.objects.order_by("pk")] == [
        ("manual_entry.proposed", ann),
        ("manual_entry.approved", ben),
    ]


def test_nobody_approves_their_own_and_nobody_outside_the_staff_any(ann: User, ben: User, alice: Any) -> None:
    manual = proposed(ann)

    for user, refusal, match in ((ann, FourEyes, "another one of the staff"), (alice.user, NotAllowed, "Only staff")):
        with pytest.raises(refusal, match=match):
            approve(manual=manual, user=user)
    with pytest.raises(NotAllowed):
        proposed(alice.user, key="mine")

    assert ledger.balances() == {} and not ManualDecision.objects.exists()


def test_a_rejection_needs_a_reason_and_ends_it(ann: User, ben: User) -> None:
    manual = proposed(ann)
    with pytest.raises(InvalidInput, match="why"):
        reject(manual=manual, user=ben, note=" ")
    reject(manual=manual, user=ben, note="No receipt")

    with pytest.raises(AlreadyDecided, match="rejected it"):
        approve(manual=manual, user=UserFactory(is_staff=True))
    assert ledger.balances() == {}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"legs": {"expense:other:USD": 1}}, "/legs"),
        ({"legs": {"expense:other:USD": 2, "equity:owners:USD": -1}}, "/legs"),
        ({"legs": {"expense:other:USD": 1, "equity:owners:EUR": -1}}, "/legs"),
        ({"legs": {"payable:1:USD": 1, "equity:owners:USD": -1}}, "/legs/0"),
        ({"legs": {"nonsense": 1, "equity:owners:USD": -1}}, "/legs/0"),
        ({"legs": {"expense:other:USD": 0, "equity:owners:USD": 0}}, "/legs/0"),
        ({"reason": "  "}, "/reason"),
        ({"legs": {"cash:available:USD": -1, "expense:other:USD": 1}}, "/balance_transaction_id"),
        ({"balance_transaction_id": "txn_1"}, "/balance_transaction_id"),
        ({"booked_at": datetime(2999, 1, 1, tzinfo=UTC)}, "/booked_at"),
    ],
)
def test_bad_proposals_name_what_is_wrong_and_leave_nothing(ann: User, changes: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        proposed(ann, **changes)

    assert list(refused.value.pointers) == [pointer]
    assert not ManualEntry.objects.exists() and not AuditEvent.objects.exists()


def fund(ann: User, ben: User, dollars: int) -> None:
    legs = {"bank:USD": dollars * 1_000_000, "equity:owners:USD": -dollars * 1_000_000}
    approve(manual=proposed(ann, key=f"fund {dollars}", legs=legs), user=ben)


def promise(key: str, dollars: int, *, to: str = "in_transit_rail:USD") -> None:
    ledger.post(
        key=key,
        kind=JournalEntry.Kind.RAIL_INTENT,
        postings={"revenue:other:USD": dollars * 1_000_000, to: -dollars * 1_000_000},
    )


def taking(dollars: int) -> dict[str, int]:
    return {"equity:owners:USD": dollars * 1_000_000, "bank:USD": -dollars * 1_000_000}


@pytest.mark.parametrize("to", ["in_transit_rail:USD", "refunding_bank:USD", "unapplied:USD"])
def test_nobody_takes_what_is_promised_out_of_the_bank(ann: User, ben: User, to: str) -> None:
    fund(ann, ben, 100)
    promise("rail", 70, to=to)

    with pytest.raises(
        BankShort, match=r"30\.00 USD of the 100\.00 USD in bank:USD is free, and this takes 31\.00"
    ) as refused:
        proposed(ann, legs=taking(31))
    assert refused.value.pointers == {"/legs/1": "more than is free"}
    manual, more = proposed(ann, key="a", legs=taking(30)), proposed(ann, key="b", legs=taking(20))
    approve(manual=manual, user=ben)
    with pytest.raises(BankShort, match=r"0\.00 USD of the 70\.00 USD"):
        approve(manual=more, user=ben)
    commit_would_pass()

    assert ledger.balance("bank:USD") == 70_000_000
    assert not ManualDecision.objects.filter(manual=more).exists()
    reject(manual=more, user=ben, note="The bank holds too little.")


def test_where_nothing_is_promised_an_overdraft_is_booked_as_it_is(ann: User, ben: User) -> None:
    fund(ann, ben, 10)

    approve(manual=proposed(ann, legs=taking(12)), user=ben)
    commit_would_pass()
    fund(ann, ben, 1)  # what comes in is booked however short it leaves the account
    commit_would_pass()

    assert ledger.balance("bank:USD") == -1_000_000


def test_the_database_refuses_to_take_what_is_promised(ann: User, ben: User) -> None:
    fund(ann, ben, 100)
    manual = proposed(ann, legs=taking(31))
    promise("rail", 70)
    with pytest.raises(DatabaseError, match="leaves 69000000, of which 70000000 are promised"), transaction.atomic():
        entry = ledger.post(
            key=f"manual:{manual.pk}",
            kind=JournalEntry.Kind.MANUAL,
            postings=taking(31),
            booked_at=manual.booked_at,
        )
        ManualDecision.objects.create(manual=manual, is_approved=True, entry=entry, decided_by=ben)
        commit_would_pass()

    assert ledger.balance("bank:USD") == 100_000_000


def test_the_database_refuses_a_manual_entry_that_nobody_approved(ann: User) -> None:
    with pytest.raises(DatabaseError, match="nobody approved it"), transaction.atomic():
        ledger.post(key="manual:1", kind=JournalEntry.Kind.MANUAL, postings=LEGS)
        commit_would_pass()


def test_the_database_refuses_other_legs_than_were_approved(ann: User, ben: User) -> None:
    manual = proposed(ann)
    with pytest.raises(DatabaseError, match="not what was approved"), transaction.atomic():
        entry = ledger.post(
            key="manual:x",
            kind=JournalEntry.Kind.MANUAL,
            postings={code: 2 * micros for code, micros in LEGS.items()},
            booked_at=manual.booked_at,
        )
        ManualDecision.objects.create(manual=manual, is_approved=True, entry=entry, decided_by=ben)
        commit_would_pass()


@pytest.mark.as_owner
def test_the_database_refuses_the_proposers_approval_later_legs_and_any_change(
    ann: User, ben: User, alice: Any
) -> None:
    manual = proposed(ann)
    for decider in (ann, alice.user):
        with pytest.raises(DatabaseError, match="decision refused"), transaction.atomic():
            ManualDecision.objects.create(manual=manual, is_approved=False, decided_by=decider)
    with connection.cursor() as cursor:  # as if it had been proposed by an earlier transaction
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_manualentry DISABLE TRIGGER append_only")
        cursor.execute("UPDATE payouts_manualentry SET txid = '3'")
        cursor.execute("ALTER TABLE payouts_manualentry ENABLE ALWAYS TRIGGER append_only")
    with pytest.raises(DatabaseError, match="written before"), transaction.atomic():
        ManualLeg.objects.create(manual=manual, account_code="bank:USD", amount_micros=1)
    for change in ("UPDATE payouts_manualentry SET reason = 'x'", "DELETE FROM payouts_manualleg"):
        with pytest.raises(DatabaseError, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(change)


def test_two_who_decide_at_once_post_it_once(committed_db: str, django_db_blocker: Any) -> None:
    with django_db_blocker.unblock():
        ann, *others = (UserFactory(is_staff=True) for _ in range(5))
        manual = proposed(ann)

        def decide(user: User) -> str:
            try:
                approve(manual=manual, user=user)
                return "posted"
            except AlreadyDecided:
                return "too late"
            finally:
                connection.close()

        with ThreadPoolExecutor(4) as pool:
            ended = sorted(pool.map(decide, others))

        assert ended == ["posted", "too late", "too late", "too late"]
        assert ledger.balances() == LEGS


def test_a_proposal_in_a_month_that_was_closed_meanwhile_is_refused(ann: User, ben: User) -> None:
    from payouts.errors import PeriodClosed
    from payouts.services.closing import close_period

    manual = proposed(ann)
    ledger.post(key="first", kind=JournalEntry.Kind.SALE, postings={"cash:pending:USD": 1, "pool:1:USD": -1})
    clock.advance(timedelta(days=40))
    month = manual.booked_at.date().replace(day=1)
    close_period(starts_on=month, by=ben, note="Without it")

    with pytest.raises(PeriodClosed):
        approve(manual=manual, user=ben)
    with pytest.raises(PeriodClosed):
        proposed(ann, key="again", booked_at=manual.booked_at)
    assert not ManualDecision.objects.exists()
