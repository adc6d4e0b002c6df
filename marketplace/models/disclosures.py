"""What a trainer says a model was trained on: a bibliography that a program can check."""

import uuid

from django.db import models
from django.db.models import Q
from django.utils import timezone


class TrainedModel(models.Model):
    """A model's public page; its disclosures are its versions."""

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    owner = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="models")
    slug = models.SlugField(max_length=80, unique=True)
    name = models.CharField(max_length=120)
    summary = models.CharField(max_length=280, blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return self.name


class Disclosure(models.Model):
    """One disclosure document, kept as it was sent (canonical JSON) under its digest; immutable."""

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    model = models.ForeignKey(TrainedModel, models.PROTECT, related_name="disclosures")
    number = models.PositiveIntegerField()
    document = models.JSONField()
    document_sha256 = models.CharField(max_length=64, unique=True)
    disclosed_at = models.DateTimeField()
    embargo_until = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["model", "number"], name="disclosure_number_once_per_model")]
        ordering = ["model", "-number"]

    def __str__(self) -> str:
        return f"{self.model} disclosure {self.number}"


class Citation(models.Model):
    """One dataset version that a disclosure cites, under the license that allows it."""

    disclosure = models.ForeignKey(Disclosure, models.PROTECT, related_name="citations")
    position = models.PositiveIntegerField()  # in the document; the training records are concatenated in this order
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="citations")
    license = models.ForeignKey("marketplace.License", models.PROTECT, related_name="citations")
    n_records = models.PositiveBigIntegerField()
    selection_sha256 = models.CharField(max_length=64)  # see DESIGN §3: the digest of the exact selection

    class Meta:
        ordering = ["disclosure", "position"]
        constraints = [
            models.UniqueConstraint(fields=["disclosure", "version"], name="one_citation_per_disclosure_and_version"),
            models.UniqueConstraint(fields=["disclosure", "position"], name="citation_position_once"),
            models.CheckConstraint(condition=Q(n_records__gt=0), name="citation_of_some_records"),
        ]

    def __str__(self) -> str:
        return f"{self.disclosure} cites {self.version}"
