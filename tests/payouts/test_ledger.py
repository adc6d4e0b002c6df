from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from marketplace import clock
from payouts import chart, ledger
from payouts.models import Account, JournalEntry, Posting

SALE, RELEASE = JournalEntry.Kind.SALE, JournalEntry.Kind.RELEASE
POSTINGS = {"cash:pending:USD": 9_000_000, "expense:stripe_fees:USD": 1_000_000, "pool:7:USD": -10_000_000}


def check_entries() -> None:
    """What a commit would check."""
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("SET CONSTRAINTS ALL DEFERRED")


def test_post_writes_one_balanced_entry_exactly_once(db: Any) -> None:
    first = ledger.post(key="sale:1", kind=SALE, postings=POSTINGS)
    again = ledger.post(key="sale:1", kind=SALE, postings=POSTINGS)

    check_entries()
    assert first == again
    assert ledger.balances() == POSTINGS
    assert ledger.postings_of(first) == POSTINGS
    assert list(first.postings.order_by("leg").values_list("leg", flat=True)) == [0, 1, 2]


def test_post_refuses_a_used_key_with_other_contents(db: Any) -> None:
    ledger.post(key="sale:1", kind=SALE, postings=POSTINGS)

    with pytest.raises(ledger.EntryKeyReused):
        ledger.post(key="sale:1", kind=SALE, postings={"cash:pending:USD": 1, "pool:7:USD": -1})
    with pytest.raises(ledger.EntryKeyReused):
        ledger.post(key="sale:1", kind=RELEASE, postings=POSTINGS)

    assert ledger.balances() == POSTINGS


@pytest.mark.parametrize(
    "postings",
    [
        {},
        {"pool:7:USD": 0, "cash:pending:USD": 0},
        {"pool:7:USD": 1, "cash:pending:USD": -2},
        {"pool:7:USD": 1, "cash:pending:EUR": -1},
        {"pool:7:USD": 1, "petty:cash:USD": -1},
        {"pool:07:USD": 1, "cash:pending:USD": -1},
        {"pool:7:XXX": 1, "cash:pending:XXX": -1},
        {f"pool:{number}:USD": 1 if number % 2 else -1 for number in range(1_002)},
    ],
    ids=["empty", "zeros", "unbalanced", "two currencies", "unknown", "padded id", "no currency", "too many legs"],
)
def test_post_refuses_what_is_no_entry_and_writes_nothing(db: Any, postings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"legs in|no account of the chart"):
        ledger.post(key="bad", kind=SALE, postings=postings)

    assert (JournalEntry.objects.count(), Posting.objects.count(), Account.objects.count()) == (0, 0, 0)


def test_a_thousand_legs_fit_and_zero_amounts_are_left_out(db: Any, alice: Any) -> None:
    postings = {f"pool:{number}:USD": 1 if number % 2 else -1 for number in range(1_000)}

    entry = ledger.post(key="wide", kind=RELEASE, postings=postings | {chart.payable(alice, "USD"): 0})

    check_entries()
    assert entry.n_legs == 1_000
    assert ledger.balance(chart.payable(alice, "USD")) == 0


def test_reverse_books_back_once(db: Any) -> None:
    entry = ledger.post(key="sale:1", kind=SALE, postings=POSTINGS)

    back = ledger.reverse(entry, key="sale:1:reversed")
    assert ledger.reverse(entry, key="sale:1:reversed") == back

    check_entries()
    assert ledger.balances() == {}
    assert back.reverses == entry
    assert JournalEntry.objects.count() == 2


def test_balances_read_by_prefix_and_by_time(db: Any, alice: Any) -> None:
    now = clock.now()
    ledger.post(key="old", kind=SALE, postings=POSTINGS, booked_at=now - timedelta(days=9))
    ledger.post(key="new", kind=RELEASE, postings={"pool:7:USD": 10_000_000, chart.payable(alice, "USD"): -10_000_000})

    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -10_000_000}
    assert ledger.balances(prefix="pool") == {}
    assert ledger.balance("pool:7:USD", before=now - timedelta(days=1)) == -10_000_000
    assert Account.objects.get(code=chart.payable(alice, "USD")).party == alice
    with pytest.raises(ValueError, match="no account"):
        ledger.balance("payable:alice:USD")


@given(dues=st.dictionaries(st.integers(1, 99), st.integers(1, 9)), size=st.integers(1, 7))
def test_batches_cut_everything_once_and_in_order(dues: dict[int, int], size: int) -> None:
    cut = list(ledger.batches(dues, size=size))

    assert [who for batch in cut for who in batch] == sorted(dues)
    assert {who: due for batch in cut for who, due in batch.items()} == dues
    assert all(len(batch) == size for batch in cut[:-1])
