"""What a statement's line says besides its amount: what the buyer paid, the platform's fee, the pool, and what was measured."""

import csv
import gzip
import io
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.files import File
from django.core.files.storage import default_storage
from django.core.management import call_command
from django.db import connection

from attribution.models import Share
from marketplace import clock, jobs
from marketplace.errors import InvalidInput
from marketplace.models import License, User
from marketplace.money import Money
from payouts.models import IssuedStatement, Payment, Refund
from payouts.services import issuing, refunds, royalties, sales, statements
from payouts.services.closing import close_period
from payouts.services.events import book_checkout
from payouts.services.report_corrections import correct_report
from payouts.services.royalties import release_pool
from payouts.services.statement_proofs import verify_statement
from payouts.services.statements import StatementLine, statement
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import collect, sell
from tests.pages import assert_page, signed_in
from tests.payouts.conftest import as_owner


def usd(amount: str) -> Money:
    return Money.parse(amount, "USD")


@pytest.fixture
def april(db: Any, alice: Any, bob: Any, carol: Any) -> dict[str, Any]:
    """Carol buys alice's and bob's data for $100, and other data; a result of her model releases the pool and divides a royalty.

    Three fifths of the model are due to the first version, where alice did two thirds; March's revenue of $1,000 owes it 5 %.
    """
    clock.advance(datetime(2028, 3, 10, tzinfo=UTC) - clock.now())
    version = PublishedVersionFactory(contributions={alice: 1, bob: 3})
    other = PublishedVersionFactory(contributions={bob: 3})
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version, royalty_bps=500, labellers_bps=0)])
    sell(order)
    licenses = [
        License.objects.get(order_line__order=order),
        LicenseFactory(licensee=carol, offer=OfferFactory(version=other, royalty_bps=200)),
    ]
    model = ModelFactory(owner=carol, name="Net")
    disclosure = DisclosureFactory(model=model, licenses=licenses)
    result = PublishedResultFactory(
        disclosure=disclosure, version=version, shares={version: {alice: 4, bob: 2}, other: {bob: 4}}
    )
    clock.advance(timedelta(days=25))
    release_pool(pool=order.lines.get().pool, result=result)
    invoice = royalties.report_revenue(
        licensee=carol,
        model=model,
        period_start=date(2028, 3, 1),
        period_end=date(2028, 3, 31),
        revenue=usd("1000"),
        key="march",
    )
    collect(invoice)
    return {"version": version, "result": result, "invoice": invoice, "model": model}


def lines_of(party: Any, month: int) -> dict[str, StatementLine]:
    (of,) = statement(party=party, year=2028, month=month).currencies
    assert of.recomputes
    return {line.division_key.split(":")[0]: line for line in of.lines if line.role == "rights_holder"}


def test_each_line_goes_from_what_the_buyer_paid_to_the_amount(april: dict[str, Any], alice: Any) -> None:
    lines = lines_of(alice, 3) | lines_of(alice, 4)

    assert {
        name: (line.gross.of, line.gross.amount, line.gross.fee, line.gross.pool, line.divided, line.amount)
        for name, line in lines.items()
    } == {
        "upfront": ("price of the license", usd("100"), usd("10"), usd("30"), usd("30"), usd("7.50")),
        "release": ("price of the license", usd("100"), usd("10"), usd("60"), usd("60"), usd("40")),
        "royalty": ("revenue × share × rate", usd("30"), usd("3"), usd("27"), usd("27"), usd("18")),
    }
    for line in lines.values():  # by hand: gross × percentage, pot × weight ÷ total
        assert line.gross.amount.share(line.gross.fee_bps) == line.gross.fee
        assert line.gross.amount.share(line.gross.pool_bps) == line.gross.pool == line.divided == line.pot
        assert abs(line.pot.micros * line.weight - line.amount.micros * line.weight_total) < line.weight_total
    royalty = lines["royalty"].gross
    assert (royalty.revenue, royalty.share_ppq, royalty.rate_bps) == (usd("1000"), 6 * 10**14, 500)
    assert royalty.revenue and royalty.share_ppq and royalty.rate_bps
    assert royalty.revenue.micros * royalty.share_ppq * royalty.rate_bps == royalty.amount.micros * 10**15 * 10_000


