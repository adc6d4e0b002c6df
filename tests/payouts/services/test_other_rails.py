from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import AuditEvent, User
from payouts import ledger
from payouts.errors import AlreadyDecided, FourEyes, NothingOwed
from payouts.models import JournalEntry, RailExport, RailPayout, ServedCountries
from payouts.selectors import earnings_of
from payouts.services.manual_entries import approve, propose
from payouts.services.other_rails import (
    approve_export,
    ask_served_countries,
    confirm_returned,
    confirm_sent,
    export_rows,
    is_served,
    propose_export,
    reject_export,
)
from payouts.services.proofs import check_books
from payouts.services.transfers import due_micros
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory, UserFactory
from tests.factories.payouts import sell

DOLLAR = 1_000_000


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def ben(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def unserved(alice: Any, bob: Any, carol: Any) -> Any:
    """Alice is where Stripe does not pay, bob where it does; 30 USD is due to each."""
    ServedCountries.objects.create(platform_country="US", countries=["DE", "US"])
    type(alice).objects.filter(pk=alice.pk).update(country="CU", name="=cmd|alice")
    for party in (alice, bob):
        version = PublishedVersionFactory(contributions={party: 1})
        sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    clock.advance(timedelta(days=40))
    alice.refresh_from_db()
    return alice


def funded(ann: User, ben: User, dollars: int) -> None:
    """Own revenue withdrawn from Stripe to the bank."""
    legs = {"bank:USD": dollars * DOLLAR, "cash:available:USD": -dollars * DOLLAR}
    manual = propose(
        user=ann, key=f"fund {dollars}", legs=legs, reason="Withdrawn", balance_transaction_id=f"txn_fund_{dollars}"
    )
    approve(manual=manual, user=ben)


def test_who_is_not_reached_accrues_and_is_paid_over_another_rail(unserved: Any, ann: User, ben: User) -> None:
    (is_alice, is_bob) = is_served("CU"), is_served("DE")
    export = propose_export(user=ann, currency="USD", key="e1")
    assert propose_export(user=ann, currency="USD", key="e1") == export
    assert (is_alice, is_bob) == (False, True)
    assert [(one.party, one.amount_micros) for one in export.payouts.all()] == [(unserved, 30 * DOLLAR)]
    assert ledger.balances(prefix="in_transit_rail") == {}
    funded(ann, ben, 30)

    approve_export(export=export, user=ben)
    rows = list(export_rows(export))
    payout = export.payouts.get()
    for _ in range(2):
        confirm_sent(payout=payout, user=ann, reference="SWIFT 1")

    assert ledger.balances(prefix="in_transit_rail") == ledger.balances(prefix="bank") == {}
    assert ledger.balance(f"payable:{unserved.pk}:USD") == 0
    assert due_micros(party_id=unserved.pk, currency="USD", until=clock.now()) == 0
    (earned,) = earnings_of(unserved)
    assert (earned.paid.micros, earned.due.micros) == (30 * DOLLAR, 0)
    assert "'=cmd|alice" in rows[1] and "30.00" in rows[1] and len(rows) == 2
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []
    assert set(AuditEvent.objects.filter(action__startswith="rail").values_list("action", flat=True)) == {
        "rail_export.proposed",
        "rail_export.approved",
        "rail_payout.sent",
    }


def test_what_came_back_is_owed_again(unserved: Any, ann: User, ben: User) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    payout = export.payouts.get()
    confirm_sent(payout=payout, user=ann, reference="SWIFT 1")
    for _ in range(2):
        confirm_returned(payout=payout, user=ann, reference="SWIFT 2")

    assert ledger.balance(f"payable:{unserved.pk}:USD") == -30 * DOLLAR
    assert ledger.balances(prefix="bank") == {"bank:USD": 30 * DOLLAR}
    assert due_micros(party_id=unserved.pk, currency="USD", until=clock.now()) == 30 * DOLLAR
    with pytest.raises(InvalidInput, match="is returned"):
        confirm_sent(payout=payout, user=ann, reference="again")
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []
    with connection.cursor() as cursor:  # somebody with the owner's rights marks it as still out
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_railpayout DISABLE TRIGGER USER")
        cursor.execute("UPDATE payouts_railpayout SET status = 'intended'")
    assert {"rail_stage_differs", "in_transit_differs"} <= {one.code for one in check_books().findings}


def test_it_takes_two_people_and_money_in_the_bank(unserved: Any, ann: User, ben: User, alice: Any) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")

    for user in (ann, alice.user):
        with pytest.raises(FourEyes):
            approve_export(export=export, user=user)
    with pytest.raises(NothingOwed, match=r"30\.00 USD too little"):
        approve_export(export=export, user=ben)

    assert RailExport.objects.get().status == "awaiting" and RailPayout.objects.get().status == "proposed"
    assert not JournalEntry.objects.filter(kind="rail_intent").exists()


def test_nothing_is_proposed_twice_and_a_rejected_export_frees_it(unserved: Any, ann: User, ben: User) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    with pytest.raises(NothingOwed):
        propose_export(user=ben, currency="USD", key="e2")
    reject_export(export=export, user=ben)
    with pytest.raises(AlreadyDecided):
        approve_export(export=export, user=ben)

    assert propose_export(user=ben, currency="USD", key="e3").payouts.count() == 1


def test_the_database_refuses_shortcuts(unserved: Any, ann: User, alice: Any) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    tries: list[Any] = [
        lambda: RailPayout.objects.update(status="intended"),
        lambda: RailPayout.objects.update(amount_micros=31 * DOLLAR),
        lambda: RailPayout.objects.update(status="sent", reference="x", confirmed_by=ann),
        lambda: RailExport.objects.update(status="approved", decided_by=ann, decided_at=clock.now()),
        lambda: RailExport.objects.update(status="approved", decided_by=alice.user, decided_at=clock.now()),
        lambda: RailExport.objects.create(
            key="x",
            currency="USD",
            status="approved",
            proposed_by=ann,
            proposed_at=clock.now(),
            decided_by=alice.user,
            decided_at=clock.now(),
        ),
    ]
    for attempt in tries:
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()
    assert export.payouts.get().status == "proposed"


def test_where_stripe_pays_is_asked_of_stripe_and_kept_when_it_changes(db: Any, stripe: Any) -> None:
    assert is_served("DE") is None
    assert ask_served_countries() == ask_served_countries()
    assert (is_served("DE"), is_served("CU"), is_served("")) == (True, False, None)
