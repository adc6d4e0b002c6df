"""A disclosure's way to a published result, as jobs.

    replayed:   Verification —match→ AttributionRun: plan → Shards → merge → result of grade replayed
                             —mismatch→ no result: what was proven false pays nobody by it
    estimated:  AttributionRun: plan → Shards in three stages → merge → result of grade estimated
    metered:    AttributionRun → result of grade declared, by count, which holds until segments replay
                Verification: draw → SegmentReplays → verdict —match→ AttributionRun → result of grade metered
    otherwise:  AttributionRun → result of grade declared, by count

A planned run or verification waits in the queue, not due, until its last part resumes it; so no worker is held meanwhile.
"""

import io
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from django.conf import settings
from django.db import connection, transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from attribution.artifacts import local_path, open_artifact, store_artifact
from attribution.documents import TrainingRecords, build_task, checkpoint_paths, pointing, read_records
from attribution.engine.coalitions import Plan
from attribution.engine.shares import RoundResult, SharesResult, merge_rounds, plan_shares, run_round
from attribution.engine.unreplayed import UnreplayedShares
from attribution.engine.verification import verify
from attribution.errors import NotReplayed, RunFailed
from attribution.grades import Grade, disclosed_grade
from attribution.models import Artifact, AttributionResult, AttributionRun, SegmentReplay, Shard, Share, Verification
from attribution.services import estimates, segments
from attribution.services.questions import request_index
from attribution.services.shares import shares_by_count, shares_by_influence
from marketplace import clock, jobs
from marketplace.models import Disclosure

logger = logging.getLogger(__name__)

#: How long a run that waits for its shards is not due; `request_missing_runs` looks sooner.
WAITING = timedelta(days=1)
PROGRESS_SECONDS = 1.0
MIN_ROUNDS = 4


def request_measurement(disclosure: Disclosure) -> Verification | AttributionRun:
    """Queue what the document's evidence allows; harmless to call twice."""
    grade = disclosed_grade(disclosure.document)
    if grade == Grade.REPLAYED:
        return request_verification(disclosure=disclosure)
    if grade == Grade.METERED:
        request_verification(disclosure=disclosure)
        grade = Grade.DECLARED  # until segments replay
    return request_run(disclosure=disclosure, grade=grade, budget=0)


def is_requested(disclosure: Disclosure) -> bool:
    return Verification.objects.filter(disclosure=disclosure).exists() or disclosure.runs.exists()


def request_verification(*, disclosure: Disclosure) -> Verification:
    verification, is_new = Verification.objects.get_or_create(disclosure=disclosure)
    if is_new:
        jobs.wake(verification)
    return verification


def request_run(*, disclosure: Disclosure, grade: str, budget: float | None = None, seed: int = 0) -> AttributionRun:
    """Queue one measurement; the same question is the same run.

    Raises:
        NotReplayed: grade replayed or metered, and no replay has matched.
    """
    if grade in (Grade.REPLAYED, Grade.METERED):
        matched = Verification.objects.filter(disclosure=disclosure, verdict=Verification.Verdict.MATCH)
        if not matched.exists():
            raise NotReplayed("Influence is measured once a replay has reproduced the disclosed weights.")
    elif grade not in (Grade.DECLARED, Grade.ESTIMATED):
        raise ValueError(f"No run has grade {grade!r}")
    run, is_new = AttributionRun.objects.get_or_create(
        disclosure=disclosure,
        grade=grade,
        budget=settings.ATTRIBUTION_BUDGET if budget is None else budget,
        seed=seed,
    )
    if is_new:
        jobs.wake(run)
    return run


def verify_disclosure(verification: Verification) -> None:
    """Replay the training; a match opens the measurement, a mismatch closes the matter."""
    use_threads()
    disclosure = verification.disclosure
    if disclosed_grade(disclosure.document) == Grade.METERED:
        _verify_segments(verification)
        return
    task = build_task(disclosure)
    with checkpoint_paths(disclosure) as paths, pointing(""):
        report = verify(task, checkpoints=paths, progress=teller(verification))
    with transaction.atomic():
        verification.lock()
        matches = report.matches
        verdict = Verification.Verdict.MATCH if matches else Verification.Verdict.MISMATCH
        verification.write(verdict=verdict, report=_plain(report.to_json()))
        verification.finish()
        if matches:
            request_run(disclosure=disclosure, grade=Grade.REPLAYED)
    logger.info("Verified disclosure=%s verdict=%s", disclosure.pk, verdict)


