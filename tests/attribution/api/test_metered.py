"""Metered trainings through the API: planned, heads posted, disclosed; every refusal names its place and keeps nothing."""

import io
import uuid

import pytest
import torch
from django.db import IntegrityError, connection, transaction
from safetensors.torch import save

from attribution.artifacts import store_artifact
from attribution.models import MeterCommitment, MeteredRun, MeterHead, SegmentReplay, Verification
from attribution.services.disclosures import disclose_model
from marketplace.errors import DomainError
from marketplace.models import Disclosure
from tests.factories.attribution import (
    Metering,
    estimated_document,
    metered_document,
    queries_file,
    trained_document,
    two_clouds,
)

URL = "/api/v1/metered-runs/"
HEADS = [{"entry": n, "step": n, "head": f"{n:064x}"} for n in (1, 3, 5)]


@pytest.fixture
def queries(carol):
    return store_artifact(owner=carol, kind="queries", stream=queries_file(*two_clouds(8, seed=99)))


@pytest.fixture
def planned(client_of, carol, queries):
    return client_of(carol).post(URL, {"slug": "night-shift", "queries_sha256": queries.sha256}, format="json").json()


def test_a_run_is_planned_once_and_takes_heads_with_the_servers_time(client_of, carol, planned, queries):
    client = client_of(carol)
    again = client.post(URL, {"slug": "night-shift", "queries_sha256": queries.sha256}, format="json")
    assert (again.status_code, again.json()["id"]) == (201, planned["id"])
    assert planned["n_heads"] == 0 and planned["last_head"] is None and planned["committed_at"] is None

    url = f"{URL}{planned['id']}/heads/"
    first = client.post(url, {"heads": HEADS[:2]}, format="json")
    repeated = client.post(url, {"heads": HEADS}, format="json")

    assert (first.status_code, repeated.status_code) == (201, 201)
    assert repeated.json()["heads"][:2] == first.json()["heads"]
    assert [head["entry"] for head in repeated.json()["heads"]] == [1, 3, 5]
    assert first.json()["heads"][0]["posted_at"] == first.json()["heads"][1]["posted_at"], "one request is one moment"
    assert repeated.json()["heads"][2]["posted_at"] > first.json()["heads"][1]["posted_at"]
    seen = client.get(f"{URL}{planned['id']}/").json()
    assert (seen["n_heads"], seen["last_head"]["entry"]) == (3, 5)
    assert [run["id"] for run in client.get(URL).json()["results"]] == [planned["id"]]


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ([{"entry": 3, "step": 3, "head": "f" * 64}], "another head"),
        ([{"entry": 2, "step": 2, "head": "0" * 64}], "posted in order"),
        ([{"entry": 9, "step": 9, "head": "0" * 64}, {"entry": 8, "step": 8, "head": "0" * 64}], "entries ascend"),
        ([{"entry": 9, "step": 9, "head": "ABC"}], ""),
        ([{"entry": -1, "step": 9, "head": "0" * 64}], ""),
        ([{"entry": 2**60, "step": 9, "head": "0" * 64}], ""),
        ([{"entry": n, "step": n, "head": "0" * 64} for n in range(9, 1011)], "1 to 1000 heads"),
        ([], ""),
    ],
    ids=["contradicts", "too late", "not ascending", "not hex", "negative", "huge", "too many", "none"],
)
def test_heads_that_do_not_follow_are_refused_and_none_of_the_request_is_kept(client_of, carol, planned, heads, says):
    client, url = client_of(carol), f"{URL}{planned['id']}/heads/"
    client.post(url, {"heads": HEADS}, format="json")
    before = list(MeterHead.objects.values())

    refused = client.post(url, {"heads": heads}, format="json")

    assert refused.status_code in (409, 422)
    assert refused["content-type"] == "application/problem+json"
    assert says in refused.json()["detail"]
    assert list(MeterHead.objects.values()) == before


