import csv
import gzip
import io
import tracemalloc
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core import mail
from django.core.files import File
from django.core.files.storage import default_storage
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection, transaction
from django.test import Client

from marketplace import clock
from marketplace.models import License, Membership
from payouts import ledger
from payouts.models import (
    ClosedPeriod,
    DivisionLine,
    IssuedStatement,
    JournalEntry,
    StatementNotice,
    StatementRun,
    StatementTotal,
)
from payouts.services import issuing, statements
from payouts.services.closing import close_period
from payouts.services.proofs import check_books
from payouts.services.royalties import release_pool
from payouts.services.statement_proofs import verify_statement
from payouts.tasks import issue_statements, send_statement_notice
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import sell
from tests.pages import assert_page, signed_in

MARCH, APRIL = date(2028, 3, 1), date(2028, 4, 1)


def closed(month: date) -> StatementRun:
    period = close_period(starts_on=month, by=None, note="A test's")
    return StatementRun.objects.get(period=period)


@pytest.fixture
def issued(db: Any, alice: Any, bob: Any, carol: Any) -> list[IssuedStatement]:
    """A sale in March, its pool released by a result in April; both months are closed and alice's two statements issued."""
    clock.advance(datetime(2028, 3, 10, 12, tzinfo=UTC) - clock.now())
    dan = PartyFactory()
    version = PublishedVersionFactory(contributions={alice: 2, bob: 1}, labellers={dan: 3}, dataset__title="=SUM(A1)")
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version, labellers_bps=1_000)])
    sell(order)
    clock.advance(timedelta(days=35))
    result = PublishedResultFactory(license=License.objects.get(), shares={alice: 2, bob: 5}, labellers={dan: 1})
    release_pool(pool=order.lines.get().pool, result=result)
    clock.advance(timedelta(days=30))
    for month in (MARCH, APRIL):
        issue_statements(closed(month).pk)
    return list(IssuedStatement.objects.filter(party=alice).order_by("sequence"))


def test_a_closed_month_is_issued_once_numbered_and_opens_where_the_last_one_closed(
    issued: list[IssuedStatement], alice: Any
) -> None:
    march, april = issued
    issuing.issue_statement(party=alice, period=april.period)  # again: it finds the first one's

    assert [one.number for one in issued] == [f"RS-{alice.pk}-0001", f"RS-{alice.pk}-0002"]
    of_march, of_april = march.balances.get(), april.balances.get()
    assert (of_march.opening_micros, of_march.earned_micros) == (0, 18_000_000)
    assert of_april.opening_micros == of_march.closing_micros
    assert of_april.closing_micros == -ledger.balance(f"payable:{alice.pk}:USD")
    (total,) = april.totals.all()
    assert (total.dataset, total.source, total.n_lines) == ("=SUM(A1)", "royalty pool of a sale", 1)
    assert IssuedStatement.objects.count() == IssuedStatement.objects.values("party", "period").distinct().count()


def test_a_statement_recomputes_and_so_does_its_download(issued: list[IssuedStatement], tmp_path: Path) -> None:
    for statement in issued:
        assert verify_statement(statement).mismatch is None
    path = tmp_path / "s.csv"
    path.write_text("".join(issuing.stored_csv(issued[1])), encoding="utf-8", newline="")
    out = StringIO()
    for named in (issued[1].number, str(path)):
        call_command("verify_statement", named, stdout=out)

    assert out.getvalue().count(f"{issued[1].number}: all 3 rows recompute") == 2


@pytest.mark.as_owner
def test_a_line_that_was_tampered_with_in_the_database_is_named(issued: list[IssuedStatement], alice: Any) -> None:
    """Somebody with the owner's rights gives alice a micro more, in the line and in the issued statement."""
    april = issued[1]
    line = DivisionLine.objects.get(party=alice, division__source="pool")
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_divisionline DISABLE TRIGGER append_only")
        cursor.execute("UPDATE payouts_divisionline SET amount_micros = amount_micros + 1 WHERE id = %s", [line.pk])
        cursor.execute("ALTER TABLE payouts_divisionline ENABLE ALWAYS TRIGGER append_only")
    clone = reissued(april)

    verified = verify_statement(clone)

    assert verified.mismatch is not None
    assert (verified.mismatch.line, verified.mismatch.column) == (2, "earned")
    out = StringIO()
    with pytest.raises(SystemExit) as ended:
        call_command("verify_statement", clone.number, stdout=out)
    assert ended.value.code == 1 and "DIFFERS: line 2, earned:" in out.getvalue()


