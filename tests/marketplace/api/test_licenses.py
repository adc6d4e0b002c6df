from datetime import timedelta
from urllib.parse import urlsplit

from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace import clock
from marketplace.models import License
from tests.factories.marketplace import LicenseFactory


def test_a_license_says_what_it_is_for(api, carol):
    license = LicenseFactory(licensee=carol)
    version = license.version

    (found,) = api(carol).get("/api/v1/licenses/").json()["results"]

    assert {name: found[name] for name in ("id", "dataset", "version", "merkle_root", "n_records", "is_live")} == {
        "id": str(license.public_id),
        "dataset": version.dataset.slug,
        "version": 1,
        "merkle_root": version.merkle_root,
        "n_records": 8,
        "is_live": True,
    }
    assert found["price"] == {"amount": "100.00", "currency": "USD"}
    assert found["order"] == str(license.order_line.order.public_id)


def test_a_license_that_ended_says_so(api, carol):
    LicenseFactory(licensee=carol)
    clock.advance(timedelta(days=366))

    assert [one["is_live"] for one in api(carol).get("/api/v1/licenses/").json()["results"]] == [False]


def test_a_download_link_works_without_the_key(api, carol, client):
    license = LicenseFactory(licensee=carol)

    found = api(carol).get(f"/api/v1/licenses/{license.public_id}/download/").json()

    response = client.get(urlsplit(found["url"]).path)
    body = b"".join(response.streaming_content)
    assert (response.status_code, len(body)) == (200, found["size_bytes"])
    assert found["merkle_root"] == license.version.merkle_root
    assert response["ETag"] == f'"{found["sha256"]}"'


def test_a_revoked_license_has_no_link(api, carol):
    license = LicenseFactory(licensee=carol)
    License.objects.update(revoked_at=clock.now())

    refused = api(carol).get(f"/api/v1/licenses/{license.public_id}/download/")

    assert (refused.status_code, refused.json()["code"]) == (403, "license_not_live")


def test_a_strangers_license_does_not_exist(api, carol, mallory):
    license = LicenseFactory(licensee=carol)
    stranger = api(mallory)

    assert stranger.get("/api/v1/licenses/").json()["results"] == []
    for path in (f"/api/v1/licenses/{license.public_id}/", f"/api/v1/licenses/{license.public_id}/download/"):
        assert stranger.get(path).status_code == 404
    license.refresh_from_db()
    assert license.first_downloaded_at is None


def test_a_list_of_licenses_asks_as_much_for_three_as_for_one(api, carol):
    def n_queries():
        with CaptureQueriesContext(connection) as queries:
            assert client.get("/api/v1/licenses/").status_code == 200
        return len(queries)

    client = api(carol)
    LicenseFactory(licensee=carol)
    one = n_queries()
    LicenseFactory(licensee=carol)
    LicenseFactory(licensee=carol)

    assert (one, n_queries()) == (4, 4)  # the key, its last use, the licenses, the clock
