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
        ROUND = "round"  # a shard's output: a round of replays, or a piece of an estimate
        VALUES = "values"  # records' values, Parquet
        METER = "meter"  # an in-run meter's log, closed
        GRADIENTS = "gradients"  # a shard of a gradient store
        INDEX = "index"  # what else belongs to the store: its manifest, the model's state, the shortlist

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


class SegmentReplay(Job):
    """One drawn segment of a metered training, run again with the meter on: do its weights and its entries come out?"""

    task_name: ClassVar[str] = "attribution.tasks.replay_segment"

    verification = models.ForeignKey(Verification, models.PROTECT, related_name="segments")
    number = models.PositiveIntegerField()  # among all segments of the training
    first_step = models.PositiveIntegerField()  # completed before it
    last_step = models.PositiveIntegerField()  # and after it
    matches = models.BooleanField(null=True)
    report = models.JSONField(default=dict, blank=True)

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["verification", "number"], name="segment_replayed_once"),
        ]

    def __str__(self) -> str:
        return f"Steps {self.first_step} to {self.last_step} of {self.verification}"


class MeteredRun(models.Model):
    """A training that its trainer announced before it began, so that its meter's heads have somewhere to go."""

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    owner = models.ForeignKey("marketplace.Party", models.PROTECT, related_name="metered_runs")
    slug = models.SlugField(max_length=80)  # the trainer's own name for it
    queries_sha256 = models.CharField(max_length=64)  # what will be asked is fixed before training
    planned_at = models.DateTimeField(default=timezone.now)  # wall time; the database sets it

    class Meta:
        ordering = ["-pk"]
        constraints = [models.UniqueConstraint(fields=["owner", "slug"], name="metered_run_once_per_owner")]

    def __str__(self) -> str:
        return self.slug


class MeterHead(models.Model):
    """A head of a log's hash chain, posted while training ran; rows are never changed, and their time is the database's."""

    run = models.ForeignKey(MeteredRun, models.PROTECT, related_name="heads")
    entry = models.PositiveBigIntegerField()
    step = models.PositiveBigIntegerField()  # optimizer steps finished
    head = models.CharField(max_length=64)
    posted_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["run", "entry"]
        constraints = [models.UniqueConstraint(fields=["run", "entry"], name="one_head_per_entry")]

    def __str__(self) -> str:
        return f"Head {self.entry} of {self.run}"


class MeterCommitment(models.Model):
    """What a metered run was disclosed with, and the seed that draws the segments to replay: made only then, once."""

    run = models.OneToOneField(MeteredRun, models.PROTECT, related_name="commitment")
    evidence_sha256 = models.CharField(max_length=64)  # of the document without the model's name and summary
    log = models.ForeignKey(Artifact, models.PROTECT, related_name="+")
    seed = models.BigIntegerField()
    committed_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"Commitment of {self.run}"


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
    reliability = models.FloatField(null=True)  # λ in [0, 1]; null where nothing was measured
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


class InfluenceIndex(Job):
    """The gradient store of one disclosure's training records: plan → shards → the store. Asked, it names records.

    It divides no money: see `attribution/engine/search.py` for what its scores are.
    """

    task_name: ClassVar[str] = "attribution.tasks.advance_index"
    reopened_codes = ("internal", "run_failed")

    disclosure = models.OneToOneField("marketplace.Disclosure", models.PROTECT, related_name="influence_index")
    n_records = models.PositiveBigIntegerField(default=0)  # 0 until it is planned
    # file name → SHA-256 of an artifact of kind "index"; empty until the store is whole
    files = models.JSONField(default=dict, blank=True)

    class Meta(Job.Meta):
        pass

    def __str__(self) -> str:
        return f"Index of {self.disclosure}"


class IndexShard(Job):
    """The projected gradients of one range of records."""

    task_name: ClassVar[str] = "attribution.tasks.build_index_shard"

    index = models.ForeignKey(InfluenceIndex, models.PROTECT, related_name="shards")
    number = models.PositiveIntegerField()
    output = models.ForeignKey(Artifact, models.PROTECT, null=True, blank=True, related_name="+")

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["index", "number"], name="shard_number_once_per_index"),
        ]

    def __str__(self) -> str:
        return f"Shard {self.number} of {self.index}"


class InfluenceQuestion(Job):
    """Which records moved one output: of an evaluation query, or of a text that somebody entered. Asked once, kept."""

    task_name: ClassVar[str] = "attribution.tasks.answer_question"

    public_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    index = models.ForeignKey(InfluenceIndex, models.PROTECT, related_name="questions")
    query = models.PositiveIntegerField(null=True, blank=True)  # number of an evaluation query
    text = models.TextField(blank=True)
    label = models.CharField(max_length=200, blank=True)  # the class that is asked about; "" where there are none
    text_sha256 = models.CharField(max_length=64, blank=True)  # of text and label
    answer = models.JSONField(default=dict, blank=True)

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(
                fields=["index", "query", "text_sha256"], name="question_once_per_index", nulls_distinct=False
            ),
            models.CheckConstraint(
                condition=Q(query__isnull=False, text="", label="", text_sha256="")
                | (Q(query__isnull=True) & ~Q(text="") & ~Q(text_sha256="")),
                name="question_about_a_query_or_a_text",
            ),
        ]

    def __str__(self) -> str:
        return f"Question {self.public_id} of {self.index}"
