"""Offers: terms in versions, their policy and their contract."""

import hashlib
import json
import threading

import pytest
from django.db import connection

from marketplace.errors import InvalidInput, NotAllowed
from marketplace.export.odrl import ALLOWED_USES, CONTEXT, PROFILE, policy_sha256
from marketplace.models import AuditEvent, Dataset, Membership, Offer, User
from marketplace.money import InvalidMoney, Money
from marketplace.selectors import current_offer, listed_datasets, price_history
from marketplace.services.offers import NothingToOffer, publish_offer
from marketplace.services.versions import create_dataset, withdraw_dataset
from tests.factories.marketplace import DatasetFactory, PublishedVersionFactory

USD = "USD"


def terms(**changes):
    return {
        "price": Money.parse("129.00", USD),
        "upfront_bps": 3_000,
        "pool_bps": 6_000,
        "royalty_bps": 250,
        "royalty_cap": Money.parse("5000.00", USD),
        "labellers_bps": 2_000,
        "term_days": 365,
        "seats": 5,
        "allowed_uses": ["evaluate", "train"],
        "disclosure_due_days": 90,
    } | changes


@pytest.fixture
def dataset(alice):
    dataset = DatasetFactory(owner=alice, title="Digits", slug="digits")
    PublishedVersionFactory(dataset=dataset)
    return dataset


def test_offer_lists_the_dataset_under_its_terms(dataset, alice):
    offer = publish_offer(dataset=dataset, user=alice.user, **terms())

    dataset.refresh_from_db()
    assert dataset.status == "listed"
    assert (offer.number, offer.price, offer.royalty_cap) == (1, Money(129_000_000, USD), Money(5_000_000_000, USD))
    assert (offer.platform_fee_bps, offer.upfront_bps, offer.pool_bps) == (1_000, 3_000, 6_000)
    assert offer.allowed_uses == ["train", "evaluate"]
    assert current_offer(dataset) == offer
    event = AuditEvent.objects.get(action="offer.published")
    assert (event.actor, event.party, event.target) == (alice.user, alice, f"offer:{offer.pk}")


def test_policy_says_what_the_offer_says(dataset, alice):
    offer = publish_offer(dataset=dataset, user=alice.user, **terms())
    target = f"urn:residual:merkle:sha256:{offer.version.merkle_root}"
    compensate = {"@id": "odrl:compensate"}

    assert offer.policy == {
        "@context": CONTEXT,
        "@type": "Offer",
        "uid": f"urn:residual:offer:{dataset.public_id}:1",
        "profile": PROFILE,
        "assigner": {"@type": "Party", "uid": f"urn:uuid:{alice.public_id}"},
        "permission": [
            {
                "target": target,
                "action": f"{PROFILE}:{use}",
                "constraint": [
                    constraint("elapsedTime", "lteq", "P365D", "xsd:duration"),
                    constraint(f"{PROFILE}:seats", "lteq", "5", "xsd:integer"),
                ],
                "duty": [
                    {
                        "action": [{"rdf:value": compensate, "refinement": [pay("eq", "129.00")]}],
                        "constraint": [
                            {"leftOperand": "event", "operator": "lt", "rightOperand": {"@id": "odrl:policyUsage"}}
                        ],
                    },
                    {
                        "action": f"{PROFILE}:disclose",
                        "constraint": [constraint("delayPeriod", "lteq", "P90D", "xsd:duration")],
                    },
                    {
                        "action": [
                            {
                                "rdf:value": compensate,
                                "refinement": [
                                    constraint(f"{PROFILE}:shareOfAttributedRevenue", "eq", "2.50", "xsd:decimal")
                                    | {"unit": f"{PROFILE}:percent"},
                                    pay("lteq", "5000.00"),
                                ],
                            }
                        ]
                    },
                ],
            }
            for use in ("train", "evaluate")
        ],
        "prohibition": [{"target": target, "action": "distribute"}, {"target": target, "action": "sell"}],
    }


