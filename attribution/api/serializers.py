from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from attribution import selectors
from attribution.grades import MEANING
from attribution.holding import holding_result
from attribution.models import (
    Artifact,
    AttributionResult,
    AttributionRun,
    InfluenceQuestion,
    MeteredRun,
    MeterHead,
    Share,
    Verification,
)
from attribution.services.questions import MAX_TEXT
from marketplace import clock
from marketplace.api.fields import MoneyField
from marketplace.jobs import Job
from marketplace.models import Citation, Disclosure, TrainedModel
from marketplace.selectors import price_history

PPQ_HELP = "Parts per quadrillion: 1000000000000000 is everything."


class ArtifactOutput(serializers.ModelSerializer):
    class Meta:
        model = Artifact
        fields = ["sha256", "kind", "size_bytes", "registered_at"]


class JobOutput(serializers.Serializer):
    """Where a job stands; `done` and `total` count its own units of work."""

    status = serializers.ChoiceField(choices=Job.Status.choices)
    attempt = serializers.IntegerField()
    done = serializers.SerializerMethodField()
    total = serializers.SerializerMethodField()
    error_code = serializers.CharField()
    error_message = serializers.CharField()
    finished_at = serializers.DateTimeField(allow_null=True)

    def get_done(self, job: Job) -> int:
        return self._progress(job)[0]

    def get_total(self, job: Job) -> int:
        return self._progress(job)[1]

    def _progress(self, job: Job) -> tuple[int, int]:
        return job.progress_done, job.progress_total


class MeteredRunInput(serializers.Serializer):
    slug = serializers.CharField(
        max_length=80, help_text="Your own name for the run: lower-case letters, digits, hyphens."
    )
    queries_sha256 = serializers.RegexField(
        r"^[0-9a-f]{64}\Z",
        help_text="The evaluation queries, handed in as an artifact; the disclosure must name the same.",
    )


class HeadInput(serializers.Serializer):
    """A head of the log's hash chain, as the engine's `Meter(heads=…)` hands it out."""

    entry = serializers.IntegerField(min_value=0, max_value=2**53 - 1, help_text="The number of the log's last entry.")
    step = serializers.IntegerField(min_value=0, max_value=2**53 - 1, help_text="Optimizer steps finished.")
    head = serializers.RegexField(r"^[0-9a-f]{64}\Z")


class HeadsInput(serializers.Serializer):
    heads = HeadInput(many=True, allow_empty=False)


class HeadOutput(serializers.ModelSerializer):
    class Meta:
        model = MeterHead
        fields = ["entry", "step", "head", "posted_at"]


class HeadsOutput(serializers.Serializer):
    heads = HeadOutput(many=True)


class MeteredRunOutput(serializers.ModelSerializer):
    id = serializers.UUIDField(source="public_id")
    n_heads = serializers.IntegerField()
    last_head = serializers.SerializerMethodField(help_text="The head posted last; null: none yet.")
    committed_at = serializers.DateTimeField(
        allow_null=True, help_text="When the run was disclosed; its log takes no heads from then on."
    )

    class Meta:
        model = MeteredRun
        fields = ["id", "slug", "queries_sha256", "planned_at", "n_heads", "last_head", "committed_at"]

    @extend_schema_field(HeadOutput(allow_null=True))
    def get_last_head(self, run: MeteredRun) -> dict[str, Any] | None:
        last = run.heads.order_by("-entry").first()
        return HeadOutput(last).data if last else None


class SegmentOutput(JobOutput):
    """One drawn segment of a metered training."""

    first_step = serializers.IntegerField()
    last_step = serializers.IntegerField()
    matches = serializers.BooleanField(allow_null=True)


class VerificationOutput(JobOutput):
    verdict = serializers.ChoiceField(choices=Verification.Verdict.choices, allow_blank=True)
    report = serializers.JSONField(help_text="What the replay found, tensor by tensor, and on which build.")
    segments = SegmentOutput(
        many=True, help_text="Of a metered training: the segments that were drawn. Otherwise none."
    )

    def _progress(self, job: Job) -> tuple[int, int]:
        assert isinstance(job, Verification)
        return selectors.verification_progress(job)


class RunOutput(JobOutput):
    id = serializers.UUIDField(source="public_id")
    grade = serializers.CharField()
    budget = serializers.FloatField(help_text="In trainings of the model.")

    def _progress(self, job: Job) -> tuple[int, int]:
        assert isinstance(job, AttributionRun)
        return selectors.run_progress(job)


class ShareOutput(serializers.ModelSerializer):
    dataset = serializers.SlugField(source="version.dataset.slug")
    version = serializers.IntegerField(source="version.number")
    contributor = serializers.UUIDField(source="party.public_id")
    name = serializers.SerializerMethodField()
    paid_ppq = serializers.CharField(help_text=f"What money is divided by. {PPQ_HELP}")
    count_ppq = serializers.CharField(help_text=f"What counting records would give. {PPQ_HELP}")
    raw = serializers.FloatField(allow_null=True, help_text="As measured: signed, summing to 1 over the partition.")

    class Meta:
        model = Share
        fields = [
            "dataset",
            "version",
            "contributor",
            "name",
            "partition",
            "n_records",
            "paid_ppq",
            "count_ppq",
            "raw",
            "low",
            "high",
        ]

    def get_name(self, share: Share) -> str:
        return share.party.public_name


