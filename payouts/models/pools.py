"""What waits to be divided, and every line of every division."""

from django.apps import apps
from django.contrib.postgres.indexes import BrinIndex
from django.db import models
from django.db.models import F, OuterRef, Q, Subquery, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone

from marketplace.money import Money


class RoyaltyPoolQuerySet(models.QuerySet["RoyaltyPool"]):
    def with_left(self) -> "RoyaltyPoolQuerySet":
        """Annotate `left_micros`: the amount less what refunds and disputes have taken, whether released or not."""
        taken = (
            apps.get_model("payouts", "ClawbackLine")
            .objects.filter(order_line=OuterRef("order_line"), clawback__undo=None)
            .values("order_line")
            .annotate(sum=Sum("pool_micros"))
            .values("sum")
        )
        left = F("amount_micros") - Coalesce(Subquery(taken, output_field=models.BigIntegerField()), 0)
        return self.annotate(left_micros=left)


class RoyaltyPool(models.Model):
    """The part of one order line's price that waits for a measured result; released once, less what went back before."""

    order_line = models.OneToOneField("marketplace.OrderLine", models.PROTECT, related_name="pool")
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="pools")
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    deadline = models.DateTimeField()  # then the best result there is divides it, or the count
    released_at = models.DateTimeField(null=True)
    left_micros: int  # where the query asked for it: `with_left`

    objects = RoyaltyPoolQuerySet.as_manager()

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(amount_micros__gt=0), name="pool_positive")]

    def __str__(self) -> str:
        return f"Pool of {self.order_line}"

    @property
    def code(self) -> str:
        """Of its account."""
        return f"pool:{self.pk}:{self.currency}"

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class PayeeCount(models.Model):
    """Distinct records of a published version that one party is paid for in one role; written once, all of a version at once.

    What `marketplace.selectors.money_counts` says of a published version never changes, and it reads every record to say it.
    """

    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="+")
    role = models.CharField(max_length=13)  # of DivisionLine.Role
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="+")
    n_records = models.PositiveBigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["version", "role", "party"], name="one_count_per_version_role_party"),
            models.CheckConstraint(condition=Q(n_records__gt=0), name="payee_count_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.party}: {self.n_records} of {self.version}"


class Division(models.Model):
    """One amount divided among one version's payees: an upfront share, a pool, or a dataset's part of a royalty."""

    class Source(models.TextChoices):
        UPFRONT = "upfront"
        POOL = "pool"
        ROYALTY = "royalty"
        CORRECTION = "correction"  # what payees gain by a corrected division

    key = models.CharField(max_length=120, unique=True)  # "upfront:line:3", "release:pool:3", "royalty:line:9"
    source = models.CharField(max_length=10, choices=Source)
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="divisions")
    order_line = models.ForeignKey("marketplace.OrderLine", models.PROTECT, null=True, related_name="divisions")
    pool = models.OneToOneField(RoyaltyPool, models.PROTECT, null=True, related_name="division")
    invoice_line = models.OneToOneField(
        "payouts.RoyaltyInvoiceLine", models.PROTECT, null=True, related_name="division"
    )
    corrects = models.OneToOneField("payouts.DivisionCorrection", models.PROTECT, null=True, related_name="gains")
    result = models.ForeignKey(
        "attribution.AttributionResult", models.PROTECT, null=True, related_name="divisions"
    )  # null: by count
    amount_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    labellers_bps = models.PositiveIntegerField()
    # The sums of each pot's weights, zero lines included, so that a line can be recomputed without the others.
    holders_weight = models.BigIntegerField(default=0)
    labellers_weight = models.BigIntegerField(default=0)  # 0: nobody labelled, there is no such pot
    due_at = models.DateTimeField()  # the later of the hold and the charge's available_on
    divided_at = models.DateTimeField()  # business time

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="division_positive"),
            models.CheckConstraint(
                condition=Q(source="correction", corrects__isnull=False)
                | (~Q(source="correction") & Q(corrects__isnull=True)),
                name="only_a_correction_corrects",
            ),
        ]

    def __str__(self) -> str:
        return self.key

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


class DivisionLine(models.Model):
    """What one payee gets of one division in one role, with the integer weight that gave it; nobody gets a zero line."""

    class Role(models.TextChoices):
        RIGHTS_HOLDER = "rights_holder"
        LABELLER = "labeller"

    # The indexes below begin with each of the two. No foreign keys in the database: both are looked up for each statement's lines
    # at once (migration `0021_lines_without_row_checks`), and neither a division nor a party is ever deleted.
    division = models.ForeignKey(Division, models.PROTECT, related_name="lines", db_constraint=False, db_index=False)
    party = models.ForeignKey(
        "marketplace.Party", models.PROTECT, related_name="division_lines", db_constraint=False, db_index=False
    )
    role = models.CharField(max_length=13, choices=Role)
    n_records = models.PositiveBigIntegerField()
    weight = models.BigIntegerField()  # records when by count, parts per quadrillion when by result
    amount_micros = models.BigIntegerField()
    due_at = models.DateTimeField()  # the division's, or later for a payee on a longer hold
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["division", "party", "role"], name="one_line_per_division_party_role"),
            models.CheckConstraint(condition=Q(amount_micros__gt=0), name="line_positive"),
        ]
        indexes = [
            models.Index(fields=["party", "due_at"], name="line_due"),
            BrinIndex(
                fields=["due_at"], autosummarize=True, name="lines_not_yet_due"
            ),  # lines are nearly in this order
        ]

    def __str__(self) -> str:
        return f"{self.party}: {self.amount_micros} of {self.division}"
