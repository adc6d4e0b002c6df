"""A dataset and its versions. A version is immutable and named by its Merkle root once it is frozen."""

import uuid
from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from marketplace.jobs import Job


class Dataset(models.Model):
    """What a rights holder lists; its versions hold the records, its offers the price."""

    class Status(models.TextChoices):
        DRAFT = "draft"
        LISTED = "listed"
        WITHDRAWN = "withdrawn"  # no new sales; licenses already sold keep their terms

    class Modality(models.TextChoices):
        IMAGE = "image"
        TEXT = "text"
        TABULAR = "tabular"

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    owner = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="datasets")
    slug = models.SlugField(max_length=80, unique=True)
    title = models.CharField(max_length=120)
    summary = models.CharField(max_length=280, blank=True)
    description = models.TextField(blank=True)
    source = models.TextField(blank=True)  # where it comes from, whose it is, and under which license it came
    modality = models.CharField(max_length=8, choices=Modality, default=Modality.TABULAR)
    status = models.CharField(max_length=10, choices=Status, default=Status.DRAFT, db_index=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-pk"]

    def __str__(self) -> str:
        return self.title


class DatasetVersion(models.Model):
    """The records at one moment: normalised Parquet in object storage, a digest per record, a Merkle root over them."""

    class Status(models.TextChoices):
        DRAFT = "draft"  # an upload is being read
        FROZEN = "frozen"  # content and root are final
        PUBLISHED = "published"  # attested and, with an offer, for sale

    dataset = models.ForeignKey(Dataset, models.PROTECT, related_name="versions")
    number = models.PositiveIntegerField()
    status = models.CharField(max_length=10, choices=Status, default=Status.DRAFT)
    merkle_root = models.CharField(max_length=64, blank=True)  # hex of the RFC 6962 root over the records' digests
    n_records = models.PositiveBigIntegerField(default=0)
    n_copies = models.PositiveBigIntegerField(
        default=0
    )  # records that repeat an earlier one, here or in anything published
    size_bytes = models.PositiveBigIntegerField(default=0)  # of the normalised Parquet
    parquet_sha256 = models.CharField(max_length=64, blank=True)
    parquet_key = models.CharField(max_length=200, blank=True)  # key in object storage
    features = models.JSONField(default=dict, blank=True)  # content columns: {"name": …, "type": …, "shape": […]}
    statistics = models.JSONField(default=dict, blank=True)  # per column; labels with counts
    preview = models.JSONField(default=list, blank=True)  # the rows that the rights holder lets anyone see
    created_at = models.DateTimeField(default=timezone.now)
    frozen_at = models.DateTimeField(null=True, blank=True)
    published_at = models.DateTimeField(null=True, blank=True, db_index=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["dataset", "number"], name="version_number_once_per_dataset"),
            models.UniqueConstraint(
                fields=["merkle_root"], condition=~Q(merkle_root=""), name="version_is_named_by_its_root"
            ),
            models.CheckConstraint(
                condition=Q(status="draft") | (~Q(merkle_root="") & ~Q(parquet_key="") & Q(n_records__gt=0)),
                name="frozen_version_has_content",
            ),
            models.CheckConstraint(
                condition=Q(status="published", published_at__isnull=False)
                | (~Q(status="published") & Q(published_at__isnull=True)),
                name="published_version_has_its_time",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.dataset} v{self.number}"


class Upload(Job):
    """One file on its way to become a version: the ingest job and its report."""

    class Format(models.TextChoices):
        CSV = "csv"
        PARQUET = "parquet"

    task_name: ClassVar[str] = "marketplace.tasks.ingest_upload"

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    version = models.OneToOneField(DatasetVersion, models.PROTECT, related_name="upload")
    uploaded_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    filename = models.CharField(max_length=255)
    format = models.CharField(max_length=8, choices=Format)
    size_bytes = models.PositiveBigIntegerField()
    sha256 = models.CharField(max_length=64)
    file_key = models.CharField(max_length=200)  # key in object storage
    # {"content": ["pixels"] or ["p0", …], "label": "label", "rights_holder": "holder", "labeller": "labeller" or ""}
    mapping = models.JSONField()
    report = models.JSONField(default=dict, blank=True)  # counts for the uploader, never another party's records

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"{self.filename} → {self.version}"


class Attestation(models.Model):
    """A member with the authority says that the party may license this exact version; kept with its root, append-only."""

    version = models.OneToOneField(DatasetVersion, models.PROTECT, related_name="attestation")
    merkle_root = models.CharField(max_length=64)
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="+")
    signed_by = models.ForeignKey("marketplace.User", models.PROTECT, related_name="+")
    signed_name = models.CharField(max_length=120)
    statement = models.TextField()
    signed_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.signed_name} for {self.version}"
