"""Revenue reports that were wrong, invoices too small to charge, and refunds that free a period and a cap."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from marketplace import clock, jobs
from marketplace.errors import InvalidInput, KeyReused
from marketplace.models import User
from marketplace.money import Money
from payouts import chart, ledger
from payouts.errors import NotFound, PayByBankTransfer, PeriodOverlaps, ReportNotCorrectable
from payouts.models import Division, Document, Payment, Refund, RoyaltyInvoice, RoyaltyReport
from payouts.services import outgoing, receipts, refunds, royalties
from payouts.services.events import book_checkout
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile
from payouts.services.report_corrections import correct_report
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, PublishedVersionFactory
from tests.factories.payouts import collect

DOLLAR = 1_000_000
OCTOBER = {"period_start": date(2026, 10, 1), "period_end": date(2026, 10, 31)}
SEPTEMBER = {"period_start": date(2026, 9, 1), "period_end": date(2026, 9, 30)}
URLS = {"success_url": "http://a.test/", "cancel_url": "http://a.test/"}


def usd(amount: str) -> Money:
    return Money.parse(amount, "USD")


@pytest.fixture(autouse=True)
def november(db: Any) -> None:
    if clock.today() < date(2026, 11, 2):
        clock.advance(timedelta(days=(date(2026, 11, 2) - clock.today()).days))


def measured(carol: Any, alice: Any, **terms: Any) -> Any:
    """A model of carol's that owes alice a tenth of its revenue."""
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 4}), royalty_bps=1_000, **terms)
    license = LicenseFactory(licensee=carol, offer=offer)
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
    return PublishedResultFactory(version=offer.version, disclosure=disclosure, shares={alice: 1}).model


@pytest.fixture
def model(carol: Any, alice: Any) -> Any:
    return measured(carol, alice)


def report(model: Any, amount: str = "1000", **changes: Any) -> RoyaltyInvoice:
    asked = {"licensee": model.owner, "model": model, "key": "october", "revenue": usd(amount)} | OCTOBER
    return royalties.report_revenue(**asked | changes)  # type: ignore[arg-type]


def correct(invoice: RoyaltyInvoice, revenue: str, *, key: str = "again", **changes: Any) -> RoyaltyInvoice:
    report = invoice.report
    asked = {
        "licensee": report.licensee,
        "report": report,
        "revenue": usd(revenue),
        "note": "Refunds of ours.",
        "key": key,
    }
    return correct_report(**asked | changes)


def finish(refund: Refund) -> None:
    with jobs.claimed(Refund, refund.pk) as held:
        assert held
        refunds.execute_refund(held)


def test_an_unpaid_report_is_replaced_and_its_invoice_credited(model: Any) -> None:
    first = report(model)

    second = correct(first, "1200")

    first.refresh_from_db()
    assert (first.status, second.status, second.total) == ("void", "open", usd("120"))
    assert [(document.reference, document.total) for document in Document.objects.order_by("pk")] == [
        ("INV-2026-000001", usd("100")),
        ("CN-2026-000001", usd("100")),
        ("INV-2026-000002", usd("120")),
    ]
    assert second.report.replaces == first.report
    assert correct(first, "1200") == second  # the same key and correction
    with pytest.raises(KeyReused):
        correct(first, "1300")
    with pytest.raises(ReportNotCorrectable, match="was replaced"):
        correct(first, "1300", key="third")
    collect(second)
    assert check_books().findings == []


def test_more_revenue_than_was_paid_for_is_invoiced_and_divided_by_the_result_of_the_first_report(
    model: Any, alice: Any, bob: Any
) -> None:
    first = report(model)
    collect(first)
    earlier = first.lines.get().result
    PublishedResultFactory(disclosure=earlier.disclosure, version=first.lines.get().version, shares={alice: 1, bob: 1})

    second = correct(first, "1500")
    third = correct(second, "2000", key="more")  # before the second was paid

    second.refresh_from_db()
    assert (second.total, second.status, third.total) == (usd("50"), "void", usd("100"))
    assert third.lines.get().result == earlier
    collect(third)
    assert ledger.balance("revenue:platform_fee:USD") == -20 * DOLLAR  # a tenth of 200.00 in all
    assert {division.result for division in Division.objects.all()} == {earlier}
    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -180 * DOLLAR}
    assert check_books().findings == []


