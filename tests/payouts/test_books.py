from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.money import Money
from payouts import books, ledger
from payouts.errors import NotFound
from payouts.models import BalanceCheck, BalanceSnapshot, JournalEntry, PayoutRun
from payouts.services import transfers
from payouts.services.balance_checks import check_balances
from payouts.services.closing import close_period
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell

DOLLAR = 1_000_000


def dollars(*amounts: int) -> tuple[Money, ...]:
    return tuple(Money(amount * DOLLAR, "USD") for amount in amounts)


def post(number: int, micros: int, *, at: datetime | None = None) -> JournalEntry:
    legs = {"cash:pending:USD": micros, "revenue:other:USD": -micros}
    return ledger.post(key=f"e{number}", kind=JournalEntry.Kind.SALE, postings=legs, booked_at=at)


@pytest.fixture
def spring(db: Any, alice: Any, bob: Any, carol: Any) -> None:
    """Two sales in March, of 100 USD each; alice is owed 45 of the 60 upfront, bob 15. It is May, and March is closed."""
    clock.advance(datetime(2028, 3, 10, tzinfo=UTC) - clock.now())
    for _ in range(2):
        version = PublishedVersionFactory(contributions={alice: 3, bob: 1})
        sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    clock.advance(datetime(2028, 5, 20, tzinfo=UTC) - clock.now())
    close_period(starts_on=date(2028, 3, 1), by=None, note="A test's")


def test_the_trial_balance_balances_and_sets_what_is_others_apart(spring: None) -> None:
    (trial,) = books.trial_balance(as_of=clock.now())

    assert trial.balances
    assert {line.purpose: line.balance.micros // 10_000 for line in trial.lines if line.balance} == {
        "cash:pending": 19_360,
        "expense:stripe_fees": 640,
        "revenue:platform_fee": -2_000,
        "pool": -12_000,
        "payable": -6_000,
    }
    assert (trial.for_others, trial.own_revenue) == (Money(180 * DOLLAR, "USD"), Money(13_600_000, "USD"))
    assert trial.assets == trial.for_others + trial.own_revenue + trial.owners


def test_a_trial_balance_in_the_past_leaves_out_what_came_later_with_and_without_a_closed_month(spring: None) -> None:
    post(1, 5 * DOLLAR)

    assert books.trial_balance(as_of=datetime(2028, 3, 1, tzinfo=UTC)) == []
    (march,) = books.trial_balance(as_of=datetime(2028, 4, 1, tzinfo=UTC))
    (now,) = books.trial_balance(as_of=clock.now() + timedelta(seconds=1))
    assert "revenue:other" not in {line.purpose for line in march.lines}
    assert now.debit - march.debit == Money(5 * DOLLAR, "USD")


def test_a_journal_runs_its_balance_over_pages_from_snapshots_and_days(db: Any, monkeypatch: Any) -> None:
    start = datetime(2028, 3, 1, 12, tzinfo=UTC)
    for number in range(1, 8):
        post(number, number, at=start + timedelta(days=number))
        if number == 4:
            monkeypatch.setattr(ledger, "SNAPSHOT_POSTINGS", 1)
            assert ledger.take_snapshots() == 2

    newest = books.account_journal(code="cash:pending:USD", size=3)
    assert [(row.key, row.balance.micros) for row in newest.rows] == [("e5", 15), ("e6", 21), ("e7", 28)]
    assert newest.later is None and newest.opening.micros == 10
    older = books.account_journal(code="cash:pending:USD", before=newest.earlier, size=3)
    assert [(row.key, row.balance.micros) for row in older.rows] == [("e2", 3), ("e3", 6), ("e4", 10)]
    assert books.account_journal(code="cash:pending:USD", after=older.later, size=3).rows == newest.rows
    since = books.account_journal(code="cash:pending:USD", since=date(2028, 3, 7), size=3)
    assert [row.key for row in since.rows] == ["e6", "e7"]
    whole = list(books.account_journal_rows(books.find_account("cash:pending:USD")))
    assert [row.balance.micros for row in whole] == [1, 3, 6, 10, 15, 21, 28]
    with pytest.raises(NotFound):
        books.account_journal(code="cash:pending:EUR")


