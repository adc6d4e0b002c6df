"""What later packages and pages may ask of attribution."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Count, F, Q, QuerySet

from attribution.grades import Grade, disclosed_grade
from attribution.models import (
    AttributionResult,
    AttributionRun,
    IndexShard,
    InfluenceIndex,
    InfluenceQuestion,
    MeteredRun,
    SegmentReplay,
    Shard,
    Share,
    Verification,
)
from marketplace.models import Dataset, DatasetVersion, Disclosure, Party, TrainedModel


def published_results(model: TrainedModel | None = None) -> QuerySet[AttributionResult]:
    """Newest first; of all models, or of one."""
    results = AttributionResult.objects.filter(status=AttributionResult.Status.PUBLISHED)
    if model is not None:
        results = results.filter(model=model)
    return results.select_related("model", "disclosure").order_by("-published_at", "-pk")


def result_shares(result: AttributionResult) -> QuerySet[Share]:
    """Largest paid share first."""
    shares = Share.objects.filter(result=result).select_related("party", "version__dataset")
    return shares.order_by("partition", "-paid_ppq", "version", "party")


def disclosures_visible_to(party: Party) -> QuerySet[Disclosure]:
    """The only door to the state of a disclosure's jobs for non-staff: its owner's."""
    return (
        Disclosure.objects.filter(model__owner=party)
        .select_related("model", "verification")
        .prefetch_related(
            "citations__version__dataset", "citations__license", "runs__shards", "results", "verification__segments"
        )
    )


def public_disclosures(at: datetime) -> QuerySet[Disclosure]:
    """What anyone may read: every disclosure that is not, or no longer, under embargo."""
    return (
        Disclosure.objects.filter(Q(embargo_until=None) | Q(embargo_until__lte=at))
        .select_related("model", "verification")
        .prefetch_related("citations__version__dataset", "runs")
        .order_by("-number")
    )


#: declared: no evidence was given; checkpoints: they were, and no recipe; open: the replay is still to come; reproduced: it
#: gave the disclosed weights (metered: in every drawn segment, and the log's entries); contradicted: it gave others; unusable: it
#: could not be carried out.
EVIDENCE_STATES = ("declared", "checkpoints", "open", "reproduced", "contradicted", "unusable")


def evidence_state(disclosure: Disclosure) -> str:
    """What has become of a disclosure's evidence, in a word of `EVIDENCE_STATES`."""
    grade = disclosed_grade(disclosure.document)
    if grade in (Grade.DECLARED, Grade.ESTIMATED):
        return "declared" if grade == Grade.DECLARED else "checkpoints"
    verification = getattr(disclosure, "verification", None)
    if verification is None or not verification.is_finished:
        return "open"
    if verification.status == Verification.Status.FAILED:
        return "unusable"
    return "reproduced" if verification.verdict == Verification.Verdict.MATCH else "contradicted"


#: Where a result's λ comes from.
RELIABILITY_SOURCES = ("replays", "record", "none")


def reliability_source(result: AttributionResult) -> str:
    """In a word of `RELIABILITY_SOURCES`."""
    if result.grade == Grade.DECLARED:
        return "none"
    return "replays" if result.grade == Grade.REPLAYED else "record"


def metered_runs_of(party: Party) -> QuerySet[MeteredRun]:
    """The only door to planned trainings: their owner's."""
    runs = MeteredRun.objects.filter(owner=party).annotate(n_heads=Count("heads"))
    return runs.annotate(committed_at=F("commitment__committed_at")).order_by("-pk")


def find_metered_run(disclosure: Disclosure) -> MeteredRun | None:
    """The planned training that a metered disclosure names."""
    if disclosed_grade(disclosure.document) != Grade.METERED:
        return None
    return metered_runs_of(disclosure.model.owner).filter(public_id=disclosure.document["meter"]["run"]).first()


def find_verification(disclosure: Disclosure) -> Verification | None:
    return Verification.objects.filter(disclosure=disclosure).first()