def test_less_revenue_than_a_transfer_paid_for_goes_back_by_transfer(model: Any, alice: Any, stripe: Any) -> None:
    one, two = (User.objects.create_user(f"{n}@example.org", "correct horse", is_staff=True) for n in ("ida", "jo"))
    first = report(model, "20000000")
    with pytest.raises(PayByBankTransfer):
        royalties.start_invoice_checkout(invoice=first, **URLS)
    payment = first.payment
    told = {"payment": payment, "amount": payment.amount, "reference": "IN 1", "received_on": clock.today()}
    receipts.decide_receipt(receipt=receipts.record_receipt(by=one, **told), approved=True, by=two)

    second = correct(first, "6000000")

    refund = Refund.objects.get()
    assert (second.status, refund.amount, refund.reason, refund.method) == (
        "nothing_due",
        usd("1400000"),
        "corrected",
        "bank",
    )
    assert ledger.balance(chart.payable(alice, "USD")) == -540_000 * DOLLAR  # nine tenths of 600,000
    assert check_books().findings == []
    transfer = outgoing.record_refund_sent(refund=refund, reference="OUT 1", sent_on=clock.today(), by=one)
    outgoing.decide_transfer(transfer=transfer, approved=True, by=two)
    assert ledger.balances(prefix="bank") == {"bank:USD": 600_000 * DOLLAR}
    assert Document.objects.get(kind="CN").total == usd("1400000")
    assert check_books().findings == []
    third = correct(second, "7000000", key="third")  # the difference to what stands now is asked for again
    assert third.total == usd("100000")


def test_less_revenue_than_was_paid_for_goes_back_to_the_card(model: Any, alice: Any, stripe: Any) -> None:
    first = report(model)
    stripe.pay(royalties.start_invoice_checkout(invoice=first, **URLS))
    book_checkout(Payment.objects.get().checkout_id)

    second = correct(first, "600.05")

    refund = Refund.objects.get()
    assert (second.status, second.total.micros, refund.amount, refund.reason) == (
        "nothing_due",
        0,
        usd("39.99"),
        "corrected",
    )
    finish(refund)
    assert ledger.balances(prefix="payable") == {chart.payable(alice, "USD"): -54_009_000}
    assert Document.objects.get(kind="CN").total == usd("39.99")
    third = correct(second, "1000", key="after all")
    assert third.total == usd("39.99")
    assert check_books().findings == []
    assert reconcile().differences == []


def test_a_correction_goes_by_the_result_of_the_period_even_where_the_first_report_had_no_line(
    carol: Any, alice: Any
) -> None:
    """By the first result carol's own data did everything, by the second alice's did."""
    alices, own = (
        LicenseFactory(licensee=carol, offer=OfferFactory(version=version, royalty_bps=1_000))
        for version in (
            PublishedVersionFactory(contributions={alice: 4}),
            PublishedVersionFactory(dataset__owner=carol),
        )
    )
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[alices, own])
    for weight, at in ((0, datetime(2026, 10, 20, tzinfo=UTC)), (1, datetime(2026, 11, 10, tzinfo=UTC))):
        PublishedResultFactory(
            version=alices.version,
            disclosure=disclosure,
            shares={alices.version: {alice: weight}, own.version: {carol: 1}},
            published_at=at,
        )
    clock.advance(timedelta(days=40))
    nothing = report(disclosure.model)
    assert (nothing.status, nothing.lines.count()) == ("nothing_due", 0)

    corrected = correct(nothing, "2000", period_end=date(2026, 11, 20))

    assert (corrected.status, corrected.lines.count()) == ("nothing_due", 0)
    assert report(disclosure.model, key="later", period_start=date(2026, 11, 21), period_end=date(2026, 11, 30)).total


def test_corrections_that_cannot_be_are_refused_and_leave_nothing(model: Any, mallory: Any) -> None:
    first = report(model)
    report(model, "500", key="september", **SEPTEMBER)

    for refusal, changes in (
        (NotFound, {"licensee": mallory}),
        (InvalidInput, {"note": "  "}),
        (InvalidInput, {"revenue": Money(-1, "USD")}),
        (InvalidInput, {"revenue": Money.parse("1200", "EUR")}),
        (InvalidInput, {"revenue": usd("1000")}),
        (InvalidInput, {"period_end": clock.today() + timedelta(days=3)}),
        (PeriodOverlaps, {"period_start": date(2026, 9, 30)}),
    ):
        asked = {
            "licensee": first.report.licensee,
            "report": first.report,
            "revenue": usd("1200"),
            "note": "Ours.",
            "key": "x",
        }
        with pytest.raises(refusal):
            correct_report(**asked | changes)

    first.refresh_from_db()
    assert (first.status, RoyaltyReport.objects.count(), Document.objects.count()) == ("open", 2, 2)


