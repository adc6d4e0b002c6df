import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.db import connection

from marketplace import clock
from marketplace.models import AuditEvent, Dataset, License, Order
from marketplace.money import Money
from marketplace.services.orders import OfferNotOpen, OrderNotPayable
from payouts import chart, gateway, ledger
from payouts.errors import AlreadyPaid, PaymentMismatch, StripeUnavailable
from payouts.models import Division, DivisionLine, JournalEntry, Payment, RoyaltyPool, StripeEvent
from payouts.services import sales
from payouts.services.events import book_checkout
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile
from payouts.tasks import apply_stripe_event
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory, PublishedVersionFactory
from tests.factories.payouts import paid_checkout, pay_out, sell

BACK = {"success_url": "http://shop.test/done", "cancel_url": "http://shop.test/order"}


def nothing_is_booked() -> bool:
    return (JournalEntry.objects.count(), RoyaltyPool.objects.count(), License.objects.count()) == (0, 0, 0)


def test_a_sale_books_every_part_of_the_price_in_its_place(db: Any, alice: Any, bob: Any, carol: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 6, bob: 2})
    order = OrderFactory(buyer=carol, offers=[OfferFactory(version=version)])  # 100 USD: 10 % fee, 30 upfront, 60 pool

    payment = sell(order)

    pool = RoyaltyPool.objects.get()
    assert ledger.balances() == {
        "cash:pending:USD": 96_800_000,
        "expense:stripe_fees:USD": 3_200_000,
        chart.payable(alice, "USD"): -22_500_000,
        chart.payable(bob, "USD"): -7_500_000,
        chart.royalty_pool(pool): -60_000_000,
        "revenue:platform_fee:USD": -10_000_000,
    }
    order.refresh_from_db()
    license = License.objects.get()
    assert (payment.status, order.status, order.paid_at) == ("paid", "paid", payment.paid_at)
    assert pool.deadline == license.disclosure_due_at + timedelta(days=30)
    assert check_books().findings == []


def test_an_order_of_two_datasets_has_a_pool_and_a_division_per_line(db: Any, carol: Any) -> None:
    offers = [
        OfferFactory(price_micros=50_000_000),
        OfferFactory(price_micros=31_410_000, upfront_bps=0, pool_bps=9_000),
    ]
    order = OrderFactory(buyer=carol, offers=offers)

    sell(order)

    assert list(RoyaltyPool.objects.order_by("pk").values_list("amount_micros", flat=True)) == [30_000_000, 28_269_000]
    assert [(d.source, d.amount_micros) for d in Division.objects.all()] == [("upfront", 15_000_000)]
    assert ledger.balance("revenue:platform_fee:USD") == -8_141_000
    assert check_books().findings == []


def test_the_labellers_share_is_a_pot_of_its_own_and_unlabelled_records_are_their_holders(
    db: Any, alice: Any, bob: Any, carol: Any
) -> None:
    dan = PartyFactory()
    version = PublishedVersionFactory(contributions={alice: 6, bob: 2}, labellers={dan: 4})
    offer = OfferFactory(version=version, labellers_bps=2_000)

    sell(OrderFactory(buyer=carol, offers=[offer]))

    lines = {(line.party_id, line.role): line.amount_micros for line in DivisionLine.objects.all()}
    assert lines == {  # of 30 USD: 24 to holders 6:2; 6 to labellers: dan 4, alice's own 2, bob's own 2
        (alice.pk, "rights_holder"): 18_000_000,
        (bob.pk, "rights_holder"): 6_000_000,
        (dan.pk, "labeller"): 3_000_000,
        (alice.pk, "labeller"): 1_500_000,
        (bob.pk, "labeller"): 1_500_000,
    }
    assert check_books().findings == []


def test_without_labellers_the_rights_holders_have_it_all(db: Any, alice: Any, bob: Any, carol: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 1, bob: 2})

    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version, labellers_bps=4_000)]))

    lines = {(line.party_id, line.role): line.amount_micros for line in DivisionLine.objects.all()}
    assert lines == {(alice.pk, "rights_holder"): 10_000_000, (bob.pk, "rights_holder"): 20_000_000}


