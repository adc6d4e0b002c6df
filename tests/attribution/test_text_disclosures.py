"""Text through the disclosure document: read, replayed, measured and paid by the server alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from attribution.artifacts import store_artifact
from attribution.documents import build_task
from attribution.engine.text import PAD
from attribution.models import PPQ, Verification
from attribution.services.disclosures import disclose_model
from marketplace.errors import DomainError
from marketplace.models import Disclosure
from tests.factories.attribution import (
    TEXT_MODELS,
    declaration,
    published_clouds,
    published_texts,
    queries_file,
    text_document,
    two_moods,
)
from tests.factories.marketplace import LicenseFactory, PublishedVersionFactory


@pytest.fixture
def license(alice: Any, bob: Any, carol: Any) -> Any:
    version = published_texts({alice: 26, bob: 14}, labellers={bob: 20})
    return LicenseFactory(licensee=carol, version=version)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_text_model_is_reproduced_bit_for_bit_and_measured(model, license, carol, alice, bob, work):
    disclosure = disclose_model(owner=carol, document=text_document(licenses=[license], model=model, epochs=1))

    work()

    verification = Verification.objects.get(disclosure=disclosure)
    assert (verification.verdict, verification.report["is_bit_equal"]) == ("match", True)
    result = disclosure.results.get()
    assert (result.grade, result.status) == ("replayed", "published")
    holders = {s.party: (s.n_records, s.paid_ppq) for s in result.shares.filter(partition="rights_holder")}
    assert {party: n for party, (n, _) in holders.items()} == {alice: 26, bob: 14}
    assert sum(paid for _, paid in holders.values()) == PPQ


@pytest.mark.parametrize("model", ["ngrams", "gpt"])
def test_a_text_that_was_changed_before_training_is_caught(model, license, carol, work):
    def change(texts: list[str]) -> None:
        texts[3] = "!" + texts[3][1:]  # the gpt looks at the first 16 bytes

    disclose_model(owner=carol, document=text_document(licenses=[license], model=model, alter=change))
    work()

    assert Verification.objects.get().verdict == "mismatch"


def test_a_gpt_needs_no_labels_and_long_texts_are_cut_off(alice, carol):
    texts = [*two_moods(19)[0], "short"]
    version = PublishedVersionFactory(contributions={alice: 20}, content=texts, labels=[None] * 20)
    license = LicenseFactory(licensee=carol, version=version)
    disclosure = disclose_model(owner=carol, document=text_document(licenses=[license], model="gpt"))

    (tokens,) = build_task(disclosure).train[torch.arange(20)]

    assert (tokens.dtype, tokens.shape) == (torch.int64, (20, 16))
    assert (tokens == PAD).any() and (tokens != PAD).all(1).any()


def _set(path: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(document: dict[str, Any], owner: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        place: Any = document
        for part in parents:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


def _asked(content: Any, labels: list[str] | None) -> Callable[[dict[str, Any], Any], None]:
    def change(document: dict[str, Any], owner: Any) -> None:
        stored = store_artifact(owner=owner, kind="queries", stream=queries_file(content, labels))
        document["queries"] = {"sha256": stored.sha256, "n_queries": len(content)}

    return change


def _a_training_text(document: dict[str, Any], owner: Any) -> None:
    _asked(["something new", f"  {two_moods(8)[0][7].upper()} "], ["0", "1"])(document, owner)


REFUSALS: dict[str, tuple[str, Callable[[dict[str, Any], Any], None], str, str]] = {
    "a classifier without classes": (
        "ngrams",
        _set("features/classes", None),
        "/features/classes",
        "cross_entropy needs the labels",
    ),
    "next_byte of a classifier": ("ngrams", _set("loss", "next_byte"), "/loss", "next_byte is a gpt's"),
    "classes of a gpt": ("gpt", _set("features/classes", ["0", "1"]), "/features/classes", "leave the classes out"),
    "another loss of a gpt": ("gpt", _set("measurement", "cross_entropy"), "/measurement", "is next_byte"),
    "n-grams for a gpt": (
        "gpt",
        _set("features/transform", [{"kind": "hashed_ngrams", "shortest": 1, "longest": 2, "buckets": 64}]),
        "/features/transform",
        "a gpt takes",
    ),
    "fewer positions than bytes": (
        "gpt",
        _set("architecture/n_positions", 15),
        "/architecture/n_positions",
        "the transform gives 16 bytes",
    ),
    "heads that do not divide": ("gpt", _set("architecture/n_head", 3), "/architecture/n_head", "must divide n_embd"),
    "a gpt of a billion parameters": ("gpt", _set("architecture/n_embd", 8192), "/architecture", "at most 50,000,000"),
    "an option that no gpt has": (
        "gpt",
        _set("architecture/vocab_size", 50257),
        "/architecture/vocab_size",
        "n_positions",
    ),
    "too many bytes for a token": (
        "gpt",
        _set("features/transform/0/length", 4097),
        "/features/transform/0/length",
        "4096",
    ),
    "an embedding without the padding": (
        "bytes",
        _set("architecture/layers/0/num_embeddings", 256),
        "/architecture/layers/0/num_embeddings",
        "257 tokens",
    ),
    "tokens into a linear layer": (
        "bytes",
        _set("architecture/layers", [{"kind": "linear", "in_features": 24, "out_features": 2}]),
        "/architecture/layers/0",
        "begin with embedding or mean_embedding",
    ),
    "a transform for numbers": (
        "ngrams",
        _set("features/transform", [{"kind": "scale", "divide_by": 2}]),
        "/features/transform/0/kind",
        "begin with bytes or hashed_ngrams",
    ),
    "longest below shortest": (
        "ngrams",
        _set("features/transform/0/shortest", 4),
        "/features/transform/0/longest",
        "below shortest",
    ),
    "queries that are vectors": (
        "ngrams",
        _asked(np.zeros((2, 3)), ["0", "1"]),
        "/queries/sha256",
        "The queries are vectors, the training records texts",
    ),
    "queries without labels for a classifier": (
        "ngrams",
        _asked(["something new"], None),
        "/queries/sha256",
        "label ''",
    ),
    "a query that repeats a training text": (
        "ngrams",
        _a_training_text,
        "/queries/sha256",
        "Query 1 repeats record 7 of",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_text_evidence_that_does_not_fit_together_is_refused_by_its_place(what, license, carol):
    model, change, pointer, message = REFUSALS[what]
    document = text_document(licenses=[license], model=model)
    change(document, carol)

    with pytest.raises(DomainError) as refused:
        disclose_model(owner=carol, document=document)

    assert pointer in refused.value.pointers, refused.value.pointers
    assert message in f"{refused.value.message} {refused.value.pointers[pointer]}"
    assert not Disclosure.objects.exists()


def test_texts_and_vectors_do_not_make_one_training_set(license, alice, carol):
    vectors = LicenseFactory(licensee=carol, version=published_clouds({alice: 4}))
    document = text_document(licenses=[license])
    document["training_data"] += declaration(licenses=[vectors])["training_data"]

    with pytest.raises(DomainError, match="one model takes one kind") as refused:
        disclose_model(owner=carol, document=document)
    assert refused.value.pointers == {"/training_data/1": "vectors"}


def test_more_features_than_fit_are_refused(license, carol, monkeypatch):
    document = text_document(licenses=[license])
    monkeypatch.setattr("attribution.engine.architectures.MAX_FEATURES", 40 * 64 - 1)

    with pytest.raises(DomainError, match="give at most 63, or cite less") as refused:
        disclose_model(owner=carol, document=document)
    assert set(refused.value.pointers) == {"/features/transform/0/buckets"}