def test_strangers_see_no_run_and_a_key_needs_the_scope(client_of, carol, mallory, planned, queries):
    stranger = client_of(mallory)
    for response in (
        stranger.get(f"{URL}{planned['id']}/"),
        stranger.post(f"{URL}{planned['id']}/heads/", {"heads": HEADS}, format="json"),
    ):
        assert response.status_code == 404
    reading = client_of(carol, "read")
    assert reading.post(f"{URL}{planned['id']}/heads/", {"heads": HEADS}, format="json").status_code == 403
    assert reading.post(URL, {"slug": "x", "queries_sha256": queries.sha256}, format="json").status_code == 403
    assert not MeterHead.objects.exists()


def test_a_plan_needs_its_queries_and_a_name_keeps_them(client_of, carol, planned):
    client = client_of(carol)
    missing = client.post(URL, {"slug": "day-shift", "queries_sha256": "0" * 64}, format="json").json()
    assert (missing["code"], missing["errors"][0]["pointer"]) == ("artifact_missing", "/queries_sha256")
    other = store_artifact(owner=carol, kind="queries", stream=queries_file(*two_clouds(9, seed=98)))
    taken = client.post(URL, {"slug": "night-shift", "queries_sha256": other.sha256}, format="json").json()
    assert taken["code"] == "metered_run_taken"
    assert MeteredRun.objects.count() == 1


STATEMENTS = [
    "UPDATE attribution_meterhead SET head = repeat('0', 64)",
    "DELETE FROM attribution_meterhead",
    "TRUNCATE attribution_meterhead",
    "UPDATE attribution_meteredrun SET planned_at = now() - interval '1 day'",
    "UPDATE attribution_metercommitment SET seed = 1",
    "DELETE FROM attribution_metercommitment",
    """INSERT INTO attribution_meterhead (run_id, entry, step, head, posted_at)
       SELECT id, 999, 999, repeat('0', 64), now() FROM attribution_meteredrun""",
]


