from django.db import models
from django.utils import timezone


class ApiKey(models.Model):
    """A party's key to the API. Only its SHA-256 is kept; the prefix lets its owner recognise it."""

    class Scope(models.TextChoices):
        READ = "read"
        BUY = "buy"
        UPLOAD = "upload"
        DISCLOSE = "disclose"
        REPORT = "report"

    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="api_keys")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=16)
    key_sha256 = models.CharField(max_length=64, unique=True)  # of 256 random bits: no salt or stretching is needed
    scopes = models.JSONField()
    spending_limit_micros = models.BigIntegerField(null=True, blank=True)  # over the key's life, in any one currency
    created_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    created_at = models.DateTimeField(default=timezone.now)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"
