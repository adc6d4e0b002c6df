"""Which records moved an output, over the API."""

from datetime import timedelta
from typing import Any

import pytest
from rest_framework.test import APIClient

from attribution.models import InfluenceIndex, InfluenceQuestion
from attribution.services import questions
from marketplace import clock
from marketplace.models import Disclosure
from tests.factories.attribution import DisclosureFactory, ModelFactory, PublishedResultFactory, trained_document

URL = "/api/v1/models/net/questions/"


@pytest.fixture
def disclosure(license: Any, carol: Any) -> Disclosure:
    document = trained_document(licenses=[license], slug="net")
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol, slug="net"), licenses=[license], document=document)
    holders = {c.party: c.n_records for c in license.version.contributions.filter(role="rights_holder")}
    PublishedResultFactory(disclosure=disclosure, version=license.version, shares=holders)
    return disclosure


def test_a_question_is_asked_answered_and_read_by_anyone(disclosure, client_of, mallory, work):
    questions.request_index(disclosure)
    work()
    client = client_of(mallory)

    asked = client.post(URL, {"query": 5}, format="json")

    assert (asked.status_code, asked.json()["status"], asked.json()["helpful"]) == (202, "queued", [])
    work()
    read = APIClient().get(f"{URL}{asked.json()['id']}/").json()
    assert (read["status"], read["way"], read["query"], read["model"]) == ("done", "exact", 5, "net")
    first = read["helpful"][0]
    assert first["score"] > 0 > read["harmful"][0]["score"]
    assert first["preview"] is None and len(first["digest"]) == 64
    assert first["share_ppq"] in (40 * 10**15 // 64, 24 * 10**15 // 64)
    assert set(read["said"]) == {"measured", "asked", "likeliest", "chance"}
    assert client.post(URL, {"query": 5}, format="json").json()["id"] == read["id"]


@pytest.mark.parametrize(
    ("body", "pointer"), [({}, ""), ({"query": 1, "text": "x"}, ""), ({"query": 99}, "query"), ({"text": "x"}, "query")]
)
def test_what_cannot_be_asked_is_a_problem_with_a_pointer(body, pointer, disclosure, client_of, mallory):
    InfluenceIndex.objects.create(disclosure=disclosure, status="done")

    refused = client_of(mallory).post(URL, body, format="json")

    assert refused.status_code == 422
    assert [error["pointer"] for error in refused.json()["errors"]] == [pointer]
    assert not InfluenceQuestion.objects.exists()


def test_asking_needs_a_key_and_a_quota(disclosure, client_of, mallory, settings):
    settings.QUESTIONS_PER_HOUR = {"party": 1, "address": 0}
    InfluenceIndex.objects.create(disclosure=disclosure, status="done")

    assert APIClient().post(URL, {"query": 1}, format="json").status_code == 401
    client = client_of(mallory)
    assert client.post(URL, {"query": 1}, format="json").status_code == 202
    refused = client.post(URL, {"query": 2}, format="json")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_questions")


def test_under_embargo_only_the_owner_asks_and_reads(disclosure, client_of, mallory, carol):
    index = InfluenceIndex.objects.create(disclosure=disclosure, status="done")
    question = InfluenceQuestion.objects.create(index=index, query=1)
    Disclosure.objects.update(embargo_until=clock.now() + timedelta(days=1))

    one = f"{URL}{question.public_id}/"
    assert client_of(mallory).post(URL, {"query": 1}, format="json").status_code == 404
    assert [APIClient().get(one).status_code, client_of(mallory).get(one).status_code] == [404, 404]
    assert client_of(carol).post(URL, {"query": 1}, format="json").json()["id"] == str(question.public_id)
    assert client_of(carol).get(one).status_code == 200
