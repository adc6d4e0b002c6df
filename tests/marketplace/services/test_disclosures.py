import copy
import hashlib
import json
import threading
from datetime import timedelta

import pyarrow.parquet as pq
import pytest
from django.core.files.storage import default_storage
from django.db import connection, transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketplace import clock
from marketplace.models import AuditEvent, Citation, Disclosure, License, TrainedModel
from marketplace.services import disclosures
from marketplace.services.disclosures import (
    CitationInvalid,
    DisclosureInvalid,
    ModelSlugTaken,
    canonical_json,
    record_disclosure,
    selection_digest,
    validate_document,
)
from marketplace.services.licenses import match_refunded
from tests.factories.marketplace import LicenseFactory, PartyFactory, PublishedVersionFactory

SHA = "ab" * 32


def digests(version):
    with default_storage.open(version.parquet_key, "rb") as stored:
        return [digest.as_py() for digest in pq.read_table(stored, columns=["digest"])["digest"]]


def cite(license, selection="all"):
    every = digests(license.version)
    rows = range(len(every)) if selection == "all" else [row for span in selection for row in range(*span)]
    return {
        "license": str(license.public_id),
        "merkle_root": license.version.merkle_root,
        "n_records": len(rows),
        "selection": selection,
        "selection_sha256": hashlib.sha256(b"".join(every[row] for row in rows)).hexdigest(),
    }


def document(*citations, slug="digits-mlp"):
    return {
        "schema_version": 1,
        "model": {"slug": slug, "name": "Digits MLP", "summary": "Reads digits."},
        "training_data": list(citations),
        "features": {"transform": [{"kind": "scale", "divide_by": 16}], "classes": ["0", "1"]},
        "architecture": {
            "kind": "sequential",
            "layers": [
                {"kind": "linear", "in_features": 4, "out_features": 8},
                {"kind": "gelu"},
                {"kind": "linear", "in_features": 8, "out_features": 2},
            ],
        },
        "loss": "cross_entropy",
        "measurement": "cross_entropy",
        "recipe": {
            "optimizer": "sgd",
            "options": {"momentum": 0.9},
            "groups": [["0.*bias", {"weight_decay": 0}]],
            "learning_rate": 0.05,
            "order": {"rule": "epoch_order", "batch": 4, "epochs": 2, "seed": 1},
            "normalizer": "batch",
            "initial_state": {"rule": "seed", "seed": 7},
            "clip_norm": None,
            "seed": 0,
        },
        "queries": {"sha256": SHA, "n_queries": 12},
        "checkpoints": [{"step": 4, "sha256": SHA}],
    }


@pytest.fixture
def license(carol):
    return LicenseFactory(licensee=carol, version=PublishedVersionFactory(content=[[i, 1.0] for i in range(10)]))


def assert_nothing_written():
    found = [model.objects.count() for model in (TrainedModel, Disclosure, Citation)]
    assert found == [0, 0, 0]
    assert not AuditEvent.objects.filter(action="model.disclosed").exists()


def test_a_disclosure_is_kept_as_it_was_sent(carol, license):
    sent = document(cite(license, [[0, 3], [5, 9]]))

    disclosure = record_disclosure(owner=carol, document=sent, user=carol.user)

    disclosure.refresh_from_db()
    assert disclosure.document == sent
    assert disclosure.document_sha256 == hashlib.sha256(canonical_json(disclosure.document)).hexdigest()
    assert (disclosure.number, disclosure.model.slug, disclosure.model.owner) == (1, "digits-mlp", carol)
    (citation,) = disclosure.citations.all()
    assert (citation.version, citation.license, citation.n_records) == (license.version, license, 7)
    assert citation.selection_sha256 == sent["training_data"][0]["selection_sha256"]


def test_the_same_document_is_the_same_disclosure_and_another_the_next(carol, license):
    sent = document(cite(license))
    first = record_disclosure(owner=carol, document=sent)
    again = record_disclosure(owner=carol, document=dict(reversed(sent.items())))
    sent["recipe"]["seed"] = 1
    sent["model"]["name"] = "Digits MLP, again"
    second = record_disclosure(owner=carol, document=sent)

    assert first == again
    assert (first.number, second.number, second.model_id) == (1, 2, first.model_id)
    assert TrainedModel.objects.get().name == "Digits MLP, again"
    assert (Disclosure.objects.count(), Citation.objects.count()) == (2, 2)


def test_what_is_over_needs_no_check_again(carol, license):
    sent = document(cite(license))
    first = record_disclosure(owner=carol, document=sent)
    License.objects.filter(pk=license.pk).update(revoked_at=clock.now())

    assert record_disclosure(owner=carol, document=sent) == first


def test_a_declaration_cites_and_shows_no_evidence(carol, license):
    declared = {
        name: value
        for name, value in document(cite(license)).items()
        if name in ("schema_version", "model", "training_data")
    }

    assert record_disclosure(owner=carol, document=declared).citations.count() == 1


