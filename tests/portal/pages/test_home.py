from django.test import Client, RequestFactory
from django.urls import get_resolver

from attribution.models import AttributionResult
from marketplace.money import Money
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import LicenseFactory, OfferFactory
from tests.factories.payouts import pay_out
from tests.pages import assert_page


def test_home_counts_the_live_system(client, alice, carol):
    offer = OfferFactory()
    PublishedResultFactory(license=LicenseFactory(licensee=carol, offer=offer), shares={offer.dataset.owner: 1})
    pay_out(alice, Money(12_340_000, "USD"), status="paid", is_owed=False)

    text = assert_page(client.get("/"))

    assert "dataset for sale 1" in text
    assert "records in them, each with an owner 8" in text
    assert "model with an open bibliography 1" in text
    assert "paid out to contributors, in play money $12.34" in text
    assert AttributionResult.objects.count() == 1


def test_home_of_an_empty_system(client, db):
    assert "datasets for sale 0" in assert_page(client.get("/"))


def test_production_says_nothing_of_play_money(client, db, settings):
    assert "Demo: play money" in assert_page(client.get("/"))
    settings.IS_DEMO = False

    assert "play money" not in assert_page(client.get("/"))


def test_robots_keep_out_of_what_is_private(client, db):
    text = client.get("/robots.txt").content.decode()

    assert "Disallow: /earnings/" in text and "Disallow: /datasets/" not in text


def test_what_does_not_exist_says_so(client, db):
    text = assert_page(client.get("/no-such-page/"), 404)

    assert "There is no such page" in text


def test_a_form_without_its_token_says_what_to_do(db):
    response = Client(enforce_csrf_checks=True).post("/accounts/login/", {"login": "a", "password": "b"})

    assert "The form was too old" in assert_page(response, 403)


def test_the_page_for_our_own_faults_needs_no_context(db):
    handler = get_resolver().resolve_error_handler(500)

    response = handler(RequestFactory().get("/"))

    assert response.status_code == 500 and b"Something broke on our side" in response.content
    assert b"style=" not in response.content
