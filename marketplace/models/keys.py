from datetime import timedelta
from typing import ClassVar

from django.db import models
from django.db.models import F, Q
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


class StaffKey(models.Model):
    """A staff member's own key to the desk's API: it acts as the person, and ends with what lets the person in.

    Only its SHA-256 is kept. Whoever stops being active staff, or takes away the second factor that the key was made with, loses
    it for good: triggers of migration `0012_staff_key_rules` revoke it in the same transaction and write that into the audit log.
    """

    class Scope(models.TextChoices):
        READ = "desk:read"
        ACT = "desk:act"

    LONGEST: ClassVar[timedelta] = timedelta(days=90)

    user = models.ForeignKey("marketplace.User", models.PROTECT, related_name="staff_keys")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=16)
    key_sha256 = models.CharField(max_length=64, unique=True)  # of 256 random bits: no salt or stretching is needed
    scopes = models.JSONField()
    second_factor = models.ForeignKey("mfa.Authenticator", models.SET_NULL, null=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now)  # wall time, as all of these
    expires_at = models.DateTimeField()
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.CheckConstraint(
                condition=Q(expires_at__gt=F("created_at"), expires_at__lte=F("created_at") + timedelta(days=90)),
                name="staff_key_lasts_ninety_days_at_most",
            ),
            models.CheckConstraint(
                condition=Q(second_factor__isnull=False) | Q(revoked_at__isnull=False),
                name="staff_key_stands_on_a_second_factor",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"

    @property
    def is_alive(self) -> bool:
        return self.revoked_at is None and self.expires_at > timezone.now()


class StaffAct(models.Model):
    """What one staff member did by a key, and the answer they got: the same request again is answered with it. Append-only."""

    user = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    key = models.ForeignKey(StaffKey, models.PROTECT, related_name="acts")
    idempotency_key = models.CharField(max_length=255)
    path = models.CharField(max_length=255)
    asked_sha256 = models.CharField(max_length=64)  # of path and body
    answer_status = models.PositiveSmallIntegerField()
    answer = models.JSONField()
    acted_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(fields=["user", "idempotency_key"], name="one_act_per_person_and_idempotency_key")
        ]

    def __str__(self) -> str:
        return f"{self.path} by {self.key}"
