"""Which records moved an output: the pages, without a worker; answers are laid beside the questions."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from attribution.models import IndexShard, InfluenceIndex, InfluenceQuestion
from marketplace import clock
from marketplace.models import Disclosure
from tests.factories.attribution import (
    DisclosureFactory,
    ModelFactory,
    PublishedResultFactory,
    declaration,
    published_texts,
    text_document,
)
from tests.factories.marketplace import LicenseFactory, OfferFactory
from tests.pages import assert_page, signed_in, text_of

URL = "/models/moody/influence/"


@pytest.fixture
def license(alice: Any, bob: Any, carol: Any) -> Any:
    version = published_texts({alice: 6, bob: 4}, preview=[{"content": "a grey <b>day</b>", "label": "0"}])
    return LicenseFactory(licensee=carol, offer=OfferFactory(version=version))


def disclosed(carol: Any, license: Any, **queries: Any) -> Disclosure:
    document = text_document(licenses=[license], slug="moody", epochs=1, **queries)
    disclosure = DisclosureFactory(
        model=ModelFactory(owner=carol, slug="moody", name="Moody"), licenses=[license], document=document
    )
    holders = {c.party: c.n_records for c in license.version.contributions.filter(role="rights_holder")}
    PublishedResultFactory(disclosure=disclosure, version=license.version, shares=holders)
    InfluenceIndex.objects.create(disclosure=disclosure, status="done", n_records=10, files={"manifest.json": "0"})
    return disclosure


@pytest.fixture
def disclosure(carol: Any, license: Any) -> Disclosure:
    return disclosed(carol, license)


def answered(disclosure: Disclosure, alice: Any, bob: Any, **question: Any) -> InfluenceQuestion:
    version = disclosure.citations.get().version
    places = [
        {"version": version.pk, "row": row, "digest": f"{row}" * 64, "score": score, "holder": holder.pk}
        for row, score, holder in ((0, 4.0, alice), (7, 1.0, bob), (3, -2.0, alice))
    ]
    return InfluenceQuestion.objects.create(
        index=disclosure.influence_index,
        status="done",
        answer={
            "way": "exact",
            "recall": 1.0,
            "measured": 0.25,
            "asked": "1",
            "likeliest": "1",
            "chance": 0.91,
            "helpful": places[:2],
            "harmful": places[2:],
        },
        **{"query": 3} | question,
    )


def test_the_model_page_leads_to_the_question(client, disclosure):
    page = client.get("/models/moody/")

    assert "Which records moved an output?" in assert_page(page)
    assert f'href="{URL}"'.encode() in page.content


def test_a_query_is_asked_without_javascript_and_its_page_waits_for_the_worker(client, disclosure):
    text = assert_page(client.get(URL))
    assert "0 to 11" in text and "keeps the queries to themselves" in text and "A text of your own" in text

    asked = client.post(URL, {"query": "3"})

    question = InfluenceQuestion.objects.get()
    assert (asked.status_code, asked.url, question.query) == (302, f"{URL}{question.public_id}/", 3)
    page = client.get(asked.url)
    assert "Searching the records" in assert_page(page) and "Look again" in text_of(page)
    fragment = client.get(asked.url, headers={"HX-Request": "true"})
    assert b"hx-trigger" in fragment.content and b"<html" not in fragment.content


def test_a_text_and_a_label_are_asked(client, disclosure):
    asked = client.post(URL, {"text": "warm rain", "label": "1"})

    assert asked.status_code == 302
    assert "warm rain" in assert_page(client.get(asked.url))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"query": "12"}, "not 0 to 11"),
        ({"query": ""}, "required"),
        ({"text": "", "label": "1"}, "required"),
        ({"text": "fine", "label": "7"}, "not one of the available choices"),
    ],
)
def test_what_cannot_be_asked_comes_back_with_its_reason(client, disclosure, sent, message):
    assert message in assert_page(client.post(URL, sent), 422)
    assert not InfluenceQuestion.objects.exists()


def test_an_answer_names_records_shows_previews_only_and_says_what_it_is(client, disclosure, alice, bob):
    question = answered(disclosure, alice, bob)

    page = client.get(f"{URL}{question.public_id}/")

    text = assert_page(page)
    assert "a grey &lt;b&gt;day&lt;/b&gt;" in text  # row 0, which alice shows
    assert "row 7 77777777" in text and "row 3 33333333" in text
    title = disclosure.citations.get().version.dataset.title
    assert title in text and "Alice 60.00 %" in text and "Bob 40.00 %" in text
    assert "not a division of money" in text and "The model says 1, 91.0 %" in text
    assert text.index("Helped most") < text.index("row 7") < text.index("Harmed most") < text.index("row 3")
    assert b"hx-trigger" not in page.content


def test_queries_are_seen_by_their_trainer_or_if_they_are_public(client, carol, license, alice, bob):
    private = disclosed(carol, license)
    question = answered(private, alice, bob)

    assert "№99.3" not in text_of(client.get(URL))
    assert "№99.3" not in text_of(client.get(f"{URL}{question.public_id}/"))
    assert "№99.3" in text_of(signed_in(carol).get(URL))


def test_public_queries_are_a_choice(client, carol, license):
    disclosed(carol, license, is_public=True)

    page = client.get(URL)

    assert "№99.3" in assert_page(page) and page.content.count(b'type="radio"') == 12


def test_a_model_under_embargo_answers_its_owner_only(client, disclosure, carol, mallory, alice, bob):
    question = answered(disclosure, alice, bob)
    Disclosure.objects.update(embargo_until=clock.now() + timedelta(days=1))

    for url in (URL, f"{URL}{question.public_id}/"):
        assert_page(client.get(url), 404)
        assert_page(signed_in(mallory).get(url), 404)
        assert_page(signed_in(carol).get(url))
    assert client.post(URL, {"query": "1"}).status_code == 404
    assert InfluenceQuestion.objects.count() == 1


def test_too_many_questions_are_refused_in_words(client, disclosure, settings):
    settings.QUESTIONS_PER_HOUR = {"party": 1, "address": 1}
    client.post(URL, {"query": "3"})

    assert "ask again in the next" in assert_page(client.post(URL, {"query": "4"}), 422)


def test_an_index_in_the_making_and_none_at_all_say_so(client, carol, disclosure, license):
    InfluenceIndex.objects.update(status="queued", n_records=10)
    IndexShard.objects.bulk_create(
        IndexShard(index=disclosure.influence_index, number=n, status=status)
        for n, status in enumerate(["done", "queued"])
    )
    assert "1 of 2 parts" in assert_page(client.get(URL))
    assert "cannot be asked about yet" in assert_page(client.post(URL, {"query": "3"}), 422)

    DisclosureFactory(
        model=ModelFactory(owner=carol, slug="mute"),
        licenses=[license],
        document=declaration(licenses=[license], slug="mute"),
    )
    assert "disclosed without checkpoints" in assert_page(client.get("/models/mute/influence/"))


def test_an_answer_takes_as_many_queries_for_many_records_as_for_one(client, disclosure, alice, bob):
    question = answered(disclosure, alice, bob)
    counts = []
    for times in (1, 10):
        question.answer["harmful"] = question.answer["harmful"] * times
        question.save()
        with CaptureQueriesContext(connection) as queries:
            client.get(f"{URL}{question.public_id}/")
        counts.append(len(queries))

    assert counts[0] == counts[1] < 20