CHANGES = {
    "not an object": (lambda d: [], "", "give object"),
    "unknown field": (lambda d: d | {"pickle": 1}, "/pickle", "not a field"),
    "missing field": (lambda d: _without(d, "training_data"), "/training_data", "missing"),
    "half the evidence": (lambda d: _without(d, "queries"), "/queries", "missing"),
    "another version": (lambda d: d | {"schema_version": 2}, "/schema_version", "use 1"),
    "no citation": (lambda d: d | {"training_data": []}, "/training_data", "at least 1"),
    "slug": (lambda d: _set(d, "model/slug", "Not A Slug"), "/model/slug", "does not match"),
    "nul": (lambda d: _set(d, "model/name", "a\0b"), "/model/name", "does not match"),
    "lone surrogate": (lambda d: _set(d, "model/name", "\ud800"), "/model/name", "does not match"),
    "selection": (
        lambda d: _set(d, "training_data/0/selection", [[0, -1]]),
        "/training_data/0/selection/0/1",
        "least 0",
    ),
    "digest": (lambda d: _set(d, "queries/sha256", "AB" * 32), "/queries/sha256", "does not match"),
    "layer kind": (
        lambda d: _set(d, "architecture/layers/1", {"kind": "eval"}),
        "/architecture/layers/1/kind",
        "use one of linear",
    ),
    "layer option": (
        lambda d: _set(d, "architecture/layers/0/dtype", "float64"),
        "/architecture/layers/0/dtype",
        "there are bias, in_features",
    ),
    "layer width": (
        lambda d: _set(d, "architecture/layers/0/out_features", 10**12),
        "/architecture/layers/0/out_features",
        "at most 1000000",
    ),
    "too many layers": (
        lambda d: _set(d, "architecture/layers", [{"kind": "gelu"}] * 65),
        "/architecture/layers",
        "at most 64",
    ),
    "epochs": (lambda d: _set(d, "recipe/order/epochs", 10**9), "/recipe/order/epochs", "at most 10000"),
    "order rule": (lambda d: _set(d, "recipe/order/rule", "mine"), "/recipe/order/rule", "use epoch_order"),
    "option": (lambda d: _set(d, "recipe/options/foreach", True), "/recipe/options/foreach", "not a field"),
    "learning rate": (lambda d: _set(d, "recipe/learning_rate", "fast"), "/recipe/learning_rate", "give number"),
    "bool is no number": (lambda d: _set(d, "recipe/seed", True), "/recipe/seed", "give integer"),
    "costly pattern": (lambda d: _set(d, "recipe/groups/0/0", "(a+)+$"), "/recipe/groups/0/0", "does not match"),
    "transform": (
        lambda d: _set(d, "features/transform/0", {"kind": "scale", "divide_by": 0}),
        "/features/transform/0/divide_by",
        "more than 0",
    ),
    "class twice": (lambda d: _set(d, "features/classes", ["0", "0"]), "/features/classes", "twice"),
    "steps": (lambda d: _set(d, "checkpoints/0/step", 0), "/checkpoints/0/step", "at least 1"),
}


def _without(data, name):
    return {key: value for key, value in data.items() if key != name}


def _set(data, where, value):
    *path, last = where.split("/")
    inner = data
    for part in path:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = value
    return data


@pytest.mark.parametrize("name", CHANGES)
def test_the_schema_names_the_place_and_the_remedy(carol, license, name):
    change, pointer, remedy = CHANGES[name]
    sent = change(copy.deepcopy(document(cite(license))))

    with pytest.raises(DisclosureInvalid) as refused:
        record_disclosure(owner=carol, document=sent)

    assert pointer in refused.value.pointers, refused.value.pointers
    assert remedy in refused.value.pointers[pointer]
    assert len(refused.value.message) < 600
    assert_nothing_written()


def test_a_refusal_does_not_repeat_the_document():
    with pytest.raises(DisclosureInvalid) as refused:
        validate_document(dict.fromkeys((f"field{n}" * 20 for n in range(5_000)), "x" * 1_000))

    assert len(refused.value.pointers) == 20
    assert len(json.dumps([refused.value.message, refused.value.pointers])) < 10_000


def test_the_schema_itself_is_sound():
    disclosures.Draft202012Validator.check_schema(disclosures.disclosure_schema())


def refused_citation(owner, *citations):
    with pytest.raises(CitationInvalid) as refused:
        record_disclosure(owner=owner, document=document(*citations))
    assert_nothing_written()
    ((pointer, what),) = refused.value.pointers.items()
    return pointer, what


def test_a_strangers_license_is_no_license(carol, mallory, license):
    pointer, what = refused_citation(mallory, cite(license))

    assert (pointer, what) == ("/training_data/0/license", f"{license.public_id} is none of your licenses.")


