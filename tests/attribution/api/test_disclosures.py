"""What a trainer may disclose; every refusal names its place and writes nothing."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from attribution.artifacts import store_artifact
from attribution.models import AttributionRun, Verification
from marketplace.models import AuditEvent, Disclosure, TrainedModel
from tests.factories.attribution import declaration, queries_file, trained_document, two_clouds

URL = "/api/v1/disclosures/"


@pytest.fixture
def document(license: Any) -> dict[str, Any]:
    return trained_document(licenses=[license])


def _set(path: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(document: dict[str, Any], owner: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        place: Any = document
        for part in parents:
            place = place[part]
        place[last] = value

    return change


def _other_shape(document: dict[str, Any], owner: Any) -> None:
    state = {"model.0.weight": torch.zeros(8, 5), "model.0.bias": torch.zeros(8)}
    state |= {"model.2.weight": torch.zeros(2, 8), "model.2.bias": torch.zeros(2)}
    artifact = store_artifact(owner=owner, kind="state", stream=io.BytesIO(save(state)))
    document["checkpoints"][-1]["sha256"] = artifact.sha256


def _other_dtype(document: dict[str, Any], owner: Any) -> None:
    state = {"model.0.weight": torch.zeros(8, 6).half(), "model.0.bias": torch.zeros(8)}
    state |= {"model.2.weight": torch.zeros(2, 8), "model.2.bias": torch.zeros(2)}
    artifact = store_artifact(owner=owner, kind="state", stream=io.BytesIO(save(state)))
    document["checkpoints"][-1]["sha256"] = artifact.sha256


def _someone_elses_state(document: dict[str, Any], owner: Any) -> None:
    artifact = store_artifact(owner=None, kind="state", stream=io.BytesIO(save({"model.w": torch.ones(1)})))
    document["checkpoints"][-1]["sha256"] = artifact.sha256


def _queries(content: Any, labels: list[str]) -> Callable[[dict[str, Any], Any], None]:
    def change(document: dict[str, Any], owner: Any) -> None:
        artifact = store_artifact(owner=owner, kind="queries", stream=queries_file(np.array(content), labels))
        document["queries"] = {"sha256": artifact.sha256, "n_queries": len(labels)}

    return change


def _a_training_record(document: dict[str, Any], owner: Any) -> None:
    content, _ = two_clouds(64)
    fresh, _ = two_clouds(3, seed=5)
    _queries([*fresh.tolist(), content[17].tolist()], ["0"] * 4)(document, owner)


LAYERS = "architecture/layers"
REFUSALS: dict[str, tuple[Callable[[dict[str, Any], Any], None], str, str]] = {
    "an architecture that is not allowed": (
        _set(f"{LAYERS}/1", {"kind": "lambda"}),
        "/architecture/layers/1/kind",
        "linear",
    ),
    "10^12 parameters": (
        _set(
            LAYERS,
            [
                {"kind": "linear", "in_features": 6, "out_features": 1_000_000},
                {"kind": "linear", "in_features": 1_000_000, "out_features": 1_000_000},
            ],
        ),
        "/architecture/layers/",
        "",
    ),
    "400 million parameters": (
        _set(
            LAYERS,
            [
                {"kind": "linear", "in_features": 6, "out_features": 16_000},
                {"kind": "linear", "in_features": 16_000, "out_features": 16_000},
            ],
        ),
        "/architecture/layers/1",
        "at most 50,000,000",
    ),
    "layers that do not fit the records": (
        _set(f"{LAYERS}/0/in_features", 5),
        "/architecture/layers/0",
        "does not take what comes to it",
    ),
    "too few outputs": (_set("features/classes", ["1", "0", "2"]), "/architecture", "(2,) for 3 classes"),
    "a checkpoint of another shape": (_other_shape, "/checkpoints/1/sha256", "F32 of shape [8, 5]"),
    "a checkpoint of another type": (_other_dtype, "/checkpoints/1/sha256", "F16 of shape [8, 6]"),
    "a checkpoint of somebody else": (_someone_elses_state, "/checkpoints/1/sha256", "send its bytes"),
    "a checkpoint that is not there": (
        _set("checkpoints/0/sha256", "0" * 64),
        "/checkpoints/0/sha256",
        "send its bytes",
    ),
    "no final checkpoint": (_set("checkpoints/1/step", 6), "/checkpoints", "must be the final state, step 8"),
    "checkpoints out of order": (_set("checkpoints/0/step", 8), "/checkpoints/1/step", "steps ascend"),
    "a class that is not listed": (_set("features/classes", ["1", "2"]), "/training_data/0", "label '0'"),
    "a query of an unknown class": (_queries(np.zeros((1, 6)), ["9"]), "/queries/sha256", "label '9'"),
    "queries of another length": (_queries(np.zeros((1, 7)), ["1"]), "/queries/sha256", "7 numbers"),
    "another number of queries": (_set("queries/n_queries", 25), "/queries/n_queries", "the file has 24"),
    "a query that repeats a training record": (
        _a_training_record,
        "/queries/sha256",
        "Query 3 repeats record 17 of",
    ),
    "absurd epochs": (_set("recipe/order/epochs", 10**9), "/recipe/order/epochs", ""),
    "too many steps": (
        _set("recipe/order", {"rule": "epoch_order", "batch": 1, "epochs": 9_999, "seed": 1}),
        "/recipe/order/epochs",
        "at most 200000 steps",
    ),
    "rates for other steps": (
        _set("recipe/learning_rate", [0.1] * 9),
        "/recipe/learning_rate",
        "9 learning rates for 8",
    ),
    "an option of another optimizer": (_set("recipe/options", {"eps": 1e-8}), "/recipe/options/eps", "momentum"),
    "a transform that is not allowed": (
        _set("features/transform", [{"kind": "eval"}]),
        "/features/transform/0/kind",
        "",
    ),
    "statistics of another length": (
        _set("features/transform", [{"kind": "standardize", "mean": [0, 0], "std": 1}]),
        "/features/transform/0/mean",
        "6",
    ),
    "an unknown loss": (_set("loss", "regret"), "/loss", "cross_entropy"),
    "half of the evidence": (lambda document, owner: document.pop("queries") and None, "/queries", "missing"),
    "a digest of other records": (
        _set("training_data/0/selection_sha256", "1" * 64),
        "/training_data/0/selection_sha256",
        "",
    ),
    "a number where the document should be": (_set("schema_version", 2), "/schema_version", ""),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_replayed_is_refused_by_place_and_nothing_is_written(case, document, carol, client_of):
    change, pointer, reason = REFUSALS[case]
    change(document, carol)

    answer = client_of(carol).post(URL, document, format="json")

    assert (answer.status_code, answer["Content-Type"]) == (422, "application/problem+json"), answer.data
    pointers = [error["pointer"] for error in answer.data["errors"]]
    assert any(found.startswith(pointer) for found in pointers), answer.data
    assert reason in answer.data["detail"] + str(answer.data["errors"])
    written = [Disclosure, TrainedModel, Verification, AttributionRun]
    assert [model.objects.count() for model in written] == [0, 0, 0, 0]
    assert not AuditEvent.objects.filter(action="model.disclosed").exists()


def test_a_disclosure_is_answered_with_its_state_and_the_same_again(document, carol, client_of, work):
    client = client_of(carol)
    first = client.post(URL, document, format="json")
    again = client.post(URL, copy.deepcopy(document), format="json")

    assert (first.status_code, again.status_code) == (201, 201)
    assert first.data["id"] == again.data["id"]
    assert first.data["verification"]["status"] == "queued"
    assert (first.data["runs"], first.data["results"]) == ([], [])

    work()
    seen = client.get(f"{URL}{first.data['id']}/").json()

    assert (seen["verification"]["verdict"], seen["verification"]["attempt"]) == ("match", 1)
    assert [(run["status"], run["done"] == run["total"] > 0) for run in seen["runs"]] == [("done", True)]
    assert [(result["grade"], result["number"]) for result in seen["results"]] == [("replayed", 1)]


def test_what_the_replay_could_not_reproduce_says_where(license, carol, client_of, work):
    def nudge(state: dict[str, torch.Tensor]) -> None:
        state["model.0.weight"][3, 2] += 1e-3

    document = trained_document(licenses=[license], alter_state=nudge)
    client = client_of(carol)
    sent = client.post(URL, document, format="json").data

    work()
    seen = client.get(f"{URL}{sent['id']}/").json()

    assert seen["verification"]["verdict"] == "mismatch"
    (difference,) = seen["verification"]["report"]["differences"]
    assert (difference["step"], difference["tensor"], difference["n_different"]) == (8, "model.0.weight", 1)
    assert seen["results"] == []
    page = client.get(f"/api/v1/models/{document['model']['slug']}/").json()
    assert (page["disclosures"][0]["evidence"], page["result"]) == ("contradicted", None)


@pytest.mark.parametrize("body", ["[]", "3", "{", '"x"'])
def test_a_body_that_is_no_document_is_refused(body, carol, client_of):
    answer = client_of(carol).post(URL, body, content_type="application/json")

    assert answer.status_code in (400, 422)
    assert answer["Content-Type"] == "application/problem+json"


def test_a_stranger_finds_nothing(license, carol, mallory, client_of):
    mine = client_of(carol).post(URL, declaration(licenses=[license]), format="json").data

    stranger = client_of(mallory)

    assert stranger.get(f"{URL}{mine['id']}/").status_code == 404
    assert stranger.get(URL).json()["results"] == []
    assert stranger.post(URL, declaration(licenses=[license], slug="stolen"), format="json").status_code == 422
    assert client_of(mallory, "read").post(URL, {}, format="json").status_code == 403


def test_the_list_takes_as_many_queries_for_three_disclosures_as_for_one(
    license, carol, client_of, work, django_assert_num_queries
):
    client = client_of(carol)
    for n, slugs in ((1, ["a"]), (3, ["b", "c"])):
        for slug in slugs:
            client.post(URL, declaration(licenses=[license], slug=slug), format="json")
        work()
        with django_assert_num_queries(10):
            assert len(client.get(URL).json()["results"]) == n