class ResultOutput(serializers.ModelSerializer):
    id = serializers.UUIDField(source="public_id")
    disclosure = serializers.UUIDField(source="disclosure.public_id")
    meaning = serializers.SerializerMethodField(help_text="What the grade means, in plain words.")
    reliability_source = serializers.SerializerMethodField(
        help_text="`replays`: λ was measured on this training. `record`: replay was not possible, and λ is the method's measured "
        "record times the values' coherence. `none`: records were counted."
    )
    intervals = serializers.SerializerMethodField(
        help_text="What the 95 % intervals promise; empty where nothing was measured."
    )

    class Meta:
        model = AttributionResult
        fields = [
            "id",
            "number",
            "disclosure",
            "grade",
            "meaning",
            "paid_by",
            "reliability",
            "reliability_source",
            "intervals",
            "total",
            "total_low",
            "total_high",
            "regime",
            "published_at",
        ]

    def get_meaning(self, result: AttributionResult) -> str:
        return MEANING[result.grade]

    @extend_schema_field({"type": "string", "enum": list(selectors.RELIABILITY_SOURCES)})
    def get_reliability_source(self, result: AttributionResult) -> str:
        return selectors.reliability_source(result)

    def get_intervals(self, result: AttributionResult) -> str:
        return str(result.summary.get("intervals", ""))


class CurrentResultOutput(ResultOutput):
    shares = serializers.SerializerMethodField()

    class Meta(ResultOutput.Meta):
        fields = [*ResultOutput.Meta.fields, "summary", "shares"]

    @extend_schema_field(ShareOutput(many=True))
    def get_shares(self, result: AttributionResult) -> list[dict[str, Any]]:
        return ShareOutput(selectors.result_shares(result), many=True).data  # type: ignore[return-value]


class OfferedPrice(serializers.Serializer):
    """One step of a dataset's public price history."""

    number = serializers.IntegerField()
    price = MoneyField()
    since = serializers.DateTimeField(source="created_at")


class ModelCitationOutput(serializers.ModelSerializer):
    dataset = serializers.SlugField(source="version.dataset.slug")
    title = serializers.CharField(source="version.dataset.title")
    version = serializers.IntegerField(source="version.number")
    merkle_root = serializers.CharField(source="version.merkle_root")
    prices = serializers.SerializerMethodField()

    class Meta:
        model = Citation
        fields = ["dataset", "title", "version", "merkle_root", "n_records", "selection_sha256", "prices"]

    @extend_schema_field(OfferedPrice(many=True))
    def get_prices(self, citation: Citation) -> list[dict[str, Any]]:
        return OfferedPrice(price_history(citation.version.dataset), many=True).data  # type: ignore[return-value]


class DisclosureOutput(serializers.ModelSerializer):
    id = serializers.UUIDField(source="public_id")
    model = serializers.SlugField(source="model.slug")
    verification = serializers.SerializerMethodField()
    runs = RunOutput(many=True)
    results = serializers.SerializerMethodField()

    class Meta:
        model = Disclosure
        fields = ["id", "model", "number", "document_sha256", "disclosed_at", "verification", "runs", "results"]

    @extend_schema_field(VerificationOutput(allow_null=True))
    def get_verification(self, disclosure: Disclosure) -> dict[str, Any] | None:
        found = getattr(disclosure, "verification", None)
        return VerificationOutput(found).data if found else None

    @extend_schema_field(ResultOutput(many=True))
    def get_results(self, disclosure: Disclosure) -> list[dict[str, Any]]:
        published = [r for r in disclosure.results.all() if r.status == AttributionResult.Status.PUBLISHED]
        return ResultOutput(published, many=True).data  # type: ignore[return-value]


class PublicDisclosureOutput(serializers.ModelSerializer):
    """A version of the model's bibliography, and whether a replay reproduced it."""

    id = serializers.UUIDField(source="public_id")
    evidence = serializers.SerializerMethodField()
    citations = ModelCitationOutput(many=True)

    class Meta:
        model = Disclosure
        fields = ["id", "number", "document_sha256", "disclosed_at", "evidence", "citations"]

    @extend_schema_field({"type": "string", "enum": list(selectors.EVIDENCE_STATES)})
    def get_evidence(self, disclosure: Disclosure) -> str:
        return selectors.evidence_state(disclosure)


