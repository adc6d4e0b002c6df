"""The papers' pages: invoices, a report and its correction, what a model would owe, what is overdue, and the desk's books."""

from datetime import date, timedelta
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from marketplace import clock
from marketplace.models import Order, User
from marketplace.money import Money
from payouts.models import (
    BankReceipt,
    BillingProfile,
    Division,
    DivisionCorrection,
    Document,
    Payment,
    ReportDuty,
    RoyaltyInvoice,
    TaxRate,
)
from payouts.services import billing, quotes, royalties, sales
from payouts.services.royalties import release_pool
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PoolFactory
from tests.pages import assert_page, with_second_factor

DOLLAR = 1_000_000
ADDRESS = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}


def acting_as(party: Any) -> Client:
    client = Client()
    client.force_login(party.user, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


@pytest.fixture
def people(db: Any) -> tuple[User, User]:
    one, two = (
        User.objects.create_user(f"{name}@example.org", "correct horse battery staple", is_staff=True)
        for name in ("fay", "gil")
    )
    return one, two


def desk_of(user: User) -> Client:
    return with_second_factor(Client(), user)


@pytest.fixture
def model(carol: Any, alice: Any) -> Any:
    """A model of carol's that owes alice a tenth of its revenue; October 2026 is over."""
    if clock.today() < date(2026, 11, 2):
        clock.advance(timedelta(days=(date(2026, 11, 2) - clock.today()).days))
    offer = OfferFactory(version=PublishedVersionFactory(contributions={alice: 4}), royalty_bps=1_000)
    license = LicenseFactory(licensee=carol, offer=offer)
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
    return PublishedResultFactory(version=offer.version, disclosure=disclosure, shares={alice: 1}).model


def reported(model: Any) -> RoyaltyInvoice:
    return royalties.report_revenue(
        licensee=model.owner,
        model=model,
        period_start=date(2026, 10, 1),
        period_end=date(2026, 10, 31),
        revenue=Money.parse("1000", "USD"),
        key="october",
    )


def test_an_order_shows_its_tax_is_invoiced_and_its_invoice_is_the_buyers_alone(
    carol: Any, mallory: Any, people: Any
) -> None:
    billing.add_tax_rate(jurisdiction="DE", name="VAT", rate_bps=1_900, valid_from=clock.today(), user=people[0])
    order: Order = OrderFactory(buyer=carol, offers=[OfferFactory(price_micros=100 * DOLLAR)])
    client = acting_as(carol)
    page = reverse("order", args=[order.public_id])
    assert "VAT 19 % (DE)" in client.get(page).content.decode()

    ask = reverse("order-invoice", args=[order.public_id])
    assert client.post(ask, {"purchase_order": "PO-7"}).url == reverse("billing")
    saved = client.post(reverse("billing"), ADDRESS | {"vat_id": "DE136695976"})
    assert (saved.url, BillingProfile.objects.get().vat_id) == (reverse("invoices"), "DE136695976")
    made = client.post(ask, {"purchase_order": "PO-7"})

    document = Document.objects.get()
    assert made.url == reverse("invoice", args=[document.reference])
    shown = client.get(made.url).content.decode()
    assert all(text in shown for text in ("Carol GmbH", "PO-7", "119.00 USD", "VAT 19 % (DE)"))
    assert client.get(f"{made.url[:-1]}.pdf").content.startswith(b"%PDF-")
    assert document.reference in client.get(reverse("invoices")).content.decode()
    assert document.reference in client.get(page).content.decode()
    for address in (made.url, f"{made.url[:-1]}.pdf"):
        assert acting_as(mallory).get(address).status_code == 404
    for wrong in ("INV-2026", "INV-2026-1", "XX-2026-000001", "INV-99999-000001"):
        assert client.get(f"/invoices/{wrong}/").status_code == 404


def test_a_wrong_vat_id_is_a_form_error_and_nothing_is_saved(carol: Any) -> None:
    answer = acting_as(carol).post(reverse("billing"), ADDRESS | {"vat_id": "DE136695978"})

    assert answer.status_code == 422
    assert "is no VAT id of DE" in answer.content.decode()
    assert BillingProfile.objects.count() == 0


def test_a_report_is_corrected_on_its_page_once(model: Any, carol: Any, mallory: Any) -> None:
    invoice = reported(model)
    client, page = acting_as(carol), reverse("royalty-invoice", args=[invoice.pk])
    shown = client.get(page).content.decode()
    assert all(text in shown for text in ("1,000.00", "100.00", "Correct this report"))
    sent = {
        "key": "k",
        "amount": "1200.00",
        "period_start": "2026-10-01",
        "period_end": "2026-10-31",
        "note": "A late sale.",
    }

    first, again = (client.post(page, sent) for _ in range(2))
    refused = client.post(page, sent | {"key": "other", "amount": "1300"})

    assert first.url == again.url
    made = client.get(first.url).content.decode()
    assert "A late sale." in made and "120.00" in made
    assert refused.status_code == 422 and "was replaced" in refused.content.decode()
    assert acting_as(mallory).get(page).status_code == 404
    assert [one.status for one in RoyaltyInvoice.objects.order_by("pk")] == ["void", "open"]
    assert client.get(reverse("royalties")).status_code == 200


def test_anyone_sees_what_is_overdue_and_the_owner_what_is_due(model: Any, carol: Any) -> None:
    duty = ReportDuty.objects.create(
        license=LicenseFactory(licensee=carol),
        model=model,
        period_start=date(2026, 7, 1),
        period_end=date(2026, 9, 30),
        due_on=clock.today() - timedelta(days=2),
    )

    public = Client().get(reverse("model", args=[model.slug])).content.decode()
    own = acting_as(carol).get(reverse("royalties")).content.decode()

    assert "The report of its revenue from 01 July 2026 to 30 September 2026" in public
    assert "Reports that you still owe" in own and "overdue since" in own
    prefilled = f"?model={model.pk}&amp;period_start=2026-07-01&amp;period_end=2026-09-30#report"
    assert prefilled in own
    form = acting_as(carol).get(f"{reverse('royalties')}{prefilled.replace('&amp;', '&')}").content.decode()
    assert 'value="2026-07-01"' in form and 'value="2026-09-30"' in form
    ReportDuty.objects.filter(pk=duty.pk).update(met_on=clock.today())
    assert "overdue" not in Client().get(reverse("model", args=[model.slug])).content.decode()


def test_a_report_that_several_licenses_ask_for_is_listed_once(model: Any, carol: Any) -> None:
    for title in ("One set", "Another set"):
        offer = OfferFactory(version=PublishedVersionFactory(contributions={carol: 1}, dataset__title=title))
        ReportDuty.objects.create(
            license=LicenseFactory(licensee=carol, offer=offer),
            model=model,
            period_start=date(2026, 7, 1),
            period_end=date(2026, 9, 30),
            due_on=clock.today(),
        )

    own = acting_as(carol).get(reverse("royalties")).content.decode()

    assert "for One set, Another set" in own and own.count("Report it") == 1


def test_an_invoice_that_is_late_says_so_to_its_buyer_and_at_the_desk(carol: Any, people: Any) -> None:
    order: Order = OrderFactory(buyer=carol, offers=[OfferFactory()])
    client = acting_as(carol)
    client.post(reverse("billing"), ADDRESS)
    client.post(reverse("order-invoice", args=[order.public_id]), {"purchase_order": ""})
    document = Document.objects.get()
    pages = [(client, reverse("invoices")), (client, reverse("invoice", args=[document.reference]))]
    pages += [(desk_of(people[0]), reverse("desk-invoices"))]
    assert all("verdue since" not in browser.get(page).content.decode() for browser, page in pages)

    clock.advance(timedelta(days=31))

    assert all("verdue since" in browser.get(page).content.decode() for browser, page in pages)


def test_a_planned_selection_is_estimated_between_its_least_and_its_most(carol: Any, alice: Any) -> None:
    offers = [
        OfferFactory(
            version=PublishedVersionFactory(contributions={alice: 6}), royalty_bps=1_000, royalty_cap_micros=30 * DOLLAR
        ),
        OfferFactory(version=PublishedVersionFactory(contributions={alice: 2}), royalty_bps=200),
    ]

    plan = quotes.quote_plan(offers=offers, revenue=Money.parse("1000", "USD"))

    # 3/4 at 10 % is 75.00, capped at 30.00; 1/4 at 2 % is 5.00. At most: 30 % reach the cap, and 70 % are at 2 %.
    assert [(line.amount, line.is_capped) for line in plan.lines] == [
        (Money.parse("30", "USD"), True),
        (Money.parse("5", "USD"), False),
    ]
    assert (plan.by_count, plan.least, plan.most) == tuple(Money.parse(text, "USD") for text in ("35", "20", "44"))
    slugs = "\n".join(offer.dataset.slug for offer in offers)
    shown = Client().get(reverse("estimate"), {"datasets": slugs, "revenue": "1000", "currency": "USD"})
    assert all(text in shown.content.decode() for text in ("35.00", "20.00", "44.00", "capped"))
    for wrong in ({"datasets": "no-such"}, {"revenue": "-5"}, {"datasets": f"{slugs}\n{offers[0].dataset.slug}"}):
        asked = {"datasets": slugs, "revenue": "1000", "currency": "USD"} | wrong
        assert Client().get(reverse("estimate"), asked).status_code == 422


def test_an_invoices_page_says_which_result_divides_it(model: Any, carol: Any) -> None:
    page = reverse("royalty-invoice", args=[reported(model).pk])

    text = assert_page(acting_as(carol).get(page))

    assert "Divided by replayed result 1 Published on" in text
    assert "A newer one changes later periods only." in text


def test_a_models_own_estimate_is_what_its_report_would_make(model: Any, carol: Any) -> None:
    client = acting_as(carol)

    shown = client.get(reverse("estimate"), {"model": model.pk, "revenue": "1000", "currency": "USD", "datasets": ""})

    assert f"{model.name} would owe" in shown.content.decode()
    assert "100.00" in shown.content.decode()


# --- the desk ---------------------------------------------------------------------------------------------------------


def test_the_books_exist_for_staff_only(people: Any, carol: Any) -> None:
    for name in ("desk-pools", "desk-invoices", "desk-divisions", "desk-taxes"):
        assert desk_of(people[0]).get(reverse(name)).status_code == 200
        assert acting_as(carol).get(reverse(name)).status_code == 404
        assert Client().get(reverse(name)).status_code == 404


def test_a_transfer_is_recorded_by_one_and_confirmed_by_another(people: Any, carol: Any) -> None:
    billing.set_billing_profile(party=carol, user=carol.user, **ADDRESS)
    order = OrderFactory(buyer=carol, offers=[OfferFactory(price_micros=100 * DOLLAR)])
    document = sales.invoice_order(order=order)
    fay, gil = (desk_of(one) for one in people)
    sent = {"amount": "100.00", "reference": "4711", "received_on": f"{clock.today()}"}

    page = reverse("desk-invoice", args=[document.reference])
    assert fay.post(page, sent | {"amount": "99"}).status_code == 422
    assert fay.post(page, sent).url == reverse("desk-invoices")
    decide = reverse("desk-receipt", args=[BankReceipt.objects.get().pk])
    assert fay.post(decide, {"act": "approve"}).status_code == 403
    assert "somebody else confirms" in fay.get(reverse("desk-invoices")).content.decode()
    assert gil.post(decide, {"act": "approve"}).status_code == 302

    assert (Payment.objects.get().status, Payment.objects.get().method) == ("paid", "bank")
    assert fay.get(f"{page}?as=pdf").content.startswith(b"%PDF-")


def test_a_division_is_corrected_by_two_people_who_saw_every_difference(people: Any, alice: Any, bob: Any) -> None:
    pool = PoolFactory(version=PublishedVersionFactory(contributions={alice: 4, bob: 4}))
    result = PublishedResultFactory(license=pool.order_line.license, shares={alice: 1})
    release_pool(pool=pool, result=result)
    page = reverse("desk-division", args=[Division.objects.get().pk])
    fay, gil = (desk_of(one) for one in people)
    assert alice.name in fay.get(page).content.decode()

    proposed = fay.post(page, {"result": "", "reason": "The wrong file was measured."})

    shown = fay.get(proposed.url).content.decode()
    assert all(text in shown for text in ("20.00", "-10.00", "10.00", "somebody else approves"))
    assert fay.post(proposed.url, {"act": "approve"}).status_code == 403
    assert gil.post(proposed.url, {"act": "approve"}).status_code == 302
    assert DivisionCorrection.objects.get().status == "booked"
    assert "We had divided it wrongly" in acting_as(alice).get(reverse("earnings")).content.decode()
    assert acting_as(bob).get(reverse("earnings")).status_code == 200


def test_tax_rates_are_added_at_the_desk(people: Any) -> None:
    sent = {"jurisdiction": "DE", "name": "VAT", "percent": "19", "is_reversed": "on", "valid_from": f"{clock.today()}"}
    client = desk_of(people[0])

    assert client.post(reverse("desk-taxes"), sent).status_code == 302
    again = client.post(reverse("desk-taxes"), sent)

    assert again.status_code == 422 and "another one is valid then" in again.content.decode()
    rate = TaxRate.objects.get()
    assert rate.rate_bps == 1_900
    end = reverse("desk-tax-end", args=[rate.pk])
    assert [client.post(end).status_code for _ in range(2)] == [302, 302]
    assert TaxRate.objects.get().valid_until == clock.today()
    clock.advance(timedelta(days=1))
    assert client.post(end).status_code == 422
