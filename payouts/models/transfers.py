"""Money that goes out: intent first (booked and committed), then the transfer at Stripe."""

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from marketplace.jobs import Job
from marketplace.money import Money


class PayoutRun(Job):
    """Everything due in one currency at one business time, as one resumable job."""

    task_name: ClassVar[str] = "payouts.tasks.execute_payout_run"

    currency = models.CharField(max_length=3)
    due_until = models.DateTimeField()  # business time
    key = models.CharField(max_length=120, unique=True)  # "run:USD:2026-12-31"
    planned_at = models.DateTimeField(null=True)

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return self.key


class Payout(models.Model):
    """One payee's money in one run: intended → sent → paid (in the bank), or refused and booked back."""

    class Status(models.TextChoices):
        INTENDED = "intended"  # booked to in_transit; Stripe may or may not know
        SENT = "sent"  # Stripe made the transfer
        PAID = "paid"  # the connected account's payout reached the bank
        REFUSED = "refused"  # Stripe definitely refused; booked back to payable

    run = models.ForeignKey(PayoutRun, models.PROTECT, related_name="payouts")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="payouts")
    destination = models.CharField(max_length=64)  # the connected account
    amount_micros = models.BigIntegerField()  # whole minor units
    currency = models.CharField(max_length=3)
    status = models.CharField(max_length=8, choices=Status, default=Status.INTENDED)
    attempt = models.PositiveIntegerField(default=1)  # in the idempotency key `payout:{id}:{attempt}`
    first_tried_at = models.DateTimeField(null=True)  # wall time; Stripe forgets a key after a day
    transfer_id = models.CharField(max_length=255, unique=True, null=True)
    bank_payout_id = models.CharField(max_length=255, blank=True)
    refusal_code = models.CharField(max_length=60, blank=True)
    refusal_message = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    intended_at = models.DateTimeField()  # business time
    sent_at = models.DateTimeField(null=True)
    paid_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(fields=["run", "party"], name="one_payout_per_run_and_party"),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="payout_positive"),
            models.CheckConstraint(
                condition=Q(status__in=["intended", "refused"]) | Q(transfer_id__isnull=False),
                name="sent_payout_has_its_transfer",
            ),
        ]

    def __str__(self) -> str:
        return f"Payout {self.pk}: {self.amount} to {self.party}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)
