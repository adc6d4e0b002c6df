"""The desk as a place: what waits there, every page of it under its tabs, and codes in words."""

from datetime import date, timedelta
from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, reverse

from marketplace import clock
from marketplace.models import AuditEvent, User
from marketplace.money import Money
from payouts.models import Document, ManualEntry, Reminder, ReportDuty
from payouts.services import manual_entries
from portal.pages.urls import urlpatterns
from portal.templatetags.desk import PAGES, credit, debit, detail_words, target_page, with_side
from tests.factories.attribution import DisclosureFactory, ModelFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, OrderFactory, PublishedVersionFactory, UserFactory
from tests.factories.payouts import sell
from tests.pages import assert_page, with_second_factor


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def desk(ann: User) -> Client:
    return with_second_factor(Client(), ann)


def test_every_page_of_the_desk_that_needs_no_number_is_under_its_tabs() -> None:
    alone = {
        pattern.name
        for pattern in urlpatterns
        if isinstance(pattern, URLPattern)
        and str(pattern.pattern).startswith("desk/")
        and "<" not in str(pattern.pattern)
    }
    assert {address for pages in PAGES.values() for _, _, address in pages} == alone - {"desk-beancount"}  # a file


@pytest.mark.parametrize(("key", "label", "address"), [page for pages in PAGES.values() for page in pages])
def test_each_page_stands_under_its_own_tab(desk: Client, key: str, label: str, address: str) -> None:
    html = desk.get(reverse(address)).content.decode()
    assert f'<a href="{reverse(address)}" aria-current="page">{label}</a>' in html
    assert html.count('aria-label="Desk"') == 1


def test_the_first_page_counts_what_waits_for_a_person_and_leads_to_it(desk: Client, ann: User) -> None:
    assert "Nothing: no approval, no difference, nothing overdue." in assert_page(desk.get("/desk/"))
    for number in (1, 2):
        manual_entries.propose(
            user=ann,
            key=f"k{number}",
            legs={"expense:other:USD": 1_000_000, "equity:owners:USD": -1_000_000},
            reason="Paper",
        )

    answer = desk.get("/desk/")

    assert "2 manual entries to approve" in assert_page(answer)
    assert b'href="/desk/entries/"' in answer.content
    manual_entries.reject(manual=ManualEntry.objects.first(), user=UserFactory(is_staff=True), note="No.")
    assert "1 manual entry to approve" in assert_page(desk.get("/desk/"))


def test_reports_and_reminders_name_what_is_overdue_and_when_a_mail_went_out(
    desk: Client, alice: Any, carol: Any
) -> None:
    assert "Every report that was due is in." in assert_page(desk.get("/desk/overdue/"))
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 1}), royalty_bps=500)
    license = LicenseFactory(licensee=carol, offer=offer)
    model = ModelFactory(owner=carol)
    DisclosureFactory(model=model, licenses=[license])
    today = clock.today()
    duty = ReportDuty.objects.create(
        license=license,
        model=model,
        period_start=date(2026, 1, 1),
        period_end=date(2026, 1, 31),
        due_on=today - timedelta(days=1),
    )
    assert "not yet" in assert_page(desk.get("/desk/overdue/"))
    Reminder.objects.create(duty=duty, moment="after", mailed_at=clock.now())

    text = assert_page(desk.get("/desk/overdue/"))

    assert all(
        part in text for part in (model.name, carol.name, "1 Jan 2026 to 31 Jan 2026", "overdue since", f"{today:%Y}")
    )
    assert "not yet" not in text
    assert "1 revenue report overdue" in assert_page(desk.get("/desk/"))


def test_an_invoice_stands_under_the_desks_tabs_there_and_alone_with_its_buyer(desk: Client, carol: Any) -> None:
    sell(OrderFactory(buyer=carol, offers=[OfferFactory()]))
    document = Document.objects.get()

    shown = desk.get(f"/desk/invoices/{document.reference}/").content.decode()

    assert 'aria-label="Desk"' in shown and f'href="/desk/payments/{document.payment_id}/"' in shown
    buyer = Client()
    buyer.force_login(carol.user)
    assert 'aria-label="Desk"' not in buyer.get(f"/invoices/{document.reference}/").content.decode()


def test_an_event_is_told_in_words_with_amounts_as_money(desk: Client, ann: User) -> None:
    detail = {"before": {"state": "awaiting"}, "after": {"micros": 45_000_000, "currency": "USD", "payouts": 2}}
    assert detail_words(detail) == [("before state", "awaiting"), ("after", "$45.00"), ("after payouts", "2")]
    assert detail_words({"legs": {"equity:owners:USD": -1_500_000}}) == [("legs equity:owners:USD", "credit $1.50")]
    assert detail_words({"from_micros": 1_000_000, "fields": [], "note": None}) == [
        ("fields", "none"),
        ("from", "1"),
        ("note", "none"),
    ]
    assert target_page("manual_entry:3") == "/desk/entries/3/"
    assert [target_page(target) for target in ("period:2026-03", "order:7", "manual_entry:x")] == ["", "", ""]
    AuditEvent.objects.create(actor=ann, action="rail_export.proposed", target="rail_export:1", detail=detail)
    text = assert_page(desk.get("/desk/audit/"))
    assert "rail export proposed rail export 1 " in text and "before state awaiting" in text and "{" not in text


@pytest.mark.parametrize(
    ("micros", "shown"),
    [(0, ("", "", "$0.00")), (1_500_000, ("$1.50", "", "$1.50 Dr")), (-1_500_000, ("", "$1.50", "$1.50 Cr"))],
)
def test_an_amount_stands_on_its_side(micros: int, shown: tuple[str, str, str]) -> None:
    amount = Money(micros, "USD")
    assert (debit(amount), credit(amount), with_side(amount)) == shown