def _verify_segments(verification: Verification) -> None:
    """Take the check of a metered training one step on: draw its segments and open them, or read their verdict."""
    replays = verification.segments.order_by("number")
    if not replays.exists():
        with transaction.atomic():
            verification.lock()
            for replay in segments.draw(verification):
                jobs.wake(replay)
            _wait(verification)
    elif failed := replays.filter(status=SegmentReplay.Status.FAILED).first():
        raise RunFailed(
            f"Steps {failed.first_step} to {failed.last_step}: {failed.error_message}", pointers=failed.error_pointers
        )
    elif replays.exclude(status=SegmentReplay.Status.DONE).exists():
        _wait(verification)
    else:
        matches = all(replay.matches for replay in replays)
        verdict = Verification.Verdict.MATCH if matches else Verification.Verdict.MISMATCH
        with transaction.atomic():
            verification.lock()
            verification.write(verdict=verdict, report=_plain(segments.report(verification)))
            verification.finish()
            if matches:
                request_run(disclosure=verification.disclosure, grade=Grade.METERED, budget=0)
        logger.info("Verified disclosure=%s verdict=%s segments=%s", verification.disclosure_id, verdict, len(replays))


def replay_segment(replay: SegmentReplay) -> None:
    """Train one drawn segment again, the meter on; whoever finishes the last one wakes the verdict."""
    use_threads()
    matches, report = segments.replay(replay, progress=teller(replay))
    with transaction.atomic():
        replay.lock()
        replay.write(matches=matches, report=_plain(report))
        replay.finish()
        # Two last segments at once: the second to get the verification's row counts after the first has committed.
        verification = Verification.objects.select_for_update().get(pk=replay.verification_id)
        if not verification.segments.exclude(status=SegmentReplay.Status.DONE).exists():
            jobs.resume(verification)


def advance_run(run: AttributionRun) -> None:
    """Take a run one step on: plan it and open its shards, or merge them and publish.

    Raises:
        RunFailed: a shard has failed for good.
    """
    use_threads()
    if run.grade == Grade.DECLARED:
        records = read_records(run.disclosure)
        publish_result(run=run, shares=shares_by_count(records))
    elif run.grade == Grade.METERED:
        _publish(run, *segments.divide(run.disclosure, seed=run.seed))
    elif run.plan is None:
        _plan(run)
    elif failed := run.shards.filter(status=Shard.Status.FAILED).order_by("number").first():
        raise RunFailed(
            f"Round {failed.number} failed: {failed.error_message}",
            pointers=failed.error_pointers,
        )
    elif run.shards.exclude(status=Shard.Status.DONE).exists():
        _wait(run)
    elif run.grade == Grade.ESTIMATED:
        if opened := estimates.next_stage(run):
            _open(run, opened)
        else:
            _publish(run, *estimates.merge(run))
    else:
        _merge(run)


def execute_shard(shard: Shard) -> None:
    """Measure one round; whoever finishes the last one wakes the merge."""
    use_threads()
    run = shard.run
    with tempfile.TemporaryDirectory(prefix="round-") as folder:
        if run.grade == Grade.ESTIMATED:
            result = estimates.run_shard(shard, progress=teller(shard))
        else:
            task = build_task(run.disclosure)
            with pointing("/plan"):
                result = run_round(task, read_plan(run), shard.number, progress=teller(shard))
        path = Path(folder) / "round.safetensors"
        result.save(path)
        with path.open("rb") as stream:
            output = store_artifact(owner=None, kind=Artifact.Kind.ROUND, stream=stream)
    with transaction.atomic():
        shard.lock()
        shard.write(output=output)
        shard.finish()
        # Two last shards at once: the second to get the run's row counts after the first has committed.
        AttributionRun.objects.select_for_update().get(pk=run.pk)
        if not run.shards.exclude(status=Shard.Status.DONE).exists():
            jobs.resume(run)