def test_a_correction_may_move_the_days_too(model: Any) -> None:
    first = report(model)

    moved = correct(first, "1000", period_start=date(2026, 10, 2))
    october_first = report(model, "10", key="one day", period_start=date(2026, 10, 1), period_end=date(2026, 10, 1))

    assert (moved.report.period_start, october_first.total) == (date(2026, 10, 2), usd("1"))


def test_the_database_refuses_overlapping_reports_and_reports_of_others_models(model: Any, mallory: Any) -> None:
    first = report(model).report
    fields = {
        "model": model,
        "licensee": first.licensee,
        "revenue_micros": 1,
        "currency": "USD",
        "key": "by hand",
        "request_sha256": "",
        "reported_at": clock.now(),
        "period_start": date(2026, 10, 31),
        "period_end": date(2026, 11, 1),
    }
    with pytest.raises(IntegrityError, match="same days"), transaction.atomic():
        RoyaltyReport.objects.create(**fields)
    with pytest.raises(IntegrityError, match="is not party"), transaction.atomic():
        RoyaltyReport.objects.create(**fields | {"licensee": mallory, "period_start": date(2026, 11, 1)})


# --- too small to charge ----------------------------------------------------------------------------------------------


def test_invoices_under_stripes_least_charge_roll_over_to_the_next(model: Any, carol: Any, alice: Any) -> None:
    other = measured(carol, alice)
    small = report(model, "3", **SEPTEMBER, key="september")  # 30 cents
    more = report(other, "1.50", key="other")  # 15 cents: 45 together
    in_euros = report(model, key="euros", revenue=Money.parse("3", "EUR"))

    enough = report(model, "1")  # 10 cents: 55 together

    statuses = [RoyaltyInvoice.objects.get(pk=one.pk).status for one in (small, more, in_euros, enough)]
    assert statuses == ["carried", "carried", "carried", "open"]
    assert (enough.demand, Document.objects.get().total) == (usd("0.55"), usd("0.55"))
    with pytest.raises(ReportNotCorrectable, match="asked for with invoice"):
        correct(RoyaltyInvoice.objects.get(pk=small.pk), "4")

    payment = collect(enough)

    assert list(RoyaltyInvoice.objects.filter(currency="USD").values_list("status", flat=True)) == ["paid"] * 3
    assert (payment.amount, ledger.balances(prefix="payable")) == (
        usd("0.55"),
        {chart.payable(alice, "USD"): -495_000},
    )
    assert check_books().findings == []


def test_a_voided_invoice_leaves_what_it_carried_to_the_next(model: Any) -> None:
    small = report(model, "3", **SEPTEMBER, key="september")
    first = report(model, "1000")

    second = correct(first, "2000")

    small.refresh_from_db()
    assert (small.carried_into, second.demand) == (second, usd("200.30"))


def test_a_refunded_invoice_frees_its_period_and_its_cap(carol: Any, alice: Any, stripe: Any) -> None:
    model = measured(carol, alice, royalty_cap_micros=120 * DOLLAR)
    first = report(model)
    stripe.pay(royalties.start_invoice_checkout(invoice=first, **URLS))
    payment = book_checkout(Payment.objects.get().checkout_id)
    assert payment is not None
    staff = User.objects.create_user("finance@example.org", "correct horse battery staple", is_staff=True)
    asked = {"payment": payment, "reason": Refund.Reason.GOODWILL, "note": "The wrong model.", "user": staff}
    finish(refunds.request_refund(**asked, amount=usd("40"), key="one"))
    november = report(model, key="november", period_start=date(2026, 9, 1), period_end=date(2026, 9, 30))
    assert (november.total, november.lines.get().is_capped) == (usd("60"), True)

    finish(refunds.request_refund(**asked, amount=usd("60"), key="two"))
    again = report(model, "900", key="anew")

    first.refresh_from_db()
    assert (first.status, again.total) == ("refunded", usd("60"))  # 120 less what September still owes
    assert check_books().findings == []
