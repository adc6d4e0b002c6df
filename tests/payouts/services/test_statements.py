import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import License
from marketplace.money import Money
from payouts import ledger
from payouts.models import JournalEntry, Payment, PayoutRun
from payouts.services import transfers
from payouts.services.royalties import release_pool
from payouts.services.statements import COLUMNS, CurrencyStatement, statement, statement_csv
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell


@pytest.fixture
def two_months(db: Any, alice: Any, bob: Any, carol: Any) -> tuple[datetime, datetime]:
    """A sale in one month; in the next its pool is released and a payout is promised."""
    clock.advance(datetime(2028, 3, 10, tzinfo=UTC) - clock.now())
    dan = PartyFactory()
    version = PublishedVersionFactory(contributions={alice: 2, bob: 1}, labellers={dan: 3}, dataset__title="=SUM(A1)")
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version, labellers_bps=1_000)])
    payment = sell(order)
    march = clock.now()
    clock.advance(timedelta(days=35))
    pool = order.lines.get().pool
    license = License.objects.get()
    release_pool(
        pool=pool, result=PublishedResultFactory(license=license, shares={alice: 2, bob: 5}, labellers={dan: 1})
    )
    Payment.objects.filter(pk=payment.pk).update(settled_at=clock.now())
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": 96_800_000, "cash:pending:USD": -96_800_000},
    )
    payee = PayeeAccountFactory(party=alice)
    run = PayoutRun.objects.create(
        key="april", currency="USD", due_until=clock.now(), status="running", lease_expires_at=clock.now(), attempt=1
    )
    transfers._intend(run, [payee.party_id])
    return march, clock.now()


def month(party: Any, at: datetime) -> CurrencyStatement:
    (only,) = statement(party=party, year=at.year, month=at.month).currencies
    assert only.recomputes
    return only


def test_a_statement_opens_where_the_last_one_closed_and_recomputes(two_months: Any, alice: Any) -> None:
    march, april = (month(alice, at) for at in two_months)

    assert (march.opening, march.earned, march.paid_out) == (Money(0, "USD"), Money(18_000_000, "USD"), Money(0, "USD"))
    assert march.closing == april.opening == Money(18_000_000, "USD")
    assert [payout.amount for payout in april.payouts] == [Money(18_000_000, "USD")]
    assert april.closing == april.earned
    assert ledger.balances(prefix=f"payable:{alice.pk}") == {f"payable:{alice.pk}:USD": -april.closing.micros}


def test_every_line_recomputes_from_its_own_figures(two_months: Any, alice: Any, bob: Any) -> None:
    lines = [line for party in (alice, bob) for at in two_months for line in month(party, at).lines]

    assert len(lines) >= 4
    for line in lines:
        exact = line.pot.micros * line.weight / line.weight_total
        assert abs(line.amount.micros - exact) < 1
        assert (line.model == "") == (line.share_low is None)
    pool = next(line for line in month(bob, two_months[1]).lines if line.role == "rights_holder")
    assert (pool.divided, pool.pot) == (Money(60_000_000, "USD"), Money(54_000_000, "USD"))
    assert pool.share_low is not None and pool.share_high is not None
    assert pool.share_low < pool.share < pool.share_high


def test_a_stranger_has_an_empty_statement(two_months: Any, mallory: Any) -> None:
    assert statement(party=mallory, year=2028, month=3).currencies == []


def test_the_csv_adds_up_and_no_cell_acts_as_a_formula(two_months: Any, alice: Any) -> None:
    at = two_months[1]
    text = "".join(statement_csv(party=alice, year=at.year, month=at.month))

    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == COLUMNS
    micros = {
        name: sum(int(float(row[name] or 0) * 1_000_000 + 0.5) for row in rows) for name in ("earned", "paid_out")
    }
    opening, closing = (int(float(rows[n]["balance"]) * 1_000_000 + 0.5) for n in (0, -1))
    assert opening + micros["earned"] - micros["paid_out"] == closing
    assert {row["dataset"] for row in rows} == {"", "'=SUM(A1)"}
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


@pytest.mark.parametrize(("year", "number"), [(2028, 0), (2028, 13), (1999, 1), (9999, 1)])
def test_there_is_no_such_month(db: Any, alice: Any, year: int, number: int) -> None:
    with pytest.raises(InvalidInput, match="is no month"):
        statement(party=alice, year=year, month=number)
