from datetime import timedelta

import pytest
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import SimpleUploadedFile

from marketplace.models import DatasetVersion, Upload
from marketplace.tasks import ingest_upload
from marketplace.web import incoming
from tests.factories.marketplace import DatasetFactory
from tests.pages import assert_page, signed_in

CSV = b"text,label,holder\nhello,a,Ann\ngood day,b,Ben\nhello,a,Ben\n"
MAPPING = {"content": "text", "label": "label", "rights_holder": "holder", "labeller": "", "preview_rows": "2"}


@pytest.fixture
def sending(alice, committed_messages):
    """A dataset, its owner's browser, and how to send it a file."""
    dataset = DatasetFactory(owner=alice)
    browser = signed_in(alice)

    def send(data: bytes = CSV, name: str = "greetings.csv"):
        return browser.post(f"/datasets/{dataset.slug}/upload/", {"file": SimpleUploadedFile(name, data)})

    return dataset, browser, send


@pytest.fixture
def committed_messages(monkeypatch):
    """Messages to the workers, which have none here: the rows are what is tested."""
    sent = []
    monkeypatch.setattr("marketplace.jobs._send", lambda name, pk: sent.append((name, pk)))
    return sent


def test_upload_in_two_steps_then_read_then_signed(sending):
    dataset, browser, send = sending
    assert_page(browser.get(f"/datasets/{dataset.slug}/upload/"))

    step = send()
    assert step.status_code == 302
    page = browser.get(step.url)
    assert "greetings.csv has 3 columns" in assert_page(page)
    assert b'<option value="text" selected>' in page.content and b'<option value="holder" selected>' in page.content
    done = browser.post(step.url, MAPPING)

    upload = Upload.objects.get()
    assert done.url == f"/uploads/{upload.public_id}/"
    assert upload.mapping["content"] == ["text"] and upload.mapping["preview_rows"] == 2
    assert default_storage.listdir(incoming.FOLDER)[1] == []
    waiting = browser.get(done.url)
    assert "Waiting for a worker" in assert_page(waiting) and b'hx-trigger="every 1s"' in waiting.content

    ingest_upload(upload.pk)
    ready = browser.get(done.url)
    text = assert_page(ready)
    assert "records 3 rights holders 2 labellers 0" in text and b"hx-trigger" not in ready.content

    sign = f"/uploads/{upload.public_id}/publish/"
    assert "Alice holds the rights" in assert_page(browser.get(sign))
    assert browser.post(sign, {"signed_name": "Alice A.", "confirmed": "on"}).url == f"/datasets/{dataset.slug}/offer/"
    version = DatasetVersion.objects.get()
    assert (version.status, version.attestation.signed_name) == ("published", "Alice A.")


def test_the_status_fragment_is_what_is_polled_for(sending):
    _, browser, send = sending
    browser.post(send().url, MAPPING)
    url = f"/uploads/{Upload.objects.get().public_id}/"

    fragment = browser.get(url, headers={"HX-Request": "true"})

    assert fragment.content.strip().startswith(b'<section id="upload-status"')


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "This file is empty"),
        (b"\x80\x04\x95pickle", "it is a pickle"),
        (b"PAR1nothing", "cannot be read as one"),
    ],
)
def test_a_bad_file_is_refused_beside_its_field_and_leaves_nothing(sending, data, message):
    _, _, send = sending

    response = send(data, "bad.parquet")

    assert message in assert_page(response, 422)
    assert b'id="id_file_error"' in response.content
    assert not Upload.objects.exists() and not default_storage.exists(incoming.FOLDER)


def test_a_file_that_fails_to_be_read_says_which_row(sending):
    dataset, browser, send = sending
    browser.post(send(CSV + b"ragged,row\n").url, MAPPING)
    upload = Upload.objects.get()

    ingest_upload(upload.pk)

    text = assert_page(browser.get(f"/uploads/{upload.public_id}/"))
    assert "The file could not be read" in text and "row 4" in text
    assert f"/datasets/{dataset.slug}/upload/" in browser.get(f"/uploads/{upload.public_id}/").content.decode()


def test_publishing_needs_a_name_and_the_tick(sending):
    _, browser, send = sending
    browser.post(send().url, MAPPING)
    upload = Upload.objects.get()
    ingest_upload(upload.pk)

    response = browser.post(f"/uploads/{upload.public_id}/publish/", {"signed_name": "Alice"})

    assert "Tick the box" in assert_page(response, 422)
    upload.version.refresh_from_db()
    assert upload.version.status == "frozen"


def test_a_file_waits_for_its_mapping_for_a_day(sending, monkeypatch):
    _, browser, send = sending
    first = send().url
    monkeypatch.setattr(incoming, "LIFE", timedelta(0))

    send()

    assert_page(browser.get(first), 404)


def test_strangers_find_neither_upload_nor_waiting_file(sending, mallory):
    _, browser, send = sending
    step = send().url
    browser.post(step, MAPPING)
    upload = Upload.objects.get()
    stranger = signed_in(mallory)

    for url in (step, f"/uploads/{upload.public_id}/", f"/uploads/{upload.public_id}/publish/"):
        assert_page(stranger.get(url), 404)


def test_a_waiting_file_belongs_to_its_dataset(sending, alice):
    _, browser, send = sending
    waiting = send().url.rstrip("/").rpartition("/")[2]
    other = DatasetFactory(owner=alice)

    assert_page(browser.get(f"/datasets/{other.slug}/upload/{waiting}/"), 404)