def reissued(statement: IssuedStatement) -> IssuedStatement:
    """The statement over the file that the stored lines give now, as only the owner of the tables could make it."""
    starts_at, ends_at = statements.month_bounds(2028, 4)
    rows = statements.statement_rows(
        party=statement.party, starts_at=starts_at, ends_at=ends_at, number=statement.number
    )
    text = "".join(statements.csv_lines(rows)).encode()
    digest = sha256(text).hexdigest()
    default_storage.save(issuing._file_name(digest), File(io.BytesIO(gzip.compress(text))))
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_issuedstatement DISABLE TRIGGER append_only")
        cursor.execute("UPDATE payouts_issuedstatement SET csv_sha256 = %s WHERE id = %s", [digest, statement.pk])
        cursor.execute("ALTER TABLE payouts_issuedstatement ENABLE ALWAYS TRIGGER append_only")
    return IssuedStatement.objects.get(pk=statement.pk)


@pytest.mark.parametrize("column", ["earned", "weight", "dataset", "balance"])
def test_a_changed_download_is_named_by_line_and_column(
    issued: list[IssuedStatement], tmp_path: Path, column: str
) -> None:
    rows = list(csv.DictReader(io.StringIO("".join(issuing.stored_csv(issued[1])))))
    number = 1 if column != "balance" else 2
    rows[number][column] = "999"
    path = tmp_path / "s.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, statements.COLUMNS, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
    out = StringIO()

    with pytest.raises(SystemExit) as ended:
        call_command("verify_statement", str(path), stdout=out)

    assert ended.value.code == 1
    assert f"DIFFERS: line {number + 1}, {column}: 999 is stated" in out.getvalue()


def test_a_download_with_a_line_left_out_or_of_something_else_is_refused(
    issued: list[IssuedStatement], tmp_path: Path
) -> None:
    lines = list(issuing.stored_csv(issued[1]))
    path = tmp_path / "s.csv"
    path.write_text("".join(lines[:-1]), newline="")
    out = StringIO()
    with pytest.raises(SystemExit):
        call_command("verify_statement", str(path), stdout=out)
    assert "line 3, the whole line: nothing is stated" in out.getvalue()

    path.write_text("a,b\n1,2\n")
    with pytest.raises(CommandError, match="no issued statement"):
        call_command("verify_statement", str(path))
    with pytest.raises(CommandError, match="There is no statement RS-0-0001"):
        call_command("verify_statement", "RS-0-0001")


CHANGES = [
    "UPDATE payouts_issuedstatement SET csv_sha256 = 'x'",
    "DELETE FROM payouts_issuedstatement",
    "UPDATE payouts_statementbalance SET earned_micros = earned_micros + 1, closing_micros = closing_micros + 1",
    "DELETE FROM payouts_statementtotal",
    "TRUNCATE payouts_statementtotal",
]


