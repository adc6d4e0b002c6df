import pytest
from django.test import Client

from marketplace.models import Dataset, Offer, Party
from marketplace.services.parties import introduce_party
from tests.factories.marketplace import DatasetFactory, LicenseFactory, OfferFactory, PublishedVersionFactory
from tests.marketplace.web.test_forms import TERMS
from tests.pages import assert_page, signed_in, text_of

PICTURE = {"content": [0.0, 1.0, 1.0, 0.0], "label": "7"}


def listed(owner: Party, **dataset: object) -> Offer:
    version = PublishedVersionFactory(
        dataset=DatasetFactory(owner=owner, **dataset), preview=[PICTURE], contributions={owner: 6}
    )
    return OfferFactory(version=version)


def test_catalogue_lists_what_is_for_sale_with_its_price(client, alice):
    listed(alice, title="Whale song", summary="Calls of the north.")
    DatasetFactory(owner=alice, title="A draft")

    text = assert_page(client.get("/datasets/"))

    assert "Whale song" in text and "Calls of the north." in text and "$100.00" in text and "6 records" in text
    assert "A draft" not in text


def test_catalogue_search_finds_by_word_and_says_so_when_it_does_not(client, alice):
    listed(alice, title="Whale song")
    listed(alice, title="Street signs")

    assert "Street signs" not in assert_page(client.get("/datasets/?q=whale"))
    assert "Nothing matches “zebra”" in assert_page(client.get("/datasets/?q=zebra"))


@pytest.mark.parametrize("n_rows", [1, 3])
def test_catalogue_takes_the_same_number_of_queries_for_any_number_of_rows(
    client, alice, django_assert_num_queries, n_rows
):
    for _ in range(n_rows):
        listed(alice)
    client.get("/datasets/")

    with django_assert_num_queries(3):  # count, datasets with owners, their offers with versions
        client.get("/datasets/")


def test_dataset_page_shows_what_it_is_and_what_it_costs(client, alice):
    offer = listed(alice, title="Whale song", description="Recorded in 2020.", source="Our own boat.")

    response = client.get(f"/datasets/{offer.dataset.slug}/")
    text = assert_page(response)

    for expected in ("Whale song", "Recorded in 2020.", "Our own boat.", "$100.00", "Alice", offer.version.merkle_root):
        assert expected in text
    assert b'alt="Record 1, labelled 7"' in response.content and b"data:image/png;base64," in response.content
    assert "Sign in to license it" in text
    assert "No model has disclosed" in text


def test_dataset_page_calls_who_has_not_claimed_by_number_to_all_but_the_owner(client, alice, bob):
    private = introduce_party(introducer=alice, external_ref="someone@example.org")
    offer = OfferFactory(
        version=PublishedVersionFactory(dataset=DatasetFactory(owner=alice), contributions={private: 3, bob: 2})
    )
    url = f"/datasets/{offer.dataset.slug}/"

    public, own = text_of(client.get(url)), text_of(signed_in(alice).get(url))

    assert "someone@example.org" not in public and private.public_name in public and "Bob" in public
    assert "someone@example.org" in own


def test_a_page_shows_fifty_contributors_and_leads_to_the_others(client, alice):
    people = Party.objects.bulk_create(Party(name=f"P{n}", claimed_at=alice.claimed_at) for n in range(60))
    version = PublishedVersionFactory(
        dataset=DatasetFactory(owner=alice), contributions=dict.fromkeys(people, 1), labellers={people[0]: 4}
    )
    url = f"/datasets/{OfferFactory(version=version).dataset.slug}/"

    first, second = (client.get(f"{url}?people={page}") for page in (1, 2))

    assert "rights holders 60 labellers 1" in assert_page(first).replace("records 60 ", "")
    assert b"?people=2#people-heading" in first.content
    assert [page.content.count(b"<td>rights holder</td>") for page in (first, second)] == [50, 10]
    assert second.content.count(b"<td>labeller</td>") == 1


def test_a_draft_exists_for_its_owner_only(client, alice, mallory):
    draft = DatasetFactory(owner=alice, title="Not yet")
    url = f"/datasets/{draft.slug}/"

    assert "Not yet" in assert_page(signed_in(alice).get(url))
    assert_page(client.get(url), 404)
    assert_page(signed_in(mallory).get(url), 404)
    for page in ("upload/", "offer/"):
        assert_page(signed_in(mallory).get(url + page), 404)


