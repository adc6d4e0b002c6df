"""`check_ledger` finds what no rule of the database let in: rows planted with the triggers off."""

from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection

from marketplace import clock, jobs
from marketplace.models import License
from payouts import ledger, tasks
from payouts.models import JournalEntry, Payment, PayoutRun
from payouts.services.proofs import CHECKS, check_books
from payouts.services.royalties import release_pool
from payouts.services.transfers import _intend, request_payout_run
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell

TABLES = (
    "payouts_account",
    "payouts_journalentry",
    "payouts_posting",
    "payouts_division",
    "payouts_divisionline",
    "payouts_payeecount",
    "payouts_payout",
    "payouts_payment",
    "payouts_royaltypool",
    "payouts_payment",
    "payouts_document",
)


def sql(statement: str, *args: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, args)  # with arguments, even none, a % is written twice


@pytest.fixture
def books(db: Any, alice: Any, bob: Any, carol: Any) -> Iterator[None]:
    """One of everything: a sale, an unreleased and a released pool, an intended payout; then no rule holds any more."""
    version = PublishedVersionFactory(contributions={alice: 2, bob: 1})
    offers = [OfferFactory(version=version), OfferFactory()]
    payment = sell(OrderFactory(buyer=carol, offers=offers))
    license = License.objects.get(version=version)
    release_pool(
        pool=license.order_line.pool, result=PublishedResultFactory(license=license, shares={alice: 1, bob: 4})
    )
    Payment.objects.filter(pk=payment.pk).update(settled_at=clock.now())
    net = payment.amount_micros - (payment.fee_micros or 0)
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={"cash:available:USD": net, "cash:pending:USD": -net},
    )
    payee = PayeeAccountFactory(party=alice)
    clock.advance(timedelta(days=40))
    held = jobs.claim(PayoutRun, request_payout_run(currency="USD", key="run").pk)
    assert held is not None
    _intend(held, [payee.party_id])
    assert check_books().findings == []
    sql("SET CONSTRAINTS ALL IMMEDIATE")
    for table in TABLES:
        sql(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    yield
    sql("SET CONSTRAINTS ALL IMMEDIATE")


def codes() -> set[str]:
    return {finding.code for finding in check_books().findings}


PLANTED = {
    "a leg made larger": (
        "UPDATE payouts_posting SET amount_micros = amount_micros + 1 WHERE id = (SELECT min(p.id) FROM payouts_posting p"
        " JOIN payouts_account a ON a.id = p.account_id WHERE a.code LIKE 'payable:%%')",
        {"entry_unbalanced", "division_differs_from_entries", "payable_differs", "liability_overdrawn"},
    ),
    "a leg taken away": (
        "DELETE FROM payouts_posting WHERE id = (SELECT max(id) FROM payouts_posting)",
        {"entry_unbalanced", "entry_incomplete", "in_transit_differs"},
    ),
    "two legs moved to another currency": (
        "UPDATE payouts_account SET currency = 'EUR' WHERE code = 'cash:pending:USD'",
        {"entry_mixes_currencies", "account_misdescribed"},
    ),
    "an account of no chart": (
        "INSERT INTO payouts_account (code, kind, currency, created_at) VALUES ('petty:USD', 'asset', 'USD', now())",
        {"unknown_account"},
    ),
    "money moved from one payee to another": (
        "WITH two AS (SELECT min(id) AS a, max(id) AS b FROM payouts_divisionline WHERE division_id ="
        " (SELECT max(division_id) FROM payouts_divisionline))"
        " UPDATE payouts_divisionline SET amount_micros = amount_micros + CASE id WHEN a THEN 1 ELSE -1 END"
        " FROM two WHERE id IN (a, b)",
        {"division_differs_from_entries", "line_does_not_recompute", "payable_differs"},
    ),
    "a line's weight": (
        "UPDATE payouts_divisionline SET weight = weight + 1 WHERE id = (SELECT min(id) FROM payouts_divisionline)",
        {"line_does_not_recompute"},
    ),
    "a line taken away": (
        "DELETE FROM payouts_divisionline WHERE id = (SELECT min(id) FROM payouts_divisionline)",
        {
            "division_differs_from_lines",
            "division_differs_from_entries",
            "line_does_not_recompute",
            "payable_differs",
        },
    ),
    "a payee's count of records": (
        "UPDATE payouts_payeecount SET n_records = n_records + 1 WHERE id = (SELECT min(c.id) FROM payouts_payeecount c"
        " JOIN payouts_division d ON d.version_id = c.version_id WHERE d.result_id IS NULL AND c.role = 'rights_holder')",
        {"count_differs", "line_does_not_recompute"},
    ),
    "a leg of no account": (
        "UPDATE payouts_posting SET account_id = 0 WHERE id = (SELECT min(p.id) FROM payouts_posting p"
        " JOIN payouts_account a ON a.id = p.account_id WHERE a.code = 'revenue:platform_fee:USD')",
        {"posting_of_nothing"},
    ),
    "a pool without its money": (
        "UPDATE payouts_royaltypool SET amount_micros = amount_micros + 1 WHERE released_at IS NULL",
        {"pool_differs"},
    ),
    "a pool said to be released": (
        "UPDATE payouts_royaltypool SET released_at = now() WHERE released_at IS NULL",
        {"pool_half_released"},
    ),
    "a payment's fee": ("UPDATE payouts_payment SET fee_micros = 1", {"payment_differs", "settlement_differs"}),
    "a payment said not to be settled": ("UPDATE payouts_payment SET settled_at = NULL", {"settlement_differs"}),
    "an order behind a payment": (
        "UPDATE marketplace_order SET status = 'placed', paid_at = NULL WHERE id = (SELECT order_id FROM payouts_payment)",
        {"paid_thing_differs"},
    ),
    "a word of an invoice": ("UPDATE payouts_document SET content = '{}'", {"document_changed"}),
    "a number left out": ("UPDATE payouts_document SET number = 7", {"document_numbers_differ"}),
    "an invoice of another amount": ("UPDATE payouts_document SET net_micros = net_micros + 1", {"document_differs"}),
    "a payout said to be sent": (
        "UPDATE payouts_payout SET status = 'sent', transfer_id = 'tr_1'",
        {"payout_stage_differs", "in_transit_differs"},
    ),
    "a payout made larger": (
        "UPDATE payouts_payout SET amount_micros = amount_micros + 1",
        {"payout_differs", "in_transit_differs", "payable_differs"},
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_corruption_is_found_and_named(books: None, planted: str) -> None:
    statement, expected = PLANTED[planted]

    sql(statement)

    assert codes() == expected


def test_a_payable_below_nothing_and_negative_cash_are_found(books: None, bob: Any) -> None:
    owed = -ledger.balance(f"payable:{bob.pk}:USD")
    ledger.post(
        key="planted",
        kind=JournalEntry.Kind.RELEASE,
        postings={f"payable:{bob.pk}:USD": owed + 1, "cash:pending:USD": -owed - 1},
    )

    assert codes() == {"liability_overdrawn", "cash_negative", "payable_differs"}


def test_money_left_in_clearing_is_found(books: None) -> None:
    ledger.post(
        key="planted",
        kind=JournalEntry.Kind.UPFRONT,
        postings={"clearing:upfront:999:USD": -5, "revenue:platform_fee:USD": 5},
    )

    assert codes() == {"clearing_not_empty"}


def test_a_reversal_that_undoes_something_else_is_found(books: None) -> None:
    sale = JournalEntry.objects.get(kind=JournalEntry.Kind.SALE)
    ledger.post(
        key="planted",
        kind=JournalEntry.Kind.REVERSAL,
        postings={"expense:stripe_fees:USD": -5, "revenue:platform_fee:USD": 5},
        reverses=sale,
    )

    assert codes() == {"reversal_differs"}


def test_the_command_counts_what_it_checked_and_exits_1_on_a_finding(books: None) -> None:
    out = StringIO()
    call_command("check_ledger", stdout=out)
    n_entries = JournalEntry.objects.count()
    assert out.getvalue().startswith(f"{n_entries} entries, ")
    assert out.getvalue().strip().endswith(" checked, 0 findings")

    sql("UPDATE payouts_payment SET fee_micros = 1")
    with pytest.raises(SystemExit) as ended:
        call_command("check_ledger", stdout=out)

    assert ended.value.code == 1
    assert "FINDING payment_differs: payment" in out.getvalue()


def test_every_check_runs_alone_on_empty_books(db: Any) -> None:
    assert [finding for check in CHECKS for finding in check({})] == []
    assert tasks.divide_what_is_ready() is None
