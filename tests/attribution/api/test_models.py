"""A model's public page: who reads it needs no key."""

from datetime import timedelta

import pytest
from rest_framework.test import APIClient

from attribution.services.disclosures import disclose_model
from marketplace import clock
from marketplace.services.parties import introduce_party
from tests.factories.attribution import (
    DisclosureFactory,
    ModelFactory,
    PublishedResultFactory,
    declaration,
    published_clouds,
)
from tests.factories.marketplace import LicenseFactory

URL = "/api/v1/models/"


def test_anyone_may_read_citations_prices_and_shares(license, carol, alice, bob, work):
    disclosure = disclose_model(owner=carol, document=declaration(licenses=[license], slug="open-model"))
    work()

    page = APIClient().get(f"{URL}open-model/").json()

    assert (page["slug"], page["owner"]) == ("open-model", "Carol")
    (seen,) = page["disclosures"]
    assert (seen["evidence"], seen["document_sha256"]) == ("declared", disclosure.document_sha256)
    (citation,) = seen["citations"]
    assert (citation["merkle_root"], citation["n_records"]) == (license.version.merkle_root, 64)
    assert [price["price"] for price in citation["prices"]] == [{"amount": "100.00", "currency": "USD"}]
    result = page["result"]
    assert (result["grade"], result["paid_by"], result["number"]) == ("declared", "count", 1)
    holders = {share["name"]: share["paid_ppq"] for share in result["shares"] if share["partition"] == "rights_holder"}
    assert holders == {"Alice": str(40 * 10**15 // 64), "Bob": str(24 * 10**15 // 64)}
    assert [one["id"] for one in page["history"]] == [result["id"]]


def test_an_introduced_contributors_name_stays_private(alice, carol):
    someone = introduce_party(introducer=alice, external_ref="jane.doe@example.org")
    license = LicenseFactory(licensee=carol, version=published_clouds({someone: 4}))
    PublishedResultFactory(license=license, shares={someone: 1})

    text = APIClient().get(f"{URL}{carol.models.get().slug}/").content.decode()

    assert "jane" not in text
    assert f"Contributor {str(someone.public_id)[:8]}" in text


def test_the_latest_result_holds_and_the_earlier_ones_are_history(license, carol, alice, bob):
    disclosure = DisclosureFactory(model=ModelFactory(owner=carol), licenses=[license])
    now = clock.now()
    for days, weight in ((2, 1), (1, 3)):
        PublishedResultFactory(
            disclosure=disclosure, shares={alice: weight, bob: 1}, published_at=now - timedelta(days=days)
        )

    page = APIClient().get(f"{URL}{disclosure.model.slug}/").json()

    assert page["result"]["number"] == 2
    assert [result["number"] for result in page["history"]] == [2, 1]
    assert page["result"]["shares"][0]["paid_ppq"] == str(3 * 10**15 // 4)


@pytest.mark.parametrize(("days", "status"), [(1, 404), (-1, 200)], ids=["during the embargo", "after it"])
def test_an_embargoed_disclosure_is_nobodys_to_see(days, status, license, carol):
    disclosure = DisclosureFactory(
        model=ModelFactory(owner=carol), licenses=[license], embargo_until=clock.now() + timedelta(days=days)
    )

    client = APIClient()

    assert client.get(f"{URL}{disclosure.model.slug}/").status_code == status
    assert len(client.get(URL).json()["results"]) == (status == 200)