def test_odrl_is_the_policy_whose_hash_the_offer_keeps(client, alice):
    offer = listed(alice)

    response = client.get(f"/datasets/{offer.dataset.slug}/odrl.json")

    assert response.headers["Content-Type"] == "application/ld+json"
    assert response.json() == offer.policy


def test_price_history_shows_every_price_there_was(client, alice):
    offer = listed(alice)
    OfferFactory(version=offer.version, price_micros=80_000_000)

    text = assert_page(client.get(f"/datasets/{offer.dataset.slug}/"))

    assert "Price history" in text and "$80.00" in text and "$100.00" in text


def test_dataset_page_cites_the_models_that_cite_it(client, alice, carol):
    from tests.factories.attribution import DisclosureFactory, ModelFactory

    offer = listed(alice)
    license = LicenseFactory(licensee=carol, offer=offer)
    DisclosureFactory(model=ModelFactory(owner=carol, name="Whale net"), licenses=[license])

    text = assert_page(client.get(f"/datasets/{offer.dataset.slug}/"))

    assert "Whale net" in text and "trained on 6 records" in text


def test_new_dataset_goes_on_to_its_upload(alice):
    browser = signed_in(alice)
    assert_page(browser.get("/datasets/new/"))

    response = browser.post("/datasets/new/", {"title": "Whale song", "modality": "tabular"})

    assert response.status_code == 302 and response.url == "/datasets/whale-song/upload/"
    assert Dataset.objects.get().owner == alice


def test_new_dataset_without_a_title_says_so_beside_the_field_and_on_top(alice):
    response = signed_in(alice).post("/datasets/new/", {"modality": "tabular"})

    text = assert_page(response, 422)
    assert "The dataset was not made" in text and "This field is required" in text
    assert b'<a href="#id_title">Title</a>' in response.content and b'aria-invalid="true"' in response.content
    assert not Dataset.objects.exists()


def test_offer_form_publishes_and_shows_what_becomes_of_the_price(alice):
    version = PublishedVersionFactory(dataset=DatasetFactory(owner=alice))
    browser, url = signed_in(alice), f"/datasets/{version.dataset.slug}/offer/"
    assert "What becomes of $100.00" in assert_page(browser.get(url))

    assert browser.post(url, TERMS).url == f"/datasets/{version.dataset.slug}/"

    offer = Offer.objects.get()
    assert (offer.price.micros, offer.upfront_bps, offer.pool_bps, offer.royalty_bps) == (
        129_000_000,
        3_000,
        6_000,
        250,
    )
    assert "Offer 1 stays in the public price history" in assert_page(browser.get(url))


def test_offer_preview_publishes_nothing(alice):
    version = PublishedVersionFactory(dataset=DatasetFactory(owner=alice))
    browser, url = signed_in(alice), f"/datasets/{version.dataset.slug}/offer/"

    fragment = browser.post(url, TERMS | {"preview": "yes"}, headers={"HX-Request": "true"})
    page = browser.post(url, TERMS | {"preview": "yes"})
    unclear = browser.post(url, TERMS | {"preview": "yes", "pool": "10"}, headers={"HX-Request": "true"})

    assert "$38.70" in text_of(fragment) and b"<html" not in fragment.content
    assert "$77.40" in assert_page(page)
    assert unclear.status_code == 200 and "The example appears once" in text_of(unclear)
    assert not Offer.objects.exists()


@pytest.mark.parametrize("price", ["-1", "0.0000001", "1e30", "4.99"])
def test_offer_refuses_a_price_that_cannot_be_and_leaves_no_trace(alice, price):
    version = PublishedVersionFactory(dataset=DatasetFactory(owner=alice))

    response = signed_in(alice).post(f"/datasets/{version.dataset.slug}/offer/", TERMS | {"price": price})

    assert "The offer was not published" in assert_page(response, 422)
    assert b'id="id_price_error"' in response.content
    assert not Offer.objects.exists()


def test_pages_that_write_send_a_visitor_to_sign_in(db):
    for url in ("/datasets/new/", "/datasets/yours/", "/orders/", "/licenses/", "/settings/keys/", "/earnings/"):
        response = Client().get(url)
        assert response.status_code == 302 and response.url == f"/accounts/login/?next={url}"
