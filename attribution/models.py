"""Evidence: what was handed in, what was replayed, and what each owner's records did for a model."""

import uuid
from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from marketplace.jobs import Job

#: A share of 1 in parts per quadrillion: 64-bit integers hold it and leave room for a thousand-fold sum.
PPQ = 10**15


class Artifact(models.Model):
    """Bytes in object storage under their SHA-256: checkpoints, initial states, evaluation queries, engine output."""

    class Kind(models.TextChoices):
        STATE = "state"  # safetensors
        QUERIES = "queries"  # Parquet, the dataset's columns
        PLAN = "plan"  # the engine's plan, JSON
        ROUND = "round"  # a shard's output
        VALUES = "values"  # records' values, Parquet

    sha256 = models.CharField(max_length=64)
    kind = models.CharField(max_length=10, choices=Kind)
    owner = models.ForeignKey(
        "marketplace.Party", models.PROTECT, null=True, related_name="artifacts"
    )  # null: the platform
    size_bytes = models.PositiveBigIntegerField()
    key = models.CharField(max_length=200)
    registered_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["sha256", "kind", "owner"], name="artifact_once_per_owner", nulls_distinct=False
            ),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.sha256[:12]}"


class Verification(Job):
    """One replay of a disclosure: does this recipe, on these records, give these weights?"""

    class Verdict(models.TextChoices):
        MATCH = "match"
        MISMATCH = "mismatch"

    task_name: ClassVar[str] = "attribution.tasks.verify_disclosure"

    disclosure = models.OneToOneField("marketplace.Disclosure", models.PROTECT, related_name="verification")
    verdict = models.CharField(max_length=8, choices=Verdict, blank=True)
    report = models.JSONField(default=dict, blank=True)  # the engine's verify.json

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"Verification of {self.disclosure}"


class AttributionRun(Job):
    """One measurement of a disclosure: plan → shards → merge. The run itself is the job that plans and, last, merges."""

    task_name: ClassVar[str] = "attribution.tasks.advance_run"
    reopened_codes = ("internal", "run_failed")

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    disclosure = models.ForeignKey("marketplace.Disclosure", models.PROTECT, related_name="runs")
    grade = models.CharField(max_length=9)  # AttributionResult.Grade
    budget = models.FloatField()  # run equivalents
    seed = models.BigIntegerField(default=0)
    # The engine's plan, a number per record; null until made.
    plan = models.ForeignKey(Artifact, models.PROTECT, null=True, blank=True, related_name="+")

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["disclosure", "grade", "budget", "seed"], name="one_run_per_question"),
        ]

    def __str__(self) -> str:
        return f"Run {self.pk} of {self.disclosure}"


class Shard(Job):
    """One round of masks: about a minute of replays, whose output is an artifact."""

    task_name: ClassVar[str] = "attribution.tasks.execute_shard"

    run = models.ForeignKey(AttributionRun, models.PROTECT, related_name="shards")
    number = models.PositiveIntegerField()
    output = models.ForeignKey(Artifact, models.PROTECT, null=True, blank=True, related_name="+")

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["run", "number"], name="shard_number_once_per_run"),
        ]

    def __str__(self) -> str:
        return f"Shard {self.number} of run {self.run_id}"


class AttributionResult(models.Model):
    """What a model owes to whom, as published: immutable, numbered per model."""

    class Grade(models.TextChoices):
        DECLARED = "declared"
        METERED = "metered"
        ESTIMATED = "estimated"
        REPLAYED = "replayed"

    class Status(models.TextChoices):
        DRAFT = "draft"
        PUBLISHED = "published"

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    disclosure = models.ForeignKey("marketplace.Disclosure", models.PROTECT, related_name="results")
    run = models.OneToOneField(AttributionRun, models.PROTECT, null=True, related_name="result")  # null: declared
    number = models.PositiveIntegerField()  # within the model
    model = models.ForeignKey("marketplace.TrainedModel", models.PROTECT, related_name="results")
    grade = models.CharField(max_length=9, choices=Grade)
    status = models.CharField(max_length=9, choices=Status, default=Status.DRAFT)
    paid_by = models.CharField(max_length=9, choices=[("influence", "influence"), ("count", "count")])
    reliability = models.FloatField(null=True)  # λ in [0, 1]; null where nothing was replayed
    total = models.FloatField(null=True)  # f(all) − f(none), in the measurement's unit
    total_low = models.FloatField(null=True)
    total_high = models.FloatField(null=True)
    regime = models.CharField(max_length=10, blank=True)
    summary = models.JSONField(default=dict)  # the engine's shares.json without the owners
    values = models.ForeignKey(Artifact, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now)
    published_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["model", "-number"]
        constraints = [
            models.UniqueConstraint(fields=["model", "number"], name="result_number_once_per_model"),
            models.CheckConstraint(
                condition=Q(status="published", published_at__isnull=False)
                | Q(status="draft", published_at__isnull=True),
                name="published_result_has_its_time",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.grade} result {self.number} of {self.model}"


class Share(models.Model):
    """One party's part of one partition of one result, within one cited version; rows are never changed.

    The rights holders' rows over all versions sum to PPQ, and so do `paid_ppq` of partition "labeller" together with the
    part of records without a labeller, which goes to their rights holder (party = that rights holder, same partition).
    """

    class Partition(models.TextChoices):
        RIGHTS_HOLDER = "rights_holder"
        LABELLER = "labeller"

    result = models.ForeignKey(AttributionResult, models.PROTECT, related_name="shares")
    version = models.ForeignKey("marketplace.DatasetVersion", models.PROTECT, related_name="+")
    party = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="shares")
    partition = models.CharField(max_length=13, choices=Partition)
    n_records = models.PositiveBigIntegerField()  # distinct, non-copy records that the order uses
    count_ppq = models.BigIntegerField()  # the share that counting gives
    raw = models.FloatField(null=True)  # signed, of Σ values; sums to 1 over the partition
    low = models.FloatField(null=True)  # 95 % interval of `raw`
    high = models.FloatField(null=True)
    paid_ppq = models.BigIntegerField()  # what money is divided by; ≥ 0

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["result", "version", "party", "partition"], name="one_share_per_party_and_partition"
            ),
            models.CheckConstraint(
                condition=Q(paid_ppq__gte=0, paid_ppq__lte=PPQ, count_ppq__gte=0), name="share_in_range"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.party}: {self.paid_ppq} ppq of {self.result}"