def open_run(disclosure: Disclosure) -> AttributionRun | None:
    """The run that is queued or running, if any."""
    unfinished = Q(status=AttributionRun.Status.QUEUED) | Q(status=AttributionRun.Status.RUNNING)
    return AttributionRun.objects.filter(unfinished, disclosure=disclosure).order_by("-pk").first()


def verification_progress(verification: Verification) -> tuple[int, int]:
    """(work done, work in all): the job's own units or, of a metered training, thousandths of a drawn segment."""
    segments = list(verification.segments.all())
    if not segments:
        return verification.progress_done, verification.progress_total
    done = sum(
        1000 if s.status == SegmentReplay.Status.DONE else 1000 * s.progress_done // max(1, s.progress_total)
        for s in segments
    )
    return done, 1000 * len(segments)


def run_progress(run: AttributionRun) -> tuple[int, int]:
    """(work done, work in all) over the run's shards, in thousandths of a shard; (0, 0) while it is being planned."""
    shards = list(run.shards.all())
    done = sum(
        1000 if shard.status == Shard.Status.DONE else 1000 * shard.progress_done // max(1, shard.progress_total)
        for shard in shards
    )
    return done, 1000 * max(len(shards), run.progress_total if shards else 0)  # an estimate's later stages open later


def find_index(disclosure: Disclosure) -> InfluenceIndex | None:
    """The gradient store of the disclosure's records, made or in the making."""
    return InfluenceIndex.objects.filter(disclosure=disclosure).select_related("disclosure").first()


def index_progress(index: InfluenceIndex) -> tuple[int, int]:
    """(shards done, shards in all); (0, 0) while it is being planned."""
    return index.shards.filter(status=IndexShard.Status.DONE).count(), index.shards.count()


def questions_about(disclosures: Iterable[Disclosure]) -> QuerySet[InfluenceQuestion]:
    """What was asked about some disclosures; whoever has a question's id may read it, if they may read the disclosure."""
    found = InfluenceQuestion.objects.filter(index__disclosure__in=disclosures)
    return found.select_related("index__disclosure__model")


@dataclass(frozen=True)
class MovedRecord:
    """A record that moved an output, by what anyone may see of it."""

    version: DatasetVersion
    row: int
    digest: str
    score: float  # signed; positive helped
    weight: float  # |score| over the largest of the answer
    holder: Party | None  # None: they have no share in the published result
    share_ppq: int | None  # their paid share of the model, by the latest result of this disclosure
    preview: dict[str, Any] | None  # content and label, if the rights holder shows this row to anyone


def moved_records(question: InfluenceQuestion) -> dict[str, list[MovedRecord]]:
    """The records of an answer, largest first, under "helpful" and "harmful"; three queries, however many they are.

    A record's content is shown only if it is one of the first rows that its rights holder lets anyone see, and its dataset
    is on sale; of any other there is its place and its digest.
    """
    answer: dict[str, list[dict[str, Any]]] = {side: question.answer.get(side, []) for side in ("helpful", "harmful")}
    places = [place for side in answer.values() for place in side]
    versions = DatasetVersion.objects.select_related("dataset").in_bulk({place["version"] for place in places})
    result = published_results().filter(disclosure=question.index.disclosure_id).first()
    shares = {
        (share.version_id, share.party_id): share
        for share in Share.objects.filter(
            result=result, partition=Share.Partition.RIGHTS_HOLDER, party__in={place["holder"] for place in places}
        ).select_related("party")
    }
    largest = max((abs(place["score"]) for place in places), default=1.0)

    def record(place: dict[str, Any]) -> MovedRecord:
        version, row = versions[place["version"]], place["row"]
        share = shares.get((version.pk, place["holder"]))
        is_shown = version.dataset.status == Dataset.Status.LISTED and row < len(version.preview)
        return MovedRecord(
            version=version,
            row=row,
            digest=place["digest"],
            score=place["score"],
            weight=abs(place["score"]) / largest,
            holder=share.party if share else None,
            share_ppq=share.paid_ppq if share else None,
            preview=version.preview[row] if is_shown else None,
        )

    return {side: [record(place) for place in found] for side, found in answer.items()}
