from django.db import models
from django.utils import timezone


class AuditEvent(models.Model):
    """Who did what to what, and when; append-only (a trigger refuses UPDATE, DELETE and TRUNCATE)."""

    happened_at = models.DateTimeField(default=timezone.now, db_index=True)
    actor = models.ForeignKey("marketplace.User", models.PROTECT, null=True, related_name="+")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, null=True, related_name="+")
    action = models.CharField(max_length=60)  # "offer.published"
    target = models.CharField(max_length=120)  # "offer:17"
    detail = models.JSONField(default=dict)  # ids and amounts; never e-mails, bank details or record contents

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"{self.action} {self.target}"