def test_a_license_that_is_not_in_force_cannot_be_cited(carol, license):
    License.objects.filter(pk=license.pk).update(revoked_at=clock.now())
    assert "not in force" in refused_citation(carol, cite(license))[1]

    License.objects.filter(pk=license.pk).update(revoked_at=None)
    clock.advance(timedelta(days=366))
    assert "not in force" in refused_citation(carol, cite(license))[1]


def test_a_license_is_for_one_version(carol, license):
    pointer, what = refused_citation(carol, cite(license) | {"merkle_root": SHA})

    assert pointer == "/training_data/0/merkle_root"
    assert license.version.merkle_root in what


@pytest.mark.parametrize(
    ("selection", "where"),
    [([[0, 11]], 0), ([[3, 3]], 0), ([[5, 2]], 0), ([[0, 4], [3, 6]], 1), ([[5, 6], [0, 2]], 1)],
)
def test_a_selection_is_ranges_in_ascending_order(carol, license, selection, where):
    pointer, what = refused_citation(carol, cite(license) | {"selection": selection})

    assert pointer == f"/training_data/0/selection/{where}"
    assert "has 10 records" in what


def test_the_count_and_the_digest_are_of_the_selection(carol, license):
    """One record left out of the cited selection, or one too many."""
    honest, other = cite(license, [[0, 9]]), cite(license, [[1, 10]])

    assert refused_citation(carol, honest | {"n_records": 10}) == (
        "/training_data/0/n_records",
        "It says 10; the selection has 9 records.",
    )
    pointer, what = refused_citation(carol, honest | {"selection_sha256": other["selection_sha256"]})
    assert pointer == "/training_data/0/selection_sha256"
    assert "column 'digest'" in what


def test_a_version_is_cited_once(carol, license):
    again = LicenseFactory(licensee=carol, version=license.version)

    pointer, what = refused_citation(carol, cite(license, [[0, 2]]), cite(again, [[2, 4]]))

    assert (pointer, "cited twice" in what) == ("/training_data/1", True)


def test_a_models_address_belongs_to_its_owner(carol, mallory, license):
    record_disclosure(owner=carol, document=document(cite(license)))
    theirs = LicenseFactory(licensee=mallory, version=license.version)

    with pytest.raises(ModelSlugTaken) as refused:
        record_disclosure(owner=mallory, document=document(cite(theirs)))

    assert refused.value.pointers == {"/model/slug": "taken"}
    assert Disclosure.objects.get().model.owner == carol


def test_two_documents_at_once_are_numbered_in_turn(committed_db):
    from tests.marketplace.services.test_orders import at_once

    owner = PartyFactory()
    sent = document(cite(LicenseFactory(licensee=owner)))
    others = [sent, sent | {"model": sent["model"] | {"summary": "Another."}}, sent]

    numbers = at_once(3, lambda n: record_disclosure(owner=owner, document=others[n]).number)

    assert sorted(set(numbers)) == [1, 2]
    assert numbers[0] == numbers[2]
    assert Disclosure.objects.filter(model__owner=owner).count() == 2


def test_a_license_that_ends_while_its_disclosure_is_written_is_not_cited(committed_db):
    license = LicenseFactory()
    order, line = license.order_line.order, license.order_line_id
    refused = []

    def disclose():
        try:
            record_disclosure(owner=license.licensee, document=document(cite(license)))
        except CitationInvalid as error:
            refused.append(error.message)
        finally:
            connection.close()

    with transaction.atomic():
        match_refunded(order=order, refunded=[line], at=clock.now())
        thread = threading.Thread(target=disclose)
        thread.start()
        thread.join(timeout=1.5)
        assert thread.is_alive()  # it read the license as live, and waits for the refund's outcome
    thread.join()

    assert [message.partition(":")[0] for message in refused] == ["/training_data/0/license"]
    assert Disclosure.objects.count() == Citation.objects.count() == 0


cuts = st.lists(st.integers(0, 23), unique=True, min_size=2, max_size=8).map(sorted)


@pytest.fixture
def version_of_23(db):
    return PublishedVersionFactory(content=[[float(i)] for i in range(23)])


def test_the_digest_of_a_selection_is_that_of_its_rows_whatever_the_batches(version_of_23, monkeypatch):
    every = digests(version_of_23)

    # A busy machine, on which drawing an example may take a second, is no failure.
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(cuts=cuts, batch=st.integers(1, 30))
    def check(cuts, batch):
        monkeypatch.setattr(disclosures, "BATCH_ROWS", batch)
        selection = [[start, stop] for start, stop in zip(cuts[::2], cuts[1::2], strict=False)]
        rows = [row for span in selection for row in range(*span)]

        computed = selection_digest(version=version_of_23, selection=selection)

        assert computed == hashlib.sha256(b"".join(every[row] for row in rows)).hexdigest()

    check()
    assert selection_digest(version=version_of_23, selection="all") == hashlib.sha256(b"".join(every)).hexdigest()


def test_canonical_json_is_one_text_for_one_document():
    assert canonical_json({"b": [1.0, 0.05, True], "a": "é"}) == '{"a":"é","b":[1,0.05,true]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})