def test_payables_age_from_the_day_they_fell_due_and_payouts_pay_the_oldest_first(
    db: Any, alice: Any, bob: Any, carol: Any
) -> None:
    for days in (60, 35, 0):  # due 30 days after each sale; 7 for a known buyer is never reached here
        version = PublishedVersionFactory(contributions={alice: 1})
        sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
        clock.advance(timedelta(days=days))

    (row,) = books.aged_payables()
    assert row.total == Money(90 * DOLLAR, "USD") == Money(-ledger.balance(f"payable:{alice.pk}:USD"), "USD")
    assert row.by_age == dollars(30, 30, 0, 30, 0, 0)
    assert (row.n_days, row.can_be_paid) == (65, False)

    ledger.post(
        key="settled",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": 200 * DOLLAR, "cash:pending:USD": -200 * DOLLAR},
    )
    run = PayoutRun.objects.create(
        key="r",
        currency="USD",
        due_until=clock.now() - timedelta(days=10),
        status="running",
        lease_expires_at=clock.now(),
        attempt=1,
    )
    transfers._intend(run, [PayeeAccountFactory(party=alice).party_id])

    (row,) = books.aged_payables()
    assert row.by_age == dollars(30, 30, 0, 0, 0, 0) and row.can_be_paid
    assert books.aged_totals() == {"USD": (1, row.by_age)}


def test_a_year_sums_up_each_payee_by_quarter(spring: None, alice: Any, bob: Any) -> None:
    rows = {row.name: row for row in books.yearly_totals(2028)}

    assert rows["Alice"].credited_by_quarter == dollars(45, 0, 0, 0)
    assert (rows["Alice"].n_credits, rows["Alice"].party) == (2, str(alice.public_id))
    assert rows["Bob"].credited == Money(15 * DOLLAR, "USD")
    assert list(books.yearly_totals(2027)) == []
    with pytest.raises(InvalidInput):
        next(books.yearly_totals(99_999))


def test_beancount_reads_the_whole_journal_and_agrees_with_every_closed_month(spring: None, tmp_path: Path) -> None:
    loader = pytest.importorskip("beancount.loader")
    post(1, 1)  # a micro
    path = tmp_path / "books.beancount"
    path.write_text("".join(books.beancount_lines()))

    entries, errors, _ = loader.load_file(str(path))

    assert errors == []
    kinds = [type(entry).__name__ for entry in entries]
    assert kinds.count("Transaction") == JournalEntry.objects.count()
    assert kinds.count("Balance") >= 5
    text = path.read_text()
    broken = tmp_path / "broken.beancount"
    broken.write_text(
        text.replace("balance Assets:Cash:Pending:USD 193.600000", "balance Assets:Cash:Pending:USD 193.600001")
    )
    assert broken.read_text() != text and loader.load_file(str(broken))[1] != []


def test_kept_balances_are_checked_in_turns_and_a_wrong_one_is_named(db: Any, caplog: Any) -> None:
    post(1, 7)
    post(2, 5)
    accounts = sorted(books.Account.objects.values_list("pk", flat=True))
    (last,) = ledger.Posting.objects.filter(account=accounts[1]).order_by("-pk")[:1]
    BalanceSnapshot.objects.create(account_id=accounts[0], up_to=last.pk, balance_micros=12)
    BalanceSnapshot.objects.create(account_id=accounts[1], up_to=last.pk, balance_micros=-11)

    looks = [check_balances(accounts=1) for _ in range(4)]

    assert [(one.n_checked, one.n_wrong) for one in looks] == [(1, 0), (1, 1), (0, 0), (1, 0)]
    assert "-11 is kept, the postings sum to -12" in looks[1].findings[0]
    assert "-11 is kept" in caplog.text
    assert BalanceCheck.objects.count() == 4
