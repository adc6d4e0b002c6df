"""Which records moved an output: the index as jobs, questions and their answers, and who may ask."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from django.db import connection
from django.utils import timezone

from attribution import selectors, tasks
from attribution.documents import build_task
from attribution.engine.text import byte_tokens
from attribution.errors import NotIndexed, QuestionInvalid, TooManyQuestions
from attribution.models import Artifact, AttributionResult, IndexShard, InfluenceIndex, InfluenceQuestion
from attribution.services import influence, questions
from marketplace.models import Dataset, Disclosure
from tests.factories.attribution import (
    DisclosureFactory,
    ModelFactory,
    PublishedResultFactory,
    published_texts,
    text_document,
    trained_document,
)
from tests.factories.marketplace import LicenseFactory, OfferFactory


def published(carol: Any, license: Any, document: dict[str, Any]) -> Disclosure:
    """A disclosure with checkpoints and a published result, whose index was not asked for yet."""
    disclosure = DisclosureFactory(
        model=ModelFactory(owner=carol, slug=document["model"]["slug"]), licenses=[license], document=document
    )
    holders = {c.party: c.n_records for c in license.version.contributions.filter(role="rights_holder")}
    PublishedResultFactory(disclosure=disclosure, version=license.version, shares=holders)
    return disclosure


@pytest.fixture
def disclosure(license: Any, carol: Any) -> Disclosure:
    return published(carol, license, trained_document(licenses=[license]))


@pytest.fixture
def text_disclosure(alice: Any, bob: Any, carol: Any) -> Disclosure:
    version = published_texts({alice: 26, bob: 14}, preview=[{"content": "cold rain", "label": "0"}] * 5)
    license = LicenseFactory(licensee=carol, offer=OfferFactory(version=version))
    return published(carol, license, text_document(licenses=[license]))


def indexed(disclosure: Disclosure, work: Any) -> InfluenceIndex:
    questions.request_index(disclosure)
    work()
    index = InfluenceIndex.objects.get()
    assert index.status == "done", index.error_message
    return index


def test_an_answer_is_the_inner_products_of_whole_gradients(disclosure, work):
    indexed(disclosure, work)
    question = questions.ask(disclosure=disclosure, asker="address:192.0.2.1", query=7)

    work()

    question.refresh_from_db()
    with influence.final_task(disclosure) as (task, records):
        model = task.model()
        model.load_state_dict(influence.final_state(task))

        def gradient(loss: torch.Tensor) -> torch.Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

        asked = gradient(task.measurement(model, task.queries[torch.tensor([7])])[0])
        exact = torch.stack(
            [gradient(task.loss(model, task.train[torch.tensor([n])])[0]) @ asked for n in range(task.n_train)]
        ).numpy()
    order = np.argsort(-exact)
    rounding = 0.02 * np.abs(exact).max()  # the store keeps 8 bits of a number
    for side, expected in (("helpful", order[:12]), ("harmful", order[::-1][:12])):
        rows, scores = zip(*((place["row"], place["score"]) for place in question.answer[side]), strict=True)
        np.testing.assert_allclose(scores, exact[list(rows)], atol=rounding)
        np.testing.assert_allclose(scores, exact[expected], atol=rounding)
    assert question.answer["way"] == "exact" and 0 < question.answer["chance"] <= 1
    assert {place["holder"] for place in question.answer["helpful"]} <= set(
        disclosure.results.get().shares.values_list("party", flat=True)
    )


def test_publishing_a_result_asks_for_the_index(disclosure, license, carol):
    assert influence.request_missing_indexes() == 1
    assert influence.request_missing_indexes() == 0
    assert InfluenceIndex.objects.get().disclosure == disclosure

    declared = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
    assert questions.request_index(declared) is None


def test_an_index_in_shards_is_the_one_made_at_once_and_a_dead_worker_costs_one_shard(disclosure, work, monkeypatch):
    monkeypatch.setattr(influence, "SHARD_RECORDS", 20)
    monkeypatch.setattr("attribution.engine.store.SHARD_RECORDS", 20)
    for function in (influence.build_shard, influence.build_store):
        monkeypatch.setitem(function.__kwdefaults__, "shard_records", 20)
    questions.request_index(disclosure)
    index = InfluenceIndex.objects.get()
    tasks.advance_index(index.pk)
    first, *others = IndexShard.objects.order_by("number")
    tasks.build_index_shard(first.pk)
    first.refresh_from_db()
    bytes_before = first.output.sha256
    IndexShard.objects.filter(pk=first.pk).update(
        status="running", output=None, finished_at=None, lease_expires_at=timezone.now() - timedelta(seconds=1)
    )
    tasks.build_index_shard(first.pk)
    tasks.advance_index(index.pk)  # a stray message: it waits, and is not due
    work()

    index.refresh_from_db()
    first.refresh_from_db()
    assert (len(others), first.attempt, first.output.sha256) == (3, 2, bytes_before)
    assert (index.status, set(index.files)) == ("done", {"manifest.json", "state.safetensors"})
    with influence.stored(index) as store, influence.final_task(disclosure) as (task, _):
        assert len(store) == 64
        fresh = influence.players(task), store.query_vectors(task, torch.arange(2))
        assert fresh[1].shape == (2, store.width)


def test_a_lost_message_to_the_last_step_is_found(disclosure):
    questions.request_index(disclosure)
    index = InfluenceIndex.objects.get()
    tasks.advance_index(index.pk)
    for shard in index.shards.all():
        tasks.build_index_shard(shard.pk)
    InfluenceIndex.objects.update(due_at=timezone.now() + timedelta(days=1))

    assert influence.request_missing_indexes() == 1
    tasks.advance_index(index.pk)

    index.refresh_from_db()
    assert index.status == "done"


def test_a_shard_that_fails_for_good_fails_the_index_by_name(disclosure):
    questions.request_index(disclosure)
    index = InfluenceIndex.objects.get()
    tasks.advance_index(index.pk)
    IndexShard.objects.update(status="failed", error_message="It failed 6 times.")

    influence.request_missing_indexes()
    tasks.advance_index(index.pk)

    index.refresh_from_db()
    assert (index.status, index.error_message) == ("failed", "Shard 0 failed: It failed 6 times.")


def test_a_text_of_ones_own_is_answered_and_shows_only_what_the_rights_holder_shows(text_disclosure, work):
    indexed(text_disclosure, work)
    question = questions.ask(disclosure=text_disclosure, asker="address:a", text=" warm rain ", label="1")
    work()

    question = selectors.questions_about([text_disclosure]).get()
    moved = selectors.moved_records(question)
    records = [record for side in moved.values() for record in side]
    assert (question.text, question.answer["asked"]) == ("warm rain", "1")
    assert moved["helpful"][0].score > 0 > moved["harmful"][0].score
    assert max(record.weight for record in records) == 1
    assert {record.row < 5 for record in records} == {True, False}
    assert all((record.preview is not None) == (record.row < 5) for record in records)
    assert all(record.share_ppq == {26: 650, 14: 350}[26 if record.row < 26 else 14] * 10**12 for record in records)

    Dataset.objects.update(status=Dataset.Status.WITHDRAWN)
    assert not any(
        r.preview
        for side in selectors.moved_records(selectors.questions_about([text_disclosure]).get()).values()
        for r in side
    )


def test_a_gpt_answers_without_labels(alice, carol, work):
    license = LicenseFactory(licensee=carol, version=published_texts({alice: 20}, labels=[None] * 20))
    disclosure = published(carol, license, text_document(licenses=[license], model="gpt", epochs=1))
    indexed(disclosure, work)

    question = questions.ask(disclosure=disclosure, asker="address:a", text="rain on friends")
    work()

    question.refresh_from_db()
    with influence.final_task(disclosure) as (task, _):
        model = task.model()
        model.load_state_dict(influence.final_state(task), strict=False)
        measured = task.measurement(model.eval(), (byte_tokens(["rain on friends"], 16),))[0].item()
    assert question.answer["measured"] == pytest.approx(measured, rel=1e-5)
    assert "asked" not in question.answer and question.answer["helpful"]
    with pytest.raises(QuestionInvalid, match="leave the label out"):
        questions.ask(disclosure=disclosure, asker="address:a", text="rain", label="0")


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ({"query": 12}, "query"),
        ({"query": 1, "text": "both"}, "query"),
        ({"text": " ", "label": "0"}, "text"),
        ({"text": "x" * 4001, "label": "0"}, "text"),
        ({"text": "fine", "label": "2"}, "label"),
        ({"text": "fine"}, "label"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(asked, pointer, text_disclosure):
    InfluenceIndex.objects.create(disclosure=text_disclosure, status="done")

    with pytest.raises(QuestionInvalid) as refused:
        questions.ask(disclosure=text_disclosure, asker="address:a", **asked)

    assert set(refused.value.pointers) == {pointer}
    assert not InfluenceQuestion.objects.exists()


def test_a_model_of_vectors_takes_no_text_and_an_unfinished_index_no_question(disclosure):
    with pytest.raises(NotIndexed):
        questions.ask(disclosure=disclosure, asker="address:a", query=0)
    index = questions.request_index(disclosure)
    with pytest.raises(NotIndexed):
        questions.ask(disclosure=disclosure, asker="address:a", query=0)
    InfluenceIndex.objects.filter(pk=index.pk).update(status="done")
    with pytest.raises(QuestionInvalid, match="takes no texts"):
        questions.ask(disclosure=disclosure, asker="address:a", text="hello", label="0")


def test_the_same_question_is_one_row_and_only_new_ones_cost_the_quota(text_disclosure, settings):
    settings.QUESTIONS_PER_HOUR = {"party": 3, "address": 2}
    InfluenceIndex.objects.create(disclosure=text_disclosure, status="done")

    def ask(asker: str, **asked: Any) -> InfluenceQuestion:
        return questions.ask(disclosure=text_disclosure, asker=asker, **asked)

    first = ask("address:a", query=0)
    assert [ask("address:a", query=0) for _ in range(5)] == [first] * 5
    ask("address:a", text="hello", label="1")
    with pytest.raises(TooManyQuestions, match="2 new questions this hour"):
        ask("address:a", text="hello", label="0")
    assert ask("address:a", query=0) == first
    for query in (1, 2, 3):
        ask("party:1", query=query)
    with pytest.raises(TooManyQuestions):
        ask("party:1", query=4)
    assert InfluenceQuestion.objects.count() == 5


def test_a_full_queue_takes_no_more(text_disclosure, monkeypatch):
    monkeypatch.setattr(questions, "MAX_WAITING", 1)
    InfluenceIndex.objects.create(disclosure=text_disclosure, status="done")
    questions.ask(disclosure=text_disclosure, asker="address:a", query=0)

    with pytest.raises(TooManyQuestions, match="a few minutes"):
        questions.ask(disclosure=text_disclosure, asker="address:b", query=1)


def test_the_workers_database_role_suffices(disclosure, work):
    questions.request_index(disclosure)
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL ROLE residual_worker")
        try:
            work()
            question = questions.ask(disclosure=disclosure, asker="address:a", query=3)
            work()
        finally:
            cursor.execute("RESET ROLE")

    question.refresh_from_db()
    assert question.status == "done"
    assert Artifact.objects.filter(kind="gradients", owner=None).count() == 1
    assert AttributionResult.objects.count() == 1 and build_task(disclosure).n_train == 64
