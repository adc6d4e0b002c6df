"""A licensee reports a model's revenue; an invoice follows, a line per cited dataset with a rate."""

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.money import Money


class RoyaltyReport(models.Model):
    """A model's revenue in one period and currency, as its owner states it; never edited, only replaced by a later one.

    A report stands unless another replaces it or its invoice was refunded wholly; no two that stand overlap (a trigger).
    """

    model = models.ForeignKey("marketplace.TrainedModel", models.PROTECT, related_name="royalty_reports")
    licensee = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="royalty_reports")
    period_start = models.DateField()
    period_end = models.DateField()  # inclusive
    revenue_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    key = models.CharField(max_length=255)
    request_sha256 = models.CharField(max_length=64)
    reported_at = models.DateTimeField()
    replaces = models.OneToOneField("self", models.PROTECT, null=True, related_name="replaced_by")
    note = models.TextField(blank=True)  # of a correction: why

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["licensee", "key"], name="one_report_per_licensee_and_key"),
            models.CheckConstraint(
                condition=Q(replaces=None, note="") | (Q(replaces__isnull=False) & ~Q(note="")),
                name="correction_of_a_report_says_why",
            ),
            models.CheckConstraint(condition=Q(period_end__gte=F("period_start")), name="report_period_in_order"),
            models.CheckConstraint(condition=Q(revenue_micros__gte=0), name="report_revenue_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.model} {self.period_start}–{self.period_end}"

    @property
    def revenue(self) -> Money:
        return Money(self.revenue_micros, self.currency)


class RoyaltyInvoice(models.Model):
    """What the report makes due. The total is rounded down to whole minor units; the rest is never charged.

    Below what Stripe charges it is carried: asked for with the licensee's next invoice in the currency, `carried_into`.
    """

    class Status(models.TextChoices):
        OPEN = "open"
        PAID = "paid"
        NOTHING_DUE = "nothing_due"
        CARRIED = "carried"  # too little to charge: waits for the next one, or is asked for with it
        VOID = "void"  # a correction of its report took its place before it was paid
        REFUNDED = "refunded"  # wholly: neither its period nor its license's cap is used any more

    report = models.OneToOneField(RoyaltyReport, models.PROTECT, related_name="invoice")
    total_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    platform_fee_bps = models.PositiveIntegerField()
    status = models.CharField(max_length=11, choices=Status, default=Status.OPEN)
    issued_at = models.DateTimeField(default=timezone.now)
    due_on = models.DateField(null=True)  # of an open one
    carried_into = models.ForeignKey("self", models.PROTECT, null=True, related_name="carried")
    purchase_order = models.CharField(max_length=60, blank=True)  # the licensee's own number for it
    paid_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(total_micros__gte=0), name="invoice_not_negative"),
            models.CheckConstraint(
                condition=Q(carried_into=None) | Q(status__in=["carried", "paid", "refunded"]),
                name="only_a_carried_invoice_is_asked_for_with_another",
            ),
        ]

    def __str__(self) -> str:
        return f"Royalty invoice {self.pk}"

    @property
    def total(self) -> Money:
        return Money(self.total_micros, self.currency)

    @property
    def asked_with_it(self) -> list["RoyaltyInvoice"]:
        """This invoice and those that were carried into it, whose payment is one."""
        return [self, *self.carried.order_by("pk")]

    @property
    def demand(self) -> Money:
        """What is asked for: its own total and what was carried into it."""
        return Money(sum(one.total_micros for one in self.asked_with_it), self.currency)


class RoyaltyInvoiceLine(models.Model):
    """One dataset's part: revenue · share · rate, capped as its license says."""

    invoice = models.ForeignKey(RoyaltyInvoice, models.PROTECT, related_name="lines")
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="+")
    license = models.ForeignKey("marketplace.License", models.PROTECT, related_name="royalty_lines")
    result = models.ForeignKey("attribution.AttributionResult", models.PROTECT, related_name="+")
    share_ppq = models.BigIntegerField()
    rate_bps = models.PositiveIntegerField()
    amount_micros = models.BigIntegerField()  # after the cap and the rounding of the total
    is_capped = models.BooleanField(default=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["invoice", "version"], name="one_line_per_invoice_and_version"),
            models.CheckConstraint(condition=Q(amount_micros__gte=0), name="invoice_line_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.version} in {self.invoice}"