def test_an_interval_stands_beside_the_share_that_it_is_of(april: dict[str, Any], alice: Any) -> None:
    """Alice has two thirds of the pot, and two fifths of the whole model, 39 % to 41 %."""
    share = Share.objects.get(result=april["result"], party=alice, partition="rights_holder")

    line = lines_of(alice, 4)["release"]

    assert line.share == pytest.approx(2 / 3)
    assert (
        (line.measured, line.measured_low, line.measured_high)
        == (share.raw, share.low, share.high)
        == (
            0.4,
            pytest.approx(0.39),
            pytest.approx(0.41),
        )
    )
    assert lines_of(alice, 3)["upfront"].measured is None


def test_a_corrected_reports_line_says_that_it_is_a_difference(april: dict[str, Any], alice: Any) -> None:
    invoice = april["invoice"]
    corrected = correct_report(
        licensee=invoice.report.licensee, report=invoice.report, revenue=usd("1500"), note="Late sales.", key="again"
    )
    collect(corrected)

    (of,) = statement(party=alice, year=2028, month=4).currencies
    line = next(line for line in of.lines if line.division_key == f"royalty:line:{corrected.lines.earliest('pk').pk}")

    of_what, amount, fee = line.gross.of, line.gross.amount, line.gross.fee
    assert (of_what, amount, fee) == ("difference to an earlier report", usd("15"), usd("1.50"))
    assert (line.gross.revenue, line.amount) == (usd("1500"), usd("9"))
    assert_proved(alice)


def test_a_cap_and_the_rounding_of_an_invoice_can_be_read(april: dict[str, Any], alice: Any) -> None:
    """$33.33 owe 99.99 and 26.664 cents, together $1.26: either gives up a part of the rest."""
    model, capped = april["model"], april["version"]
    asked = {"licensee": model.owner, "model": model}
    clock.advance(datetime(2028, 4, 20, tzinfo=UTC) - clock.now())
    collect(
        royalties.report_revenue(
            **asked, period_start=date(2028, 4, 1), period_end=date(2028, 4, 3), revenue=usd("33.33"), key="small"
        )
    )
    other = OfferFactory(
        version=PublishedVersionFactory(contributions={alice: 2}), royalty_bps=1_000, royalty_cap_micros=20_000_000
    )
    license = LicenseFactory(licensee=model.owner, offer=other)
    disclosure = DisclosureFactory(model=ModelFactory(owner=model.owner), licenses=[license])
    result = PublishedResultFactory(disclosure=disclosure, version=other.version, shares={alice: 1})
    asked["model"] = result.model
    collect(
        royalties.report_revenue(
            **asked, period_start=date(2028, 4, 1), period_end=date(2028, 4, 3), revenue=usd("500"), key="capped"
        )
    )

    (of,) = statement(party=alice, year=2028, month=4).currencies
    told = {
        (line.version, line.dataset): line.gross
        for line in of.lines
        if line.gross.rate_bps and line.divided < usd("20")
    }

    small, cap = told[1, capped.dataset.title], told[1, other.version.dataset.title]
    assert small.of == "revenue × share × rate" and Money(989_999, "USD") < small.amount < usd("1")
    assert small.fee + small.pool == small.amount
    assert (cap.of, cap.amount, cap.fee) == ("revenue × share × rate, up to the license's cap", usd("20"), usd("2"))
    assert_proved(alice)


def test_what_went_back_before_the_pool_was_divided_can_be_read(db: Any, alice: Any, carol: Any, stripe: Any) -> None:
    """$45 of $100 are refunded out of the pool of $60 (and $4.50 of them by the platform) before it is divided."""
    clock.advance(datetime(2028, 4, 2, tzinfo=UTC) - clock.now())
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=PublishedVersionFactory(contributions={alice: 2}))])
    stripe.pay(sales.start_checkout(order=order, success_url="http://a.test/", cancel_url="http://a.test/"))
    payment = book_checkout(Payment.objects.get().checkout_id)
    assert payment is not None
    staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
    refund = refunds.request_refund(
        payment=payment, amount=usd("45"), reason=Refund.Reason.GOODWILL, note="Late.", user=staff, key="one"
    )
    with jobs.claimed(Refund, refund.pk) as held:
        assert held
        refunds.execute_refund(held)
    release_pool(pool=order.lines.get().pool, result=None)

    line = lines_of(alice, 4)["release"]

    assert (line.gross.fee, line.gross.pool, line.divided) == (usd("10"), usd("60"), usd("19.50"))
    text = assert_page(signed_in(alice).get("/earnings/2028-04/"))
    assert "to divide 60 % $60.00 , of which $19.50 here: the rest had gone back to the buyer" in text
    assert_proved(alice, months=[4])


