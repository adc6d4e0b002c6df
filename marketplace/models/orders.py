"""An order has a line per dataset; a paid line is a license."""

import uuid
from datetime import datetime

from django.db import models
from django.db.models import Q

from marketplace.money import Money


class Order(models.Model):
    """placed → paid → refunded, or placed → cancelled at its deadline. One currency; the total is fixed when it is placed.

    Refunded means wholly: what was given back of a paid order's price is the refunds' to say.
    """

    class Status(models.TextChoices):
        PLACED = "placed"
        PAID = "paid"
        REFUNDED = "refunded"
        CANCELLED = "cancelled"

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    buyer = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="orders")
    placed_by = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")  # null: by API key
    api_key = models.ForeignKey("marketplace.ApiKey", models.PROTECT, null=True, related_name="orders")  # its spending
    status = models.CharField(max_length=10, choices=Status, default=Status.PLACED)
    total_micros = models.BigIntegerField()
    currency = models.CharField(max_length=3)
    key = models.CharField(max_length=255)  # the buyer's idempotency key
    request_sha256 = models.CharField(max_length=64)  # of what was asked under that key
    accepted_name = models.CharField(max_length=120)  # the buyer accepts the contract by name
    placed_at = models.DateTimeField()
    expires_at = models.DateTimeField()  # business time; unpaid by then, it is cancelled
    paid_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-placed_at", "-pk"]
        constraints = [
            models.UniqueConstraint(fields=["buyer", "key"], name="one_order_per_buyer_and_key"),
            models.CheckConstraint(condition=Q(total_micros__gt=0), name="order_total_positive"),
            models.CheckConstraint(
                condition=Q(status__in=["paid", "refunded"], paid_at__isnull=False)
                | (~Q(status__in=["paid", "refunded"]) & Q(paid_at__isnull=True)),
                name="paid_order_has_its_time",
            ),
        ]
        indexes = [models.Index(fields=["expires_at"], condition=Q(status="placed"), name="unpaid_orders_by_deadline")]

    def __str__(self) -> str:
        return f"Order {self.public_id}"

    @property
    def total(self) -> Money:
        return Money(self.total_micros, self.currency)


class OrderLine(models.Model):
    """One dataset of an order, at the terms of one offer version."""

    order = models.ForeignKey(Order, models.PROTECT, related_name="lines")
    offer = models.ForeignKey("marketplace.Offer", models.PROTECT, related_name="order_lines")
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="order_lines")
    price_micros = models.BigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["order", "version"], name="one_line_per_order_and_version"),
            models.CheckConstraint(condition=Q(price_micros__gt=0), name="line_price_positive"),
        ]

    def __str__(self) -> str:
        return f"{self.version} in {self.order}"

    @property
    def price(self) -> Money:
        return Money(self.price_micros, self.order.currency)


class License(models.Model):
    """The right to train on one version, from the moment its order is paid; the terms are the offer's, by hash."""

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    order_line = models.OneToOneField(OrderLine, models.PROTECT, related_name="license")
    licensee = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="licenses")
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="licenses")
    offer = models.ForeignKey("marketplace.Offer", models.PROTECT, related_name="licenses")
    policy_sha256 = models.CharField(max_length=64)
    granted_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    disclosure_due_at = models.DateTimeField()
    first_downloaded_at = models.DateTimeField(null=True, blank=True)  # the refund as of right ends here
    revoked_at = models.DateTimeField(null=True, blank=True)
    suspended_at = models.DateTimeField(null=True, blank=True)  # while the payment is disputed
    in_arrears_at = models.DateTimeField(null=True, blank=True)  # while a royalty report or invoice is long overdue

    class Meta:
        ordering = ["-granted_at", "-pk"]

    def __str__(self) -> str:
        return f"License of {self.version} to {self.licensee}"

    def is_live(self, at: datetime) -> bool:
        is_held = self.suspended_at is not None or self.in_arrears_at is not None
        return self.revoked_at is None and not is_held and self.granted_at <= at < self.expires_at
