from datetime import timedelta
from threading import Barrier, Thread

import pytest
from django.db import connection, transaction

from marketplace import clock
from marketplace.api.keys import create_api_key
from marketplace.errors import InvalidInput, KeyReused, NotAllowed
from marketplace.models import AuditEvent, Dataset, License, Membership, Order, OrderLine
from marketplace.money import Money
from marketplace.services.orders import (
    OfferNotOpen,
    OrderNotPayable,
    PriceChanged,
    SpendingLimitReached,
    mark_paid,
    place_order,
)
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, UserFactory

USD_100 = Money(100_000_000, "USD")


def place(buyer, offers, **changes):
    asked = {
        "buyer": buyer,
        "key": "k1",
        "offers": offers,
        "expected_total": Money(sum(offer.price_micros for offer in offers), offers[0].currency if offers else "USD"),
        "accepted_name": "Carol Chen",
        "user": buyer.user,
    }
    return place_order(**asked | changes)


def assert_nothing_written():
    assert (Order.objects.count(), OrderLine.objects.count()) == (0, 0)
    assert not AuditEvent.objects.filter(action__startswith="order.").exists()


def test_place_order_has_a_line_per_offer_at_its_price(carol):
    cheap, dear = OfferFactory(price_micros=20_000_000), OfferFactory(price_micros=109_000_000)

    order = place(carol, [cheap, dear])

    assert order.total == Money(129_000_000, "USD")
    assert (order.status, order.buyer, order.placed_by, order.api_key) == ("placed", carol, carol.user, None)
    assert [(line.offer, line.version, line.price_micros) for line in order.lines.order_by("pk")] == [
        (cheap, cheap.version, 20_000_000),
        (dear, dear.version, 109_000_000),
    ]
    assert AuditEvent.objects.get(action="order.placed").detail["total_micros"] == 129_000_000


def test_the_same_key_and_request_give_the_same_order_even_after_the_price_changed(carol):
    offer = OfferFactory()
    first = place(carol, [offer])
    OfferFactory(version=offer.version, price_micros=200_000_000)

    assert place(carol, [offer], accepted_name=" Carol Chen ") == first
    assert Order.objects.count() == 1


def test_nobody_licenses_their_own_dataset(carol):
    own, other = OfferFactory(version__dataset__owner=carol), OfferFactory()

    with pytest.raises(InvalidInput, match="nobody pays themselves") as refused:
        place(carol, [other, own])

    assert refused.value.pointers == {"/offers/1": "the buyer's own dataset"}
    assert_nothing_written()


def test_the_same_key_for_another_request_is_refused(carol):
    offer, other = OfferFactory(), OfferFactory()
    first = place(carol, [offer])

    with pytest.raises(KeyReused) as refused:
        place(carol, [other])

    assert refused.value.pointers == {"Idempotency-Key": f"belongs to order {first.public_id}"}
    assert Order.objects.get() == first


def test_two_buyers_may_use_one_key(alice, carol):
    offer = OfferFactory()

    assert place(alice, [offer]) != place(carol, [offer])


def test_a_changed_price_is_refused_with_both_amounts(carol):
    with pytest.raises(PriceChanged) as refused:
        place(carol, [OfferFactory()], expected_total=Money(90_000_000, "USD"))

    assert "100.00 USD, not 90.00 USD" in refused.value.message
    assert_nothing_written()


def test_a_replaced_offer_is_refused_with_the_new_price(carol):
    old = OfferFactory()
    OfferFactory(version=old.version, price_micros=130_000_000)

    with pytest.raises(PriceChanged) as refused:
        place(carol, [old])

    assert "130.00 USD, not 100.00 USD" in refused.value.message
    assert_nothing_written()


def test_a_replaced_offer_is_refused_even_at_the_same_price(carol):
    old = OfferFactory()
    new = OfferFactory(version=old.version, term_days=30)

    with pytest.raises(OfferNotOpen) as refused:
        place(carol, [old])

    assert refused.value.pointers == {"/offers/0": f"replaced by offer {new.pk}"}
    assert_nothing_written()


@pytest.mark.parametrize("status", [Dataset.Status.WITHDRAWN, Dataset.Status.DRAFT])
def test_only_a_listed_dataset_can_be_ordered(carol, status):
    offer = OfferFactory()
    Dataset.objects.filter(pk=offer.dataset_id).update(status=status)

    with pytest.raises(OfferNotOpen) as refused:
        place(carol, [offer])

    assert refused.value.pointers == {"/offers/0": "its dataset is not listed"}
    assert_nothing_written()


def test_one_order_has_one_currency(carol):
    offers = [OfferFactory(), OfferFactory(currency="EUR")]

    with pytest.raises(InvalidInput) as refused:
        place(carol, offers)

    assert refused.value.pointers == {"/offers/1": "is in EUR"}
    assert_nothing_written()


def test_an_order_has_offers_and_each_dataset_once(carol):
    offer = OfferFactory()

    with pytest.raises(InvalidInput) as empty:
        place(carol, [])
    with pytest.raises(InvalidInput) as double:
        place(carol, [offer, offer])

    assert empty.value.pointers == {"/offers": "wrong number"}
    assert double.value.pointers == {"/offers/1": "the same dataset again"}
    assert_nothing_written()


def test_an_order_is_worth_its_payment(carol):
    offer = OfferFactory(price_micros=100_000_000, currency="JPY")  # 100 yen: a price, but not an order

    with pytest.raises(InvalidInput) as refused:
        place(carol, [offer])

    assert refused.value.pointers == {"/expected_total": "too small"}
    assert_nothing_written()


