import pytest
from django.test import Client

from marketplace.api.keys import create_api_key
from marketplace.models import ApiKey
from payouts.errors import StripeUnavailable
from payouts.services import sales
from portal.pages import api
from tests.factories.marketplace import OrderFactory, PaidOrderFactory
from tests.pages import assert_page, signed_in

STRIPE = "https://checkout.stripe.com/c/pay/1"


@pytest.fixture
def opened(monkeypatch):
    """What Stripe would be asked; the local Stripe itself is in tests/payouts and tests/stories."""
    asked = []

    def start_checkout(**arguments):
        asked.append(arguments)
        return STRIPE

    monkeypatch.setattr(sales, "start_checkout", start_checkout)
    monkeypatch.setattr(api, "start_checkout", start_checkout)
    return asked


def test_paying_goes_to_stripe_by_303_and_comes_back_to_the_order(carol, opened):
    order = OrderFactory(buyer=carol)

    response = signed_in(carol).post(f"/orders/{order.public_id}/checkout/")

    assert (response.status_code, response.headers["Location"]) == (303, STRIPE)
    page = f"http://127.0.0.1:8000/orders/{order.public_id}/"
    assert opened == [{"order": order, "success_url": f"{page}?from=checkout", "cancel_url": f"{page}?from=cancelled"}]


def test_an_order_that_is_paid_is_not_paid_again(carol):
    order = PaidOrderFactory(buyer=carol)

    response = signed_in(carol).post(f"/orders/{order.public_id}/checkout/")

    assert "has been paid" in assert_page(response, 409)


def test_a_stripe_that_is_silent_is_a_page_that_says_so(carol, monkeypatch):
    def start_checkout(**arguments):
        raise StripeUnavailable("Stripe did not answer; nothing was charged. Try again in a minute.")

    monkeypatch.setattr(sales, "start_checkout", start_checkout)
    order = OrderFactory(buyer=carol)

    response = signed_in(carol).post(f"/orders/{order.public_id}/checkout/")

    assert "nothing was charged" in assert_page(response, 503)


def test_the_checkout_takes_no_get(carol):
    assert signed_in(carol).get(f"/orders/{OrderFactory(buyer=carol).public_id}/checkout/").status_code == 405


def key_of(party, *scopes: str) -> dict[str, str]:
    _, text = create_api_key(party=party, user=party.user, name="test", scopes=list(scopes))
    return {"Authorization": f"Bearer {text}"}


def test_the_api_opens_a_checkout_for_a_key_that_may_buy(carol, mallory, opened):
    order = OrderFactory(buyer=carol)
    url = f"/api/v1/orders/{order.public_id}/checkout/"

    assert Client().post(url, headers=key_of(carol, ApiKey.Scope.BUY)).json() == {"url": STRIPE}
    assert Client().post(url, headers=key_of(carol, ApiKey.Scope.READ)).status_code == 403
    assert Client().post(url, headers=key_of(mallory, ApiKey.Scope.BUY)).status_code == 404
    assert Client().post(url).status_code == 401
    assert len(opened) == 1
