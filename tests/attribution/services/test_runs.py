"""From a disclosure to a published result, by the jobs' own code on a small real training."""

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from django.db import ProgrammingError, connection, transaction
from django.utils import timezone

from attribution import tasks
from attribution.models import PPQ, AttributionResult, AttributionRun, Shard, Share, Verification
from attribution.services import runs
from attribution.services.disclosures import disclose_model
from marketplace import jobs
from marketplace.models import Party
from tests.factories.attribution import declaration, published_clouds, trained_document, two_clouds
from tests.factories.marketplace import LicenseFactory


def _sums(result: AttributionResult) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for share in result.shares.all():
        sums[share.partition] += share.paid_ppq
    return dict(sums)


def test_an_honest_disclosure_is_reproduced_bit_for_bit_measured_and_published(license, carol, alice, bob, work):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license]))

    work()

    verification = Verification.objects.get(disclosure=disclosure)
    assert (verification.status, verification.verdict) == ("done", "match")
    assert verification.report["is_bit_equal"] and verification.report["environment"]["threads"] == 1
    result = AttributionResult.objects.get()
    assert (result.number, result.grade, result.status) == (1, "replayed", "published")
    assert 0 <= result.reliability <= 1
    assert result.total_low <= result.total <= result.total_high
    assert _sums(result) == {"rights_holder": PPQ, "labeller": PPQ}
    holders = {share.party: share for share in result.shares.filter(partition="rights_holder")}
    assert {party: share.n_records for party, share in holders.items()} == {alice: 40, bob: 24}
    assert sum(share.raw for share in holders.values()) == pytest.approx(1)
    # 50 labelled by bob; the 14 that nobody labelled are all bob's own
    assert {s.party: s.n_records for s in result.shares.filter(partition="labeller")} == {bob: 64}
    assert result.values.kind == "values"
    n_rounds = len(runs.read_plan(result.run).rounds)
    assert n_rounds > 1, "several workers may share even a small task"
    assert (result.run.status, result.run.shards.filter(status="done").count()) == ("done", n_rounds)


def test_the_workers_database_role_suffices_and_sees_no_money(license, carol, work):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license]))

    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL ROLE residual_worker")
        try:
            work()
            assert runs.request_missing_runs() == 0
            with pytest.raises(ProgrammingError, match="permission denied"), transaction.atomic():
                cursor.execute("SELECT 1 FROM payouts_posting")
        finally:
            cursor.execute("RESET ROLE")

    assert disclosure.results.get().status == "published"


def test_a_declaration_is_counted(version, license, carol, alice, bob, work):
    document = declaration(licenses=[license], selections=[[[0, 10], [38, 44]]])
    disclosure = disclose_model(owner=carol, document=document)

    work()

    result = disclosure.results.get()
    assert (result.grade, result.paid_by, result.reliability, result.total) == ("declared", "count", None, None)
    assert not Verification.objects.exists()
    paid = {share.party: share.paid_ppq for share in result.shares.filter(partition="rights_holder")}
    assert paid == {alice: 12 * PPQ // 16, bob: 4 * PPQ // 16}


def _flip_one(content, targets):
    targets[5] = 1 - targets[5]
    return content, targets


def _nudge(state):
    state["model.2.bias"][0] += 1e-3


@pytest.mark.parametrize(
    "lie",
    [
        {"trained_on": ["all"], "selections": [[[0, 63]]]},
        {"tamper": _flip_one},
        {"alter_state": _nudge},
    ],
    ids=["one record left out of the selection", "one label changed", "the final checkpoint altered"],
)
def test_a_disclosure_that_lies_is_caught_and_publishes_nothing(lie, license, carol, work):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license], **lie))

    work()
    runs.request_missing_runs()
    work()

    verification = Verification.objects.get(disclosure=disclosure)
    assert (verification.status, verification.verdict) == ("done", "mismatch")
    difference = verification.report["differences"][0]
    assert difference["largest"] > 0 and difference["tensor"].split(".")[0] in ("model", "optimizer")
    assert not AttributionRun.objects.exists()
    assert not AttributionResult.objects.exists()


def test_the_same_document_again_is_the_same_disclosure_and_asks_for_nothing_twice(license, carol, work):
    document = trained_document(licenses=[license])
    first = disclose_model(owner=carol, document=document)
    work()

    again = disclose_model(owner=carol, document=document)

    assert again == first
    assert runs.request_missing_runs() == 0
    assert work() == 0
    assert (Verification.objects.count(), AttributionResult.objects.count()) == (1, 1)


