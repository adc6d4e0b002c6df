"""Metered trainings: announced before they begin, their log's heads posted while they run, committed when they are disclosed.

plan_metered_run → post_heads … → store_artifact(kind=meter) → disclose_model: check_meter, commit_meter → segments are drawn
"""

import hashlib
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max

from attribution.artifacts import find_artifact, local_path
from attribution.artifacts import read_header as artifact_header
from attribution.documents import build_recipe, read_records, sample_task
from attribution.engine import EngineError, metered
from attribution.engine.meter_log import Head, read_header
from attribution.engine.training import Program
from attribution.errors import EvidenceInvalid, HeadsRefused, MeterCommitted, MeteredRunTaken
from attribution.models import Artifact, MeterCommitment, MeteredRun, MeterHead
from marketplace.models import Disclosure, Party
from marketplace.services.disclosures import canonical_json

logger = logging.getLogger(__name__)

MAX_HEADS = 1_000  # in one request
MAX_HEADS_PER_RUN = 100_000
MAX_ENTRIES = 1_000_000  # of a log, rewinds and marks included
CLOCKS_DIFFER_SECONDS = 5.0  # the database's, which heads are given, and the application's
LARGEST = 2**53 - 1  # what JSON's numbers hold exactly
HEX = re.compile(r"[0-9a-f]{64}")
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class PostedHead:
    """A head as it comes in: the engine's `Head`."""

    entry: int
    step: int
    head: str


@transaction.atomic
def plan_metered_run(*, owner: Party, slug: str, queries_sha256: str) -> MeteredRun:
    """Announce a training; the same announcement again is the same run.

    Raises:
        EvidenceInvalid: a field is not of its form.
        ArtifactMissing: the queries were not handed in.
        MeteredRunTaken: the name is another run of the party's, with other queries.
    """
    if not SLUG.fullmatch(slug) or len(slug) > 80:
        raise EvidenceInvalid(
            "Name the run in lower-case letters, digits and hyphens, at most 80.", pointers={"/slug": "not a slug"}
        )
    find_artifact(owner=owner, kind=Artifact.Kind.QUERIES, sha256=queries_sha256, pointer="/queries_sha256")
    run, is_new = MeteredRun.objects.get_or_create(owner=owner, slug=slug, defaults={"queries_sha256": queries_sha256})
    if run.queries_sha256 != queries_sha256:
        raise MeteredRunTaken(
            f"Your metered run '{slug}' was planned with other queries; what is asked is fixed before training. Choose another name.",
            pointers={"/slug": "taken", "/queries_sha256": "differs"},
        )
    if is_new:
        run.refresh_from_db()  # the database sets its time
        logger.info("Planned metered run=%s owner=%s", run.pk, owner.pk)
    return run


@transaction.atomic
def post_heads(*, run: MeteredRun, heads: Sequence[PostedHead]) -> list[MeterHead]:
    """Keep heads with the time at which they came; those that are there already stay as they are.

    Raises:
        HeadsRefused: one is malformed, contradicts a posted one, or comes after a later one; nothing is kept of the request.
        MeterCommitted: the run was disclosed.
    """
    if not 0 < len(heads) <= MAX_HEADS:
        raise HeadsRefused(f"Post 1 to {MAX_HEADS} heads at once.", pointers={"/heads": f"{len(heads)} heads"})
    for number, head in enumerate(heads):
        pointer = f"/heads/{number}"
        if not 0 <= head.entry <= LARGEST or not 0 <= head.step <= LARGEST:
            raise HeadsRefused(f"{pointer}: entry and step are counted from 0.", pointers={pointer: "out of range"})
        if not HEX.fullmatch(head.head):
            raise HeadsRefused(
                f"{pointer}/head: give 64 lower-case hex digits.", pointers={f"{pointer}/head": "not a SHA-256"}
            )
        if number and head.entry <= heads[number - 1].entry:
            raise HeadsRefused(f"{pointer}/entry: entries ascend.", pointers={f"{pointer}/entry": "out of order"})
    known = {head.entry: head for head in run.heads.filter(entry__in=[head.entry for head in heads])}
    new = []
    for number, head in enumerate(heads):
        found = known.get(head.entry)
        if found is None:
            new.append(MeterHead(run=run, entry=head.entry, step=head.step, head=head.head))
        elif (found.head, found.step) != (head.head, head.step):
            raise HeadsRefused(
                f"Entry {head.entry} was posted with another head at {found.posted_at:%H:%M:%S}; a log that was written again needs a "
                "run of its own.",
                pointers={f"/heads/{number}/head": "contradicts the posted one"},
            )
    if new:
        if MeterCommitment.objects.filter(run=run).exists():
            raise MeterCommitted("The run was disclosed; its log takes no more heads. Plan another run.")
        if run.heads.count() + len(new) > MAX_HEADS_PER_RUN:
            raise HeadsRefused(
                f"A run has at most {MAX_HEADS_PER_RUN:,} heads; post every hundredth entry's, say.",
                pointers={"/heads": "too many"},
            )
        last = run.heads.aggregate(last=Max("entry"))["last"]
        if last is not None and new[0].entry < last:
            raise HeadsRefused(
                f"Entry {new[0].entry} comes after {last}, whose head is posted: heads are posted in order.",
                pointers={"/heads": f"entry {new[0].entry} is too late"},
            )
        try:
            with transaction.atomic():
                MeterHead.objects.bulk_create(new)
        except IntegrityError as error:  # another request posted, or a disclosure committed, at the same moment
            raise HeadsRefused(
                "Other heads of this run came in at the same moment; post these again.",
                pointers={"/heads": "try again"},
            ) from error
        logger.info("Posted heads run=%s count=%s last=%s", run.pk, len(new), new[-1].entry)
    return list(run.heads.filter(entry__in=[head.entry for head in heads]).order_by("entry"))