def constraint(left, operator, right, type_):
    return {"leftOperand": left, "operator": operator, "rightOperand": {"@value": right, "@type": type_}}


def pay(operator, amount):
    return constraint("payAmount", operator, amount, "xsd:decimal") | {"unit": "urn:iso:std:iso:4217:USD"}


def test_policy_is_kept_by_the_hash_of_its_canonical_json(dataset, alice):
    offer = publish_offer(dataset=dataset, user=alice.user, **terms())

    offer.refresh_from_db()  # as PostgreSQL gives it back, its keys in another order
    canonical = json.dumps(offer.policy, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert offer.policy_sha256 == hashlib.sha256(canonical.encode()).hexdigest() == policy_sha256(offer.policy)


def test_contract_says_every_term_in_words(dataset, alice):
    text = publish_offer(dataset=dataset, user=alice.user, **terms()).contract_text

    for words in (
        "Alice licenses “Digits”, version 1: 8 records",
        "Allowed: train a model from scratch; evaluate a model. Not allowed: fine-tune a model that exists.",
        "for 5 people and ends 365 days after payment",
        "The price is 129.00 USD. Of it, 30 % is divided",
        "60 % waits until it is measured",
        "10 % is the platform’s fee",
        "Labellers receive 20 %",
        "within 90 days of payment",
        "2.5 % of the part of the revenue",
        "at most 5000.00 USD over the life of this license",
    ):
        assert words in text


def test_terms_without_royalty_or_cap_owe_none(dataset, alice):
    offer = publish_offer(dataset=dataset, user=alice.user, **terms(royalty_bps=0, royalty_cap=None, labellers_bps=0))

    assert "No royalty is due" in offer.contract_text
    assert "Labellers" not in offer.contract_text
    assert len(offer.policy["permission"][0]["duty"]) == 2


def test_a_change_adds_a_row_and_the_same_terms_add_none(dataset, alice):
    first = publish_offer(dataset=dataset, user=alice.user, **terms())
    again = publish_offer(dataset=dataset, user=alice.user, **terms())
    second = publish_offer(dataset=dataset, user=alice.user, **terms(price=Money.parse("99.00", USD)))

    assert again == first
    assert [(offer.number, str(offer.price)) for offer in price_history(dataset)] == [
        (2, "99.00 USD"),
        (1, "129.00 USD"),
    ]
    assert current_offer(dataset) == second
    assert first.policy_sha256 != second.policy_sha256


def test_a_new_version_is_offered_anew(dataset, alice):
    first = publish_offer(dataset=dataset, user=alice.user, **terms())
    version = PublishedVersionFactory(dataset=dataset)

    second = publish_offer(dataset=dataset, user=alice.user, **terms())

    assert (first.number, second.number, second.version) == (1, 2, version)


@pytest.mark.parametrize("text", ["-1", "0.0000001", "1e30", "nan", "12 dollars"])
def test_price_that_is_none_leaves_no_trace(dataset, alice, text):
    with pytest.raises(InvalidMoney):
        publish_offer(dataset=dataset, user=alice.user, **terms(price=Money.parse(text, USD)))

    assert_no_trace(dataset)


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"price": Money(-1_000_000, USD)}, "price"),
        ({"price": Money(4_990_000, USD)}, "price"),
        ({"price": Money(5_000_001, USD)}, "price"),
        ({"price": Money(10**30, USD)}, "price"),
        ({"price": Money(10**15 + 10_000, USD)}, "price"),  # a cent more than the largest amount
        ({"upfront_bps": 3_001}, "pool_bps"),
        ({"upfront_bps": -1_000, "pool_bps": 10_000}, "upfront_bps"),
        ({"royalty_bps": 10_001}, "royalty_bps"),
        ({"royalty_bps": 2.5}, "royalty_bps"),
        ({"royalty_cap": Money(0, USD)}, "royalty_cap"),
        ({"royalty_cap": Money(1_000_000, "EUR")}, "royalty_cap"),
        ({"royalty_bps": 0}, "royalty_cap"),
        ({"labellers_bps": 10_001}, "labellers_bps"),
        ({"term_days": 0}, "term_days"),
        ({"seats": 0}, "seats"),
        ({"disclosure_due_days": 10**6}, "disclosure_due_days"),
        ({"allowed_uses": []}, "allowed_uses"),
        ({"allowed_uses": ["train", "resell"]}, "allowed_uses"),
    ],
)
def test_term_out_of_range_is_named_and_leaves_no_trace(dataset, alice, changes, pointer):
    with pytest.raises(InvalidInput) as caught:
        publish_offer(dataset=dataset, user=alice.user, **terms(**changes))

    assert list(caught.value.pointers) == [pointer]
    assert caught.value.message == caught.value.pointers[pointer]
    assert_no_trace(dataset)