def publish_result(
    *,
    run: AttributionRun,
    shares: list[Share],
    measured: SharesResult | UnreplayedShares | None = None,
    values: Artifact | None = None,
) -> AttributionResult | None:
    """Write a result with its shares, final from here on, and finish its run: all in one transaction.

    A count that comes after something was measured for the same disclosure is not published: it would hold from then on.

    Raises:
        LostLease: another worker holds the run; nothing is written.
    """
    disclosure = run.disclosure
    with transaction.atomic():
        run.lock()
        with connection.cursor() as cursor:  # numbers are consecutive within the model, whoever else publishes now
            cursor.execute(
                "SELECT pg_advisory_xact_lock(hashtext('attribution.result'), %s::int)", [disclosure.model_id]
            )
        if run.grade == Grade.DECLARED and disclosure.results.exclude(grade=Grade.DECLARED).exists():
            run.finish()
            return None
        last = AttributionResult.objects.filter(model=disclosure.model_id).order_by("-number").first()
        result = AttributionResult(
            disclosure=disclosure,
            run=run,
            number=last.number + 1 if last else 1,
            model_id=disclosure.model_id,
            grade=run.grade,
            paid_by="influence" if measured and not measured.counted else "count",
            values=values,
        )
        if measured:
            summary = _plain(measured.to_json())
            result.reliability = measured.reliability
            result.total, result.total_low, result.total_high = measured.total, measured.total_low, measured.total_high
            result.regime = measured.regime
            result.summary = {name: part for name, part in summary.items() if name not in ("owners", "groups")}
        result.save()
        for share in shares:
            share.result = result
        Share.objects.bulk_create(shares, batch_size=1_000)
        result.status = AttributionResult.Status.PUBLISHED
        result.published_at = clock.now()
        result.save(update_fields=["status", "published_at"])
        request_index(disclosure)
        run.finish()
    logger.info("Published result=%s model=%s grade=%s", result.pk, disclosure.model_id, run.grade)
    return result


def request_missing_runs() -> int:
    """Open what a disclosure should have and has not, and wake runs whose shards have ended; returns how many."""
    requested = 0
    verified = Verification.objects.filter(disclosure=OuterRef("pk"))
    run = AttributionRun.objects.filter(disclosure=OuterRef("pk"))
    unasked = Disclosure.objects.filter(~Exists(verified), ~Exists(run)).order_by("pk")
    for disclosure in unasked[:1000]:
        request_measurement(disclosure)
        requested += 1
    matched = verified.filter(status=Verification.Status.DONE, verdict=Verification.Verdict.MATCH)
    unmeasured = Disclosure.objects.filter(Exists(matched), ~Exists(run.filter(grade=Grade.REPLAYED))).exclude(
        document__has_key="meter"
    )
    for disclosure in unmeasured.order_by("pk")[:1000]:
        request_run(disclosure=disclosure, grade=Grade.REPLAYED)
        requested += 1
    metered = matched.filter(disclosure__document__has_key="meter")
    uncounted = Disclosure.objects.filter(Exists(metered), ~Exists(run.filter(grade=Grade.METERED)))
    for disclosure in uncounted.order_by("pk")[:1000]:
        request_run(disclosure=disclosure, grade=Grade.METERED, budget=0)
        requested += 1
    shards = Shard.objects.filter(run=OuterRef("pk"))
    ended = Exists(shards.filter(status=Shard.Status.FAILED)) | ~Exists(shards.exclude(status=Shard.Status.DONE))
    waiting = AttributionRun.objects.filter(
        ended, status=AttributionRun.Status.QUEUED, plan__isnull=False, due_at__gt=timezone.now(), n_failures=0
    )
    for stuck in waiting.order_by("pk")[:1000]:
        requested += jobs.resume(stuck)
    replays = SegmentReplay.objects.filter(verification=OuterRef("pk"))
    ended = Exists(replays.filter(status=SegmentReplay.Status.FAILED)) | (
        Exists(replays) & ~Exists(replays.exclude(status=SegmentReplay.Status.DONE))
    )
    undecided = Verification.objects.filter(
        ended, status=Verification.Status.QUEUED, due_at__gt=timezone.now(), n_failures=0
    )
    for verification in undecided.order_by("pk")[:1000]:
        requested += jobs.resume(verification)
    return requested


