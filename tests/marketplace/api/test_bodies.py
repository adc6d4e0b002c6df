"""Nobody makes the server read more than it said it would."""

import json
from io import BytesIO
from typing import Any

import pytest

from marketplace.bodies import BodyTooLarge, LimitedJSONParser
from marketplace.models import Order
from marketplace.services.disclosures import DisclosureInvalid, validate_document
from tests.factories.marketplace import DatasetFactory
from tests.pages import assert_page, signed_in


class Unread:
    """A body that fails the test when a byte of it is asked for."""

    def read(self, *size: int) -> bytes:
        raise AssertionError("the body was read")

    readline = read


def send(client: Any, path: str, *, length: int | None, content_type: str = "application/json", **extra: Any) -> Any:
    environ = {"wsgi.input": Unread(), "CONTENT_TYPE": content_type, **extra}
    if length is not None:
        environ["CONTENT_LENGTH"] = str(length)
    return client.generic("POST", path, **environ)


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/api/v1/orders/", "MAX_JSON_BYTES"),
        ("/api/v1/disclosures/", "MAX_DISCLOSURE_BYTES"),
        ("/api/v1/artifacts/?kind=state", "MAX_ARTIFACT_BYTES"),
    ],
)
def test_an_api_request_that_says_it_is_too_large_is_refused_unread(api, carol, settings, path, limit):
    n_bytes = getattr(settings, limit) + 1

    refused = send(api(carol, "buy", "disclose"), path, length=n_bytes)

    assert (refused.status_code, refused["Content-Type"]) == (413, "application/problem+json")
    assert (refused.json()["code"], "Send less" in refused.json()["detail"]) == ("body_too_large", True)


def test_a_body_of_unknown_length_is_refused(api, carol):
    refused = send(api(carol, "buy"), "/api/v1/orders/", length=None, HTTP_TRANSFER_ENCODING="chunked")

    assert (refused.status_code, refused.json()["code"]) == (411, "length_required")


def test_a_body_that_is_longer_than_it_said_is_stopped_at_the_limit(settings):
    settings.MAX_JSON_BYTES = 1_000
    endless = BytesIO(b"[" + b"0," * 1_000_000)

    with pytest.raises(BodyTooLarge):
        LimitedJSONParser().parse(endless, "application/json", {})

    assert endless.tell() <= 1_001
    assert LimitedJSONParser().parse(BytesIO(b'{"a": 1}'), "application/json", {}) == {"a": 1}


def test_a_body_that_is_nested_without_end_is_a_refusal(api, carol):
    refused = api(carol, "buy").post("/api/v1/orders/", b"[" * 500_000, content_type="application/json")

    assert (refused.status_code, refused.json()["code"]) == (400, "parse_error")
    assert not Order.objects.exists()


def test_a_file_that_is_too_large_is_refused_unread_with_a_page(alice, settings):
    dataset = DatasetFactory(owner=alice)
    settings.MAX_UPLOAD_BYTES = 5_000_000

    refused = send(
        signed_in(alice),
        f"/datasets/{dataset.slug}/upload/",
        length=6_000_001,
        content_type="multipart/form-data; boundary=x",
    )

    assert "more than the 4.8 MB" in assert_page(refused, 413)


def test_a_file_from_nobody_is_not_read_at_all(client, alice):
    path = f"/datasets/{DatasetFactory(owner=alice).slug}/upload/"

    asked_to_sign_in = send(client, path, length=1_000_000, content_type="multipart/form-data; boundary=x")

    assert (asked_to_sign_in.status_code, asked_to_sign_in.url) == (302, f"/accounts/login/?next={path}")


def test_a_page_without_a_file_takes_no_more_than_a_form(client, db, settings):
    refused = send(client, "/accounts/login/", length=settings.DATA_UPLOAD_MAX_MEMORY_SIZE + 1)

    assert "Send less at once" in assert_page(refused, 413)


def test_a_document_with_a_million_faults_names_a_few(monkeypatch):
    made = 0

    def count(*args: Any) -> Any:
        nonlocal made
        made += 1
        return explain(*args)

    from marketplace.services import disclosures

    explain = disclosures._explain
    monkeypatch.setattr(disclosures, "_explain", count)
    citation = {"selection": [0] * 90_000}

    with pytest.raises(DisclosureInvalid) as refused:
        validate_document(json.loads(json.dumps({"training_data": [citation] * 200})))

    assert len(refused.value.pointers) <= 20
    assert made <= 21
