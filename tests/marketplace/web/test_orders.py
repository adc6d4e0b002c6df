import re
import uuid
from datetime import timedelta

import pytest

from marketplace import clock
from marketplace.models import Membership, Order, User
from marketplace.services.orders import cancel_order
from tests.factories.marketplace import LicenseFactory, OfferFactory, OrderFactory, PaidOrderFactory
from tests.pages import assert_page, signed_in


def buy_form(offer) -> dict[str, str]:
    return {"key": uuid.uuid4().hex, "offer": str(offer.pk), "accepted_name": "Carol C."}


def test_an_order_is_placed_from_the_dataset_page_once_however_often_it_is_sent(carol):
    offer, browser = OfferFactory(), signed_in(carol)
    url = f"/datasets/{offer.dataset.slug}/"
    page = browser.get(url)
    assert "License for $100.00" in assert_page(page)
    key = re.search(r'name="key" value="(\w+)"', page.content.decode())[1]
    sent = buy_form(offer) | {"key": key}

    first, again = browser.post(url + "order/", sent), browser.post(url + "order/", sent)

    order = Order.objects.get()
    assert first.url == again.url == f"/orders/{order.public_id}/"
    assert (order.buyer, order.accepted_name, order.total_micros) == (carol, "Carol C.", 100_000_000)
    assert "Pay at Stripe" in assert_page(browser.get(first.url))


def test_owners_see_what_others_pay_and_are_not_asked_to(carol):
    offer = OfferFactory(version__dataset__owner=carol)

    text = assert_page(signed_in(carol).get(f"/datasets/{offer.dataset.slug}/"))

    assert "What others see and pay." in text
    assert "License for" not in text


def test_an_order_at_a_price_that_has_changed_is_refused_with_both_prices(carol):
    offer = OfferFactory()
    OfferFactory(version=offer.version, price_micros=120_000_000)

    response = signed_in(carol).post(f"/datasets/{offer.dataset.slug}/order/", buy_form(offer))

    text = assert_page(response, 422)
    assert "The price has changed" in text and "120.00 USD, not 100.00 USD" in text
    assert not Order.objects.exists()


def test_an_order_needs_a_name_and_an_offer_of_that_dataset(carol):
    offer, other = OfferFactory(), OfferFactory()
    browser, url = signed_in(carol), f"/datasets/{offer.dataset.slug}/order/"

    assert "The order was not placed" in assert_page(browser.post(url, buy_form(offer) | {"accepted_name": ""}), 422)
    assert_page(browser.post(url, buy_form(other)), 404)
    assert not Order.objects.exists()


def test_a_viewer_cannot_buy(carol):
    viewer = User.objects.create_user("viewer@example.org", "correct horse battery staple")
    Membership.objects.create(party=carol, user=viewer, role=Membership.Role.VIEWER)
    carol.user = viewer
    offer, browser = OfferFactory(), signed_in(carol)

    assert "Only an owner of Carol can buy" in assert_page(browser.get(f"/datasets/{offer.dataset.slug}/"))
    response = browser.post(f"/datasets/{offer.dataset.slug}/order/", buy_form(offer))

    assert "Only an owner of Carol" in assert_page(response, 403)
    assert not Order.objects.exists()


def test_back_from_stripe_the_page_waits_for_the_webhook(carol):
    order, browser = OrderFactory(buyer=carol), signed_in(carol)
    url = f"/orders/{order.public_id}/?from=checkout"

    waiting = browser.get(url)
    fragment = browser.get(url, headers={"HX-Request": "true"})

    assert "Waiting for Stripe’s confirmation" in assert_page(waiting) and b"hx-get" in waiting.content
    assert fragment.content.strip().startswith(b'<div id="order-state"')
    assert "Nothing was charged" in assert_page(browser.get(f"/orders/{order.public_id}/?from=cancelled"))


def test_a_paid_order_leads_to_its_licenses(carol):
    order, browser = PaidOrderFactory(buyer=carol), signed_in(carol)
    page = browser.get(f"/orders/{order.public_id}/?from=checkout")

    assert "The licenses are yours" in assert_page(page) and b"hx-get" not in page.content
    licenses = browser.get("/licenses/")
    text = assert_page(licenses)
    title = order.lines.get().version.dataset.title
    assert title in text and order.lines.get().version.merkle_root in text


def test_a_download_is_a_signed_address(carol):
    license = LicenseFactory(licensee=carol)

    response = signed_in(carol).post(f"/licenses/{license.public_id}/download/")

    assert response.status_code == 303 and "/downloads/" in response.headers["Location"]


def test_strangers_find_no_order_and_no_license(carol, mallory):
    order, license, stranger = OrderFactory(buyer=carol), LicenseFactory(licensee=carol), signed_in(mallory)

    assert_page(stranger.get(f"/orders/{order.public_id}/"), 404)
    assert_page(stranger.post(f"/orders/{order.public_id}/checkout/"), 404)
    assert_page(stranger.post(f"/licenses/{license.public_id}/download/"), 404)
    assert "No order yet" in assert_page(stranger.get("/orders/"))
    assert "No license yet" in assert_page(stranger.get("/licenses/"))


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("url", ["/orders/", "/licenses/"])
def test_lists_take_the_same_number_of_queries_for_any_number_of_rows(carol, django_assert_num_queries, url, n_rows):
    for _ in range(n_rows):
        LicenseFactory(licensee=carol)
    browser = signed_in(carol)

    with django_assert_num_queries(7):  # session, user, membership, menu; count, rows, and their lines or the clock
        browser.get(url)


def test_an_order_says_until_when_it_can_be_paid_and_then_that_it_was_cancelled(carol):
    order, browser = OrderFactory(buyer=carol), signed_in(carol)
    url = f"/orders/{order.public_id}/"
    deadline = f"{order.expires_at:%H:%M}"

    text = assert_page(browser.get(url))
    assert "Pay by" in text and deadline in text and "Pay at Stripe" in text

    clock.advance(timedelta(hours=24))
    text = assert_page(browser.get(url))
    assert "Too late to pay" in text and "Pay at Stripe" not in text

    cancel_order(order=order)
    text = assert_page(browser.get(url))
    assert "Cancelled It was not paid by" in text and deadline in text
    assert "cancelled" in assert_page(browser.get("/orders/"))
