"""What licensees still owe, by a key: the reports and the royalties that the desk's page shows."""

from datetime import date, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace import clock
from marketplace.models import License
from payouts.models import Reminder, ReportDuty, RoyaltyInvoice, RoyaltyReport
from tests.desk import Desk
from tests.factories.attribution import DisclosureFactory, ModelFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, PartyFactory, PublishedVersionFactory

DAY = timedelta(days=1)


def owed(alice: Any, licensee: Any, due_on: date) -> ReportDuty:
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}), royalty_bps=500)
    license = LicenseFactory(licensee=licensee, offer=offer)
    model = ModelFactory(owner=licensee)
    DisclosureFactory(model=model, licenses=[license])
    return ReportDuty.objects.create(
        license=license, model=model, period_start=date(2026, 1, 1), period_end=date(2026, 1, 31), due_on=due_on
    )


def unpaid(due_on: date, currency: str = "USD") -> RoyaltyInvoice:
    model = ModelFactory()
    report = RoyaltyReport.objects.create(
        model=model,
        licensee=model.owner,
        period_start=date(2026, 1, 1),
        period_end=date(2026, 1, 31),
        revenue_micros=1_000_000_000,
        currency=currency,
        key="k",
        request_sha256="0" * 64,
        reported_at=clock.now(),
    )
    return RoyaltyInvoice.objects.create(
        report=report, total_micros=50_000_000, currency=currency, platform_fee_bps=1_000, due_on=due_on
    )


def test_owed_reports_say_whose_since_when_and_when_a_mail_went_out(ann: Desk, alice: Any, carol: Any) -> None:
    late = owed(alice, carol, clock.today() - DAY)
    soon = owed(alice, PartyFactory(), clock.today())
    Reminder.objects.create(duty=late, moment="after", mailed_at=clock.now())
    License.objects.filter(pk=late.license_id).update(in_arrears_at=clock.now())

    first, second = ann.get("owed-reports/")["results"]

    assert [first["id"], second["id"]] == [late.pk, soon.pk]
    assert (first["licensee"]["id"], first["model"], first["dataset"]) == (
        carol.pk,
        late.model.slug,
        late.license.version.dataset.slug,
    )
    assert (first["period_start"], first["period_end"], first["due_on"]) == (
        "2026-01-01",
        "2026-01-31",
        f"{late.due_on}",
    )
    assert (first["is_overdue"], first["is_suspended"], len(first["reminded_at"])) == (True, True, 1)
    assert (second["is_overdue"], second["is_suspended"], second["reminded_at"]) == (False, False, [])
    assert ann.get("owed-reports/", overdue=True)["results"] == [first]
    assert ann.get("owed-reports/", overdue=False)["results"] == [second]
    ReportDuty.objects.update(met_on=clock.today())
    assert ann.get("owed-reports/")["results"] == []


def test_unpaid_royalties_are_filtered_by_day_and_currency(ann: Desk) -> None:
    later = unpaid(clock.today() + DAY, "EUR")
    late = unpaid(clock.today() - DAY)

    first, second = ann.get("unpaid-royalties/")["results"]

    assert [first["id"], second["id"]] == [late.pk, later.pk]
    assert (first["licensee"]["id"], first["model"]) == (late.report.licensee_id, late.report.model.slug)
    assert (first["is_overdue"], first["reminded_at"]) == (True, [])
    assert first["total"] == {"amount": "50.00", "currency": "USD"}
    assert ann.get("unpaid-royalties/", currency="EUR")["results"] == [second]
    assert ann.get("unpaid-royalties/", currency="EUR", overdue=True)["results"] == []
    assert ann.get("unpaid-royalties/", currency="USD", overdue=True)["results"] == [first]
    ann.get("unpaid-royalties/", 422, currency="CHF")
    RoyaltyInvoice.objects.filter(pk=late.pk).update(status="void")
    assert ann.get("unpaid-royalties/")["results"] == [second]


@pytest.mark.parametrize("path", ["owed-reports/", "unpaid-royalties/"])
def test_they_come_in_pages_and_ask_as_often_for_three_rows_as_for_one(ann: Desk, alice: Any, path: str) -> None:
    def asked() -> tuple[int, list[int]]:
        with CaptureQueriesContext(connection) as queries:
            rows = ann.get(path)["results"]
        return len(queries), [row["id"] for row in rows]

    def one_more(number: int) -> int:
        due_on = clock.today() + number * DAY
        return (owed(alice, PartyFactory(), due_on) if path == "owed-reports/" else unpaid(due_on)).pk

    made = [one_more(1)]
    n_queries, rows = asked()
    assert rows == made
    made += [one_more(2), one_more(2)]

    assert asked() == (n_queries, made)
    page = ann.get(path, page_size=2)
    assert [row["id"] for row in page["results"]] == made[:2]
    assert [row["id"] for row in ann.get(page["next"])["results"]] == made[2:]