def _plan(run: AttributionRun) -> None:
    if run.grade == Grade.ESTIMATED:
        document, total = estimates.plan(run)
        opened = list(estimates.first_stage(document))
    else:
        plan = _plan_replays(run)
        document, total, opened = plan.to_json(), len(plan.rounds), list(range(len(plan.rounds)))
    stored = store_artifact(owner=None, kind=Artifact.Kind.PLAN, stream=io.BytesIO(json.dumps(document).encode()))
    with transaction.atomic():
        run.lock()
        run.write(plan=stored, progress_done=0, progress_total=total)
        _open(run, opened)
    logger.info("Planned run=%s grade=%s shards=%s", run.pk, run.grade, total)


def _plan_replays(run: AttributionRun) -> Plan:
    task = build_task(run.disclosure)
    with pointing(""):
        plan = plan_shares(task, budget=run.budget, seed=run.seed)
        if len(plan.rounds) < MIN_ROUNDS:  # a small task, quickly planned again: several workers may share it
            plan = plan_shares(task, budget=run.budget, seed=run.seed, n_rounds=MIN_ROUNDS)
    return plan


@transaction.atomic
def _open(run: AttributionRun, numbers: Sequence[int]) -> None:
    """Give workers these shards, and wait for them."""
    run.lock()
    for shard in Shard.objects.bulk_create(Shard(run=run, number=number) for number in numbers):
        jobs.wake(shard)
    _wait(run)


def read_plan(run: AttributionRun) -> Plan:
    """What a planned run measures."""
    assert run.plan is not None, "a run without a plan is planned first"
    with open_artifact(run.plan) as file:
        return Plan.from_json(json.load(file))


def _wait(job: jobs.Job) -> None:
    """Back to the queue and not due: the last of its parts resumes it."""
    job.postpone(timezone.now() + WAITING)


def _merge(run: AttributionRun) -> None:
    records = read_records(run.disclosure)
    task = build_task(run.disclosure, records)
    shards = run.shards.select_related("output").order_by("number")
    outputs = [shard.output for shard in shards if shard.output is not None]
    with ExitStack() as stack, pointing("/rounds"):
        rounds = [RoundResult.load(stack.enter_context(local_path(output))) for output in outputs]
        measured = merge_rounds(task, read_plan(run), rounds)
    _publish(run, records, measured)


def _publish(run: AttributionRun, records: TrainingRecords, measured: SharesResult | UnreplayedShares) -> None:
    values = _store_values(records, measured)
    publish_result(run=run, shares=shares_by_influence(measured, records), measured=measured, values=values)


def _store_values(records: TrainingRecords, measured: SharesResult | UnreplayedShares) -> Artifact:
    """Every record's value by its place, so that the shares can be added up again."""
    table = pa.table(
        {
            "citation": pa.array(records.citation, pa.int32()),
            "row": pa.array(records.row, pa.int64()),
            "copy_of": pa.array(records.copy_of, pa.int64()),
            "value": pa.array(np.asarray(measured.values, dtype=np.float64), pa.float64()),
        }
    )
    with tempfile.TemporaryFile() as file:
        pq.write_table(table, file, compression="zstd")
        file.seek(0)
        return store_artifact(owner=None, kind=Artifact.Kind.VALUES, stream=file)


def teller(job: jobs.Job) -> Callable[[int, int], None]:
    """Progress to the row, at most once a second; a lost lease stops the work here, at its next word."""
    told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            job.progress(done=min(int(done), int(total)), total=int(total))

    return tell


def use_threads() -> None:
    torch.set_num_threads(settings.ATTRIBUTION_THREADS)


def _plain(document: Any) -> Any:
    """JSON that PostgreSQL takes: what is not a finite number becomes null."""
    return json.loads(json.dumps(document), parse_constant=lambda _: None)