class QuestionInput(serializers.Serializer):
    """Either an evaluation query or a text."""

    query = serializers.IntegerField(required=False, min_value=0, max_value=1_000_000, help_text="Its number, from 0.")
    text = serializers.CharField(
        required=False, max_length=MAX_TEXT, help_text="A text of your own, if the disclosed transform takes texts."
    )
    label = serializers.CharField(  # type: ignore[assignment]  # a serializer has a `label` of its own
        required=False,
        max_length=200,
        help_text="With a text, the class that is asked about, if the model has classes.",
    )

    def validate(self, data: dict[str, Any]) -> dict[str, Any]:
        if ("query" in data) == ("text" in data):
            raise serializers.ValidationError("Give either a query or a text.")
        return data


class MovedRecordOutput(serializers.Serializer):
    """A record that moved the output, by what anyone may see of it."""

    dataset = serializers.SlugField(source="version.dataset.slug")
    version = serializers.IntegerField(source="version.number")
    row = serializers.IntegerField()
    digest = serializers.CharField(help_text="The record's leaf in the version's Merkle tree.")
    score = serializers.FloatField(help_text="Signed, known up to scale; above 0 the record helped.")
    contributor = serializers.UUIDField(source="holder.public_id", default=None, allow_null=True)
    share_ppq = serializers.IntegerField(
        allow_null=True, help_text=f"Its rights holder's paid share of the whole model. {PPQ_HELP}"
    )
    preview = serializers.JSONField(
        allow_null=True, help_text="Content and label, if the rights holder shows this row to anyone; else null."
    )


class QuestionOutput(serializers.ModelSerializer):
    """Poll until its status is done."""

    id = serializers.UUIDField(source="public_id")
    model = serializers.SlugField(source="index.disclosure.model.slug")
    disclosure = serializers.UUIDField(source="index.disclosure.public_id")
    way = serializers.SerializerMethodField(help_text='"exact", or "shortlist": then `recall` was measured.')
    recall = serializers.SerializerMethodField()
    said = serializers.SerializerMethodField(
        help_text="What the model itself makes of it: measurement, likeliest class."
    )
    helpful = serializers.SerializerMethodField(help_text="Largest first.")
    harmful = serializers.SerializerMethodField(help_text="Largest first.")

    class Meta:
        model = InfluenceQuestion
        fields = ["id", "model", "disclosure", "status", "error_message", "query", "text", "label"]
        fields += ["way", "recall", "said", "helpful", "harmful"]

    def to_representation(self, question: InfluenceQuestion) -> dict[str, Any]:
        self._moved = selectors.moved_records(question)  # read once for both sides
        return super().to_representation(question)

    def get_way(self, question: InfluenceQuestion) -> str | None:
        return question.answer.get("way")

    def get_recall(self, question: InfluenceQuestion) -> float | None:
        return question.answer.get("recall")

    def get_said(self, question: InfluenceQuestion) -> dict[str, Any]:
        names = ("measured", "asked", "likeliest", "chance")
        return {name: question.answer[name] for name in names if name in question.answer}

    @extend_schema_field(MovedRecordOutput(many=True))
    def get_helpful(self, question: InfluenceQuestion) -> list[dict[str, Any]]:
        return self._records("helpful")

    @extend_schema_field(MovedRecordOutput(many=True))
    def get_harmful(self, question: InfluenceQuestion) -> list[dict[str, Any]]:
        return self._records("harmful")

    def _records(self, side: str) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = list(MovedRecordOutput(self._moved[side], many=True).data)
        return records


class ModelOutput(serializers.ModelSerializer):
    owner = serializers.CharField(source="owner.name")
    disclosures = serializers.SerializerMethodField()
    result = serializers.SerializerMethodField(
        help_text="The published result that holds now, with every share: the newest whose grade is no weaker than the one before it, and "
        "which leaves out no license or records of that one's disclosure unless its training was run again."
    )
    history = serializers.SerializerMethodField(help_text="Every published result, newest first.")

    class Meta:
        model = TrainedModel
        fields = ["slug", "name", "summary", "owner", "created_at", "disclosures", "result", "history"]

    @extend_schema_field(PublicDisclosureOutput(many=True))
    def get_disclosures(self, model: TrainedModel) -> list[dict[str, Any]]:
        disclosures = selectors.public_disclosures(clock.now()).filter(model=model)
        return PublicDisclosureOutput(disclosures, many=True).data  # type: ignore[return-value]

    @extend_schema_field(CurrentResultOutput(allow_null=True))
    def get_result(self, model: TrainedModel) -> dict[str, Any] | None:
        result = holding_result(model, among=selectors.public_disclosures(clock.now()).filter(model=model))
        return CurrentResultOutput(result).data if result else None

    @extend_schema_field(ResultOutput(many=True))
    def get_history(self, model: TrainedModel) -> list[dict[str, Any]]:
        return ResultOutput(self._results(model), many=True).data  # type: ignore[return-value]

    def _results(self, model: TrainedModel) -> Any:
        public = selectors.public_disclosures(clock.now()).filter(model=model)
        return selectors.published_results(model).filter(disclosure__in=public)


class ModelSummary(serializers.ModelSerializer):
    owner = serializers.CharField(source="owner.name")

    class Meta:
        model = TrainedModel
        fields = ["slug", "name", "summary", "owner", "created_at"]