def test_a_shard_whose_worker_died_is_done_again_to_the_same_bytes_and_no_other(license, carol, work, settings):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license]))
    tasks.verify_disclosure(disclosure.verification.pk)
    run = AttributionRun.objects.get()
    run_plan(run)
    first, *others = Shard.objects.order_by("number")
    tasks.execute_shard(first.pk)
    first.refresh_from_db()
    expected = first.output.sha256
    # what a worker leaves behind that is killed in the middle of its second round
    dead = Shard.objects.filter(pk=first.pk)
    dead.update(status="running", output=None, finished_at=None, lease_expires_at=timezone.now() - timedelta(seconds=1))

    tasks.execute_shard(first.pk)
    work()

    first.refresh_from_db()
    assert (first.attempt, first.output.sha256, first.status) == (2, expected, "done")
    assert {shard.attempt for shard in Shard.objects.exclude(pk=first.pk)} <= {1}
    assert AttributionResult.objects.filter(status="published").count() == 1


def run_plan(run: AttributionRun) -> None:
    tasks.advance_run(run.pk)
    run.refresh_from_db()
    assert (run.status, run.plan is None) == ("queued", False)


def test_a_run_that_waits_for_its_shards_holds_no_worker_and_is_not_due(license, carol):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license]))
    tasks.verify_disclosure(disclosure.verification.pk)
    run = AttributionRun.objects.get()

    run_plan(run)

    assert run.due_at > timezone.now() + timedelta(hours=1)
    assert run.lease_expires_at is None
    tasks.advance_run(run.pk)  # a stray message
    assert not AttributionResult.objects.exists()


def test_a_lost_message_to_the_merge_is_found(license, carol):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license]))
    tasks.verify_disclosure(disclosure.verification.pk)
    run = AttributionRun.objects.get()
    run_plan(run)
    for shard in run.shards.all():
        tasks.execute_shard(shard.pk)
    AttributionRun.objects.update(due_at=timezone.now() + timedelta(days=1))  # as if it had been parked a moment later

    assert runs.request_missing_runs() == 1
    tasks.advance_run(run.pk)

    assert AttributionResult.objects.count() == 1


def test_a_worker_that_lost_its_lease_publishes_nothing(license, carol, work):
    disclosure = disclose_model(owner=carol, document=declaration(licenses=[license]))
    run = jobs.claim(AttributionRun, AttributionRun.objects.get().pk)
    AttributionRun.objects.update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    successor = jobs.claim(AttributionRun, run.pk)

    with pytest.raises(jobs.LostLease):
        runs.advance_run(run)
    assert not AttributionResult.objects.exists()
    runs.advance_run(successor)

    assert disclosure.results.count() == 1


def test_a_round_that_fails_for_good_fails_its_run_by_name(license, carol, work):
    disclosure = disclose_model(owner=carol, document=trained_document(licenses=[license]))
    tasks.verify_disclosure(disclosure.verification.pk)
    run = AttributionRun.objects.get()
    run_plan(run)
    Shard.objects.filter(number=0).update(status="failed", error_code="internal", error_message="It failed 5 times.")

    runs.request_missing_runs()
    tasks.advance_run(run.pk)

    run.refresh_from_db()
    assert (run.status, run.error_code) == ("failed", "run_failed")
    assert "Round 0 failed: It failed 5 times." in run.error_message
    assert runs.request_missing_runs() == 0

    assert [jobs.reopen(job) for job in (run.shards.get(number=0), run)] == [True, True]
    work()
    assert disclosure.results.get().run == run


def test_copies_within_and_across_versions_earn_for_the_first_registrant(alice, bob, carol, work):
    original = published_clouds({alice: 30}, seed=1)
    mine, _ = two_clouds(20, seed=2)
    theirs, labels = two_clouds(30, seed=1)
    content = [*theirs[:10].tolist(), *mine.tolist()]
    copying = published_clouds(
        {bob: 30},
        content=content,
        labels=[*labels[:10], *(["0", "1"] * 10)],
        copies={row: (original, row) for row in range(10)},
    )
    licenses = [LicenseFactory(licensee=carol, version=one) for one in (copying, original)]
    both = disclose_model(owner=carol, document=declaration(licenses=licenses, slug="both"))
    alone = disclose_model(owner=carol, document=declaration(licenses=licenses[:1], slug="alone"))

    work()

    def counts(disclosure: Any) -> dict[tuple[int, Party], int]:
        holders = disclosure.results.get().shares.filter(partition=Share.Partition.RIGHTS_HOLDER)
        return {(share.version_id, share.party): share.n_records for share in holders}

    assert counts(both) == {(original.pk, alice): 30, (copying.pk, bob): 20}
    assert counts(alone) == {(copying.pk, alice): 10, (copying.pk, bob): 20}
