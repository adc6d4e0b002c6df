import hashlib
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from django.core.files.storage import default_storage
from django.core.signing import TimestampSigner
from django.utils import timezone

from marketplace import clock
from marketplace.models import AuditEvent, License
from marketplace.services.downloads import LicenseNotLive, signed_download_url
from tests.factories.marketplace import LicenseFactory, OfferFactory


@pytest.fixture
def license(carol):
    return LicenseFactory(licensee=carol, offer=OfferFactory(term_days=30))


@pytest.fixture
def path(license):
    return urlsplit(signed_download_url(license=license).url).path


def get(client, path, **headers):
    """The answer and its whole body."""
    response = client.get(path, headers=headers)
    return response, b"".join(response.streaming_content)


def content(license):
    with default_storage.open(license.version.parquet_key, "rb") as stored:
        return stored.read()


def test_a_signed_link_gives_the_bytes_and_how_to_check_them(client, license, path):
    response, got = get(client, path)

    assert (response.status_code, got) == (200, content(license))
    assert response["ETag"] == f'"{hashlib.sha256(got).hexdigest()}"' == f'"{license.version.parquet_sha256}"'
    assert response["Content-Length"] == str(len(got))
    assert response["Content-Disposition"] == f'attachment; filename="{license.version.dataset.slug}-v1.parquet"'
    assert response["Content-Type"] == "application/vnd.apache.parquet"


def test_a_link_is_valid_for_as_long_as_the_settings_say(settings, license):
    settings.DOWNLOAD_URL_SECONDS = 90

    signed = signed_download_url(license=license)

    assert timedelta(seconds=88) < signed.expires_at - timezone.now() <= timedelta(seconds=90)
    assert signed.url.startswith(f"{settings.BASE_URL}/downloads/")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-50", -50, None), ("bytes=5-999999999", 5, None)],
)
def test_a_download_can_be_resumed(client, license, path, asked, start, stop):
    whole = content(license)

    response, part = get(client, path, Range=asked)

    assert (response.status_code, part) == (206, whole[start:stop])
    first = start % len(whole)
    assert response["Content-Range"] == f"bytes {first}-{first + len(part) - 1}/{len(whole)}"
    assert response["Content-Length"] == str(len(part))


def test_a_range_beyond_the_end_is_refused(client, license, path):
    response = client.get(path, headers={"Range": "bytes=999999999-"})

    assert (response.status_code, response["Content-Range"]) == (416, f"bytes */{len(content(license))}")
    license.refresh_from_db()
    assert license.first_downloaded_at is None


@pytest.mark.parametrize("asked", ["bytes=9-5", "bytes=a-b", "bytes=-0", "bytes=0-1,4-5", "lines=0-9", "bytes=-", "x"])
def test_a_range_that_means_nothing_gets_the_whole_file(client, license, path, asked):
    response, got = get(client, path, Range=asked)

    assert (response.status_code, got) == (200, content(license))


def test_a_resumed_download_never_mixes_two_files(client, license, path):
    asked = {"Range": "bytes=0-9"}

    same, part = get(client, path, **asked, **{"If-Range": f'"{license.version.parquet_sha256}"'})
    other, whole = get(client, path, **asked, **{"If-Range": '"another"'})

    assert (same.status_code, part) == (206, content(license)[:10])
    assert (other.status_code, whole) == (200, content(license))


def test_the_first_download_is_noted_once(client, license, path):
    b"".join(client.head(path).streaming_content)
    license.refresh_from_db()
    assert license.first_downloaded_at is None

    get(client, path)
    license.refresh_from_db()
    first = license.first_downloaded_at
    get(client, path)
    license.refresh_from_db()

    assert license.first_downloaded_at == first is not None
    assert AuditEvent.objects.filter(action="license.downloaded", target=f"license:{license.pk}").count() == 1


def test_an_expired_link_says_how_to_get_a_new_one(client, license, path, settings):
    settings.DOWNLOAD_URL_SECONDS = -1

    response = client.get(path)

    problem = response.json()
    assert (response.status_code, response["Content-Type"]) == (410, "application/problem+json")
    assert problem["code"] == "download_expired"
    assert "/api/v1/licenses/{id}/download/" in problem["detail"]
    license.refresh_from_db()
    assert license.first_downloaded_at is None


def test_a_changed_link_does_not_exist(client, license, path, carol):
    token = path.rpartition("/")[2]
    other = LicenseFactory(licensee=carol)
    forged = [
        token[:-1] + ("A" if token[-1] != "A" else "B"),
        token.replace(str(license.public_id), str(other.public_id)),
        str(license.public_id),
        TimestampSigner(salt="another").sign(str(license.public_id)),
        TimestampSigner(salt="download").sign("not-a-license"),
        TimestampSigner(salt="download").sign("00000000-0000-4000-8000-000000000000"),
    ]

    for text in forged:
        response = client.get(f"/downloads/{text}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_a_link_is_checked_against_the_live_license(client, license, path):
    License.objects.filter(pk=license.pk).update(revoked_at=clock.now())

    response = client.get(path)

    assert (response.status_code, response.json()["code"]) == (403, "license_not_live")
    assert "revoked" in response.json()["detail"]


def test_an_ended_license_has_no_links(client, license, path):
    clock.advance(timedelta(days=31))

    assert client.get(path).status_code == 403
    license.refresh_from_db()
    with pytest.raises(LicenseNotLive, match="ended"):
        signed_download_url(license=license)


def test_a_link_cannot_be_posted_to(client, path):
    assert client.post(path).status_code == 405


def test_a_person_gets_a_page_that_says_what_to_do(client, license, path, settings):
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    settings.DOWNLOAD_URL_SECONDS = -1
    expired = client.get(path, headers=browser)
    settings.DOWNLOAD_URL_SECONDS = 600
    License.objects.filter(pk=license.pk).update(revoked_at=clock.now())
    revoked = client.get(path, headers=browser)
    forged = client.get(f"{path}x", headers=browser)

    for page, status, says in ((expired, 410, "licenses page"), (revoked, 403, "revoked"), (forged, 404, "whole link")):
        assert (page.status_code, page["Content-Type"]) == (status, "text/html; charset=utf-8")
        assert says in page.content.decode()
