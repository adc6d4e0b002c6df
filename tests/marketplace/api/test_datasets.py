import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace.models import Dataset
from tests.factories.marketplace import DatasetFactory, LicenseFactory, OfferFactory, PublishedVersionFactory
from tests.marketplace.services.test_disclosures import cite, document


def test_anyone_reads_what_is_on_sale(api, alice):
    version = PublishedVersionFactory(dataset__owner=alice, dataset__title="Digits")
    OfferFactory(version=version)
    current = OfferFactory(version=version, price_micros=129_000_000)
    DatasetFactory(title="A draft")

    (found,) = api().get("/api/v1/datasets/").json()["results"]

    assert (found["slug"], found["title"], found["owner"]) == (version.dataset.slug, "Digits", "Alice")
    assert (found["offer"]["id"], found["offer"]["price"]) == (current.pk, {"amount": "129.00", "currency": "USD"})
    assert (found["version"]["merkle_root"], found["version"]["n_records"]) == (version.merkle_root, 8)
    assert "contract_text" not in found["offer"]


def test_a_dataset_shows_its_terms_its_prices_and_who_cites_it(api, alice, carol):
    version = PublishedVersionFactory(dataset__owner=alice)
    for price in (100_000_000, 129_000_000):
        OfferFactory(version=version, price_micros=price)
    from marketplace.services.disclosures import record_disclosure

    record_disclosure(owner=carol, document=document(cite(LicenseFactory(licensee=carol, version=version))))

    found = api().get(f"/api/v1/datasets/{version.dataset.slug}/").json()

    assert found["offer"]["contract_text"] == "You may train models on these records."
    assert [price["price"]["amount"] for price in found["price_history"]] == ["129.00", "100.00"]
    assert [(cited["model"], cited["n_records"]) for cited in found["cited_by"]] == [("digits-mlp", 8)]
    assert "@example.org" not in str(found)


@pytest.mark.parametrize("status", [Dataset.Status.DRAFT, Dataset.Status.WITHDRAWN])
def test_what_is_not_on_sale_is_not_found(api, status):
    offer = OfferFactory()
    Dataset.objects.filter(pk=offer.dataset_id).update(status=status)

    assert api().get("/api/v1/datasets/").json()["results"] == []
    assert api().get(f"/api/v1/datasets/{offer.dataset.slug}/").status_code == 404


def test_every_word_of_a_search_is_found(api):
    for title in ("Handwritten digits", "Handwritten letters"):
        OfferFactory(version=PublishedVersionFactory(dataset__title=title))

    def titles(query):
        return [one["title"] for one in api().get("/api/v1/datasets/", {"q": query}).json()["results"]]

    assert titles("handwritten") == ["Handwritten letters", "Handwritten digits"]
    assert titles("DIGITS hand") == ["Handwritten digits"]
    assert titles("digits letters") == []
    assert titles("%") == []


def test_a_list_of_datasets_asks_as_much_for_three_as_for_one(api):
    def n_queries():
        with CaptureQueriesContext(connection) as queries:
            assert api().get("/api/v1/datasets/").status_code == 200
        return len(queries)

    OfferFactory()
    one = n_queries()
    OfferFactory()
    OfferFactory(version=OfferFactory().version)

    assert (one, n_queries()) == (2, 2)  # the datasets, their offers
