"""Stripe's webhooks, an endpoint and a secret each for our own account and for the connected ones."""

from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from marketplace.bodies import problem_document
from payouts.gateway import BadSignature
from payouts.models import StripeEvent
from payouts.services.events import receive_event


@csrf_exempt
@require_POST
def platform_webhook(request: HttpRequest) -> JsonResponse:
    return _receive(request, StripeEvent.Endpoint.PLATFORM)


@csrf_exempt
@require_POST
def connect_webhook(request: HttpRequest) -> JsonResponse:
    return _receive(request, StripeEvent.Endpoint.CONNECT)


def _receive(request: HttpRequest, endpoint: StripeEvent.Endpoint) -> JsonResponse:
    """200 once the event is stored, also when it was before; Stripe repeats whatever gets another answer."""
    signature = request.headers.get("Stripe-Signature", "")
    try:
        event = receive_event(payload=request.body, signature=signature, endpoint=endpoint)
    except BadSignature as error:
        return problem_document(error)
    return JsonResponse({"received": event.event_id})