@pytest.mark.parametrize("name", ["", "   ", "C", "C" * 121])
def test_the_contract_is_accepted_by_name(carol, name):
    with pytest.raises(InvalidInput) as refused:
        place(carol, [OfferFactory()], accepted_name=name)

    assert list(refused.value.pointers) == ["/accepted_name"]
    assert_nothing_written()


def test_only_an_owner_buys_in_a_partys_name(carol, mallory):
    editor = UserFactory()
    Membership.objects.create(party=carol, user=editor, role=Membership.Role.EDITOR)

    for user in (editor, mallory.user):
        with pytest.raises(NotAllowed):
            place(carol, [OfferFactory()], user=user)

    assert_nothing_written()


def test_exactly_one_actor_places_an_order(carol, alice):
    offer = OfferFactory()
    key, _ = create_api_key(party=alice, user=alice.user, name="k", scopes=["buy"])

    for actor in ({"user": None}, {"api_key": key}, {"user": None, "api_key": key}):  # the last acts for alice
        with pytest.raises(ValueError, match=r"party|placed by"):
            place(carol, [offer], **actor)

    assert_nothing_written()


def test_a_keys_spending_limit_holds_over_its_life(carol):
    key, _ = create_api_key(party=carol, user=carol.user, name="k", scopes=["buy"], spending_limit_micros=250_000_000)
    offers = [OfferFactory() for _ in range(3)]
    acting = {"user": None, "api_key": key}

    first = place(carol, offers[:1], key="1", **acting)
    place(carol, offers[1:2], key="2", **acting)
    with pytest.raises(SpendingLimitReached) as refused:
        place(carol, offers[2:], key="3", **acting)

    assert "has spent 200.00 USD" in refused.value.message
    assert (first.api_key, first.placed_by, Order.objects.count()) == (key, None, 2)

    Order.objects.filter(pk=first.pk).update(status=Order.Status.CANCELLED)
    assert place(carol, offers[2:], key="3", **acting).total == USD_100


def test_mark_paid_grants_a_license_per_line_once(carol):
    offers = [OfferFactory(term_days=30, disclosure_due_days=10), OfferFactory()]
    order = place(carol, offers)
    before = clock.now()

    first = mark_paid(order=order, paid_at=before)
    again = mark_paid(order=order, paid_at=before + timedelta(days=1))  # as a redelivered webhook would

    assert first == again == list(License.objects.order_by("order_line"))
    assert [(one.licensee, one.version, one.offer) for one in first] == [
        (carol, offer.version, offer) for offer in offers
    ]
    assert first[0].expires_at - first[0].granted_at == timedelta(days=30)
    assert first[0].disclosure_due_at - first[0].granted_at == timedelta(days=10)
    assert first[0].policy_sha256 == offers[0].policy_sha256
    assert first[0].is_live(clock.now()) and not first[0].is_live(clock.now() + timedelta(days=31))
    assert (order.status, order.paid_at) == ("paid", before)
    assert AuditEvent.objects.filter(action="order.paid").count() == 1


def test_licenses_run_on_business_time(carol):
    clock.advance(timedelta(days=100))

    (license,) = mark_paid(order=place(carol, [OfferFactory(term_days=30)]), paid_at=clock.now())

    assert license.is_live(clock.now())
    clock.advance(timedelta(days=30))
    assert not license.is_live(clock.now())


def test_a_cancelled_order_is_not_paid(carol):
    order = place(carol, [OfferFactory()])
    Order.objects.filter(pk=order.pk).update(status=Order.Status.CANCELLED)

    with pytest.raises(OrderNotPayable):
        mark_paid(order=order, paid_at=clock.now())

    assert not License.objects.exists()


def at_once(n, work):
    """Run `work(i)` in n threads with a connection each, let go together; what they return or raise."""
    barrier, outcomes = Barrier(n), [None] * n

    def run(index):
        try:
            barrier.wait()
            outcomes[index] = work(index)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcomes[index] = error
        finally:
            connection.close()

    threads = [Thread(target=run, args=[index]) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_two_orders_at_once_with_one_key_are_one(committed_db):
    buyer, offer = PartyFactory(), OfferFactory()

    orders = at_once(4, lambda _: place(buyer, [offer]).pk)

    assert len(set(orders)) == 1 and isinstance(orders[0], int)
    assert (Order.objects.filter(buyer=buyer).count(), OrderLine.objects.filter(order__buyer=buyer).count()) == (1, 1)


def test_two_orders_at_once_cannot_both_take_what_is_left_of_the_limit(committed_db):
    buyer, offer = PartyFactory(), OfferFactory()
    key, _ = create_api_key(party=buyer, user=buyer.user, name="k", scopes=["buy"], spending_limit_micros=150_000_000)

    outcomes = at_once(3, lambda n: place(buyer, [offer], key=f"k{n}", user=None, api_key=key))

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Order", *["SpendingLimitReached"] * 2]


def test_two_payments_at_once_grant_one_license(committed_db):
    order = OrderFactory()

    granted = at_once(
        3, lambda _: [one.pk for one in mark_paid(order=Order.objects.get(pk=order.pk), paid_at=clock.now())]
    )

    assert granted[0] == granted[1] == granted[2]
    assert License.objects.filter(order_line__order=order).count() == 1


def test_mark_paid_is_part_of_its_callers_transaction(carol):
    order = place(carol, [OfferFactory()])

    with pytest.raises(RuntimeError), transaction.atomic():
        mark_paid(order=order, paid_at=clock.now())
        raise RuntimeError("what books the money failed")

    assert not License.objects.exists()
    assert Order.objects.get().status == Order.Status.PLACED
