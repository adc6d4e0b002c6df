"""A list asks the database as often for three rows as for one."""

from django.db import connection
from django.test.utils import CaptureQueriesContext

from payouts.models import Payment, Refund
from payouts.services.manual_entries import propose
from payouts.services.refunds import request_refund
from payouts.services.royalties import release_pool
from tests.desk import Desk
from tests.factories.payouts import PoolFactory


def make_one(ann: Desk, number: int) -> None:
    """A row of each kind: a sale, its released pool, a refund of it, a manual entry, an act in the log."""
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
    ann.act("reconciliations/", None, 201, code="")
    ann.act("payout-runs/", {"currency": "USD"}, 201)


PATHS = [
    "accounts/",
    "audit/",
    "debts/",
    "divisions/",
    "invoices/",
    "manual-entries/",
    "payables/",
    "payments/",
    "payout-runs/",
    "pools/",
    "reconciliations/",
    "refunds/",
]


def test_lists_ask_as_often_for_three_rows_as_for_one(ann: Desk) -> None:
    def asked() -> dict[str, tuple[int, int]]:
        found = {}
        for path in PATHS:
            with CaptureQueriesContext(connection) as queries:
                rows = ann.get(path)["results"]
            found[path] = (len(queries), len(rows))
        return found

    make_one(ann, 1)
    one = asked()
    for number in (2, 3):
        make_one(ann, number)
    three = asked()

    assert Refund.objects.count() == 3
    assert {path: n for path, (n, _) in one.items()} == {path: n for path, (n, _) in three.items()}
    assert all(three[path][1] > one[path][1] for path in PATHS if path != "debts/"), three