def test_copies_are_paid_to_the_first_registrant_and_held_for_thirty_days(
    db: Any, alice: Any, bob: Any, carol: Any, settings: Any
) -> None:
    first = PublishedVersionFactory(contributions={alice: 3}, content=[[1.0], [2.0], [3.0]])
    again = PublishedVersionFactory(
        contributions={bob: 3}, content=[[1.0], [2.0], [9.0]], copies={0: (first, 0), 1: (first, 1)}
    )

    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=again)]))

    lines = {line.party_id: (line.n_records, line.amount_micros) for line in DivisionLine.objects.all()}
    assert lines == {alice.pk: (2, 20_000_000), bob.pk: (1, 10_000_000)}
    division = Division.objects.get()
    assert {line.due_at - division.divided_at for line in division.lines.all()} == {timedelta(days=30)}


def test_money_falls_due_after_the_hold_of_buyer_and_payee_and_not_before_the_funds_are_there(
    db: Any, alice: Any, carol: Any
) -> None:
    version = PublishedVersionFactory(contributions={alice: 8})
    late = clock.now() + timedelta(days=45)
    first = sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    second = sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]), available_on=late)

    dues = [division.due_at for division in Division.objects.order_by("pk")]
    assert dues[0] == Division.objects.order_by("pk")[0].divided_at + timedelta(days=30)
    assert dues[1] == late
    assert first.settled_at is None and second.settled_at is None


def test_known_buyers_and_known_payees_wait_seven_days(db: Any, alice: Any, bob: Any, carol: Any) -> None:
    version = PublishedVersionFactory(contributions={alice: 4, bob: 4})
    earlier = sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    Payment.objects.filter(pk=earlier.pk).update(settled_at=clock.now())
    pay_out(alice, Money(10_000, "USD"), status="paid")
    clock.advance(timedelta(days=31))

    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))

    division = Division.objects.latest("pk")
    waits = {line.party_id: (line.due_at - division.divided_at).days for line in division.lines.all()}
    assert waits == {alice.pk: 7, bob.pk: 30}


@pytest.mark.parametrize(
    ("days_before", "price", "refunded", "hold"),
    [(31, 100, 0, 7), (29, 100, 0, 30), (31, 99, 0, 30), (31, 100, 1, 30)],
    ids=["as much, long ago", "lately", "less", "given back"],
)
def test_a_buyer_is_known_for_as_much_as_has_stood_for_a_month(
    db: Any, alice: Any, carol: Any, days_before: int, price: int, refunded: int, hold: int
) -> None:
    """A small purchase of lately does not make the same person's next card a known one."""
    from marketplace.models import User
    from payouts.models import Refund
    from payouts.services import refunds

    version = PublishedVersionFactory(contributions={alice: 4})
    earlier = sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version, price_micros=price * 1_000_000)]))
    Payment.objects.filter(pk=earlier.pk).update(settled_at=clock.now())
    if refunded:
        refunds.request_refund(
            payment=earlier, amount=Money(refunded * 1_000_000, "USD"), reason=Refund.Reason.GOODWILL, note="as agreed",
            user=User.objects.create_user("staff@example.org", "correct horse battery", is_staff=True), key="r",
        )  # fmt: skip
    clock.advance(timedelta(days=days_before))

    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version, price_micros=100_000_000)]))

    division = Division.objects.latest("pk")
    assert (division.due_at - division.divided_at).days == hold