def test_every_wrong_term_is_named_at_once(dataset, alice):
    with pytest.raises(InvalidInput) as caught:
        publish_offer(dataset=dataset, user=alice.user, **terms(seats=0, term_days=0, allowed_uses=["fly"]))

    assert list(caught.value.pointers) == ["term_days", "seats", "allowed_uses"]


def test_offer_needs_authority(dataset, alice, bob, mallory):
    Membership.objects.create(party=alice, user=bob.user, role=Membership.Role.EDITOR)

    for user in (bob.user, mallory.user):
        with pytest.raises(NotAllowed):
            publish_offer(dataset=dataset, user=user, **terms())

    assert_no_trace(dataset)


def test_offer_needs_something_to_sell(dataset, alice):
    empty = create_dataset(owner=alice, user=alice.user, title="Empty")

    with pytest.raises(NothingToOffer, match="publish one first"):
        publish_offer(dataset=empty, user=alice.user, **terms())
    withdraw_dataset(dataset=dataset, user=alice.user)
    with pytest.raises(NothingToOffer, match="was withdrawn"):
        publish_offer(dataset=dataset, user=alice.user, **terms())

    assert not Offer.objects.exists()


def assert_no_trace(dataset):
    assert not Offer.objects.exists()
    assert not AuditEvent.objects.filter(action="offer.published").exists()
    assert Dataset.objects.get(pk=dataset.pk).status == "draft"


def test_two_offers_at_once_get_consecutive_numbers(committed_db):
    dataset = DatasetFactory()
    PublishedVersionFactory(dataset=dataset)
    user = User.objects.get()
    start, errors = threading.Barrier(4), []

    def publish(dollars):
        try:
            start.wait()
            publish_offer(dataset=dataset, user=user, **terms(price=Money.parse(f"{dollars}.00", USD)))
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=publish, args=(100 + n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert sorted(Offer.objects.values_list("number", flat=True)) == [1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 3])
def test_catalogue_asks_as_often_for_three_as_for_one(alice, n, django_assert_num_queries):
    for _ in range(n):
        dataset = DatasetFactory(owner=alice)
        PublishedVersionFactory(dataset=dataset)
        publish_offer(dataset=dataset, user=alice.user, **terms())

    with django_assert_num_queries(2):
        found = [(d.owner.name, current_offer(d).version.n_records, len(price_history(d))) for d in listed_datasets()]

    assert found == [("Alice", 8, 1)] * n


def test_catalogue_finds_every_word_and_only_what_is_listed(dataset, alice):
    publish_offer(dataset=dataset, user=alice.user, **terms())
    other = DatasetFactory(owner=alice, title="Digits that wait")

    assert list(listed_datasets("digits alice")) == [dataset]
    assert list(listed_datasets("digits bob")) == []
    assert other not in listed_datasets()


def test_uses_are_said_in_words():
    assert set(ALLOWED_USES) == {"train", "fine-tune", "evaluate"}
    assert all(words[:1].isupper() and not words.endswith(".") for words in ALLOWED_USES.values())
