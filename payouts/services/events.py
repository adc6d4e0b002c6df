"""What Stripe tells us: verified, stored raw, then applied once, each by asking Stripe itself how things stand."""

import json
import logging

from django.conf import settings
from django.db import transaction

from marketplace import jobs
from payouts import gateway
from payouts.models import Payment, StripeEvent
from payouts.services import disputes, payees, refunds, transfers
from payouts.services.bookings import book_checkout

logger = logging.getLogger(__name__)

__all__ = ["apply_event", "book_checkout", "receive_event", "retry_failed_events"]

REFUND_EVENTS = ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
PAID_EVENTS = ("checkout.session.completed", "checkout.session.async_payment_succeeded")


def receive_event(*, payload: bytes, signature: str, endpoint: StripeEvent.Endpoint) -> StripeEvent:
    """Keep a verified event and queue it; the same one again is kept once.

    Raises:
        gateway.BadSignature: nothing was kept.
    """
    secret = {
        StripeEvent.Endpoint.PLATFORM: settings.STRIPE_WEBHOOK_SECRET,
        StripeEvent.Endpoint.CONNECT: settings.STRIPE_CONNECT_WEBHOOK_SECRET,
    }[endpoint]
    event = gateway.parse_event(payload, signature, secret)
    with transaction.atomic():
        row, is_new = StripeEvent.objects.get_or_create(
            event_id=event.id,
            defaults={
                "endpoint": endpoint,
                "type": event.type,
                "account": event.account or "",
                "payload": payload.decode("utf-8"),
            },
        )
        if is_new:
            jobs.wake(row)
    logger.info("Received event=%s type=%s new=%s", event.id, event.type, is_new)
    return row


def apply_event(row: StripeEvent) -> None:
    """Act on a stored event; of a type that concerns nobody here, keep it and do nothing.

    Raises:
        DomainError: a person must look (`PaymentMismatch`, `OrderNotPayable`); reconciliation names it until then.
        checkouts.NotBookedByStripe, attempts.StillUncertain, gateway.StripeRefused, gateway.StripeUncertain: the job comes
            back.
    """
    thing = json.loads(row.payload)["data"]["object"]
    match row.endpoint, row.type:
        case StripeEvent.Endpoint.PLATFORM, kind if kind in PAID_EVENTS:
            book_checkout(thing["id"])
        case StripeEvent.Endpoint.PLATFORM, "charge.updated":
            # Stripe books a charge a moment after it succeeds; the session's own event may have come too early.
            named = (thing.get("metadata") or {}).get("payment", "")
            waiting = Payment.objects.filter(pk=int(named), status=Payment.Status.OPEN) if named.isdigit() else []
            for payment in waiting:
                if payment.checkout_id:
                    book_checkout(payment.checkout_id)
        case StripeEvent.Endpoint.PLATFORM, kind if kind in REFUND_EVENTS:
            refunds.refresh_refund(thing["id"])
        case StripeEvent.Endpoint.PLATFORM, "charge.refunded":
            refunds.refresh_refunds_of(thing["id"])
        case StripeEvent.Endpoint.PLATFORM, kind if kind.startswith("charge.dispute."):
            disputes.refresh_dispute(thing["id"])
        case StripeEvent.Endpoint.CONNECT, "account.updated":
            payees.refresh_payee(row.account)
        case StripeEvent.Endpoint.CONNECT, "payout.paid":
            transfers.confirm_in_bank(account=row.account, bank_payout=thing["id"])


def retry_failed_events() -> int:
    """Queue again what failed for no fault of the event's: Stripe was silent for longer than a job's attempts last.

    What a person must look at (a `DomainError`) stays failed. Returns how many.
    """
    failed = StripeEvent.objects.filter(status=jobs.Job.Status.FAILED, error_code="internal")
    return sum(jobs.reopen(row) for row in failed.order_by("pk"))
