from datetime import date

import pytest

from marketplace.money import Money
from payouts.models import RoyaltyInvoice
from payouts.services import payees, royalties
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import PayeeAccountFactory, sell
from tests.pages import assert_page, signed_in


@pytest.fixture
def sold(alice, bob, carol):
    """Carol bought for 100 USD what is three quarters alice's: 30 USD of it is divided at once, by count."""
    version = PublishedVersionFactory(contributions={alice: 6, bob: 2})
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version)])
    sell(order)
    return order


def test_earnings_say_how_much_where_it_is_and_why(alice, sold):
    text = assert_page(signed_in(alice).get("/earnings/"))

    assert "Earned $22.50" in text
    assert "On hold $22.50" in text and "Held so that a claim can still overturn it" in text
    assert "Royalty pools of sales with your records" in text and "$60.00" in text
    assert f"Sale, upfront: {sold.lines.get().version.dataset.title}" in text and "of 6 records, by count" in text
    assert "Set up payouts" in text


def test_earnings_of_who_has_none_say_what_would_bring_some(mallory):
    assert "Nothing earned yet" in assert_page(signed_in(mallory).get("/earnings/"))


@pytest.mark.parametrize("n_rows", [1, 3])
def test_earnings_take_the_same_number_of_queries_for_any_number_of_lines(
    alice, carol, django_assert_num_queries, n_rows
):
    for _ in range(n_rows):
        version = PublishedVersionFactory(contributions={alice: 6})
        sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    browser = signed_in(alice)
    browser.get("/earnings/")

    # session, user, membership, menu; what was earned, went back, was forgiven and waits; other rails; payouts; statements
    with django_assert_num_queries(37):
        browser.get("/earnings/")


def test_a_statement_recomputes_on_the_page_and_as_csv(alice, sold):
    browser = signed_in(alice)
    month = f"{sold.paid_at or sold.placed_at:%Y-%m}"

    text = assert_page(browser.get(f"/earnings/{month}/"))
    csv = browser.get(f"/earnings/{month}.csv")

    assert "Opening $0.00 + earned $22.50 − paid out $0.00 = closing $22.50" in text and "recomputes" in text
    assert "75.0000 %" in text
    assert csv.headers["Content-Type"] == "text/csv; charset=utf-8" and b"22.50" in csv.getvalue()
    assert "Nothing moved" in assert_page(browser.get("/earnings/2020-01/"))
    assert_page(browser.get("/earnings/2020-13/"), 404)


def test_onboarding_asks_for_the_country_and_goes_to_stripe(alice, monkeypatch):
    asked = []

    def start_onboarding(*, party, return_url, refresh_url):
        asked.append((party.country, return_url, refresh_url))
        return "https://connect.stripe.com/setup"

    monkeypatch.setattr(payees, "start_onboarding", start_onboarding)
    type(alice).objects.filter(pk=alice.pk).update(country="")
    browser = signed_in(alice)

    assert "Country of your bank account" in assert_page(browser.post("/earnings/onboarding/"))
    assert "two letters" in assert_page(browser.post("/earnings/onboarding/", {"country": "1"}), 422)
    response = browser.post("/earnings/onboarding/", {"country": "fr"})

    assert (response.status_code, response.headers["Location"]) == (303, "https://connect.stripe.com/setup")
    assert asked == [
        ("FR", "http://127.0.0.1:8000/earnings/?from=stripe", "http://127.0.0.1:8000/earnings/onboarding/")
    ]


def test_looking_at_the_onboarding_page_changes_nothing(alice, monkeypatch):
    monkeypatch.setattr(payees, "start_onboarding", None)  # whoever called it would fail
    browser = signed_in(alice)

    page = browser.get("/earnings/onboarding/?country=FR")  # as Stripe sends back whose link had run out

    assert "link had run out" in assert_page(page) and b'action="/earnings/onboarding/"' in page.content
    alice.refresh_from_db()
    assert alice.country == "DE"


def test_a_payee_whom_stripe_can_pay_sees_that(alice, sold):
    PayeeAccountFactory(party=alice)

    assert "Payouts are set up" in assert_page(signed_in(alice).get("/earnings/"))


@pytest.fixture
def owing(alice, carol):
    """Carol's model, of which all that it learned came from alice, at 5 % of its revenue."""
    license = LicenseFactory(licensee=carol, version=PublishedVersionFactory(contributions={alice: 4}))
    return PublishedResultFactory(license=license, shares={alice: 1}).model


def report(model, **changes) -> dict[str, str]:
    return {
        "key": "k1",
        "model": str(model.pk),
        "period_start": "2025-01-01",
        "period_end": "2025-01-31",
        "revenue": "1000.00",
        "currency": "USD",
    } | changes


def test_revenue_is_reported_once_and_becomes_an_invoice(carol, owing):
    browser = signed_in(carol)
    assert "Report revenue" in assert_page(browser.get("/royalties/"))

    for _ in range(2):
        assert browser.post("/royalties/", report(owing)).url == "/royalties/"

    invoice = RoyaltyInvoice.objects.get()
    assert (invoice.total, invoice.report.period_end) == (Money(50_000_000, "USD"), date(2025, 1, 31))
    text = assert_page(browser.get("/royalties/"))
    assert "Pay $50.00 at Stripe" in text and "100.00 % 5 % $50.00" in text


def test_a_royalty_that_stripe_cannot_charge_at_once_is_invoiced_and_paid_by_bank_transfer(carol, owing):
    browser = signed_in(carol)
    assert browser.post("/royalties/", report(owing, revenue="20000000.00")).url == "/royalties/"

    invoice = RoyaltyInvoice.objects.get()
    text = assert_page(browser.post(f"/royalties/{invoice.pk}/checkout/"), 422)
    assert "Pay it by bank transfer" in text and "999999.99" in text
    assert invoice.payment.documents.get().total == Money(1_000_000_000_000, "USD")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revenue": "-1"}, "is negative"),
        ({"period_end": "2024-12-01"}, "before it starts"),
        ({"period_end": "2999-01-31"}, "not over"),
    ],
)
def test_revenue_that_cannot_be_is_refused(carol, owing, changes, message):
    response = signed_in(carol).post("/royalties/", report(owing, **changes))

    assert message in assert_page(response, 422)
    assert not RoyaltyInvoice.objects.exists()


def test_strangers_neither_report_nor_pay_for_a_model(carol, owing, mallory):
    invoice = royalties.report_revenue(
        licensee=carol,
        model=owing,
        period_start=date(2025, 1, 1),
        period_end=date(2025, 1, 31),
        revenue=Money(1_000_000_000, "USD"),
        key="k",
    )
    stranger = signed_in(mallory)

    assert_page(stranger.post("/royalties/", report(owing, key="x")), 422)
    assert RoyaltyInvoice.objects.get() == invoice
    assert_page(stranger.post(f"/royalties/{invoice.pk}/checkout/"), 404)
    assert "No revenue reported yet" in assert_page(stranger.get("/royalties/"))