@pytest.mark.parametrize("session", ["", "SET LOCAL session_replication_role = replica"], ids=["plain", "as a replica"])
def test_the_database_changes_no_head_and_takes_none_after_the_disclosure(license, carol, session):
    disclose_model(owner=carol, document=metered_document(licenses=[license]))
    before = list(MeterHead.objects.values()), list(MeterCommitment.objects.values())
    assert all(before)

    for statement in STATEMENTS:
        with pytest.raises(IntegrityError, match="refused"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
            if session:
                cursor.execute(session)
            cursor.execute(statement)

    assert (list(MeterHead.objects.values()), list(MeterCommitment.objects.values())) == before


def test_the_database_gives_heads_their_time_whatever_the_application_says(carol, planned):
    run = MeteredRun.objects.get()
    claimed = "2001-01-01T00:00:00Z"

    head = MeterHead.objects.create(run=run, entry=1, step=1, head="0" * 64, posted_at=claimed)

    head.refresh_from_db()
    assert head.posted_at >= run.planned_at
    with pytest.raises(IntegrityError, match="heads ascend"), transaction.atomic():
        MeterHead.objects.create(run=run, entry=0, step=1, head="0" * 64)


def _refused(owner, document):
    with pytest.raises(DomainError) as refused, transaction.atomic():
        disclose_model(owner=owner, document=document)
    assert not Disclosure.objects.exists()
    assert not (Verification.objects.exists() or SegmentReplay.objects.exists() or MeterCommitment.objects.exists())
    return refused.value


def test_a_metered_disclosure_is_answered_with_its_segments(client_of, license, carol, work):
    client = client_of(carol)

    made = client.post("/api/v1/disclosures/", metered_document(licenses=[license]), format="json")

    assert made.status_code == 201
    assert made.json()["verification"]["status"] == "queued"
    work()
    seen = client.get(f"/api/v1/disclosures/{made.json()['id']}/").json()
    assert [segment["matches"] for segment in seen["verification"]["segments"]] == [True] * 4
    assert seen["verification"]["done"] == seen["verification"]["total"] == 4_000
    grades = {result["grade"]: result for result in seen["results"]}
    assert set(grades) == {"declared", "metered"}
    assert grades["metered"]["reliability_source"] == "record"
    assert "measured steps redrawn" in grades["metered"]["intervals"]
    assert "meter wrote down" in grades["metered"]["meaning"]
    assert grades["declared"]["reliability_source"] == "none"
    run = client.get(URL).json()["results"][0]
    assert run["committed_at"] is not None
    late = client.post(
        f"{URL}{run['id']}/heads/", {"heads": [{"entry": 999, "step": 9, "head": "0" * 64}]}, format="json"
    )
    assert late.json()["code"] == "meter_committed"


def test_a_run_is_disclosed_with_one_evidence_only_and_keeps_its_draw(license, carol, work):
    document = metered_document(licenses=[license])
    disclose_model(owner=carol, document=document)
    seed = MeterCommitment.objects.get().seed
    work()

    renamed = document | {"model": document["model"] | {"slug": "renamed"}}
    assert disclose_model(owner=carol, document=renamed).number == 1
    work()
    assert MeterCommitment.objects.get().seed == seed
    draws = [v.report["draw"] for v in Verification.objects.all()]
    assert len(draws) == 2 and draws[0] == draws[1]

    fewer = renamed | {"checkpoints": document["checkpoints"][1:]}
    with pytest.raises(DomainError, match="segments are drawn once"), transaction.atomic():
        disclose_model(owner=carol, document=fewer)


LIES = {
    "heads posted all at once": (Metering(heads_every=10**6), "/meter/log_sha256", "no head was posted between"),
    "no head posted": (Metering(post=lambda run, head: None), "/meter/log_sha256", "no head was posted while"),
    "other queries planned": (None, "/queries/sha256", "fixed before training"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_log_that_was_not_fixed_while_training_ran_is_refused_before_it_is_published(lie, license, carol):
    meter, pointer, says = LIES[lie]
    if meter is None:
        other = store_artifact(owner=carol, kind="queries", stream=queries_file(*two_clouds(9, seed=98)))
        meter = Metering(planned_queries=other.sha256)

    refused = _refused(carol, metered_document(licenses=[license], meter=meter))

    assert pointer in refused.pointers and says in refused.message


CHANGES = {
    "an order of another seed": (
        lambda d: d["recipe"]["order"].update(seed=2),
        "/meter/log_sha256",
        "entry 1 is of records",
    ),
    "another learning rate": (
        lambda d: d["recipe"].update(learning_rate=0.2),
        "/meter/log_sha256",
        "entry 1 has learning rate 0.1",
    ),
    "another momentum": (
        lambda d: d["recipe"]["options"].update(momentum=0.8),
        "/meter/log_sha256",
        "header says optimizer",
    ),
    "an unknown run": (lambda d: d["meter"].update(run=str(uuid.uuid4())), "/meter/run", "plan it by POST"),
    "a log that is not there": (
        lambda d: d["meter"].update(log_sha256="0" * 64),
        "/meter/log_sha256",
        "send its bytes",
    ),
    "a recipe that is not there": (lambda d: d.pop("recipe"), "/recipe", "is missing"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_log_of_another_training_is_refused_by_name(what, license, carol):
    change, pointer, says = CHANGES[what]
    document = metered_document(licenses=[license])
    change(document)

    refused = _refused(carol, document)

    assert pointer in refused.pointers, refused.pointers
    assert says in refused.message + str(refused.pointers)


def test_longer_training_than_the_log_is_refused(license, carol):
    document = metered_document(licenses=[license])
    document["recipe"]["order"]["epochs"] = 5
    document["checkpoints"].append({"step": 20, "sha256": document["checkpoints"][-1]["sha256"]})

    refused = _refused(carol, document)

    assert "ends after 16 steps; the recipe has 20" in refused.message


def test_a_middle_checkpoint_without_optimizer_state_starts_no_segment(license, carol):
    document = metered_document(licenses=[license])
    _replace_state(document, 1, carol, lambda name: name.startswith("model."))

    refused = _refused(carol, document)

    assert "no optimizer state" in refused.message and "/checkpoints/1/sha256" in refused.pointers


def _replace_state(document, number, owner, keep, fill=0.0):
    shapes = {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (2, 8), "2.bias": (2,)}
    state = {f"model.{name}": torch.full(shape, fill) for name, shape in shapes.items()}
    state |= {f"optimizer.{name}.momentum_buffer": torch.zeros(shape) for name, shape in shapes.items()}
    kept = {name: tensor for name, tensor in state.items() if keep(name)}
    artifact = store_artifact(owner=owner, kind="state", stream=io.BytesIO(save(kept)))
    document["checkpoints"][number]["sha256"] = artifact.sha256


@pytest.mark.parametrize("make", [estimated_document, trained_document], ids=["estimated", "replayed"])
def test_a_checkpoint_with_nan_is_found_before_anything_is_published(make, license, carol):
    document = make(licenses=[license])
    _replace_state(document, 0, carol, lambda name: name.startswith("model."), fill=float("nan"))

    refused = _refused(carol, document)

    assert "NaN or infinity in model.0.bias" in refused.message
    assert "/checkpoints/0/sha256" in refused.pointers


ESTIMATED_LIES = {
    "another shape": (lambda d, owner: _other_shape(d, owner), "/checkpoints/3/sha256", "of shape [8, 5]"),
    "steps that do not ascend": (
        lambda d, owner: d["checkpoints"][1].update(step=2),
        "/checkpoints/1/step",
        "steps ascend",
    ),
    "a missing checkpoint": (
        lambda d, owner: d["checkpoints"][0].update(sha256="0" * 64),
        "/checkpoints/0/sha256",
        "send its bytes",
    ),
    "no queries": (lambda d, owner: d.pop("queries"), "/queries", "is missing"),
    "a meter without a recipe": (
        lambda d, owner: d.update(meter={"run": str(uuid.uuid4()), "log_sha256": "0" * 64}),
        "/recipe",
        "is missing",
    ),
}


def _other_shape(document, owner):
    state = {"model.0.weight": torch.zeros(8, 5), "model.0.bias": torch.zeros(8)}
    state |= {"model.2.weight": torch.zeros(2, 8), "model.2.bias": torch.zeros(2)}
    artifact = store_artifact(owner=owner, kind="state", stream=io.BytesIO(save(state)))
    document["checkpoints"][-1]["sha256"] = artifact.sha256


@pytest.mark.parametrize("lie", ESTIMATED_LIES)
def test_checkpoints_that_cannot_be_estimated_from_are_refused_by_name(lie, license, carol):
    change, pointer, says = ESTIMATED_LIES[lie]
    document = estimated_document(licenses=[license])
    change(document, carol)

    refused = _refused(carol, document)

    assert pointer in refused.pointers, refused.pointers
    assert says in refused.message + str(refused.pointers)


def test_a_log_is_checked_when_it_is_handed_in(client_of, carol, tmp_path):
    from attribution.engine.meter_log import LogWriter

    client = client_of(carol)
    writer = LogWriter(tmp_path / "a", {"n_train": 1})
    unclosed = (tmp_path / "a").read_bytes()
    writer.close()
    whole = (tmp_path / "a").read_bytes()

    def hand_in(data):
        return client.post("/api/v1/artifacts/?kind=meter", data, content_type="application/octet-stream")

    assert hand_in(whole).status_code == 201
    assert "entry 1 is missing: the log was not closed" in hand_in(unclosed).json()["detail"]
    edited = bytearray(whole)
    edited[-40] ^= 1
    assert "entry 1 edited" in hand_in(bytes(edited)).json()["detail"]
    assert "is not a meter log" in hand_in(b"\x80\x04 whatever this is").json()["detail"]


def test_a_log_beyond_the_cap_is_refused(client_of, carol, monkeypatch):
    monkeypatch.setattr("attribution.artifacts.MAX_LOG_BYTES", 100)

    refused = client_of(carol).post(
        "/api/v1/artifacts/?kind=meter", b"x" * 101, content_type="application/octet-stream"
    )

    assert "at most 100 bytes" in refused.json()["detail"]
