"""Ids in, services called. Services are imported inside: only the attribution worker should pay for loading torch."""

from celery import shared_task

from attribution.models import (
    AttributionRun,
    IndexShard,
    InfluenceIndex,
    InfluenceQuestion,
    SegmentReplay,
    Shard,
    Verification,
)
from marketplace import jobs


@shared_task(acks_late=True)
def verify_disclosure(verification_id: int) -> None:
    """Harmless to run twice, at once, or after a crash; so are the others."""
    with jobs.claimed(Verification, verification_id) as verification:
        if verification:
            from attribution.services import runs

            runs.verify_disclosure(verification)


@shared_task(acks_late=True)
def advance_run(run_id: int) -> None:
    with jobs.claimed(AttributionRun, run_id) as run:
        if run:
            from attribution.services import runs

            runs.advance_run(run)


@shared_task(acks_late=True)
def execute_shard(shard_id: int) -> None:
    with jobs.claimed(Shard, shard_id) as shard:
        if shard:
            from attribution.services import runs

            runs.execute_shard(shard)


@shared_task(acks_late=True)
def replay_segment(replay_id: int) -> None:
    with jobs.claimed(SegmentReplay, replay_id) as replay:
        if replay:
            from attribution.services import runs

            runs.replay_segment(replay)


@shared_task(acks_late=True)
def advance_index(index_id: int) -> None:
    with jobs.claimed(InfluenceIndex, index_id) as index:
        if index:
            from attribution.services import influence

            influence.advance_index(index)


@shared_task(acks_late=True)
def build_index_shard(shard_id: int) -> None:
    with jobs.claimed(IndexShard, shard_id) as shard:
        if shard:
            from attribution.services import influence

            influence.build_index_shard(shard)


@shared_task(acks_late=True)
def answer_question(question_id: int) -> None:
    with jobs.claimed(InfluenceQuestion, question_id) as question:
        if question:
            from attribution.services import influence

            influence.answer_question(question)


@shared_task
def request_missing_runs() -> None:
    from attribution.services import influence, runs

    runs.request_missing_runs()
    influence.request_missing_indexes()