def assert_proved(party: Any, months: Sequence[int] = (3, 4)) -> None:
    """The months are closed and issued, and what was issued comes out again."""
    clock.advance(datetime(2028, 5, 9, tzinfo=UTC) - clock.now())
    for month in months:
        period = close_period(starts_on=date(2028, month, 1), by=None, note="A test's")
        assert verify_statement(issuing.issue_statement(party=party, period=period)).mismatch is None


# --- issued ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def issued(april: dict[str, Any], alice: Any) -> IssuedStatement:
    clock.advance(datetime(2028, 5, 9, tzinfo=UTC) - clock.now())
    for month in (3, 4):
        period = close_period(starts_on=date(2028, month, 1), by=None, note="A test's")
        found = issuing.issue_statement(party=alice, period=period)
    assert verify_statement(found).mismatch is None
    return found


def replaced(issued: IssuedStatement, text: str, format: int = statements.FORMAT) -> IssuedStatement:
    """The statement over another file, as only the owner of the tables could make it."""
    digest = sha256(text.encode()).hexdigest()
    default_storage.save(issuing._file_name(digest), File(io.BytesIO(gzip.compress(text.encode()))))
    with as_owner(), connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_issuedstatement DISABLE TRIGGER append_only")
        cursor.execute(
            "UPDATE payouts_issuedstatement SET csv_sha256 = %s, format = %s WHERE id = %s", [digest, format, issued.pk]
        )
        cursor.execute("ALTER TABLE payouts_issuedstatement ENABLE ALWAYS TRIGGER append_only")
    return IssuedStatement.objects.get(pk=issued.pk)


def test_the_csv_has_a_column_for_each_step(issued: IssuedStatement) -> None:
    rows = [row for row in csv.DictReader(issuing.stored_csv(issued)) if row["division"].startswith("royalty:")]

    (row,) = [row for row in rows if row["role"] == "rights_holder"]
    names = ("revenue", "model_share", "royalty_percent", "gross_of", "gross", "fee_percent", "platform_fee")
    assert [row[name] for name in names] == ["1000.00", "0.6", "5", "revenue × share × rate", "30.00", "10", "3.00"]
    names = ("pool_percent", "pool", "divided", "pot", "measured_share", "measured_low", "measured_high", "earned")
    assert [row[name] for name in names] == [
        "90", "27.00", "27.00", "27.00", "0.400000", "0.390000", "0.410000", "18.00"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "column",
    [
        "revenue",
        "model_share",
        "royalty_percent",
        "gross_of",
        "gross",
        "fee_percent",
        "platform_fee",
        "pool_percent",
        "pool",
        "divided",
        "measured_share",
        "measured_low",
        "measured_high",
    ],
)
def test_a_figure_that_was_tampered_with_is_named(issued: IssuedStatement, column: str) -> None:
    rows = list(csv.DictReader(issuing.stored_csv(issued)))
    (line,) = [n for n, row in enumerate(rows) if row["division"].startswith("royalty:")]
    rows[line][column] = "0.1"
    out = StringIO()

    clone = replaced(issued, "".join(statements.csv_lines(iter(rows))))
    with pytest.raises(SystemExit):
        call_command("verify_statement", clone.number, stdout=out)

    assert f"DIFFERS: line {line + 1}, {column}: 0.1 is stated" in out.getvalue()


@pytest.mark.parametrize("column", ["gross", "platform_fee", "pool"])
def test_so_is_one_of_a_sale(issued: IssuedStatement, column: str) -> None:
    rows = list(csv.DictReader(issuing.stored_csv(issued)))
    (line,) = [n for n, row in enumerate(rows) if row["division"].startswith("release:")]
    rows[line][column] = "0.1"

    verified = verify_statement(replaced(issued, "".join(statements.csv_lines(iter(rows)))))

    assert verified.mismatch is not None
    assert (verified.mismatch.line, verified.mismatch.column) == (line + 1, column)


