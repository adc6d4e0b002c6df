"""The gradient store of a disclosure, as jobs, and its answers: plan → shards → store → questions.

    score[i, q] = ∂loss_i/∂θ · ∂measurement_q/∂θ  at the last checkpoint, up to a projection's error

Positive: the record helped the output; see `attribution/engine/search.py`. Whoever finishes the last shard wakes the index,
which waits meanwhile in the queue, not due.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from django.db import transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from attribution.artifacts import local_path, store_artifact
from attribution.documents import TrainingRecords, build_task, checkpoint_paths, pointing, read_records, read_value
from attribution.engine import Task, TensorRecords, architectures
from attribution.engine.search import N_JUDGES, RECALL_AT, SHORTLIST_FROM, build_shortlist, players, search
from attribution.engine.store import MANIFEST, SHARD_RECORDS, Store, build_shard, build_store, final_state
from attribution.errors import RunFailed
from attribution.models import Artifact, AttributionResult, IndexShard, InfluenceIndex, InfluenceQuestion
from attribution.services.questions import request_index
from attribution.services.runs import WAITING, teller, use_threads
from marketplace import jobs
from marketplace.models import Disclosure

logger = logging.getLogger(__name__)

N_NAMED = 12  # records on either side of an answer


def advance_index(index: InfluenceIndex) -> None:
    """Take an index one step on: open its shards, or put the store together.

    Raises:
        RunFailed: a shard has failed for good.
    """
    use_threads()
    if not index.n_records:
        _plan(index)
    elif failed := index.shards.filter(status=IndexShard.Status.FAILED).order_by("number").first():
        raise RunFailed(f"Shard {failed.number} failed: {failed.error_message}", pointers=failed.error_pointers)
    elif index.shards.exclude(status=IndexShard.Status.DONE).exists():
        index.postpone(timezone.now() + WAITING)
    else:
        _put_together(index)


def build_index_shard(shard: IndexShard) -> None:
    """Project one range's gradients; the same bytes on every attempt."""
    use_threads()
    with final_task(shard.index.disclosure) as (task, _), pointing(""), tempfile.TemporaryDirectory() as folder:
        path = build_shard(task, Path(folder), shard.number, progress=teller(shard))
        with path.open("rb") as stream:
            output = store_artifact(owner=None, kind=Artifact.Kind.GRADIENTS, stream=stream)
    with transaction.atomic():
        shard.lock()
        shard.write(output=output)
        shard.finish()
        # Two last shards at once: the second to get the index's row counts after the first has committed.
        index = InfluenceIndex.objects.select_for_update().get(pk=shard.index_id)
        if not index.shards.exclude(status=IndexShard.Status.DONE).exists():
            jobs.resume(index)


def answer_question(question: InfluenceQuestion) -> None:
    """Name the records that moved an output most, and say what the model made of it; trains nothing."""
    use_threads()
    disclosure = question.index.disclosure
    with final_task(disclosure) as (task, records), stored(question.index) as store, pointing(""):
        number = question.query
        if number is None:
            task, number = replace(task, queries=_entered(disclosure, question)), 0
        playing = players(task)
        k = min(N_NAMED, task.n_train if playing is None else len(playing), RECALL_AT)
        found = search(task, store, [number], k=k)
        answer: dict[str, Any] = {"way": found.way, "recall": found.recall} | _said(disclosure, task, number)
    for side in ("helpful", "harmful"):
        answer[side] = _places(records, getattr(found.queries[0], side))
    with transaction.atomic():
        question.lock()
        question.write(answer=answer)
        question.finish()
    logger.info("Answered question=%s index=%s way=%s", question.pk, question.index_id, found.way)


def request_missing_indexes() -> int:
    """Open what a published result should have, and wake indexes whose shards have ended; returns how many."""
    requested = 0
    published = AttributionResult.objects.filter(disclosure=OuterRef("pk"), status=AttributionResult.Status.PUBLISHED)
    known = InfluenceIndex.objects.filter(disclosure=OuterRef("pk"))
    unindexed = Disclosure.objects.filter(Exists(published), ~Exists(known), document__has_key="checkpoints")
    for disclosure in unindexed.order_by("pk")[:1000]:
        requested += request_index(disclosure) is not None
    shards = IndexShard.objects.filter(index=OuterRef("pk"))
    ended = Exists(shards.filter(status=IndexShard.Status.FAILED)) | ~Exists(
        shards.exclude(status=IndexShard.Status.DONE)
    )
    waiting = InfluenceIndex.objects.filter(
        ended, status=InfluenceIndex.Status.QUEUED, n_records__gt=0, due_at__gt=timezone.now(), n_failures=0
    )
    for stuck in waiting.order_by("pk")[:1000]:
        requested += jobs.resume(stuck)
    return requested


