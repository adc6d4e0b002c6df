"""The grades between declared and replayed: from a disclosure to a published result, by the jobs' own code on real trainings."""

from collections import Counter
from datetime import timedelta

import numpy as np
import pytest
from django.db import connection
from django.utils import timezone

from attribution import tasks
from attribution.engine.unreplayed import RECORD
from attribution.models import (
    PPQ,
    AttributionResult,
    AttributionRun,
    MeterCommitment,
    SegmentReplay,
    Shard,
    Verification,
)
from attribution.services import runs
from attribution.services.disclosures import disclose_model
from tests.factories.attribution import Metering, estimated_document, metered_document


def _sums(result: AttributionResult) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for share in result.shares.all():
        sums[share.partition] += share.paid_ppq
    return dict(sums)


def test_checkpoints_without_a_recipe_are_estimated_and_trusted_by_the_methods_record(license, carol, alice, bob, work):
    disclosure = disclose_model(owner=carol, document=estimated_document(licenses=[license]))

    work()

    assert not Verification.objects.exists()
    result = disclosure.results.get()
    assert (result.grade, result.status, result.paid_by) == ("estimated", "published", "influence")
    assert _sums(result) == {"rights_holder": PPQ, "labeller": PPQ}
    assert result.summary["reliability_source"] == "record"
    assert result.reliability == pytest.approx(RECORD["estimated"] * result.summary["coherence"])
    assert 0 < result.reliability < 1 and 0 < result.total_low <= result.total <= result.total_high
    holders = {share.party: share for share in result.shares.filter(partition="rights_holder")}
    assert {party: share.n_records for party, share in holders.items()} == {alice: 40, bob: 24}
    for share in holders.values():
        assert share.low <= share.raw <= share.high
        blended = result.reliability * share.raw + (1 - result.reliability) * share.count_ppq / PPQ
        assert share.paid_ppq / PPQ == pytest.approx(blended, abs=1e-9), "paid = λ · raw + (1 − λ) · count"
    stages = [piece.stage for piece in _plan(result.run).pieces]
    assert stages == ["fisher"] * 4 + ["solve"] * 4 + ["scores"]
    assert result.run.shards.filter(status="done").count() == len(stages)


def _plan(run):
    from attribution.services import estimates

    return estimates.read_plan(run)


def test_from_the_end_of_training_alone_the_count_pays(license, carol, alice, bob, work):
    disclosure = disclose_model(owner=carol, document=estimated_document(licenses=[license], checkpoint_steps=[16]))

    work()

    result = disclosure.results.get()
    assert (result.grade, result.paid_by, result.reliability) == ("estimated", "count", 0)
    assert {s.party: s.paid_ppq for s in result.shares.filter(partition="rights_holder")} == {
        alice: 40 * PPQ // 64,
        bob: 24 * PPQ // 64,
    }
    assert all(share.raw is not None for share in result.shares.all()), "what was estimated is still told"


def test_an_estimates_shards_give_the_same_bytes_after_a_killed_worker(license, carol, work):
    disclosure = disclose_model(owner=carol, document=estimated_document(licenses=[license]))
    run = disclosure.runs.get()
    tasks.advance_run(run.pk)
    first = Shard.objects.order_by("number").first()
    tasks.execute_shard(first.pk)
    first.refresh_from_db()
    expected = first.output.sha256
    dead = Shard.objects.filter(pk=first.pk)
    dead.update(status="running", output=None, finished_at=None, lease_expires_at=timezone.now() - timedelta(seconds=1))

    tasks.execute_shard(first.pk)
    work()

    first.refresh_from_db()
    assert (first.attempt, first.output.sha256, first.status) == (2, expected, "done")
    assert disclosure.results.get().status == "published"


def test_a_lost_message_between_two_stages_is_found(license, carol, work):
    disclosure = disclose_model(owner=carol, document=estimated_document(licenses=[license]))
    run = disclosure.runs.get()
    tasks.advance_run(run.pk)
    for shard in run.shards.all():
        tasks.execute_shard(shard.pk)
    AttributionRun.objects.update(due_at=timezone.now() + timedelta(days=1))
    assert not disclosure.results.exists()

    assert runs.request_missing_runs() == 1
    work()

    assert disclosure.results.get().grade == "estimated"


