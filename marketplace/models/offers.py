from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.money import MAX_MICROS, Money

#: An order below this cannot carry Stripe's fee (DESIGN §5).
MIN_ORDER_MICROS = 5_000_000


class Offer(models.Model):
    """One version of a dataset's terms. A change adds a row, so the rows are the public price history; append-only.

    Of the price, `platform_fee_bps + upfront_bps + pool_bps` = 10,000: the platform's fee, what is paid out by count at
    once, and the royalty pool that waits for a measured result.
    """

    class Currency(models.TextChoices):
        USD = "USD"
        EUR = "EUR"
        GBP = "GBP"
        JPY = "JPY"

    dataset = models.ForeignKey("marketplace.Dataset", models.PROTECT, related_name="offers")
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="offers")
    number = models.PositiveIntegerField()  # 1, 2, … within the dataset; the highest is the one on sale
    price_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3, choices=Currency, default=Currency.USD)
    platform_fee_bps = models.PositiveIntegerField(default=1_000)
    upfront_bps = models.PositiveIntegerField()
    pool_bps = models.PositiveIntegerField()
    royalty_bps = models.PositiveIntegerField(default=0)  # of a model's revenue, times the dataset's paid share in it
    royalty_cap_micros = models.BigIntegerField(
        null=True, blank=True
    )  # per license, lifetime, on this dataset's own part
    labellers_bps = models.PositiveIntegerField(default=0)  # of upfront, pool and royalties alike
    term_days = models.PositiveIntegerField(default=365, validators=[MinValueValidator(1)])
    seats = models.PositiveIntegerField(default=1, validators=[MinValueValidator(1)])
    allowed_uses = models.JSONField(default=list)  # of ALLOWED_USES
    disclosure_due_days = models.PositiveIntegerField(default=90)
    policy = models.JSONField()  # ODRL, JSON-LD
    policy_sha256 = models.CharField(max_length=64)
    contract_text = models.TextField()
    created_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["dataset", "-number"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "number"], name="offer_number_once_per_dataset"),
            models.CheckConstraint(
                condition=Q(price_micros__gte=MIN_ORDER_MICROS, price_micros__lte=MAX_MICROS),
                name="offer_price_in_range",
            ),
            models.CheckConstraint(
                condition=Q(platform_fee_bps=10_000 - F("upfront_bps") - F("pool_bps")),
                name="offer_parts_sum_to_the_price",
            ),
            models.CheckConstraint(
                condition=Q(labellers_bps__lte=10_000) & Q(royalty_bps__lte=10_000), name="offer_rates_in_range"
            ),
            models.CheckConstraint(
                condition=Q(royalty_cap_micros__isnull=True)
                | Q(royalty_cap_micros__gt=0, royalty_cap_micros__lte=MAX_MICROS),
                name="offer_cap_in_range",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.dataset}: offer {self.number}, {self.price}"

    @property
    def price(self) -> Money:
        return Money(self.price_micros, self.currency)

    @property
    def royalty_cap(self) -> Money | None:
        return None if self.royalty_cap_micros is None else Money(self.royalty_cap_micros, self.currency)