@contextmanager
def final_task(disclosure: Disclosure) -> Iterator[tuple[Task, TrainingRecords]]:
    """The disclosed task at its last checkpoint, and whose its records are."""
    records = read_records(disclosure)
    with checkpoint_paths(disclosure) as paths, pointing(""):
        yield replace(build_task(disclosure, records), checkpoints=paths[-1:]), records


@contextmanager
def stored(index: InfluenceIndex) -> Iterator[Store]:
    """The finished store, as files that live as long as the context."""
    kept = {
        a.sha256: a
        for a in Artifact.objects.filter(owner=None, kind=Artifact.Kind.INDEX, sha256__in=index.files.values())
    }
    with _folder(index) as (folder, stack):
        for name, sha256 in index.files.items():
            (folder / name).symlink_to(stack.enter_context(local_path(kept[sha256])))
        yield Store.open(folder)


@contextmanager
def _folder(index: InfluenceIndex) -> Iterator[tuple[Path, ExitStack]]:
    """A folder with every shard under its own name."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="index-")))
        for shard in index.shards.select_related("output").order_by("number"):
            assert shard.output is not None, "a finished shard has its output"
            name = f"shard-{shard.number * SHARD_RECORDS:012d}.safetensors"
            (folder / name).symlink_to(stack.enter_context(local_path(shard.output)))
        yield folder, stack


def _plan(index: InfluenceIndex) -> None:
    n_records = sum(index.disclosure.citations.values_list("n_records", flat=True))
    with transaction.atomic():
        index.lock()
        index.write(n_records=n_records, progress_done=0, progress_total=-(-n_records // SHARD_RECORDS))
        for shard in IndexShard.objects.bulk_create(
            IndexShard(index=index, number=number) for number in range(-(-n_records // SHARD_RECORDS))
        ):
            jobs.wake(shard)
        index.postpone(timezone.now() + WAITING)


def _put_together(index: InfluenceIndex) -> None:
    """The manifest over the shards and, from many records on, a shortlist measured on the evaluation queries."""
    with final_task(index.disclosure) as (task, _), _folder(index) as (folder, _), pointing(""):
        shards = {path.name for path in folder.iterdir()}
        store = build_store(task, folder)  # every shard is there and is checked; none is made
        playing = players(task)
        if (len(store) if playing is None else len(playing)) >= SHORTLIST_FROM and task.n_query > 1:
            asked = store.query_vectors(task, torch.arange(min(task.n_query, N_JUDGES)))
            build_shortlist(store, asked, players=playing)
        files = {}
        for path in sorted(folder.iterdir()):
            if path.name not in shards:
                with path.open("rb") as stream:
                    files[path.name] = store_artifact(owner=None, kind=Artifact.Kind.INDEX, stream=stream).sha256
    assert MANIFEST in files
    with transaction.atomic():
        index.lock()
        index.write(files=files, progress_done=index.shards.count())
        index.finish()
    logger.info("Indexed disclosure=%s records=%s", index.disclosure_id, index.n_records)


def _entered(disclosure: Disclosure, question: InfluenceQuestion) -> TensorRecords:
    """A text that somebody entered, as the one query of a task."""
    features = disclosure.document["features"]
    with pointing("/features/transform"):
        content = architectures.transform(features["transform"], [question.text])
    if "classes" not in features:
        return TensorRecords(content)
    return TensorRecords(content, torch.tensor([features["classes"].index(question.label)]))


def _said(disclosure: Disclosure, task: Task, number: int) -> dict[str, Any]:
    """What the model itself makes of the query: its measurement and, of classes, the likeliest."""
    model = task.model().eval()
    model.load_state_dict(final_state(task), strict=False)  # a tied weight is kept once
    batch = task.queries[torch.tensor([number])]
    classes = disclosure.document["features"].get("classes")
    with torch.no_grad():
        said: dict[str, Any] = {"measured": float(task.measurement(model, batch)[0])}
        if classes is not None:
            outputs = model(batch[0])[0]
            said |= {"asked": classes[int(batch[1][0])], "likeliest": classes[int(outputs.argmax())]}
            if disclosure.document["loss"] == "cross_entropy":  # else they are no log odds
                said["chance"] = float(outputs.softmax(0).max())
    return said


def _places(records: TrainingRecords, moved: list[tuple[int, float]]) -> list[dict[str, Any]]:
    """Where each record stands, by what the page may show of it."""
    places = []
    for record, score in moved:
        citation, row = int(records.citation[record]), int(records.row[record])
        version = records.versions[citation]
        digest = read_value(version, row, "digest")
        places.append(
            {
                "version": version.pk,
                "row": row,
                "digest": digest.hex(),
                "score": score,
                "holder": records.owners[records.owner[record]].party_id,
            }
        )
    return places
