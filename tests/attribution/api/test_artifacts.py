"""Evidence comes in as raw bytes, streamed."""

import pickle

import pytest

from attribution.models import Artifact
from tests.attribution.test_artifacts import STATE
from tests.factories.attribution import queries_file, two_clouds

URL = "/api/v1/artifacts/?kind="
RAW = "application/octet-stream"


def test_bytes_are_answered_with_their_hash_and_the_same_bytes_with_the_same(carol, client_of):
    client = client_of(carol)

    first = client.post(f"{URL}state", STATE, content_type=RAW)
    again = client.post(f"{URL}state", STATE, content_type=RAW)
    queries = client.post(f"{URL}queries", queries_file(*two_clouds(4)).read(), content_type=RAW)

    assert (first.status_code, queries.status_code) == (201, 201)
    assert first.data == again.data
    assert (first.data["kind"], first.data["size_bytes"]) == ("state", len(STATE))
    assert Artifact.objects.filter(owner=carol).count() == 2


def test_a_body_larger_than_a_request_may_hold_in_memory_is_streamed(carol, client_of, settings):
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 100

    assert client_of(carol).post(f"{URL}state", STATE, content_type=RAW).status_code == 201


@pytest.mark.parametrize(
    ("kind", "body", "pointer", "reason"),
    [
        ("state", pickle.dumps({"weight": [1, 2, 3]}), "/body", "Python pickle"),
        ("state", b"", "/body", "empty"),
        ("queries", b"content,label\n1,2\n", "/body", "not a Parquet file"),
        ("round", STATE, "kind", "state, queries"),
        ("", STATE, "kind", "state, queries"),
    ],
    ids=["a pickle renamed", "an empty body", "a CSV file", "the engine's own kind", "no kind"],
)
def test_bad_bytes_are_refused_and_leave_no_trace(kind, body, pointer, reason, carol, client_of, media):
    answer = client_of(carol).post(f"{URL}{kind}", body, content_type=RAW)

    assert (answer.status_code, answer["Content-Type"]) == (422, "application/problem+json")
    assert [error["pointer"] for error in answer.data["errors"]] == [pointer]
    assert reason in answer.data["detail"]
    assert not Artifact.objects.exists()
    assert not [path for path in media.rglob("*") if path.is_file()]


def test_only_a_key_that_may_disclose_hands_in(carol, client_of):
    assert client_of(carol, "read").post(f"{URL}state", STATE, content_type=RAW).status_code == 403
    assert client_of(carol).post(f"{URL}state", {"a": 1}, format="json").status_code == 415
    assert not Artifact.objects.exists()
