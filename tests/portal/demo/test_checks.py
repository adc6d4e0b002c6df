from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from marketplace import clock
from marketplace.models import Party
from marketplace.money import Money
from payouts import chart, ledger
from payouts.models import DivisionLine
from portal.demo import checks
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import pay_out, sell


@pytest.fixture
def pay(alice: Any, bob: Any, carol: Any) -> Callable[..., None]:
    """Alice is due 22.50 USD and bob 7.50; `pay(alice, 22_500_000)` is a payout that reached the bank."""
    version = PublishedVersionFactory(contributions={alice: 6, bob: 2})
    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    clock.advance(DivisionLine.objects.latest("due_at").due_at - clock.now() + timedelta(seconds=2))

    def pay(party: Party, micros: int) -> None:
        is_owed = -ledger.balance(chart.payable(party, "USD")) >= micros
        pay_out(party, Money(micros, "USD"), status="paid", is_owed=is_owed)

    return pay


def test_everyone_due_was_paid_once(pay: Any, alice: Any, bob: Any) -> None:
    pay(alice, 22_500_000)
    pay(bob, 7_500_000)

    check = checks._payouts()

    assert (check.holds, check.figures) == (True, "2 of 2 payees, 30.00 USD")


def test_who_is_due_and_was_not_paid_is_named(pay: Any, alice: Any) -> None:
    pay(alice, 22_500_000)

    check = checks._payouts()

    assert (check.holds, check.figures) == (False, "Bob: due 7.50 USD, in the bank 0.00 USD")


def test_who_was_paid_twice_or_too_little_is_named(pay: Any, alice: Any, bob: Any) -> None:
    for micros in (22_500_000, 22_500_000):
        pay(alice, micros)
    pay(bob, 7_490_000)

    check = checks._payouts()

    assert not check.holds
    assert "Alice: due 22.50 USD, in the bank 45.00 USD" in check.figures
    assert "Bob: due 7.50 USD, in the bank 7.49 USD" in check.figures
