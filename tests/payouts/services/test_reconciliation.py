from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.utils import timezone

from payouts import gateway, ledger
from payouts.models import JournalEntry, Payment, Payout, PayoutRun, StripeEvent
from payouts.services.events import book_checkout
from payouts.services.proofs import check_books
from payouts.services.reconciliation import reconcile, settle_funds
from payouts.services.sales import start_checkout
from tests.factories.marketplace import OfferFactory, OrderFactory
from tests.factories.payouts import sell

BACK = {"success_url": "http://shop.test/done", "cancel_url": "http://shop.test/order"}


def buy(stripe: Any, **offer: Any) -> Payment:
    order = OrderFactory(offers=[OfferFactory(**offer)])
    stripe.pay(start_checkout(order=order, **BACK))
    payment = book_checkout(order.payment.checkout_id)
    assert payment is not None
    return payment


def agrees() -> bool:
    """Pending and available, by the ledger and by Stripe, to the micro."""
    held = gateway.balance()
    ours = ledger.balances(prefix="cash")
    theirs = {
        f"cash:{side}:{currency}": minor * (1_000_000 if currency == "JPY" else 10_000)
        for currency, sides in held.items()
        for side, minor in zip(("pending", "available"), sides, strict=True)
        if minor
    }
    return ours == theirs


def test_the_ledgers_cash_is_stripes_balance_at_every_quiet_moment(db: Any, stripe: Any) -> None:
    buy(stripe)
    assert agrees()
    stripe.advance(days=1)
    buy(stripe, price_micros=7_010_000)
    buy(stripe, price_micros=11_330_000, currency="EUR")
    buy(stripe, price_micros=900_000_000, currency="JPY")
    assert settle_funds() == 0
    assert agrees()
    stripe.advance(days=1.1)
    assert not agrees()  # Stripe's clock is ahead until the next look
    assert settle_funds() == 1
    assert agrees()
    stripe.advance(days=1)
    assert settle_funds() == 3
    assert settle_funds() == 0

    assert agrees()
    assert reconcile().differences == []
    assert reconcile().n_transactions == 4
    assert check_books().findings == []


def test_reconcile_names_what_only_stripe_has(db: Any, stripe: Any) -> None:
    order = OrderFactory()
    stripe.pay(start_checkout(order=order, **BACK))  # and its webhook never came

    found = reconcile()

    assert [difference.code for difference in found.differences] == ["cash_differs", "charge_not_booked"]
    assert not found.agrees


def test_reconcile_names_what_only_we_have(db: Any, stripe: Any) -> None:
    payment = sell(OrderFactory())

    differences = reconcile().differences

    assert [difference.code for difference in differences] == ["cash_differs", "charge_not_at_stripe"]
    assert str(payment.balance_transaction_id) in differences[1].detail


def test_reconcile_names_a_fee_that_we_booked_wrongly(db: Any, stripe: Any) -> None:
    payment = buy(stripe)
    with connection.cursor() as cursor:  # as a hand at the database would, which the rules refuse
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE; ALTER TABLE payouts_payment DISABLE TRIGGER keep_payment")
    Payment.objects.filter(pk=payment.pk).update(fee_micros=1)

    assert [difference.code for difference in reconcile().differences] == ["charge_differs"]


def test_reconcile_names_old_intents_and_events_that_failed(db: Any, stripe: Any, alice: Any) -> None:
    run = PayoutRun.objects.create(currency="USD", due_until=timezone.now(), key="old")
    for minutes in (14, 16):
        Payout.objects.create(
            run=run,
            party=alice if minutes == 14 else OrderFactory().buyer,
            destination="acct_1",
            amount_micros=10_000,
            currency="USD",
            intended_at=timezone.now(),
            created_at=timezone.now() - timedelta(minutes=minutes),
        )
    StripeEvent.objects.create(
        event_id="evt_1", endpoint="platform", type="x", payload="{}", status="failed", error_message="paid twice"
    )

    differences = reconcile().differences

    assert [difference.code for difference in differences] == ["in_transit_too_long", "event_not_applied"]
    assert "for 16 minutes" in differences[0].detail


def test_the_command_prints_and_exits_1_on_a_difference(db: Any, stripe: Any) -> None:
    buy(stripe)
    out = StringIO()
    call_command("reconcile", stdout=out)
    assert "1 transactions compared, 0 differences" in out.getvalue()

    ledger.post(
        key="planted", kind=JournalEntry.Kind.SALE, postings={"cash:pending:USD": 1, "revenue:platform_fee:USD": -1}
    )
    with pytest.raises(SystemExit) as ended:
        call_command("reconcile", stdout=out)

    assert ended.value.code == 1
    assert "DIFFERENCE cash_differs" in out.getvalue()