def check_meter(disclosure: Disclosure) -> None:
    """Refuse, before it is published, a metered disclosure whose log is not of this training or was not fixed while it ran.

    Raises:
        EvidenceInvalid: with a pointer into the document; the message names the entry.
        ArtifactMissing: the log was not handed in.
    """
    document = disclosure.document
    run = find_metered_run(disclosure)
    if run.queries_sha256 != document["queries"]["sha256"]:
        raise EvidenceInvalid(
            f"The run '{run.slug}' was planned with other evaluation queries; what is asked is fixed before training.",
            pointers={"/queries/sha256": "not those of the plan"},
        )
    log = find_log(disclosure)
    records = read_records(disclosure)
    sample = sample_task(disclosure, records)
    _check_segments(disclosure, needed=Program(sample).fields)
    recipe = build_recipe(document, n_train=len(records))
    with local_path(log) as path, _pointing_at_log():
        header = metered.expected_header(sample, read_header(path), n_train=len(records))
        metered.check_log(
            path,
            header=header,
            order=recipe.order,
            rates=metered.first_rates(recipe, sample.model()),
            max_entries=MAX_ENTRIES,
        )
        metered.check_heads(
            path, posted_moments(run), handed_in_at=log.registered_at.timestamp() + CLOCKS_DIFFER_SECONDS
        )


def _check_segments(disclosure: Disclosure, *, needed: Sequence[str]) -> None:
    """Every checkpoint but the last is one that a segment can start from."""
    for number, spec in enumerate(disclosure.document["checkpoints"][:-1]):
        artifact = find_artifact(
            owner=disclosure.model.owner,
            kind=Artifact.Kind.STATE,
            sha256=spec["sha256"],
            pointer=f"/checkpoints/{number}/sha256",
        )
        with local_path(artifact) as path:
            found = {name.rpartition(".")[2] for name in artifact_header(path) if name.startswith("optimizer.")}
        if missing := [name for name in needed if name not in found]:
            raise EvidenceInvalid(
                f"Checkpoint {number} has no optimizer state, and no segment can be replayed from it; save optimizer.NAME.{missing[0]} "
                "beside model.NAME, or leave this checkpoint out.",
                pointers={f"/checkpoints/{number}/sha256": f"lacks {missing[0]}"},
            )


@contextmanager
def _pointing_at_log() -> Iterator[None]:
    """The engine's refusal of a log or its heads as the disclosure's; the message names the entry."""
    try:
        yield
    except EngineError as error:
        at = re.fullmatch(r"/log/(\d+)(/.*)?", error.pointer)
        where = f"entry {at[1]} " if at and not error.reason.startswith("entry") else ""
        raise EvidenceInvalid(
            f"The meter log: {where}{error.reason}.", pointers={"/meter/log_sha256": f"{where}{error.reason}"}
        ) from error


def commit_meter(disclosure: Disclosure) -> MeterCommitment:
    """Bind a run to its evidence and make the seed of the draw, now that everything it could be chosen for is fixed.

    Raises:
        MeterCommitted: the run was disclosed before with other evidence: a second draw could be hoped to go better.
    """
    run, evidence = find_metered_run(disclosure), evidence_digest(disclosure.document)
    commitment, is_new = MeterCommitment.objects.get_or_create(
        run=run, defaults={"evidence_sha256": evidence, "log": find_log(disclosure), "seed": secrets.randbits(62)}
    )
    if commitment.evidence_sha256 != evidence:
        raise MeterCommitted(
            f"The run '{run.slug}' was disclosed before with other evidence, and its segments are drawn once. Name, address and summary of the "
            "model may change, nothing else.",
            pointers={"/meter/run": "committed to other evidence"},
        )
    if is_new:
        logger.info("Committed metered run=%s disclosure=%s", run.pk, disclosure.pk)
    return commitment


def find_metered_run(disclosure: Disclosure) -> MeteredRun:
    """The planned run that a metered document names.

    Raises:
        EvidenceInvalid: its owner has planned none such.
    """
    run = MeteredRun.objects.filter(owner=disclosure.model.owner, public_id=disclosure.document["meter"]["run"]).first()
    if run is None:
        raise EvidenceInvalid(
            "No metered run of yours has this id; plan it by POST /api/v1/metered-runs/ before you train.",
            pointers={"/meter/run": "unknown"},
        )
    return run


def find_log(disclosure: Disclosure) -> Artifact:
    return find_artifact(
        owner=disclosure.model.owner,
        kind=Artifact.Kind.METER,
        sha256=disclosure.document["meter"]["log_sha256"],
        pointer="/meter/log_sha256",
    )


def posted_moments(run: MeteredRun) -> list[metered.Moment]:
    return [
        metered.Moment(Head(head.entry, head.step, head.head), head.posted_at.timestamp())
        for head in run.heads.order_by("entry")
    ]


def evidence_digest(document: dict[str, Any]) -> str:
    """SHA-256 of a document without what the model is called."""
    evidence = {name: part for name, part in document.items() if name != "model"}
    return hashlib.sha256(canonical_json(evidence)).hexdigest()
