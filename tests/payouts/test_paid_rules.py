"""Attempts to pay what is not owed, to divide what is not there and to send what nobody approved, in SQL, as the app and as the owner."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, ProgrammingError, connection, transaction
from django.utils import timezone

from marketplace.money import Money
from payouts import ledger
from payouts.models import ApprovalLimit, Division, JournalEntry, PayoutRun
from payouts.services.proofs import check_books
from payouts.services.royalties import release_pool
from portal.roles import APP
from tests.factories.marketplace import PartyFactory, UserFactory
from tests.factories.payouts import PoolFactory
from tests.payouts.conftest import switch_off
from tests.payouts.test_ledger_rules import commit_would_pass, sql

DOLLAR = 1_000_000
RUN = (
    "INSERT INTO payouts_payoutrun (status, attempt, n_failures, due_at, queued_at, sent_at, progress_done, progress_total,"
    " error_code, error_message, error_pointers, currency, due_until, key, state, n_planned, planned_micros, skipped,"
    " funded_until, note) VALUES ('queued', 0, 0, now(), now(), now(), 0, 0, '', '', '{}', 'USD', now(), %s, %s, 0, 0, '{}', 0, '')"
    " RETURNING id"
)
PAYOUT = (
    "INSERT INTO payouts_payout (run_id, party_id, destination, amount_micros, currency, status, attempt, transfer_id, bank_payout_id,"
    " refusal_code, refusal_message, bank_failure_code, created_at, intended_at) VALUES"
    " (%s, %s, 'acct_1', %s, 'USD', %s, 1, %s, '', '', '', '', now(), now()) RETURNING id"
)
LINE = (
    "INSERT INTO payouts_divisionline (division_id, party_id, role, n_records, weight, amount_micros, due_at, created_at)"
    " VALUES (%s, %s, %s, 1, 1, %s, now(), now())"
)


@pytest.fixture(params=[APP, None], ids=["app", "owner"])
def role(request: Any, db: Any, alice: Any) -> Iterator[str | None]:
    """Alice is owed ten dollars; what follows is tried as this role."""
    owe(alice, 10)
    commit_would_pass()
    if request.param:
        sql(f'SET ROLE "{request.param}"')
    yield request.param
    sql("RESET ROLE")


def owe(party: Any, dollars: int, key: str = "owed") -> None:
    postings = {f"payable:{party.pk}:USD": -dollars * DOLLAR, "pool:7:USD": dollars * DOLLAR}
    ledger.post(key=key, kind=JournalEntry.Kind.SALE, postings=postings)


def intend(payout: int, party: Any, micros: int, *, against: str = "in_transit:USD", stage: str = "intent") -> None:
    ledger.post(
        key=f"payout:{payout}:{stage}",
        kind=JournalEntry.Kind.PAYOUT_INTENT,
        postings={f"payable:{party.pk}:USD": micros, against: -micros},
    )


def pay(party: Any, micros: int, *, status: str = "intended", transfer: str | None = None) -> int:
    (run,) = sql(RUN, f"run {timezone.now()}", "planning")
    (payout,) = sql(PAYOUT, run, party.pk, micros, status, transfer)
    return int(payout)


# --- payouts ----------------------------------------------------------------------------------------------------------


def test_an_honest_payout_passes(role: str | None, alice: Any) -> None:
    intend(pay(alice, 10 * DOLLAR), alice, 10 * DOLLAR)
    commit_would_pass()

    assert ledger.balance(f"payable:{alice.pk}:USD") == 0


def test_no_payable_is_paid_beyond_its_balance(role: str | None, alice: Any) -> None:
    with pytest.raises(IntegrityError, match="would be paid 10000 beyond"), transaction.atomic():
        intend(pay(alice, 10 * DOLLAR + 10_000), alice, 10 * DOLLAR + 10_000)
        commit_would_pass()
    with pytest.raises(IntegrityError, match="beyond"), transaction.atomic():
        for micros in (6 * DOLLAR, 5 * DOLLAR):  # each of them is covered, both are not
            intend(pay(alice, micros), alice, micros)
        commit_would_pass()

    assert ledger.balance(f"payable:{alice.pk}:USD") == -10 * DOLLAR


def test_the_balance_is_the_snapshot_and_what_came_after_it(role: str | None, alice: Any) -> None:
    sql("RESET ROLE")
    sql(
        "INSERT INTO payouts_balancesnapshot (account_id, up_to, balance_micros, taken_at)"
        " SELECT a.id, max(p.id), sum(p.amount_micros), now() FROM payouts_account a JOIN payouts_posting p ON p.account_id = a.id"
        " GROUP BY a.id"
    )
    owe(alice, 2, key="later")
    if role:
        sql(f'SET ROLE "{role}"')
    with pytest.raises(IntegrityError, match="would be paid 1000000 beyond"), transaction.atomic():
        intend(pay(alice, 13 * DOLLAR), alice, 13 * DOLLAR)
        commit_would_pass()

    intend(pay(alice, 12 * DOLLAR), alice, 12 * DOLLAR)
    commit_would_pass()


@pytest.mark.parametrize("what", ["no entry", "another amount", "of another party", "out of cash"])
def test_a_payout_has_its_intent(role: str | None, alice: Any, bob: Any, what: str) -> None:
    with pytest.raises(IntegrityError, match="no intent of its amount"), transaction.atomic():
        payout = pay(alice, 5 * DOLLAR)
        if what == "another amount":
            intend(payout, alice, 4 * DOLLAR)
        elif what == "of another party":
            intend(payout, bob, 5 * DOLLAR)
        elif what == "out of cash":
            intend(payout, alice, 5 * DOLLAR, against="cash:available:USD")
        commit_would_pass()


@pytest.mark.parametrize("status", ["sent", "paid", "refused"])
def test_a_payout_begins_as_intended(role: str | None, alice: Any, status: str) -> None:
    with pytest.raises(IntegrityError, match="begins as intended"), transaction.atomic():
        pay(alice, DOLLAR, status=status, transfer="tr_1")
    with pytest.raises(IntegrityError, match="begins as intended"), transaction.atomic():
        pay(alice, DOLLAR, transfer="tr_1")


def test_what_was_refused_and_sent_after_all_is_promised_again(role: str | None, alice: Any) -> None:
    payout = pay(alice, 10 * DOLLAR)
    intend(payout, alice, 10 * DOLLAR)
    ledger.reverse(JournalEntry.objects.get(key=f"payout:{payout}:intent"), key=f"payout:{payout}:refused")
    sql("UPDATE payouts_payout SET status = 'refused', refusal_code = 'x' WHERE id = %s", payout)
    commit_would_pass()

    with pytest.raises(IntegrityError, match="no intent-again of its amount"), transaction.atomic():
        sql("UPDATE payouts_payout SET status = 'sent', transfer_id = 'tr_1' WHERE id = %s", payout)
        commit_would_pass()
    intend(payout, alice, 10 * DOLLAR, stage="intent-again")
    sql("UPDATE payouts_payout SET status = 'sent', transfer_id = 'tr_1' WHERE id = %s", payout)
    commit_would_pass()


def test_a_rail_payout_has_its_intent_within_the_balance(role: str | None, alice: Any) -> None:
    sql("RESET ROLE")
    ann, ben = UserFactory(is_staff=True), UserFactory(is_staff=True)
    if role:
        sql(f'SET ROLE "{role}"')
    (export,) = sql(
        "INSERT INTO payouts_railexport (key, currency, status, proposed_by_id, proposed_at)"
        " VALUES ('k', 'USD', 'awaiting', %s, now()) RETURNING id",
        ann.pk,
    )
    (details,) = sql(
        "INSERT INTO payouts_bankdetails (party_id, sealed, last_four, entered_by_id, entered_at, usable_from)"
        " VALUES (%s, '', '5555', %s, now(), now() + interval '72 hours') RETURNING id",
        alice.pk,
        alice.user.pk,
    )
    (payout,) = sql(
        "INSERT INTO payouts_railpayout (export_id, party_id, details_id, amount_micros, currency, status, reference, created_at)"
        " VALUES (%s, %s, %s, 11000000, 'USD', 'proposed', '', now()) RETURNING id",
        export,
        alice.pk,
        details,
    )
    decided = "UPDATE payouts_railexport SET status = 'approved', decided_by_id = %s, decided_at = now() WHERE id = %s"
    sql(decided, ben.pk, export)
    intended = (
        "UPDATE payouts_railpayout SET status = 'intended', amount_micros = %s, intended_at = now() WHERE id = %s"
    )
    for micros, why in ((10 * DOLLAR, "no intent of its amount"), (11 * DOLLAR, "would be paid 1000000 beyond")):
        with pytest.raises(IntegrityError, match=why), transaction.atomic():
            sql(intended, micros, payout)
            if micros > 10 * DOLLAR:
                rail_intent(payout, alice, micros)
            commit_would_pass()

    sql(intended, 10 * DOLLAR, payout)
    rail_intent(payout, alice, 10 * DOLLAR)
    commit_would_pass()


def rail_intent(payout: int, party: Any, micros: int) -> None:
    ledger.post(
        key=f"rail:{payout}:intent",
        kind=JournalEntry.Kind.RAIL_INTENT,
        postings={f"payable:{party.pk}:USD": micros, "in_transit_rail:USD": -micros},
    )


def test_two_that_pay_the_same_balance_at_once_do_not_both_commit(committed_db: str, django_db_blocker: Any) -> None:
    """Neither holds the service's lock, and neither sees the other's entry before it is committed."""
    alice = PartyFactory()
    owe(alice, 10)
    opened = {"in_transit:USD": -1, "pool:7:USD": 1}  # neither waits for the other to open the account
    ledger.post(key="opened", kind=JournalEntry.Kind.SALE, postings=opened)
    start = threading.Barrier(2)

    def one() -> str:
        try:
            with transaction.atomic():
                intend(pay(alice, 6 * DOLLAR), alice, 6 * DOLLAR)
                start.wait(timeout=10)
        except IntegrityError as error:
            return str(error)
        finally:
            connection.close()
        return ""

    with ThreadPoolExecutor(2) as pool:
        said = sorted(future.result(timeout=30) for future in [pool.submit(one), pool.submit(one)])

    assert said[0] == "" and "beyond" in said[1]
    assert ledger.balance(f"payable:{alice.pk}:USD") == -4 * DOLLAR


# --- divisions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(db: Any, alice: Any, bob: Any) -> Any:
    """Twenty dollars that alice and bob will divide."""
    return PoolFactory(amount=Money(20 * DOLLAR, "USD"), contributions={alice: 1, bob: 1})


def division(pool: Any, micros: int, *, key: str = "release:pool:by hand") -> int:
    (made,) = sql(
        "INSERT INTO payouts_division (key, source, version_id, order_line_id, pool_id, amount_micros, currency, labellers_bps,"
        " holders_weight, labellers_weight, counted_role, due_at, divided_at) VALUES (%s, 'pool', %s, %s, %s, %s, 'USD', 0, 2, 0,"
        " '', now(), now()) RETURNING id",
        key,
        pool.version_id,
        pool.order_line_id,
        pool.pk,
        micros,
    )
    return int(made)


def book(pool: Any, party: Any, micros: int, *, key: str = "release:pool:by hand:0") -> None:
    postings = {f"pool:{pool.pk}:USD": micros, f"payable:{party.pk}:USD": -micros}
    ledger.post(key=key, kind=JournalEntry.Kind.RELEASE, postings=postings)


def test_an_honest_division_passes(pool: Any, role: str | None, alice: Any) -> None:
    made = division(pool, 20 * DOLLAR)
    sql(LINE, made, alice.pk, "rights_holder", 20 * DOLLAR)
    book(pool, alice, 20 * DOLLAR)
    commit_would_pass()


@pytest.mark.parametrize(
    ("amount", "line", "booked", "why"),
    [
        (20, 19, 20, "its lines sum to 19000000"),
        (20, 21, 20, "more than the 20000000 that it divides"),
        (20, 0, 20, "its lines sum to 0"),
        (20, 20, 19, "19000000 were taken from pool:"),
        (20, 20, 0, "0 were taken from pool:"),
        (19, 19, 19, "has 1000000 left"),
    ],
    ids=["too little", "too much", "no lines", "another amount booked", "nothing booked", "not all of the pool"],
)
def test_a_division_is_its_lines_and_what_left_the_pool(
    pool: Any, role: str | None, alice: Any, amount: int, line: int, booked: int, why: str
) -> None:
    with pytest.raises(IntegrityError, match=why), transaction.atomic():
        made = division(pool, amount * DOLLAR)
        if line:
            sql(LINE, made, alice.pk, "rights_holder", line * DOLLAR)
        if booked:
            book(pool, alice, booked * DOLLAR)
        commit_would_pass()

    assert not Division.objects.filter(key="release:pool:by hand").exists()


def test_no_line_joins_a_division_that_was_checked(pool: Any, role: str | None, alice: Any, bob: Any) -> None:
    with pytest.raises(IntegrityError, match="more than the"), transaction.atomic():
        made = division(pool, 20 * DOLLAR)
        sql(LINE, made, alice.pk, "rights_holder", 20 * DOLLAR)
        book(pool, alice, 20 * DOLLAR)
        commit_would_pass()  # checked early; the check at commit will not come again
        sql(LINE, made, bob.pk, "rights_holder", 1)
    with pytest.raises(IntegrityError, match="there is no division 0"), transaction.atomic():
        sql(LINE, 0, bob.pk, "rights_holder", 1)
    upfront_or_pool = release(pool, role)
    with pytest.raises(IntegrityError, match="more than the"), transaction.atomic():
        sql(LINE, upfront_or_pool, bob.pk, "labeller", 1)


def release(pool: Any, role: str | None) -> int:
    """By the service, as nobody in particular."""
    sql("RESET ROLE")
    release_pool(pool=pool, result=None)
    if role:
        sql(f'SET ROLE "{role}"')
    return Division.objects.get(pool=pool).pk


def test_a_pool_is_not_divided_twice(pool: Any, role: str | None, alice: Any) -> None:
    release(pool, role)
    commit_would_pass()

    with pytest.raises(IntegrityError, match="divided 25000000 of the 20000000"), transaction.atomic():
        (made,) = sql(
            "INSERT INTO payouts_division (key, source, version_id, order_line_id, amount_micros, currency, labellers_bps,"
            " holders_weight, labellers_weight, counted_role, due_at, divided_at) VALUES ('again', 'pool', %s, %s, 5000000, 'USD', 0,"
            " 2, 0, '', now(), now()) RETURNING id",
            pool.version_id,
            pool.order_line_id,
        )
        sql(LINE, made, alice.pk, "rights_holder", 5 * DOLLAR)
        ledger.post(  # so that the pool has it
            key="filled",
            kind=JournalEntry.Kind.SALE,
            postings={f"pool:{pool.pk}:USD": -5 * DOLLAR, "pool:7:USD": 5 * DOLLAR},
        )
        book(pool, alice, 5 * DOLLAR, key="again:0")
        commit_would_pass()


# --- approval ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def limit(db: Any) -> int:
    """In micros; as the owner set it."""
    ApprovalLimit.objects.create(above_micros=9 * DOLLAR)
    return 9 * DOLLAR


@pytest.fixture
def planned(limit: int, role: str | None, alice: Any) -> int:
    """A run that plans ten dollars, which is above the limit."""
    sql("RESET ROLE")
    starter = UserFactory(is_staff=True)
    run = PayoutRun.objects.create(currency="USD", due_until=timezone.now(), key="r", started_by=starter)
    run.planned_payouts.create(position=0, party=alice, amount_micros=10 * DOLLAR, oldest_due_at=timezone.now())
    if role:
        sql(f'SET ROLE "{role}"')
    return run.pk


PLAN = "UPDATE payouts_payoutrun SET planned_at = now(), n_planned = 1, planned_micros = %s, state = %s WHERE id = %s"
APPROVE = "UPDATE payouts_payoutrun SET state = 'sending', approved_by_id = %s, approved_at = now() WHERE id = %s"


def test_a_run_above_the_limit_is_not_sent_without_approval(planned: int, role: str | None) -> None:
    for state in ("sending", "short_of_funds", "paused", "ended"):
        with pytest.raises(IntegrityError, match="nobody approved"), transaction.atomic():
            sql(PLAN, 10 * DOLLAR, state, planned)
    with pytest.raises(IntegrityError, match="its plan sums to 10000000"), transaction.atomic():
        sql(PLAN, 8 * DOLLAR, "sending", planned)
    with pytest.raises(IntegrityError, match="planned first"), transaction.atomic():
        sql("UPDATE payouts_payoutrun SET state = 'sending' WHERE id = %s", planned)
    with pytest.raises(IntegrityError, match="begins with its plan"), transaction.atomic():
        sql(RUN, "another", "sending")

    sql(PLAN, 10 * DOLLAR, "awaiting_approval", planned)
    with pytest.raises(IntegrityError, match=r"nobody approved|does not go from"), transaction.atomic():
        sql("UPDATE payouts_payoutrun SET state = 'sending' WHERE id = %s", planned)
    with pytest.raises(IntegrityError, match="approved by a person"), transaction.atomic():
        sql("UPDATE payouts_payoutrun SET state = 'sending', approved_at = now() WHERE id = %s", planned)


def test_only_another_one_of_the_staff_approves(planned: int, role: str | None) -> None:
    sql("RESET ROLE")
    starter = PayoutRun.objects.get(pk=planned).started_by_id
    stranger, colleague = UserFactory(), UserFactory(is_staff=True)
    if role:
        sql(f'SET ROLE "{role}"')
    sql(PLAN, 10 * DOLLAR, "awaiting_approval", planned)

    with pytest.raises(IntegrityError, match="nobody_approves_their_own_run"), transaction.atomic():
        sql(APPROVE, starter, planned)
    with pytest.raises(IntegrityError, match="not of the staff"), transaction.atomic():
        sql(APPROVE, stranger.pk, planned)
    sql(APPROVE, colleague.pk, planned)

    assert sql("SELECT state, approval_above_micros FROM payouts_payoutrun WHERE id = %s", planned) == (
        "sending",
        9 * DOLLAR,
    )


def test_the_limit_is_not_the_applications_to_raise(planned: int, role: str | None) -> None:
    refusal = ProgrammingError if role == APP else DatabaseError
    if role == APP:
        with pytest.raises(refusal, match="permission denied"), transaction.atomic():
            sql("INSERT INTO payouts_approvallimit (above_micros, set_at) VALUES (1, now())")
    with pytest.raises(refusal, match=r"permission denied|append-only"), transaction.atomic():
        sql("UPDATE payouts_approvallimit SET above_micros = 10000000000")
    sql(PLAN, 10 * DOLLAR, "awaiting_approval", planned)
    with pytest.raises(IntegrityError, match="keeps the limit"), transaction.atomic():
        sql("UPDATE payouts_payoutrun SET approval_above_micros = 10000000000 WHERE id = %s", planned)


def test_each_currency_has_its_own_limit(limit: int, role: str | None, alice: Any) -> None:
    sql("RESET ROLE")
    ApprovalLimit.objects.create(currency="JPY", above_micros=1_500_000 * DOLLAR)
    runs = {}
    for currency in ("USD", "EUR", "JPY"):
        runs[currency] = PayoutRun.objects.create(currency=currency, due_until=timezone.now(), key=currency)
        runs[currency].planned_payouts.create(
            position=0, party=alice, amount_micros=10 * DOLLAR, oldest_due_at=timezone.now()
        )
    if role:
        sql(f'SET ROLE "{role}"')

    sql(PLAN, 10 * DOLLAR, "sending", runs["JPY"].pk)
    for currency in ("USD", "EUR"):  # what was written down for none in particular is of every other one
        with pytest.raises(IntegrityError, match="above 9000000, and nobody approved"), transaction.atomic():
            sql(PLAN, 10 * DOLLAR, "sending", runs[currency].pk)
    sql("RESET ROLE")
    ApprovalLimit.objects.create(above_micros=DOLLAR)  # the latest counts, whatever it is for
    if role:
        sql(f'SET ROLE "{role}"')
    with pytest.raises(IntegrityError, match="above what needs no approval"), transaction.atomic():
        sql(RUN.replace("'USD'", "'JPY'"), "small", "planning")
        small = sql("SELECT id FROM payouts_payoutrun WHERE key = 'small'")[0]
        sql(PAYOUT.replace("'USD'", "'JPY'"), small, alice.pk, 2 * DOLLAR, "intended", None)


def test_nothing_above_the_limit_is_intended_while_a_run_is_still_planning(
    limit: int, role: str | None, alice: Any
) -> None:
    with pytest.raises(IntegrityError, match="above what needs no approval"), transaction.atomic():
        pay(alice, 10 * DOLLAR)


def test_whoever_was_not_planned_is_not_paid(planned: int, role: str | None, bob: Any) -> None:
    sql(PLAN, 10 * DOLLAR, "awaiting_approval", planned)
    sql("RESET ROLE")
    colleague = UserFactory(is_staff=True)
    sql(APPROVE, colleague.pk, planned)
    with pytest.raises(IntegrityError, match="does not plan to pay"), transaction.atomic():
        sql(PAYOUT, planned, bob.pk, 1, "intended", None)


def test_a_run_that_was_sent_without_approval_is_found(planned: int, role: str | None) -> None:
    sql("RESET ROLE")
    switch_off("approved_above_the_limit", table="payouts_payoutrun")
    sql(PLAN, 10 * DOLLAR, "sending", planned)
    sql("UPDATE payouts_payoutrun SET approval_above_micros = 9000000 WHERE id = %s", planned)

    assert "run_not_approved" in {finding.code for finding in check_books().findings}
