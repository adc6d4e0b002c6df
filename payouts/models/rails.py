"""Payees whom Stripe does not reach: their money accrues, and staff send it over another rail.

ServedCountries   where Stripe says that it can transfer to, as it last said it
RailExport        a batch in one currency, proposed by one of the staff and approved by another
RailPayout        one payee's part: proposed → intended (booked) → sent, or returned and booked back
RailConfirmation  that it was sent, or came back: recorded by one person, booked when another has seen it on the statement
"""

from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.money import Money


class ServedCountries(models.Model):
    """Stripe's word on the countries whose payees it can transfer to from ours. Append-only: the latest counts."""

    platform_country = models.CharField(max_length=2)
    countries = models.JSONField()  # ISO 3166-1 alpha-2
    asked_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"{len(self.countries)} countries from {self.platform_country}"


class RailExport(models.Model):
    """Payouts over another rail than Stripe, in one currency. Nothing is booked before another one of the staff approves."""

    class Status(models.TextChoices):
        AWAITING = "awaiting"
        APPROVED = "approved"
        REJECTED = "rejected"

    key = models.CharField(max_length=80, unique=True)  # of the request
    currency = models.CharField(max_length=3)
    status = models.CharField(max_length=8, choices=Status, default=Status.AWAITING)
    proposed_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    proposed_at = models.DateTimeField()  # business time
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)  # business time

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.CheckConstraint(
                condition=Q(status="awaiting", decided_by=None, decided_at=None)
                | Q(status__in=["approved", "rejected"], decided_by__isnull=False, decided_at__isnull=False),
                name="rail_export_is_decided_by_somebody",
            ),
            models.CheckConstraint(
                condition=Q(decided_by=None) | ~Q(decided_by=F("proposed_by")), name="rail_export_has_four_eyes"
            ),
        ]

    def __str__(self) -> str:
        return f"Export {self.pk}"


class RailPayout(models.Model):
    """One payee's money in one export."""

    class Status(models.TextChoices):
        PROPOSED = "proposed"
        INTENDED = "intended"  # payable → in_transit_rail
        SENT = "sent"  # in_transit_rail → bank
        RETURNED = "returned"  # booked back
        DROPPED = "dropped"  # nothing was due any more when it was decided, or the export was rejected

    #: What counts as paid out.
    STANDING: ClassVar[list[str]] = ["intended", "sent"]

    export = models.ForeignKey(RailExport, models.PROTECT, related_name="payouts")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="rail_payouts")
    details = models.ForeignKey(
        "payouts.BankDetails", models.PROTECT, null=True, related_name="rail_payouts"
    )  # where it goes; none: before payees could enter them
    amount_micros = models.BigIntegerField()  # whole minor units
    currency = models.CharField(max_length=3)
    status = models.CharField(max_length=8, choices=Status, default=Status.PROPOSED)
    reference = models.CharField(max_length=120, blank=True)  # the bank's, once sent or returned
    intended_at = models.DateTimeField(null=True)  # business time
    created_at = models.DateTimeField(default=timezone.now)
    confirmed_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")  # the second one
    confirmed_at = models.DateTimeField(null=True)  # business time

    class Meta:
        ordering = ["pk"]
        constraints = [
            models.UniqueConstraint(fields=["export", "party"], name="one_rail_payout_per_export_and_party"),
            models.UniqueConstraint(
                fields=["party", "currency"],
                condition=Q(status__in=["proposed", "intended"]),
                name="one_open_rail_payout_per_party",
            ),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="rail_payout_positive"),
            models.CheckConstraint(
                condition=~Q(status__in=["sent", "returned"]) | (~Q(reference="") & Q(confirmed_by__isnull=False)),
                name="ended_rail_payout_says_by_whom",
            ),
        ]

    def __str__(self) -> str:
        return f"Rail payout {self.pk}: {self.amount}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class RailConfirmation(models.Model):
    """What the bank did with a rail payout: recorded by one person, booked when another has seen it on the statement."""

    class Outcome(models.TextChoices):
        SENT = "sent"
        RETURNED = "returned"  # it came back, or never left

    class Status(models.TextChoices):
        RECORDED = "recorded"
        BOOKED = "booked"
        REJECTED = "rejected"  # the record was wrong

    payout = models.ForeignKey(RailPayout, models.PROTECT, related_name="confirmations")
    outcome = models.CharField(max_length=8, choices=Outcome)
    reference = models.CharField(max_length=120)  # the bank statement's own number of what was sent or came back
    status = models.CharField(max_length=8, choices=Status, default=Status.RECORDED)
    recorded_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    recorded_at = models.DateTimeField()  # business time
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)  # business time

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["reference"], condition=~Q(status="rejected"), name="one_rail_confirmation_per_reference"
            ),
            models.UniqueConstraint(
                fields=["payout"], condition=Q(status="recorded"), name="one_open_confirmation_per_rail_payout"
            ),
            models.UniqueConstraint(
                fields=["payout", "outcome"],
                condition=~Q(status="rejected"),
                name="one_confirmation_per_rail_payout_and_outcome",
            ),
            models.CheckConstraint(condition=~Q(reference=""), name="rail_confirmation_names_the_transfer"),
            models.CheckConstraint(
                condition=Q(status="recorded", decided_by=None, decided_at=None)
                | (~Q(status="recorded") & Q(decided_by__isnull=False, decided_at__isnull=False)),
                name="decided_rail_confirmation_knows_by_whom",
            ),
            models.CheckConstraint(
                condition=~Q(status="booked") | ~Q(decided_by=F("recorded_by")),
                name="rail_confirmation_needs_a_second_person",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.payout} {self.get_outcome_display().lower()} by {self.reference}"

    @property
    def amount(self) -> Money:
        return self.payout.amount
