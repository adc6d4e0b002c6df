"""Our own error in a division, put right: a new version of it, proposed by one person and booked when another approves.

The division and its lines stay. What a payee loses by the correction is a reclaim, what one gains a line of a further division
(`Division.corrects`); both are the correction's, and in each currency they are equal.
"""

from django.db import models
from django.db.models import F, Q

from marketplace.money import Money


class DivisionCorrection(models.Model):
    """One division anew: proposed → booked, or rejected. The lines are the whole new version, so that it can be read before."""

    class Status(models.TextChoices):
        PROPOSED = "proposed"
        BOOKED = "booked"
        REJECTED = "rejected"

    division = models.ForeignKey("payouts.Division", models.PROTECT, related_name="corrections")
    number = models.PositiveIntegerField()  # of the version that it makes; the division itself is version 1
    result = models.ForeignKey(
        "attribution.AttributionResult", models.PROTECT, null=True, related_name="+"
    )  # null: by count
    reason = models.TextField()  # the payees read it
    amount_micros = models.BigIntegerField()  # what the division still gives, refunds taken off
    status = models.CharField(max_length=8, choices=Status, default=Status.PROPOSED)
    proposed_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    proposed_at = models.DateTimeField()  # business time
    decided_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["division", "number"], condition=~Q(status="rejected"), name="one_correction_per_version"
            ),
            models.CheckConstraint(
                condition=Q(number__gte=2, amount_micros__gt=0), name="correction_follows_a_version"
            ),
            models.CheckConstraint(
                condition=Q(status="proposed", decided_by=None, decided_at=None)
                | (~Q(status="proposed") & Q(decided_by__isnull=False, decided_at__isnull=False)),
                name="decided_correction_knows_by_whom",
            ),
            models.CheckConstraint(
                condition=~Q(status="booked") | ~Q(decided_by=F("proposed_by")), name="correction_needs_a_second_person"
            ),
            models.CheckConstraint(condition=~Q(reason=""), name="correction_says_why"),
        ]

    def __str__(self) -> str:
        return f"Version {self.number} of {self.division}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.division.currency)


class CorrectionLine(models.Model):
    """What one payee had by the version before, and has by this one, in one role."""

    correction = models.ForeignKey(DivisionCorrection, models.PROTECT, related_name="lines")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="+")
    role = models.CharField(max_length=13)
    n_records = models.PositiveBigIntegerField()
    weight = models.BigIntegerField()
    before_micros = models.BigIntegerField()
    after_micros = models.BigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["correction", "party", "role"], name="one_line_per_correction_party_role"),
            models.CheckConstraint(
                condition=Q(before_micros__gte=0, after_micros__gte=0, weight__gte=0),
                name="correction_line_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.difference_micros} for {self.party} by {self.correction}"

    @property
    def difference_micros(self) -> int:
        return self.after_micros - self.before_micros
