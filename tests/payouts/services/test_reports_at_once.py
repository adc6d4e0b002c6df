"""Reports and corrections of one licensee's at the same moment."""

from datetime import date, timedelta
from typing import Any

from marketplace import clock
from payouts.errors import ReportNotCorrectable
from payouts.models import Document, RoyaltyInvoice, RoyaltyReport
from payouts.services.proofs import check_books
from tests.factories.marketplace import PartyFactory
from tests.marketplace.services.test_orders import at_once
from tests.payouts.services.test_report_corrections import correct, measured, report, usd


def november() -> None:
    """The period of these tests is over, whatever the day."""
    if clock.today() < date(2026, 11, 2):
        clock.advance(timedelta(days=(date(2026, 11, 2) - clock.today()).days))


def test_two_corrections_at_once_of_one_report_are_one(committed_db: str) -> None:
    november()
    first = report(measured(PartyFactory(), PartyFactory()))

    def ask(n: int) -> Any:
        try:
            return correct(RoyaltyInvoice.objects.get(pk=first.pk), f"{1200 + n}", key=f"key {n}").pk
        except ReportNotCorrectable as error:
            return error.code

    answers = at_once(3, ask)

    assert sorted(map(str, answers))[1:] == ["report_not_correctable"] * 2
    assert RoyaltyReport.objects.filter(replaces=first.report).count() == 1
    assert list(Document.objects.order_by("pk").values_list("kind", flat=True)) == ["INV", "CN", "INV"]
    assert check_books().findings == []


def test_reports_at_once_of_a_licensees_models_carry_each_small_invoice_once(committed_db: str) -> None:
    november()
    carol, alice = PartyFactory(), PartyFactory()
    models = [measured(carol, alice) for _ in range(4)]

    at_once(4, lambda n: report(models[n], "3", key=f"{n}").pk)  # 30 cents each: two pairs of 60

    invoices = RoyaltyInvoice.objects.order_by("pk")
    assert sorted(invoices.values_list("status", flat=True)) == ["carried", "carried", "open", "open"]
    assert [one.demand for one in invoices.filter(status="open")] == [usd("0.60")] * 2
    assert check_books().findings == []
