"""A list asks the database as often for three rows as for one."""

from django.db import connection
from django.test.utils import CaptureQueriesContext

from marketplace import clock
from marketplace.money import Money
from payouts.models import Payment, Refund, StripeEvent
from payouts.services import billing, outgoing, receipts, sales, unapplied
from payouts.services.manual_entries import propose
from payouts.services.refunds import request_refund
from payouts.services.royalties import release_pool
from tests.desk import Desk
from tests.factories.marketplace import OfferFactory, OrderFactory, PartyFactory
from tests.factories.payouts import PoolFactory

DOLLAR = 1_000_000


def at_the_bank(ann: Desk, ben: Desk, number: int) -> None:
    """Money that fits no invoice, of which a part pays one, a part went back, and a part is left."""
    buyer = PartyFactory()
    address = {"legal_name": "Carol GmbH", "address": "1 Road\n10115 Berlin", "country": "DE"}
    billing.set_billing_profile(party=buyer, user=buyer.user, **address)
    order = OrderFactory(buyer=buyer, offers=[OfferFactory(price_micros=100 * DOLLAR)])
    invoice = sales.invoice_order(order=order)
    told = {"payer": "CAROL", "amount": Money(150 * DOLLAR, "USD"), "received_on": clock.today()}
    receipt = unapplied.record_unapplied(by=ann.user, reference=f"IN {number}", **told)
    receipts.decide_receipt(receipt=receipt, approved=True, by=ben.user)
    unapplied.propose_application(payment=invoice.payment, money=[receipt], by=ann.user)
    back = outgoing.record_money_returned(
        receipt=receipt,
        amount=Money(10 * DOLLAR, "USD"),
        reference=f"OUT {number}",
        sent_on=clock.today(),
        by=ann.user,
    )
    outgoing.decide_transfer(transfer=back, approved=True, by=ben.user)


def make_one(ann: Desk, ben: Desk, number: int) -> None:
    """A row of each kind: a sale, its released pool, a refund of it, money at the bank, a manual entry, an act in the log."""
    pool = PoolFactory()
    release_pool(pool=pool, result=None)
    PoolFactory()
    payment = Payment.objects.latest("pk")
    request_refund(
        payment=payment,
        amount=payment.amount.share(1_000),
        reason=Refund.Reason.GOODWILL,
        note="n",
        user=ann.user,
        key="k",
    )
    propose(
        user=ann.user,
        key=f"entry {number}",
        legs={"expense:other:USD": 1_000_000, "equity:owners:USD": -1_000_000},
        reason="Paper",
    )
    at_the_bank(ann, ben, number)
    event = StripeEvent.objects.create(
        event_id=f"evt_{number}",
        endpoint="platform",
        type="charge.updated",
        status="failed",
        payload='{"data": {"object": {"id": "ch_1"}}}',
    )
    ann.act(f"stripe-events/{event.pk}/settlements/", {"act": "explained", "reason": "r"}, 201, code="")
    ann.act("proofs/", None, 201, code="")
    ann.act("reconciliations/", None, 201, code="")
    ann.act("payout-runs/", {"currency": "USD"}, 201)


PATHS = [
    "accounts/",
    "applications/",
    "audit/",
    "debts/",
    "divisions/",
    "invoices/",
    "manual-entries/",
    "outgoing-transfers/",
    "payables/",
    "payments/",
    "payout-runs/",
    "pools/",
    "proofs/",
    "receipts/",
    "reconciliations/",
    "refunds/",
    "stripe-events/",
    "unapplied/",
]


def test_lists_ask_as_often_for_three_rows_as_for_one(ann: Desk, ben: Desk) -> None:
    def asked() -> dict[str, tuple[int, int]]:
        found = {}
        for path in PATHS:
            with CaptureQueriesContext(connection) as queries:
                rows = ann.get(path)["results"]
            found[path] = (len(queries), len(rows))
        return found

    make_one(ann, ben, 1)
    one = asked()
    for number in (2, 3):
        make_one(ann, ben, number)
    three = asked()

    assert Refund.objects.count() == 3
    assert {path: n for path, (n, _) in one.items()} == {path: n for path, (n, _) in three.items()}
    assert all(three[path][1] > one[path][1] for path in PATHS if path != "debts/"), three
