"""Grade *estimated*: a run's shards are the pieces of an estimate, opened stage by stage."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from attribution.artifacts import local_path, open_artifact
from attribution.documents import TrainingRecords, build_task, checkpoint_paths, pointing, read_records
from attribution.engine import Task
from attribution.engine.estimated import EstimatePlan, merge_pieces, plan_estimate, run_piece
from attribution.engine.shares import RoundResult
from attribution.engine.training import Progress
from attribution.engine.unreplayed import UnreplayedShares
from attribution.models import AttributionRun, Shard


def plan(run: AttributionRun) -> tuple[dict[str, Any], int]:
    """The plan as JSON, and of how many pieces it is."""
    with _task(run, read_records(run.disclosure)) as task, pointing(""):
        made = plan_estimate(task, seed=run.seed)
    return made.to_json(), len(made.pieces)


def first_stage(document: dict[str, Any]) -> list[int]:
    """The pieces that need no other."""
    return [number for number in range(len(document["pieces"])) if not EstimatePlan.from_json(document).needs(number)]


def next_stage(run: AttributionRun) -> list[int]:
    """The pieces that can be computed now that every opened one is done; empty once all are."""
    made = read_plan(run)
    opened = set(run.shards.values_list("number", flat=True))
    return [n for n in range(len(made.pieces)) if n not in opened and opened.issuperset(made.needs(n))]


def run_shard(shard: Shard, *, progress: Progress) -> RoundResult:
    made = read_plan(shard.run)
    with _task(shard.run, read_records(shard.run.disclosure)) as task, pointing(""):
        return run_piece(task, made, shard.number, _outputs(shard.run, made.needs(shard.number)), progress=progress)


def merge(run: AttributionRun) -> tuple[TrainingRecords, UnreplayedShares]:
    records, made = read_records(run.disclosure), read_plan(run)
    numbers = [number for number, piece in enumerate(made.pieces) if piece.stage != "fisher"]
    with _task(run, records) as task, pointing(""):
        return records, merge_pieces(task, made, _outputs(run, numbers))


def read_plan(run: AttributionRun) -> EstimatePlan:
    assert run.plan is not None, "a run without a plan is planned first"
    with open_artifact(run.plan) as file:
        return EstimatePlan.from_json(json.load(file))


def _outputs(run: AttributionRun, numbers: list[int]) -> dict[int, RoundResult]:
    shards = run.shards.filter(number__in=numbers).select_related("output")
    outputs = {shard.number: shard.output for shard in shards if shard.output is not None}
    with ExitStack() as stack:
        return {n: RoundResult.load(stack.enter_context(local_path(output))) for n, output in outputs.items()}


@contextmanager
def _task(run: AttributionRun, records: TrainingRecords) -> Iterator[Task]:
    with checkpoint_paths(run.disclosure) as paths:
        yield build_task(run.disclosure, records, paths)
