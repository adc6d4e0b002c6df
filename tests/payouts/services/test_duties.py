"""What is due, reminded of, told in public, enforced, and lifted."""

from datetime import date, timedelta
from typing import Any

import pytest
from django.core import mail
from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace import clock, jobs
from marketplace.models import License
from marketplace.money import Money
from marketplace.services.disclosures import CitationInvalid, record_disclosure
from marketplace.services.downloads import LicenseNotLive, note_first_download
from marketplace.services.orders import BuyerInArrears, place_order
from payouts.models import Reminder, ReportDuty, RoyaltyInvoice
from payouts.services import duties, royalties
from payouts.services.duties import periods
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory, declaration
from tests.factories.marketplace import LicenseFactory, OfferFactory, PublishedVersionFactory
from tests.factories.payouts import collect

DAY = timedelta(days=1)


@pytest.fixture
def model(carol: Any, alice: Any) -> Any:
    """Carol's model, disclosed in the second half of a quarter."""
    to = date(clock.today().year + 1, 2, 20)
    clock.advance((to - clock.today()) / DAY * DAY)
    offer = OfferFactory(
        version=PublishedVersionFactory(contributions={alice: 4}),
        royalty_bps=1_000,
        disclosure_due_days=3_000,
        term_days=3_000,
    )
    license = LicenseFactory(licensee=carol, offer=offer)
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
    return PublishedResultFactory(version=offer.version, disclosure=disclosure, shares={alice: 1}).model


def travel(day: date) -> None:
    clock.advance((day - clock.today()) / DAY * DAY)
    duties.follow_up()


def deliver() -> list[str]:
    """Send what is queued, as the workers do; the subjects."""
    mail.outbox.clear()
    for reminder in Reminder.objects.exclude(status="done").order_by("pk"):
        with jobs.claimed(Reminder, reminder.pk) as held:
            assert held
            duties.send_reminder(held)
    return [sent.subject for sent in mail.outbox]


def report(model: Any, start: date, end: date, revenue: str = "1000") -> RoyaltyInvoice:
    invoice = royalties.report_revenue(
        licensee=model.owner,
        model=model,
        period_start=start,
        period_end=end,
        revenue=Money.parse(revenue, "USD"),
        key=f"{start}",
    )
    duties.settle(model.owner)
    return invoice


def test_periods_are_the_calendars_and_the_first_begins_with_the_disclosure() -> None:
    found = list(periods(date(2026, 8, 20), date(2027, 1, 1), months=3))

    assert found == [(date(2026, 8, 20), date(2026, 9, 30)), (date(2026, 10, 1), date(2026, 12, 31))]
    assert list(periods(date(2026, 8, 20), date(2026, 9, 30), months=3)) == []
    assert list(periods(date(2026, 1, 31), date(2026, 3, 1), months=1)) == [
        (date(2026, 1, 31), date(2026, 1, 31)),
        (date(2026, 2, 1), date(2026, 2, 28)),
    ]


def test_a_report_that_does_not_come_is_reminded_of_told_and_enforced_until_it_comes(
    model: Any, carol: Any, alice: Any
) -> None:
    year = clock.today().year
    first, last, due = clock.today(), date(year, 3, 31), date(year, 4, 30)
    duties.follow_up()
    assert ReportDuty.objects.count() == 0  # the quarter is not over
    travel(last + DAY)
    duty = ReportDuty.objects.get()
    assert (duty.period_start, duty.period_end, duty.due_on) == (first, last, due)

    said = {}
    for name, day in (("before", due - 7 * DAY), ("on", due), ("after", due + 7 * DAY)):
        travel(day)
        duties.follow_up()  # as beat does all the time
        said[name] = deliver()
    what = f"revenue report of {model.name} for {first} to {last}"
    assert said == {"before": [f"Due soon: {what}"], "on": [f"Due today: {what}"], "after": [f"Overdue: {what}"]}
    assert [one.since for one in duties.overdue_of(model)] == [due + DAY]
    license = License.objects.get(licensee=carol)
    assert license.in_arrears_at is None

    travel(due + 31 * DAY)
    license.refresh_from_db()
    assert license.in_arrears_at is not None
    with pytest.raises(LicenseNotLive, match="overdue"):
        note_first_download(license=license)
    with pytest.raises(CitationInvalid, match="overdue"):
        record_disclosure(owner=carol, document=declaration(licenses=[license], slug="another"))
    offer = OfferFactory()
    asked = {
        "buyer": carol,
        "offers": [offer],
        "expected_total": offer.price,
        "accepted_name": "Carol C",
        "user": carol.user,
    }
    with pytest.raises(BuyerInArrears):
        place_order(key="one", **asked)

    report(model, first, last - DAY)
    license.refresh_from_db()
    assert license.in_arrears_at is not None  # a day is missing
    report(model, last, last, "0")

    license.refresh_from_db()
    assert (license.in_arrears_at, duties.overdue_of(model)) == (None, [])
    assert place_order(key="two", **asked).status == "placed"


