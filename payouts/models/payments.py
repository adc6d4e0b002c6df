"""Money that comes in: a checkout per order or royalty invoice, and the events that Stripe sends."""

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.money import Money


class Payment(models.Model):
    """One checkout at Stripe for one order or one royalty invoice: open → paid → settled (its funds are available)."""

    class Status(models.TextChoices):
        OPEN = "open"
        PAID = "paid"

    order = models.OneToOneField("marketplace.Order", models.PROTECT, null=True, related_name="payment")
    invoice = models.OneToOneField("payouts.RoyaltyInvoice", models.PROTECT, null=True, related_name="payment")
    status = models.CharField(max_length=4, choices=Status, default=Status.OPEN)
    currency = models.CharField(max_length=3)
    amount_micros = models.BigIntegerField()  # what the buyer is charged, whole minor units
    checkout_id = models.CharField(max_length=255, unique=True, null=True)  # null until Stripe has answered
    checkout_url = models.TextField(blank=True)
    checkout_attempt = models.PositiveIntegerField(
        default=1
    )  # in the idempotency key; rises when a session has expired, and when the key would only repeat an error
    charge_id = models.CharField(max_length=255, unique=True, null=True)
    balance_transaction_id = models.CharField(max_length=255, unique=True, null=True)
    fee_micros = models.BigIntegerField(null=True)  # Stripe's, from the balance transaction
    available_on = models.DateTimeField(null=True)
    created_at = models.DateTimeField(default=timezone.now)
    paid_at = models.DateTimeField(null=True)
    settled_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(order__isnull=False, invoice__isnull=True) | Q(order__isnull=True, invoice__isnull=False),
                name="payment_is_for_one_thing",
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="payment_positive"),
            models.CheckConstraint(
                condition=Q(status="open")
                | Q(
                    charge_id__isnull=False,
                    balance_transaction_id__isnull=False,
                    fee_micros__isnull=False,
                    available_on__isnull=False,
                    paid_at__isnull=False,
                ),
                name="paid_payment_knows_its_charge",
            ),
        ]

    def __str__(self) -> str:
        return f"Payment {self.pk}: {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class StripeEvent(Job):
    """A verified event, stored raw before anything is done with it, applied once."""

    class Endpoint(models.TextChoices):
        PLATFORM = "platform"
        CONNECT = "connect"

    task_name: ClassVar[str] = "payouts.tasks.apply_stripe_event"

    event_id = models.CharField(max_length=255, unique=True)
    endpoint = models.CharField(max_length=8, choices=Endpoint)
    type = models.CharField(max_length=100)
    account = models.CharField(max_length=64, blank=True)  # the connected account it speaks of
    payload = models.TextField()
    received_at = models.DateTimeField(default=timezone.now)

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"{self.type} {self.event_id}"


class EventSweep(models.Model):
    """Up to when an account's list of events at Stripe was read, to find what no webhook brought."""

    account = models.CharField(max_length=64, unique=True)  # a connected one; empty: our own
    swept_until = models.DateTimeField()  # Stripe's time of the newest event that was listed
    swept_at = models.DateTimeField()  # wall time

    def __str__(self) -> str:
        return f"{self.account or 'our own'} until {self.swept_until}"