@pytest.mark.as_owner
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_issued_is_refused_any_change(issued: list[IssuedStatement], change: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(change)


@pytest.mark.as_owner
def test_nothing_joins_a_statement_after_it_was_issued(issued: list[IssuedStatement]) -> None:
    with connection.cursor() as cursor:  # as if an earlier transaction had issued it
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_issuedstatement DISABLE TRIGGER append_only")
        cursor.execute("UPDATE payouts_issuedstatement SET txid = '3'")
        cursor.execute("ALTER TABLE payouts_issuedstatement ENABLE ALWAYS TRIGGER append_only")
    with pytest.raises(DatabaseError, match="written before"), transaction.atomic():
        StatementTotal.objects.create(
            statement=issued[0],
            currency="USD",
            source="x",
            dataset="x",
            version=1,
            role="x",
            n_lines=1,
            amount_micros=1,
        )


def test_owners_are_mailed_once_in_words_and_html(issued: list[IssuedStatement], alice: Any) -> None:
    assert not StatementNotice.objects.exclude(statement__party__members__isnull=False).exists()
    notice = StatementNotice.objects.get(statement=issued[1])
    send_statement_notice(notice.pk)
    send_statement_notice(notice.pk)  # as a redelivered task would

    (sent,) = mail.outbox
    assert (sent.to, sent.subject) == ([alice.user.email], f"Statement {issued[1].number} for April 2028")
    assert f"/statements/{issued[1].number}/" in sent.body and "closing $" in sent.body
    assert f"/statements/{issued[1].number}/" in str(sent.alternatives[0][0])


def test_a_later_month_waits_for_the_earlier_ones_statements(db: Any, alice: Any, carol: Any) -> None:
    clock.advance(datetime(2028, 3, 10, 12, tzinfo=UTC) - clock.now())
    for _ in range(2):
        version = PublishedVersionFactory(contributions={alice: 1})
        sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
        clock.advance(timedelta(days=30))
    clock.advance(timedelta(days=10))
    march, april = closed(MARCH), closed(APRIL)

    issue_statements(april.pk)
    april.refresh_from_db()
    assert (april.status, IssuedStatement.objects.count()) == ("queued", 0)
    issue_statements(march.pk)
    StatementRun.objects.filter(pk=april.pk).update(due_at=april.queued_at)
    issue_statements(april.pk)

    assert [one.month for one in IssuedStatement.objects.order_by("sequence")] == ["2028-03", "2028-04"]


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    db: Any, alice: Any, bob: Any, carol: Any, monkeypatch: Any
) -> None:
    clock.advance(datetime(2028, 3, 10, 12, tzinfo=UTC) - clock.now())
    sell(
        OrderFactory(
            buyer=carol, offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 1, bob: 1}))]
        )
    )
    clock.advance(timedelta(days=30))
    run = closed(MARCH)
    real, seen = issuing.issue_statement, []

    def dies(*, party: Any, period: ClosedPeriod) -> IssuedStatement:
        seen.append(party)
        if len(seen) == 2:
            raise RuntimeError("killed")
        return real(party=party, period=period)

    monkeypatch.setattr(issuing, "issue_statement", dies)
    with pytest.raises(RuntimeError):
        issue_statements(run.pk)
    StatementRun.objects.update(due_at=run.queued_at)
    issue_statements(run.pk)

    assert [party.pk for party in seen] == [alice.pk, bob.pk, bob.pk]
    assert sorted(IssuedStatement.objects.values_list("party", "sequence")) == [(alice.pk, 1), (bob.pk, 1)]


def test_pages_csv_and_pdf_are_the_partys_alone(issued: list[IssuedStatement], alice: Any, mallory: Any) -> None:
    page = f"/statements/{issued[1].number}/"
    browser = signed_in(alice)

    text = assert_page(browser.get(page))
    assert issued[1].number in text and "It does not change any more" in text and "=SUM(A1), version 1" in text
    assert "14 Apr 2028 , as rights holder of 1 record" in text and "2028-04-14" not in text
    assert "$54.00 28.5714 % $15.428571 28.57 % 27.57 % to 29.57 %" in text
    assert browser.get("/earnings/2028-04/").url == page  # the month's own address leads to what was issued
    pdf = browser.get(f"{page[:-1]}.pdf")
    assert pdf.content.startswith(b"%PDF-") and pdf.headers["Content-Type"] == "application/pdf"
    downloaded = browser.get(f"{page[:-1]}.csv").getvalue()
    assert downloaded.decode() == "".join(issuing.stored_csv(issued[1]))
    for of in (page, f"{page[:-1]}.csv", f"{page[:-1]}.pdf"):
        assert signed_in(mallory).get(of).status_code == 404
        assert Client().get(of).status_code in (302, 404)


