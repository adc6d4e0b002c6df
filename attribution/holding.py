"""Which of a model's published results holds: divides its royalties until another takes its place.

    a newer result takes the place of the one that holds, unless
    weaker       its grade is a weaker one; or
    leaves_out   its disclosure leaves out a license, or records under one, that the holding result's disclosure cites, and the
                 training that it describes was not run again (grades metered and replayed)

So whoever would be left out loses nothing by a trainer's word: that a model was trained without their records is shown by
running its training. A model that was trained anew and cannot be shown so is another model, under an address of its own.
What held at a time is read off what had been published by then, and stays.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from attribution.grades import GRADES, Grade
from attribution.models import AttributionResult
from marketplace.models import Citation, Disclosure, TrainedModel

#: Of these the engine has run the training again, whole or in drawn stretches, on exactly the records that are cited.
RUN_AGAIN = (Grade.METERED, Grade.REPLAYED)


class Refusal(StrEnum):
    """Why a newer result did not take the holding one's place."""

    WEAKER = "weaker"
    LEAVES_OUT = "leaves_out"


@dataclass(frozen=True)
class Succession:
    """The result that holds, and the newer ones that did not take its place, in the order of their publication."""

    holding: AttributionResult | None = None
    passed_over: list[tuple[AttributionResult, Refusal]] = field(default_factory=list)


def succession(
    model: TrainedModel, at: datetime | None = None, *, among: Iterable[Disclosure] | None = None
) -> Succession:
    """How the model's results stand now, or stood at a time.

    Args:
        among: as if these disclosures were all; by default they are.
    """
    return _successions([model], at, among).get(model.pk, Succession())


def holding_result(
    model: TrainedModel, at: datetime | None = None, *, among: Iterable[Disclosure] | None = None
) -> AttributionResult | None:
    """See `succession`."""
    return succession(model, at, among=among).holding


def holding_results(
    models: Iterable[TrainedModel], *, among: Iterable[Disclosure] | None = None
) -> dict[int, AttributionResult]:
    """Model → the result that holds now; of those that have one, in two queries."""
    found = _successions(models, None, among)
    return {model: one.holding for model, one in found.items() if one.holding is not None}


def _successions(
    models: Iterable[TrainedModel], at: datetime | None, among: Iterable[Disclosure] | None
) -> dict[int, Succession]:
    published = AttributionResult.objects.filter(
        model__in=[model.pk for model in models], status=AttributionResult.Status.PUBLISHED
    )
    if at is not None:
        published = published.filter(published_at__lte=at)
    if among is not None:
        published = published.filter(disclosure__in=[disclosure.pk for disclosure in among])
    results: dict[int, list[AttributionResult]] = defaultdict(list)
    for result in (
        published.select_related("model", "disclosure").defer("disclosure__document").order_by("published_at", "pk")
    ):
        results[result.model_id].append(result)
    citations: dict[int, dict[int, Citation]] = defaultdict(dict)
    cited = {result.disclosure_id for of_model in results.values() if len(of_model) > 1 for result in of_model}
    if cited:
        for citation in Citation.objects.filter(disclosure__in=cited).select_related("version"):
            citations[citation.disclosure_id][citation.license_id] = citation
    return {model: _fold(of_model, citations) for model, of_model in results.items()}


def _fold(results: Sequence[AttributionResult], citations: dict[int, dict[int, Citation]]) -> Succession:
    holding, *newer = results
    passed_over: list[tuple[AttributionResult, Refusal]] = []
    for result in newer:
        refusal = _refusal(result, holding, citations)
        if refusal is None:
            holding, passed_over = result, []
        else:
            passed_over.append((result, refusal))
    return Succession(holding, passed_over)


def _refusal(
    result: AttributionResult, holding: AttributionResult, citations: dict[int, dict[int, Citation]]
) -> Refusal | None:
    if _rank(result) < _rank(holding):
        return Refusal.WEAKER
    if result.grade in RUN_AGAIN or result.disclosure_id == holding.disclosure_id:
        return None
    ours = citations[result.disclosure_id]
    theirs = citations[holding.disclosure_id]
    covers = all(
        license in ours and _covers((result, ours[license]), (holding, citation))
        for license, citation in theirs.items()
    )
    return None if covers else Refusal.LEAVES_OUT


def _rank(result: AttributionResult) -> int:
    return GRADES.index(Grade(result.grade))


def _covers(one: tuple[AttributionResult, Citation], other: tuple[AttributionResult, Citation]) -> bool:
    """Whether every record of the other's citation of a license is in the one's."""
    (result, ours), (holding, theirs) = one, other
    if ours.selection_sha256 == theirs.selection_sha256 or ours.n_records == ours.version.n_records:
        return True
    if ours.n_records < theirs.n_records:
        return False
    spans = _joined(result.disclosure.document["training_data"][ours.position]["selection"])
    wanted = _joined(holding.disclosure.document["training_data"][theirs.position]["selection"])
    position = 0
    for first, last in wanted:
        while position < len(spans) and spans[position][1] < last:
            position += 1
        if position == len(spans) or spans[position][0] > first:
            return False
    return True


def _joined(ranges: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Ascending half-open ranges, those that touch made one."""
    spans: list[tuple[int, int]] = []
    for first, last in ranges:
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return spans
