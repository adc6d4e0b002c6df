"""kill -9 of a worker's whole process group in the middle of ingest, of attribution and of a payout run.

Each time: a new worker takes the work up within a minute, the row's attempt shows 2, nothing is half written and every
payment happened exactly once.
"""

import random
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from django.core.files import File
from django.core.files.storage import default_storage
from django.db.models import Sum

from attribution.models import PPQ, AttributionResult, SegmentReplay, Shard, Verification
from attribution.services.disclosures import disclose_model
from marketplace import clock
from marketplace.ingest import merkle
from marketplace.models import Contribution, DatasetVersion, Order, RecordFingerprint, Upload
from marketplace.services.versions import create_dataset, start_upload
from payouts import gateway
from payouts.models import DivisionLine, JournalEntry, PayeeAccount, Payment, Payout, PayoutRun
from payouts.services.payees import start_onboarding
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile
from payouts.services.sales import start_checkout
from payouts.services.transfers import request_payout_run
from portal.demo.browser import Browser
from tests.factories.attribution import Metering, metered_document, published_clouds, trained_document
from tests.factories.marketplace import (
    LicenseFactory,
    OfferFactory,
    OrderFactory,
    PartyFactory,
    PublishedVersionFactory,
)
from tests.stories.running import Story

TAKEOVER_SECONDS = 60
pytestmark = pytest.mark.story


def _kill_and_replace(story: Story, worker: str, row: Any) -> float:
    """Kill the worker's process group, start a new worker, and wait for it to take the row up; the seconds it took."""
    story.site.supervisor.kill(worker)
    killed = time.monotonic()
    story.site.supervisor.restart(worker, wait=False)

    def taken_up() -> bool:
        row.refresh_from_db()
        return bool(row.attempt == 2)

    story.wait_for(f"the takeover of {row}", taken_up, seconds=TAKEOVER_SECONDS)
    return time.monotonic() - killed


