"""A disclosure's way to a published result, as jobs.

    replayable:  Verification —match→ AttributionRun: plan → Shards → merge → result of grade replayed
                              —mismatch→ no result: what was proven false pays nobody by it
    otherwise:   AttributionRun → result of grade declared, by count

A planned run waits in the queue, not due, until its last shard resumes it; so no worker is held meanwhile.
"""

import io
import json
import logging
import tempfile
import time
from collections.abc import Callable
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
from attribution.documents import TrainingRecords, build_task, checkpoint_paths, is_replayable, pointing, read_records
from attribution.engine.shares import Plan, RoundResult, SharesResult, merge_rounds, plan_shares, run_round
from attribution.engine.verification import verify
from attribution.errors import NotReplayed, RunFailed
from attribution.models import Artifact, AttributionResult, AttributionRun, Shard, Share, Verification
from attribution.services.shares import shares_by_count, shares_by_influence
from marketplace import clock, jobs
from marketplace.models import Disclosure

logger = logging.getLogger(__name__)

Grade = AttributionResult.Grade
#: How long a run that waits for its shards is not due; `request_missing_runs` looks sooner.
WAITING = timedelta(days=1)
PROGRESS_SECONDS = 1.0
MIN_ROUNDS = 4


def request_measurement(disclosure: Disclosure) -> Verification | AttributionRun:
    """Queue what the document's evidence allows; harmless to call twice."""
    if is_replayable(disclosure.document):
        return request_verification(disclosure=disclosure)
    return request_run(disclosure=disclosure, grade=Grade.DECLARED, budget=0)


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
        NotReplayed: grade replayed, and no replay has matched.
    """
    if grade == Grade.REPLAYED:
        matched = Verification.objects.filter(disclosure=disclosure, verdict=Verification.Verdict.MATCH)
        if not matched.exists():
            raise NotReplayed("Influence is measured once a replay has reproduced the disclosed weights.")
    elif grade != Grade.DECLARED:
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
    _use_threads()
    disclosure = verification.disclosure
    task = build_task(disclosure)
    with checkpoint_paths(disclosure) as paths, pointing(""):
        report = verify(task, checkpoints=paths, progress=_teller(verification))
    with transaction.atomic():
        verification.lock()
        matches = report.matches
        verdict = Verification.Verdict.MATCH if matches else Verification.Verdict.MISMATCH
        verification.write(verdict=verdict, report=_plain(report.to_json()))
        verification.finish()
        if matches:
            request_run(disclosure=disclosure, grade=Grade.REPLAYED)
    logger.info("Verified disclosure=%s verdict=%s", disclosure.pk, verdict)


def advance_run(run: AttributionRun) -> None:
    """Take a run one step on: plan it and open its shards, or merge them and publish.

    Raises:
        RunFailed: a shard has failed for good.
    """
    _use_threads()
    if run.grade == Grade.DECLARED:
        records = read_records(run.disclosure)
        publish_result(run=run, shares=shares_by_count(records))
    elif run.plan is None:
        _plan(run)
    elif failed := run.shards.filter(status=Shard.Status.FAILED).order_by("number").first():
        raise RunFailed(
            f"Round {failed.number} failed: {failed.error_message}",
            pointers=failed.error_pointers,
        )
    elif run.shards.exclude(status=Shard.Status.DONE).exists():
        _wait(run)
    else:
        _merge(run)


def execute_shard(shard: Shard) -> None:
    """Measure one round; whoever finishes the last one wakes the merge."""
    _use_threads()
    run = shard.run
    task = build_task(run.disclosure)
    with pointing("/plan"), tempfile.TemporaryDirectory(prefix="round-") as folder:
        result = run_round(task, read_plan(run), shard.number, progress=_teller(shard))
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
    measured: SharesResult | None = None,
    values: Artifact | None = None,
) -> AttributionResult:
    """Write a result with its shares, final from here on, and finish its run: all in one transaction.

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
    unmeasured = Disclosure.objects.filter(Exists(matched), ~Exists(run.filter(grade=Grade.REPLAYED)))
    for disclosure in unmeasured.order_by("pk")[:1000]:
        request_run(disclosure=disclosure, grade=Grade.REPLAYED)
        requested += 1
    shards = Shard.objects.filter(run=OuterRef("pk"))
    ended = Exists(shards.filter(status=Shard.Status.FAILED)) | ~Exists(shards.exclude(status=Shard.Status.DONE))
    waiting = AttributionRun.objects.filter(
        ended, status=AttributionRun.Status.QUEUED, plan__isnull=False, due_at__gt=timezone.now(), n_failures=0
    )
    for stuck in waiting.order_by("pk")[:1000]:
        requested += jobs.resume(stuck)
    return requested


def _plan(run: AttributionRun) -> None:
    task = build_task(run.disclosure)
    with pointing(""):
        plan = plan_shares(task, budget=run.budget, seed=run.seed)
        if len(plan.rounds) < MIN_ROUNDS:  # a small task, quickly planned again: several workers may share it
            plan = plan_shares(task, budget=run.budget, seed=run.seed, n_rounds=MIN_ROUNDS)
    document = io.BytesIO(json.dumps(plan.to_json()).encode())
    stored = store_artifact(owner=None, kind=Artifact.Kind.PLAN, stream=document)
    with transaction.atomic():
        run.lock()
        run.write(plan=stored, progress_done=0, progress_total=len(plan.rounds))
        shards = Shard.objects.bulk_create(Shard(run=run, number=number) for number in range(len(plan.rounds)))
        for shard in shards:
            jobs.wake(shard)
        _wait(run)
    logger.info("Planned run=%s rounds=%s run_equivalents=%.0f", run.pk, len(shards), plan.run_equivalents)


def read_plan(run: AttributionRun) -> Plan:
    """What a planned run measures."""
    assert run.plan is not None, "a run without a plan is planned first"
    with open_artifact(run.plan) as file:
        return Plan.from_json(json.load(file))


def _wait(run: AttributionRun) -> None:
    """Back to the queue and not due: the last shard resumes it."""
    run.postpone(timezone.now() + WAITING)


def _merge(run: AttributionRun) -> None:
    records = read_records(run.disclosure)
    task = build_task(run.disclosure, records)
    shards = run.shards.select_related("output").order_by("number")
    outputs = [shard.output for shard in shards if shard.output is not None]
    with ExitStack() as stack, pointing("/rounds"):
        rounds = [RoundResult.load(stack.enter_context(local_path(output))) for output in outputs]
        measured = merge_rounds(task, read_plan(run), rounds)
    values = _store_values(records, measured)
    publish_result(run=run, shares=shares_by_influence(measured, records), measured=measured, values=values)


def _store_values(records: TrainingRecords, measured: SharesResult) -> Artifact:
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


def _teller(job: jobs.Job) -> Callable[[int, int], None]:
    """Progress to the row, at most once a second; a lost lease stops the work here, at its next word."""
    told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            job.progress(done=min(int(done), int(total)), total=int(total))

    return tell


def _use_threads() -> None:
    torch.set_num_threads(settings.ATTRIBUTION_THREADS)


def _plain(document: Any) -> Any:
    """JSON that PostgreSQL takes: what is not a finite number becomes null."""
    return json.loads(json.dumps(document), parse_constant=lambda _: None)