def test_the_api_gives_the_same_and_only_to_the_party(issued: list[IssuedStatement], alice: Any, mallory: Any) -> None:
    from marketplace.api.keys import create_api_key

    def asked(party: Any, path: str) -> Any:
        _, secret = create_api_key(party=party, user=party.user, name="k", scopes=["read"])
        return Client().get(f"/api/v1/issued-statements/{path}", headers={"Authorization": f"Bearer {secret}"})

    listed = asked(alice, "").json()["results"]
    assert [one["number"] for one in listed] == [issued[1].number, issued[0].number]
    detail = asked(alice, f"{issued[1].number}/").json()
    assert detail["csv_sha256"] == issued[1].csv_sha256 and detail["totals"][0]["dataset"] == "=SUM(A1)"
    assert asked(alice, f"{issued[1].number}/csv/").getvalue().startswith(b"statement,line,date")
    for path in (f"{issued[1].number}/", f"{issued[1].number}/csv/", f"{issued[1].number}/pdf/"):
        assert asked(mallory, path).status_code == 404


def test_memory_does_not_grow_with_the_lines(issued: list[IssuedStatement], alice: Any) -> None:
    """Twenty thousand lines stream in less memory than they would hold."""
    line = DivisionLine.objects.filter(party=alice).select_related("division__version__dataset").first()
    assert line is not None

    gross = statements.gross_of([line.division])[line.division_id]

    def many(*_: Any) -> Any:
        for _number in range(20_000):
            yield statements.line_of(
                line.division,
                role=line.role,
                n_records=1,
                weight=1,
                amount_micros=1,
                due_at=line.due_at,
                measured={},
                gross=gross,
            )

    starts_at, ends_at = statements.month_bounds(2028, 4)
    tracemalloc.start()
    rows = statements.statement_rows(party=alice, starts_at=starts_at, ends_at=ends_at, lines=many)
    size = sum(len(text) for text in statements.csv_lines(rows))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert size > 3_000_000
    assert peak < 1_000_000


def test_membership_is_what_makes_a_notice(issued: list[IssuedStatement]) -> None:
    """A contributor whom nobody has claimed has a statement, and nobody to write to."""
    owned = set(Membership.objects.values_list("party", flat=True))
    noticed = set(StatementNotice.objects.values_list("statement__party", flat=True))

    assert noticed == set(IssuedStatement.objects.filter(party__in=owned).values_list("party", flat=True))
    assert JournalEntry.objects.exists()


@pytest.mark.as_owner
def test_a_statement_opens_by_the_last_one_and_not_by_summing_up_a_life_again(
    issued: list[IssuedStatement], alice: Any
) -> None:
    before = statements._payable(alice, before=clock.now())
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE; ALTER TABLE payouts_posting DISABLE TRIGGER USER")
        cursor.execute(
            "DELETE FROM payouts_posting WHERE id <= %s AND account_id IN (SELECT id FROM payouts_account WHERE party_id = %s)",
            [issued[1].period.postings_after, alice.pk],
        )
        assert cursor.rowcount == 2
    assert statements._payable(alice, before=clock.now()) == before
    assert statements._payable(alice, before=issued[0].period.ends_at) == {
        "USD": issued[0].balances.get().closing_micros
    }

    ledger.post(  # what came later counts
        key="later",
        kind=JournalEntry.Kind.SALE,
        postings={f"payable:{alice.pk}:USD": -7, "revenue:platform_fee:USD": 7},
    )
    assert statements._payable(alice, before=clock.now() + timedelta(days=1)) == {"USD": before["USD"] + 7}


@pytest.mark.as_owner
def test_a_statement_that_does_not_say_what_was_booked_is_found(issued: list[IssuedStatement]) -> None:
    assert check_books().findings == []
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE; ALTER TABLE payouts_statementbalance DISABLE TRIGGER USER")
    balance = issued[0].balances.get()
    type(balance).objects.filter(pk=balance.pk).update(
        earned_micros=balance.earned_micros + 1, closing_micros=balance.closing_micros + 1
    )

    found = {str(finding).split(" ")[1] for finding in check_books().findings if finding.code == "statement_differs"}
    assert found == {one.number for one in issued}  # it closes with too much, and the next does not open with that