def test_an_invoice_that_is_not_paid_suspends_its_license_until_it_is(model: Any, carol: Any) -> None:
    year = clock.today().year
    first, last = clock.today(), date(year, 3, 31)
    travel(last + DAY)
    invoice = report(model, first, last)
    assert invoice.due_on == clock.today() + 30 * DAY
    travel(invoice.due_on + 31 * DAY)

    assert License.objects.get(licensee=carol).in_arrears_at is not None
    assert duties.overdue_of(model)[0].what.startswith("Royalties on its revenue")

    collect(RoyaltyInvoice.objects.get())
    duties.settle(carol)

    assert License.objects.get(licensee=carol).in_arrears_at is None
    assert duties.overdue_of(model) == []


def test_a_reminder_of_what_was_settled_meanwhile_is_not_mailed(model: Any) -> None:
    year = clock.today().year
    first, last = clock.today(), date(year, 3, 31)
    travel(date(year, 4, 25))
    assert Reminder.objects.get().moment == "before"

    report(model, first, last)

    assert deliver() == []
    assert (Reminder.objects.get().status, Reminder.objects.get().mailed_at) == ("done", None)


def test_a_schedule_of_the_licenses_own_comes_before_the_settings(model: Any, carol: Any) -> None:
    from payouts.models import ReportSchedule

    ReportSchedule.objects.create(license=License.objects.get(licensee=carol), every_months=1, due_days=10)

    travel(date(clock.today().year, 4, 1))

    assert [(duty.period_end.month, duty.due_on.day) for duty in ReportDuty.objects.order_by("period_end")] == [
        (2, 10),
        (3, 10),
    ]


def test_nothing_is_asked_of_a_model_that_was_not_measured_or_owes_nobody(carol: Any, alice: Any) -> None:
    free = LicenseFactory(licensee=carol, offer=OfferFactory(royalty_bps=0))
    PublishedResultFactory(
        version=free.version, disclosure=DisclosureFactory(model=ModelFactory(owner=carol), licenses=[free])
    )
    DisclosureFactory(
        model=ModelFactory(owner=carol), licenses=[LicenseFactory(licensee=carol, offer=OfferFactory(royalty_bps=500))]
    )
    clock.advance(timedelta(days=400))

    duties.follow_up()

    assert ReportDuty.objects.count() == 0


def test_a_duty_that_was_met_is_open_again_once_its_report_does_not_stand(model: Any) -> None:
    travel(date(clock.today().year, 4, 10))
    start = ReportDuty.objects.get()
    invoice = report(model, start.period_start, start.period_end)
    duties.match_reports()
    assert ReportDuty.objects.get().met_on == clock.today()
    assert duties.match_reports() == 0

    collect(invoice)
    RoyaltyInvoice.objects.filter(pk=invoice.pk).update(status=RoyaltyInvoice.Status.REFUNDED)

    assert duties.match_reports() == 1
    assert ReportDuty.objects.get().met_on is None


def test_several_reports_together_meet_a_duty_and_a_day_left_out_does_not(model: Any) -> None:
    travel(date(clock.today().year, 4, 10))
    duty = ReportDuty.objects.get()
    middle = duty.period_start + 10 * DAY
    report(model, duty.period_start, middle)
    report(model, middle + 2 * DAY, duty.period_end)
    duties.match_reports()
    assert ReportDuty.objects.get().met_on is None

    report(model, middle + DAY, middle + DAY)
    duties.match_reports()
    assert ReportDuty.objects.get().met_on == clock.today()


def test_a_round_costs_the_same_queries_however_many_duties_there_are(model: Any, carol: Any, alice: Any) -> None:
    def cost() -> int:
        duties.follow_up()
        with CaptureQueriesContext(connection) as captured:
            duties.follow_up()
        return len(captured)

    year = clock.today().year
    travel(date(year, 4, 10))
    one = cost()
    licenses = [
        LicenseFactory(
            licensee=carol,
            offer=OfferFactory(
                version=PublishedVersionFactory(contributions={alice: 1}), royalty_bps=500, term_days=3_000
            ),
        )
        for _ in range(3)
    ]
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=licenses)
    PublishedResultFactory(version=licenses[0].version, disclosure=disclosure, shares={alice: 1})
    travel(date(year + 1, 4, 10))
    assert ReportDuty.objects.count() > 10

    assert cost() == one