def test_a_metered_training_pays_by_count_until_its_segments_replay_and_then_by_its_log(
    license, carol, alice, bob, work
):
    disclosure = disclose_model(owner=carol, document=metered_document(licenses=[license]))
    counted = disclosure.runs.get()
    tasks.advance_run(counted.pk)
    first = disclosure.results.get()
    assert (first.grade, first.paid_by) == ("declared", "count")

    work()

    verification = Verification.objects.get(disclosure=disclosure)
    assert (verification.status, verification.verdict) == ("done", "match")
    assert verification.report["is_bit_equal"]
    draw = verification.report["draw"]
    assert draw["seed"] == MeterCommitment.objects.get().seed
    assert draw["n_segment"] == 4 and draw["miss_probability"] <= 0.05
    assert [(s["first"], s["last"]) for s in verification.report["segments"]] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert all(segment["log"]["worst"] == 0 for segment in verification.report["segments"])
    latest = disclosure.results.order_by("-number").first()
    assert (latest.number, latest.grade, latest.paid_by) == (2, "metered", "influence")
    assert latest.summary["details"]["measured_visits"] == 4
    assert latest.reliability == pytest.approx(RECORD["metered"] * latest.summary["coherence"])
    assert _sums(latest) == {"rights_holder": PPQ, "labeller": PPQ}
    assert {s.party for s in latest.shares.filter(partition="rights_holder")} == {alice, bob}


def test_a_log_with_too_few_measurements_leaves_the_count_in_force(license, carol, alice, bob, work):
    document = metered_document(licenses=[license], meter=Metering(every=16))
    disclosure = disclose_model(owner=carol, document=document)

    work()

    latest = disclosure.results.order_by("-number").first()
    assert (latest.grade, latest.paid_by, latest.reliability) == ("metered", "count", 0)


def test_the_workers_database_role_suffices_for_both(license, carol, work):
    estimated = disclose_model(owner=carol, document=estimated_document(licenses=[license], slug="estimated"))
    metered = disclose_model(owner=carol, document=metered_document(licenses=[license], slug="metered"))

    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL ROLE residual_worker")
        try:
            work()
            assert runs.request_missing_runs() == 0
        finally:
            cursor.execute("RESET ROLE")

    assert estimated.results.get().grade == "estimated"
    assert [result.grade for result in metered.results.order_by("number")] == ["declared", "metered"]


def test_a_segment_whose_worker_died_is_replayed_again_and_gives_the_same_verdict(license, carol, work):
    disclosure = disclose_model(owner=carol, document=metered_document(licenses=[license]))
    verification = disclosure.verification
    tasks.verify_disclosure(verification.pk)
    first = SegmentReplay.objects.order_by("number").first()
    tasks.replay_segment(first.pk)
    first.refresh_from_db()
    expected = first.report
    drawn = [replay.number for replay in verification.segments.order_by("number")]
    dead = SegmentReplay.objects.filter(pk=first.pk)
    dead.update(
        status="running",
        matches=None,
        report={},
        finished_at=None,
        lease_expires_at=timezone.now() - timedelta(seconds=1),
    )

    tasks.replay_segment(first.pk)
    work()

    first.refresh_from_db()
    assert (first.attempt, first.report, first.matches) == (2, expected, True)
    assert [replay.number for replay in verification.segments.order_by("number")] == drawn
    assert disclosure.results.filter(grade="metered").count() == 1


def _times_ten(path):
    """The log written anew with one record's influence raised in every step, as someone would who knows the format."""
    from attribution.engine.meter_log import LogWriter, entries, read_header

    header, kept = read_header(path), list(entries(path))
    path.unlink()
    writer = LogWriter(path, {k: v for k, v in header.items() if k not in ("format", "first_step")})
    for entry in kept:
        raised = entry.influence.copy()
        raised[entry.records == 3] = 10 * np.abs(raised).max()
        writer.append(type(entry)(**{**vars(entry), "influence": raised}))
    writer.close()


def test_influences_that_do_not_come_out_again_leave_the_count_and_name_the_entry(license, carol, work):
    """A trainer who raises a friend's influence while training runs: the chain and its heads are in order."""
    posted = []
    meter = Metering(post=lambda run, head: posted.append(run), alter_log=lambda path: _repost(path, posted[0]))
    disclosure = disclose_model(owner=carol, document=metered_document(licenses=[license], meter=meter))

    work()
    runs.request_missing_runs()
    work()

    verification = Verification.objects.get()
    assert verification.verdict == "mismatch"
    assert "does not come out again" in verification.report["summary"] and "entry " in verification.report["summary"]
    assert [result.grade for result in disclosure.results.all()] == ["declared"]


def _repost(path, run):
    from attribution.engine.meter_log import Head, _frames
    from tests.factories.attribution import _post_head

    _times_ten(path)
    with path.open("rb") as file:
        for number, _, head, _, _ in _frames(file):
            if number:
                _post_head(run, Head(number, number, head.hex()))


def test_a_count_that_comes_late_does_not_follow_what_was_measured(license, carol, work):
    disclosure = disclose_model(owner=carol, document=metered_document(licenses=[license]))
    count = disclosure.runs.get()
    AttributionRun.objects.filter(pk=count.pk).update(due_at=timezone.now() + timedelta(days=1))
    work()
    assert [result.grade for result in disclosure.results.all()] == ["metered"]
    AttributionRun.objects.filter(pk=count.pk).update(due_at=timezone.now())

    work()

    count.refresh_from_db()
    assert count.status == "done"
    assert [result.grade for result in disclosure.results.all()] == ["metered"]
