"""The API's way to a checkout: the same service as the page's, for a key that may buy."""

from django.shortcuts import get_object_or_404
from django.urls import path, reverse
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.status import HTTP_201_CREATED
from rest_framework.views import APIView

from marketplace.api.keys import acting_key, idempotency_key
from marketplace.models import ApiKey
from marketplace.selectors import orders_visible_to
from payouts.api.serializers import CheckoutOutput, DocumentOutput, InvoiceOrderInput, RefundOutput
from payouts.api.views import IDEMPOTENCY_KEY
from payouts.selectors import refunds_of
from payouts.services.refunds import refund_of_right
from payouts.services.sales import invoice_order, start_checkout
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


class OrderInvoiceView(APIView):
    scopes = {"post": ApiKey.Scope.BUY}

    @extend_schema(
        operation_id="orders_invoice",
        summary="Have an order invoiced",
        description="Issues the order's invoice, to be paid by its due day by bank transfer or on Stripe's page; again, it is the "
        "same one. Above what a card pays at once it is the only way. Needs your billing address.",
        parameters=[IDEMPOTENCY_KEY],
        request=InvoiceOrderInput,
        responses={201: DocumentOutput},
    )
    def post(self, request: Request, public_id: str) -> Response:
        order = get_object_or_404(orders_visible_to(acting_key(request).party), public_id=public_id)
        idempotency_key(request)  # there is one invoice whatever the key
        data = InvoiceOrderInput(data=request.data)
        data.is_valid(raise_exception=True)
        document = invoice_order(order=order, **data.validated_data)
        return Response(DocumentOutput(document).data, status=HTTP_201_CREATED)


class OrderRefundsView(APIView):
    scopes = {"get": ApiKey.Scope.READ, "post": ApiKey.Scope.BUY}

    @extend_schema(
        operation_id="orders_refunds_list",
        summary="What went back of an order",
        description="Each refund with its state, newest first.",
        responses={200: RefundOutput(many=True)},
    )
    def get(self, request: Request, public_id: str) -> Response:
        order = get_object_or_404(orders_visible_to(acting_key(request).party), public_id=public_id)
        return Response(RefundOutput(refunds_of(order), many=True).data)

    @extend_schema(
        operation_id="orders_refunds_create",
        summary="Give back what was never downloaded",
        description="The refund as of right: the price of every dataset of the order that was not downloaded goes back the "
        "way it was paid, and its license ends. Asking again answers with the same refund. Refused once everything was downloaded, and "
        "while the payment is disputed.",
        parameters=[IDEMPOTENCY_KEY],
        request=None,
        responses={201: RefundOutput},
    )
    def post(self, request: Request, public_id: str) -> Response:
        order = get_object_or_404(orders_visible_to(acting_key(request).party), public_id=public_id)
        idempotency_key(
            request
        )  # every write that moves money has one; what is given back once is not given twice anyway
        refund = refund_of_right(order=order, user=None)
        return Response(RefundOutput(refund).data, status=HTTP_201_CREATED)


paths = [
    path("orders/<uuid:public_id>/checkout/", OrderCheckoutView.as_view(), name="api-order-checkout"),
    path("orders/<uuid:public_id>/invoice/", OrderInvoiceView.as_view(), name="api-order-invoice"),
    path("orders/<uuid:public_id>/refunds/", OrderRefundsView.as_view(), name="api-order-refunds"),
]
