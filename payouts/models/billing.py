"""Who is billed, what tax is added, and the numbered documents that say so."""

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.money import Money


class BillingProfile(models.Model):
    """How a party wants to be named on its invoices; what was issued keeps what it said then."""

    party = models.OneToOneField("marketplace.Party", models.PROTECT, related_name="billing_profile")
    legal_name = models.CharField(max_length=200)
    address = models.TextField()  # lines
    country = models.CharField(max_length=2)  # ISO 3166-1 alpha-2
    region = models.CharField(max_length=3, blank=True)  # ISO 3166-2, without the country: "CA" of "US-CA"
    vat_id = models.CharField(max_length=20, blank=True)  # with its country's prefix, checked
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return self.legal_name


class TaxRate(models.Model):
    """A tax on what is sold to buyers of one jurisdiction, from one day to another; none there: none is added.

    Rows never overlap and never change, but for the day on which an open-ended one ends (triggers).
    """

    jurisdiction = models.CharField(max_length=6)  # ISO 3166: "DE", or "US-CA" before "US"
    name = models.CharField(max_length=40)  # as the invoice calls it: "VAT"
    rate_bps = models.PositiveIntegerField()
    is_reversed = models.BooleanField(default=False)  # a buyer with a VAT id owes it itself, and is charged none
    valid_from = models.DateField()
    valid_until = models.DateField(null=True, blank=True)  # the last day; open-ended without
    created_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["jurisdiction", "-valid_from"]
        constraints = [
            models.CheckConstraint(condition=Q(rate_bps__gt=0, rate_bps__lte=10_000), name="tax_rate_in_range"),
            models.CheckConstraint(
                condition=Q(valid_until=None) | Q(valid_until__gte=F("valid_from")), name="tax_rate_days_in_order"
            ),
            models.CheckConstraint(
                condition=Q(jurisdiction__regex=r"^[A-Z]{2}(-[A-Z0-9]{1,3})?$"), name="tax_jurisdiction_is_iso_3166"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.rate_bps / 100:g} % ({self.jurisdiction})"


class DocumentSeries(models.Model):
    """How far one series of numbers got in one year. Only the trigger that numbers a document moves it on."""

    series = models.CharField(max_length=3)
    year = models.PositiveIntegerField()
    last_number = models.PositiveIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["series", "year"], name="one_row_per_series_and_year")]

    def __str__(self) -> str:
        return f"{self.series}-{self.year}"


class Document(models.Model):
    """An invoice or credit note, as it was issued: numbered without gaps by series and year, never changed.

    `content` holds every word and amount of it; the page and the PDF add nothing.
    """

    class Kind(models.TextChoices):
        INVOICE = "INV", "Invoice"
        CREDIT_NOTE = "CN", "Credit note"

    kind = models.CharField(max_length=3, choices=Kind)  # also its series
    year = models.PositiveIntegerField()
    number = models.PositiveIntegerField()  # given by the database
    buyer = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="documents")
    payment = models.ForeignKey("payouts.Payment", models.PROTECT, related_name="documents")
    refund = models.ForeignKey("payouts.Refund", models.PROTECT, null=True, related_name="documents")
    cancels = models.OneToOneField("self", models.PROTECT, null=True, related_name="cancelled_by")
    issued_on = models.DateField()  # business time
    due_on = models.DateField(null=True)
    net_micros = models.BigIntegerField()
    tax_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    purchase_order = models.CharField(max_length=60, blank=True)
    vat_id = models.CharField(max_length=20, blank=True)  # the buyer's
    content = models.JSONField()
    sha256 = models.CharField(max_length=64)  # of the content's canonical JSON
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(fields=["kind", "year", "number"], name="one_document_per_number"),
            models.UniqueConstraint(
                fields=["payment"], condition=Q(kind="INV", cancels=None), name="one_invoice_per_payment"
            ),
            models.UniqueConstraint(
                fields=["refund"], condition=Q(kind="CN", cancels=None), name="one_credit_note_per_refund"
            ),
            models.CheckConstraint(
                condition=Q(net_micros__gte=0, tax_micros__gte=0, number__gte=1), name="document_not_negative"
            ),
            models.CheckConstraint(
                condition=Q(kind="INV", refund=None)
                | Q(kind="CN", cancels=None, refund__isnull=False)
                | Q(kind="CN", cancels__isnull=False)
                | Q(kind="INV", cancels__isnull=False),
                name="credit_note_has_its_cause",
            ),
        ]

    def __str__(self) -> str:
        return self.reference

    @property
    def reference(self) -> str:
        return f"{self.kind}-{self.year}-{self.number:06}"

    @property
    def net(self) -> Money:
        return Money(self.net_micros, self.currency)

    @property
    def tax(self) -> Money:
        return Money(self.tax_micros, self.currency)

    @property
    def total(self) -> Money:
        return self.net + self.tax
