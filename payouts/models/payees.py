from django.db import models
from django.utils import timezone


class PayeeAccount(models.Model):
    """A party's connected account at Stripe, as Stripe last described it."""

    party = models.OneToOneField("marketplace.Party", models.PROTECT, related_name="payee_account")
    stripe_account_id = models.CharField(max_length=64, unique=True)
    details_submitted = models.BooleanField(default=False)
    transfers_active = models.BooleanField(default=False)
    payouts_enabled = models.BooleanField(default=False)
    requirements = models.JSONField(default=list)  # Stripe's names of what is still due
    created_at = models.DateTimeField(default=timezone.now)
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"{self.party} at Stripe"

    @property
    def is_ready(self) -> bool:
        return self.transfers_active
