"""The API's way to a checkout: the same service as the page's, for a key that may buy."""

from django.shortcuts import get_object_or_404
from django.urls import path, reverse
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from marketplace.api.keys import acting_key
from marketplace.models import ApiKey
from marketplace.selectors import orders_visible_to
from payouts.api.serializers import CheckoutOutput
from payouts.services.sales import start_checkout
from portal.pages.views import checkout_urls


class OrderCheckoutView(APIView):
    scopes = {"post": ApiKey.Scope.BUY}

    @extend_schema(
        operation_id="orders_checkout",
        summary="Open a checkout",
        description="Opens a checkout at Stripe for a placed order, or answers with the one that is open. "
        "The order is paid once Stripe confirms it; poll the order.",
        request=None,
        responses={200: CheckoutOutput},
    )
    def post(self, request: Request, public_id: str) -> Response:
        order = get_object_or_404(orders_visible_to(acting_key(request).party), public_id=public_id)
        url = start_checkout(order=order, **checkout_urls(reverse("order", args=[order.public_id])))
        return Response(CheckoutOutput({"url": url}).data)


paths = [path("orders/<uuid:public_id>/checkout/", OrderCheckoutView.as_view(), name="api-order-checkout")]