def test_ingest_is_taken_up_after_its_worker_was_killed(story: Story) -> None:
    owner = PartyFactory(name="Archive")
    n_record = 200_000
    path = story.var / "large.csv"
    _write_csv(path, n_record)
    dataset = create_dataset(
        owner=owner, user=owner.user, title="Large", summary="", description="", source="", modality="tabular"
    )
    mapping = {"content": ["a", "b"], "label": "label", "rights_holder": "holder", "labeller": ""}
    with path.open("rb") as file:
        upload = start_upload(
            dataset=dataset, user=owner.user, party=owner, file=File(file), filename="large.csv", mapping=mapping
        )

    story.wait_for(
        "the middle of the ingest",
        lambda: Upload.objects.filter(pk=upload.pk, status="running", progress_done__gt=0).exists(),
    )
    seconds = _kill_and_replace(story, "ingest", upload)
    assert seconds < TAKEOVER_SECONDS
    assert DatasetVersion.objects.get().status == DatasetVersion.Status.DRAFT  # nothing of the first attempt

    story.wait_for("the end of the ingest", lambda: Upload.objects.get(pk=upload.pk).is_finished, seconds=240)
    upload.refresh_from_db()
    version = DatasetVersion.objects.get()
    assert (upload.status, upload.attempt, upload.error_message) == ("done", 2, "")
    assert (version.status, version.n_records) == (DatasetVersion.Status.FROZEN, n_record)
    assert RecordFingerprint.objects.filter(version=version).count() == n_record
    holders = Contribution.objects.filter(version=version)
    assert {c.party.name: c.n_records for c in holders} == {"north": n_record // 2, "south": n_record // 2}
    with default_storage.open(version.parquet_key) as stored:
        digests = pq.read_table(stored, columns=["digest"])["digest"].to_pylist()
    assert merkle.root(digests).hex() == version.merkle_root


def _write_csv(path: Path, n_record: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        file.write("a,b,label,holder\n")
        for row in range(n_record):
            file.write(f"{rng.random():.6f},{row},{row % 3},{'north' if row % 2 else 'south'}\n")


def test_attribution_is_taken_up_after_its_worker_was_killed(story: Story) -> None:
    holders = [PartyFactory(name=name) for name in ("North", "South")]
    lab = PartyFactory(name="Lab")
    version = published_clouds({holders[0]: 100, holders[1]: 100})
    license = LicenseFactory(version=version, licensee=lab)
    disclosure = disclose_model(owner=lab, document=trained_document(licenses=[license], epochs=4))

    def running_shard() -> Shard | None:
        return Shard.objects.filter(run__disclosure=disclosure, status="running").order_by("pk").first()

    shard = story.wait_for("the middle of a round", running_shard, seconds=120)
    seconds = _kill_and_replace(story, "attribution", shard)
    assert seconds < TAKEOVER_SECONDS
    assert not AttributionResult.objects.exists()

    story.wait_for("the result", lambda: AttributionResult.objects.filter(status="published").exists(), seconds=240)
    result = AttributionResult.objects.get()
    assert result.run is not None
    shards = list(result.run.shards.order_by("number"))
    assert {s.status for s in shards} == {"done"} and all(s.output for s in shards)
    assert Shard.objects.get(pk=shard.pk).attempt == 2
    sums: Counter[str] = Counter()
    for share in result.shares.all():
        sums[share.partition] += share.paid_ppq
    assert dict(sums) == {"rights_holder": PPQ, "labeller": PPQ}


def test_a_segments_replay_is_taken_up_after_its_worker_was_killed(story: Story) -> None:
    holders = [PartyFactory(name=name) for name in ("North", "South")]
    lab = PartyFactory(name="Lab")
    version = published_clouds({holders[0]: 60, holders[1]: 60})
    license = LicenseFactory(version=version, licensee=lab)
    steps = {"epochs": 40, "batch": 4, "checkpoint_steps": [400, 800, 1200]}
    document = metered_document(licenses=[license], meter=Metering(every=8, heads_every=100), **steps)
    disclosure = disclose_model(owner=lab, document=document)

    def running_segment() -> SegmentReplay | None:
        return (
            SegmentReplay.objects.filter(verification__disclosure=disclosure, status="running").order_by("pk").first()
        )

    segment = story.wait_for("the middle of a segment", running_segment, seconds=120)
    drawn = list(SegmentReplay.objects.order_by("number").values_list("number", flat=True))
    seconds = _kill_and_replace(story, "attribution", segment)
    assert seconds < TAKEOVER_SECONDS
    assert not AttributionResult.objects.filter(grade="metered").exists()

    story.wait_for(
        "the result",
        lambda: AttributionResult.objects.filter(grade="metered", status="published").exists(),
        seconds=240,
    )
    segments = SegmentReplay.objects.order_by("number")
    assert [one.number for one in segments] == drawn == [0, 1, 2]
    assert {(one.status, one.matches) for one in segments} == {("done", True)}
    assert Verification.objects.get().report["is_bit_equal"]
    assert [result.grade for result in disclosure.results.order_by("number")] == ["declared", "metered"]


def test_a_payout_run_is_taken_up_after_its_worker_was_killed_and_pays_everyone_once(story: Story) -> None:
    payees = [PartyFactory(name=f"Payee {number}", country="US") for number in range(24)]
    lab = PartyFactory(name="Lab")
    version = PublishedVersionFactory(contributions=dict.fromkeys(payees, 5))
    offer = OfferFactory(version=version, dataset=version.dataset, price_micros=5_000_000_000)
    order = OrderFactory(buyer=lab, offers=[offer])
    _pay(story, start_checkout(order=order, success_url=f"{story.url}/", cancel_url=f"{story.url}/"))
    story.wait_for("the sale", lambda: Order.objects.get(pk=order.pk).status == Order.Status.PAID)
    for payee in payees:
        _onboard(story, payee)
    story.wait_for(
        "Stripe's word on the accounts",
        lambda: PayeeAccount.objects.filter(transfers_active=True).count() == len(payees),
    )
    clock.advance(timedelta(days=32))
    story.site.advance_stripe_clock(32 * 86_400)
    story.wait_for("available funds", lambda: not Payment.objects.filter(settled_at=None).exists())

    # At its usual pace Stripe would be told of all of them before the kill comes.
    story.site.supervisor.children["payments"].env["STRIPE_REQUESTS_PER_SECOND"] = "3"
    story.site.supervisor.restart("payments")

    run = request_payout_run(currency="USD", key="run:USD:crash")
    # A batch's answers are booked together, so at Stripe there is more than here when the kill comes.
    story.wait_for("the middle of the run", lambda: len(_transfers()) >= 4)
    assert 4 <= len(_transfers()) < len(payees) and not Payout.objects.filter(status="sent").exists()
    seconds = _kill_and_replace(story, "payments", run)
    assert seconds < TAKEOVER_SECONDS

    story.wait_for("the end of the run", lambda: PayoutRun.objects.get(pk=run.pk).is_finished, seconds=120)
    run.refresh_from_db()
    assert (run.status, run.attempt, run.error_message) == ("done", 2, "")
    due = DivisionLine.objects.aggregate(sum=Sum("amount_micros"))["sum"]
    sent = list(Payout.objects.filter(run=run).order_by("party_id"))
    assert [payout.party for payout in sent] == payees
    assert {payout.status for payout in sent} <= {"sent", "paid"}
    assert due - len(payees) * 10_000 < sum(payout.amount_micros for payout in sent) <= due
    transfers = _transfers()
    assert len(transfers) == len(payees)  # Stripe has seen each of them once
    assert -sum(t.amount_minor for t in transfers) * 10_000 == sum(payout.amount_micros for payout in sent)
    assert JournalEntry.objects.filter(kind="payout_intent").count() == len(payees)
    assert check_books().findings == []
    assert reconcile().differences == []


def _transfers() -> list[gateway.BalanceTransaction]:
    return [moved for moved in gateway.balance_transactions(since=None) if moved.kind == "transfer"]


def _pay(story: Story, url: str) -> None:
    card = {
        "email": "lab@example.org",
        "card_number": "4242424242424242",
        "expiry": "12/40",
        "cvc": "123",
        "name": "Lab",
    }
    _fill_in(story, url, card)


def _onboard(story: Story, party: Any) -> None:
    url = start_onboarding(party=party, return_url=f"{story.url}/", refresh_url=f"{story.url}/")
    bank = {"name": party.name, "country": "US", "account_number": "000123456789", "routing_number": "110000000"}
    _fill_in(story, url, bank)


def _fill_in(story: Story, url: str, answers: dict[str, str]) -> None:
    """Fill in the one form of a page of the local Stripe."""
    with Browser(story.url) as browser:
        page = browser.get(url)
        form = page.own_form()
        browser.submit(page, form, {name: value for name, value in answers.items() if name in form.names})