def test_booking_again_changes_nothing(db: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    payment = Payment.objects.create(order=order, currency="USD", amount_micros=order.total_micros)
    checkout = paid_checkout(payment)

    sales.book_payment(payment=payment, checkout=checkout)
    before = ledger.balances()
    sales.book_payment(payment=payment, checkout=checkout)

    assert ledger.balances() == before
    assert (License.objects.count(), RoyaltyPool.objects.count(), Division.objects.count()) == (1, 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount_total_minor": 9_999},
        {"currency": "EUR"},
        {"public_reference": "some other order"},
        {"payment_status": "unpaid"},
        {"booked_currency": "EUR"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_money_that_was_not_asked_for_is_flagged_and_not_booked(db: Any, carol: Any, wrong: dict[str, Any]) -> None:
    order = OrderFactory(buyer=carol)

    with pytest.raises(PaymentMismatch):
        sell(order, **wrong)

    order.refresh_from_db()
    assert nothing_is_booked()
    assert order.status == Order.Status.PLACED


def test_a_second_charge_for_one_order_is_flagged(db: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    sell(order)
    before = ledger.balances()

    with pytest.raises(PaymentMismatch, match="paid twice"):
        sell(order, charge="ch_another")

    assert ledger.balances() == before


def test_money_for_a_cancelled_order_is_not_booked(db: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol, status=Order.Status.CANCELLED)

    with pytest.raises(OrderNotPayable):
        sell(order)

    assert nothing_is_booked()
    assert Payment.objects.get().status == Payment.Status.OPEN


def test_money_for_a_cancelled_order_is_named_until_a_person_has_looked(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    stripe.pay(sales.start_checkout(order=order, **BACK))
    Order.objects.update(status=Order.Status.CANCELLED)  # which no service does to an order with a page that is paid
    (event,) = stripe.events("checkout.session.completed")
    row = StripeEvent.objects.create(
        event_id=event["id"], type=event["type"], endpoint="platform", payload=json.dumps(event)
    )

    apply_stripe_event(row.pk)

    assert nothing_is_booked()
    found = {difference.code: difference.detail for difference in reconcile().differences}
    assert {"event_not_applied", "charge_not_booked", "cash_differs"} <= set(found)
    assert "its payment has to be returned" in found["event_not_applied"]


def test_a_thousand_payees_and_more_are_batches_of_entries(db: Any, carol: Any, alice: Any) -> None:
    from marketplace.models import Party

    parties = Party.objects.bulk_create(Party(name=f"P{n}") for n in range(1_200))
    version = PublishedVersionFactory(
        contributions=dict.fromkeys(parties, 1), content=[[float(n)] for n in range(1_200)]
    )

    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))

    entries = JournalEntry.objects.filter(kind=JournalEntry.Kind.UPFRONT).order_by("pk")
    assert [entry.n_legs for entry in entries] == [1_000, 202]
    assert sum(ledger.balances(prefix="payable").values()) == -30_000_000
    assert ledger.balances(prefix="clearing") == {}


def test_two_deliveries_at_once_book_one_sale(committed_db: str) -> None:
    order = OrderFactory()
    payment = Payment.objects.create(order=order, currency="USD", amount_micros=order.total_micros)
    checkout = paid_checkout(payment)
    start = threading.Barrier(4)

    def deliver() -> None:
        try:
            start.wait(timeout=10)
            sales.book_payment(payment=payment, checkout=checkout)
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(deliver) for _ in range(4)]:
            future.result(timeout=30)

    assert JournalEntry.objects.filter(kind=JournalEntry.Kind.SALE).count() == 1
    assert (License.objects.count(), RoyaltyPool.objects.count()) == (1, 1)
    assert check_books().findings == []


# --- at the local Stripe ----------------------------------------------------------------------------------------------


def test_checkout_gives_one_page_and_only_stripes_word_marks_the_order_paid(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol, offers=[OfferFactory(), OfferFactory(price_micros=7_770_000)])

    url = sales.start_checkout(order=order, **BACK)
    assert sales.start_checkout(order=order, **BACK) == url
    payment = Payment.objects.get()
    assert payment.amount == Money(107_770_000, "USD")
    assert book_checkout(payment.checkout_id) is None  # not paid yet
    stripe.pay(url)
    with pytest.raises(AlreadyPaid, match="within a minute"):
        sales.start_checkout(order=order, **BACK)
    order.refresh_from_db()
    assert order.status == Order.Status.PLACED

    book_checkout(payment.checkout_id)

    order.refresh_from_db()
    assert order.status == Order.Status.PAID
    assert gateway.balance() == {"USD": (10_434, 0)}  # 107.77 less 3.43
    assert ledger.balance("cash:pending:USD") == 104_340_000
    with pytest.raises(AlreadyPaid):
        sales.start_checkout(order=order, **BACK)


def test_an_expired_page_is_replaced_by_a_new_one(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    old = sales.start_checkout(order=order, **BACK)
    stripe.advance(days=1.1)

    new = sales.start_checkout(order=order, **BACK)

    payment = Payment.objects.get()
    assert new != old
    assert payment.checkout_attempt == 2
    stripe.pay(new)
    book_checkout(payment.checkout_id)
    assert check_books().findings == []


def test_a_500_does_not_lock_the_buyer_out_for_a_day(db: Any, door: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    door.refuse_with = 500
    for _ in range(2):
        with pytest.raises(StripeUnavailable, match="Nothing was charged"):
            sales.start_checkout(order=order, **BACK)
    door.refuse_with = None

    url = sales.start_checkout(order=order, **BACK)

    payment = Payment.objects.get()
    assert door.keys == [f"checkout:{payment.pk}:{attempt}" for attempt in (1, 2, 3)]
    assert sales.start_checkout(order=order, **BACK) == url
    assert len(stripe.objects("checkout/sessions")) == 1


def test_a_429_is_asked_again_under_the_same_key(db: Any, door: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    door.refuse_with = 429
    with pytest.raises(StripeUnavailable):
        sales.start_checkout(order=order, **BACK)
    door.refuse_with = None

    sales.start_checkout(order=order, **BACK)

    assert len(set(door.keys)) == 1


def test_a_buyer_does_not_read_that_our_key_is_wrong(db: Any, door: Any, carol: Any) -> None:
    door.refuse_with = 401

    with pytest.raises(StripeUnavailable) as refused:
        sales.start_checkout(order=OrderFactory(buyer=carol), **BACK)

    assert "sk_test" not in refused.value.message


# --- deadlines


def test_an_order_is_payable_until_its_deadline(db: Any, stripe: Any, carol: Any) -> None:
    order = OrderFactory(buyer=carol)
    clock.advance(timedelta(hours=24))

    with pytest.raises(OrderNotPayable, match="place a new one"):
        sales.start_checkout(order=order, **BACK)

    assert stripe.objects("checkout/sessions") == [] and not Payment.objects.exists()


def test_an_order_of_what_is_no_longer_offered_cannot_be_paid(db: Any, stripe: Any, carol: Any) -> None:
    replaced, withdrawn = (OrderFactory(buyer=carol) for _ in range(2))
    OfferFactory(version=replaced.lines.get().version, price_micros=120_000_000)
    Dataset.objects.filter(pk=withdrawn.lines.get().version.dataset_id).update(status=Dataset.Status.WITHDRAWN)

    for order in (replaced, withdrawn):
        with pytest.raises(OfferNotOpen):
            sales.start_checkout(order=order, **BACK)

    assert stripe.objects("checkout/sessions") == [] and not Payment.objects.exists()


def test_what_was_not_paid_in_time_is_cancelled_and_its_page_closed(db: Any, stripe: Any, carol: Any) -> None:
    opened, untouched, paid, late_webhook = (OrderFactory(buyer=carol) for _ in range(4))
    url = sales.start_checkout(order=opened, **BACK)
    sell(paid)
    stripe.pay(sales.start_checkout(order=late_webhook, **BACK))
    clock.advance(timedelta(hours=24))
    fresh = OrderFactory(buyer=carol)

    assert sales.cancel_expired_orders() == 2
    assert sales.cancel_expired_orders() == 0

    states = {order: Order.objects.get(pk=order.pk).status for order in (opened, untouched, paid, late_webhook, fresh)}
    assert states == {
        opened: "cancelled", untouched: "cancelled", paid: "paid", late_webhook: "placed", fresh: "placed"
    }  # fmt: skip
    assert httpx.get(url).status_code == 410
    assert AuditEvent.objects.filter(action="order.cancelled").count() == 2
    book_checkout(Payment.objects.get(order=late_webhook).checkout_id)
    assert Order.objects.get(pk=late_webhook.pk).status == Order.Status.PAID


def test_an_order_stays_until_stripe_has_said_that_its_page_is_closed(
    db: Any, door: Any, stripe: Any, carol: Any
) -> None:
    order = OrderFactory(buyer=carol)
    sales.start_checkout(order=order, **BACK)
    clock.advance(timedelta(hours=24))
    door.refuse_with = 500

    assert sales.cancel_expired_orders() == 0
    assert Order.objects.get().status == Order.Status.PLACED
