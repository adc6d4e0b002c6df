"""What Stripe tells us: verified, stored raw, then applied once, each by asking Stripe itself how things stand.

A webhook may be lost: we were away for longer than Stripe repeats it, or an endpoint was mistyped. So the lists of events that
Stripe keeps for thirty days are read too, and what is missing there is stored and applied as if it had come.
"""

import json
import logging
from collections.abc import Iterator
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import F, OuterRef, Q, Subquery
from django.utils import timezone

from marketplace import clock, jobs
from payouts import gateway
from payouts.models import EventSweep, PayeeAccount, Payment, Payout, StripeEvent
from payouts.services import disputes, payees, refunds, transfers
from payouts.services.bookings import book_checkout
from payouts.services.reconciliation import Difference

logger = logging.getLogger(__name__)

__all__ = ["apply_event", "book_checkout", "receive_event", "retry_failed_events", "sweep_events"]

REFUND_EVENTS = ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
#: A page is done: paid, or a bank confirms a debit; days later it has, or has refused it.
CHECKOUT_EVENTS = (
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
)
DISPUTE_EVENTS = tuple(
    f"charge.dispute.{what}" for what in ("created", "updated", "funds_withdrawn", "funds_reinstated", "closed")
)
BANK_EVENTS = ("payout.paid", "payout.failed", "payout.canceled")
#: What `apply_event` acts on, and so what is looked for.
APPLIED = {
    StripeEvent.Endpoint.PLATFORM: (
        *CHECKOUT_EVENTS,
        "charge.updated",
        *REFUND_EVENTS,
        "charge.refunded",
        *DISPUTE_EVENTS,
    ),
    StripeEvent.Endpoint.CONNECT: ("account.updated", *BANK_EVENTS),
}
#: Stripe keeps events this long, and lists one a little later than it happened.
EVENTS_KEPT = timedelta(days=30)
LISTED_WITHIN = timedelta(hours=1)
#: A payout is in the bank within about this long; a payee who has not finished onboarding is asked about as often.
ARRIVES_WITHIN = timedelta(days=3)
#: A bank that has taken a payout may still send it back for about a week; so long its payee's account is asked about, once a day.
BANK_MAY_RETURN = timedelta(days=10)
ASKED_AGAIN_AFTER = timedelta(days=1)
MAX_ACCOUNTS_AT_ONCE = 200


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
        case StripeEvent.Endpoint.PLATFORM, kind if kind in CHECKOUT_EVENTS:
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
        case StripeEvent.Endpoint.CONNECT, kind if kind in BANK_EVENTS:
            transfers.refresh_bank_payout(account=row.account, bank_payout=thing["id"])


def retry_failed_events() -> int:
    """Queue again what failed for no fault of the event's: Stripe was silent for longer than a job's attempts last.

    What a person must look at (a `DomainError`) stays failed. Returns how many.
    """
    failed = StripeEvent.unsettled().filter(error_code="internal")
    return sum(jobs.reopen(row) for row in failed.order_by("pk"))


def sweep_events(*, failures: list[Difference] | None = None) -> int:
    """Store and queue what Stripe has told and no webhook brought; returns how many.

    Ours are read since the newest one that was listed. Of connected accounts only those are asked that wait for a word: a payout
    that should be in the bank, or arrived lately and may come back, or an onboarding. One account's failure does not keep the others from being read.

    Args:
        failures: gets a difference for each account whose list could not be read; None: raise the first.
    """
    n_missed = 0
    for account in ["", *_waiting_accounts()]:
        try:
            n_missed += _sweep_account(account)
        except (gateway.StripeRefused, gateway.StripeUncertain) as error:
            if failures is None:
                raise
            failures.append(
                Difference("events_not_listed", f"of {account or 'our own account'}: {error}", subject=account)
            )
    return n_missed


def _waiting_accounts() -> Iterator[str]:
    """Those that were asked longest ago first."""
    late = Payout.objects.filter(status=Payout.Status.SENT, sent_at__lt=clock.now() - ARRIVES_WITHIN)
    arrived = Payout.objects.filter(status=Payout.Status.PAID, paid_at__gt=clock.now() - BANK_MAY_RETURN)
    asked = EventSweep.objects.filter(account=OuterRef("stripe_account_id")).values("swept_at")
    wall = timezone.now()
    not_lately = Q(asked_at=None) | Q(asked_at__lte=wall - LISTED_WITHIN)
    not_today = Q(asked_at=None) | Q(asked_at__lte=wall - ASKED_AGAIN_AFTER)
    waiting = PayeeAccount.objects.annotate(asked_at=Subquery(asked)).filter(
        (Q(transfers_active=False) | Q(stripe_account_id__in=late.values("destination"))) & not_lately
        | Q(stripe_account_id__in=arrived.values("destination")) & not_today
    )
    waiting = waiting.order_by(F("asked_at").asc(nulls_first=True), "pk")
    yield from waiting.values_list("stripe_account_id", flat=True)[:MAX_ACCOUNTS_AT_ONCE]


def _sweep_account(account: str) -> int:
    endpoint = StripeEvent.Endpoint.CONNECT if account else StripeEvent.Endpoint.PLATFORM
    known = EventSweep.objects.filter(account=account).first()
    since = known.swept_until - LISTED_WITHIN if known else clock.now() - EVENTS_KEPT
    newest, n_missed = since if known is None else known.swept_until, 0
    for event, payload in gateway.events_since(since, types=APPLIED[endpoint], account=account or None):
        newest = max(newest, event.created_at)
        with transaction.atomic():
            row, is_new = StripeEvent.objects.get_or_create(
                event_id=event.id,
                defaults={"endpoint": endpoint, "type": event.type, "account": account, "payload": payload},
            )
            if is_new:
                jobs.wake(row)
        if is_new:
            logger.warning("No webhook brought event=%s type=%s account=%s", event.id, event.type, account)
        n_missed += is_new
    # Only once all were stored: a reading that breaks off is repeated from where it began.
    EventSweep.objects.update_or_create(account=account, defaults={"swept_until": newest, "swept_at": timezone.now()})
    return n_missed