def test_page_and_pdf_show_every_step(issued: IssuedStatement, alice: Any, monkeypatch: Any) -> None:
    shown: list[dict[str, Any]] = []
    real: Callable[..., bytes] = issuing.compile_pdf
    monkeypatch.setattr(issuing, "compile_pdf", lambda name, data: shown.append(data) or real(name, data))
    steps = [
        "$1,000.00 revenue × 60.00 % of the model × 5 % = $30.00",
        "platform’s fee of 10 % $3.00",
        "to divide 90 % $27.00",
        "Measured, of the whole model",
        "40.00 % 39.00 % to 41.00 %",
        "66.6667 %",
        "$18.00",
    ]

    text = assert_page(signed_in(alice).get(f"/statements/{issued.number}/"))
    pdf = issuing.statement_pdf(issued)

    assert [step for step in steps if step not in text] == []
    assert pdf.startswith(b"%PDF-")
    (row,) = [row for row in shown[0]["rows"] if row["what"] == statements.SOURCES["royalty"]]
    told = " ".join([*row["how"], row["amount"], row["currency"]])
    assert [
        step for step in ("$1,000.00", "60.00 %", "$30.00", "10 %", "$3.00", "$27.00", "66.6667 %") if step not in told
    ] == []
    assert "40.00 % of the whole model, 95 %: 39.00 % to 41.00 %" in told


def test_an_open_month_shows_the_same(april: dict[str, Any], alice: Any) -> None:
    text = assert_page(signed_in(alice).get("/earnings/2028-04/"))

    assert "$1,000.00 revenue × 60.00 % of the model × 5 % = $30.00" in text
    assert "platform’s fee of 10 % $3.00" in text and "40.00 % 39.00 % to 41.00 %" in text


# --- what was issued before --------------------------------------------------------------------------------------------

FORMAT_1 = (
    "statement,line,date,what,division,dataset,version,model,result,role,records,weight,weight_total,share_low,share_high,"
    "divided,pot,earned,taken_back,paid_out,balance,owing,currency,due"
)


@pytest.fixture
def of_old(issued: IssuedStatement) -> IssuedStatement:
    starts_at, ends_at = statements.month_bounds(2028, 4)
    rows = statements.statement_rows(
        party=issued.party, starts_at=starts_at, ends_at=ends_at, number=issued.number, format=1
    )
    return replaced(issued, "".join(statements.csv_lines(rows, format=1)), format=1)


def test_a_statement_of_the_first_format_still_verifies_and_is_shown(
    of_old: IssuedStatement, alice: Any, tmp_path: Path
) -> None:
    lines = list(issuing.stored_csv(of_old))
    path = tmp_path / "s.csv"
    path.write_text("".join(lines), newline="")
    out = StringIO()
    for named in (of_old.number, str(path)):
        call_command("verify_statement", named, stdout=out)

    assert lines[0].strip() == FORMAT_1
    assert [cells.split(",")[13:15] for cells in lines[2:4]] == [["0.390000", "0.410000"]] * 2
    assert out.getvalue().count("recompute") == 2
    text = assert_page(signed_in(alice).get(f"/statements/{of_old.number}/"))
    assert "39.00 % to 41.00 %" in text and "platform’s fee of" not in text
    assert issuing.statement_pdf(of_old).startswith(b"%PDF-")


def test_a_statement_of_the_first_format_is_checked_as_it_was(of_old: IssuedStatement, tmp_path: Path) -> None:
    text = "".join(issuing.stored_csv(of_old)).replace("0.390000", "0.380000")

    verified = verify_statement(replaced(of_old, text, format=1))

    assert verified.mismatch is not None
    assert (verified.mismatch.column, verified.mismatch.stated) == ("share_low", "0.380000")


def test_a_file_of_another_format_is_not_the_one_that_was_issued(issued: IssuedStatement, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no statement"):
        verify_statement(issued, given=[f"{FORMAT_1}\r\n"])
