import csv
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext

from marketplace import clock
from marketplace.api.keys import create_api_key
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import ApiKey, AuditEvent, User
from marketplace.money import Money
from payouts import ledger
from payouts.errors import AlreadyDecided, BankDetailsInUse, FourEyes, NothingOwed, TransferNotPossible
from payouts.models import (
    BankDetailsErasure,
    JournalEntry,
    OutgoingTransfer,
    PayoutRun,
    RailConfirmation,
    RailExport,
    RailPayout,
    ServedCountries,
)
from payouts.selectors import earnings_of, open_months_of, paid_out_of
from payouts.services import outgoing
from payouts.services.bank_details import erase_details, set_details
from payouts.services.manual_entries import approve, propose
from payouts.services.other_rails import (
    approve_export,
    decide_confirmation,
    export_file,
    propose_export,
    record_returned,
    record_sent,
    reject_export,
    waiting_for_details,
)
from payouts.services.plans import set_minimum
from payouts.services.proofs import check_books
from payouts.services.reach import ask_served_countries, is_served
from payouts.services.receipts import decide_receipt
from payouts.services.transfers import due_micros
from payouts.services.unapplied import record_unapplied
from payouts.standing import standings_of
from tests.factories.marketplace import (
    OfferFactory,
    OrderFactory,
    PartyFactory,
    PublishedVersionFactory,
    UserFactory,
)
from tests.factories.payouts import pay_out, sell

DOLLAR = 1_000_000


@pytest.fixture
def ann(db: Any) -> User:
    return UserFactory(is_staff=True)


@pytest.fixture
def ben(db: Any) -> User:
    return UserFactory(is_staff=True)


IBAN = "DE89 3704 0044 0532 0130 00"
ACCOUNT = {"account_holder": "Alice Example", "account": IBAN, "address": "1 Calle\nLa Habana\nCuba"}


@pytest.fixture
def unserved(poor: Any) -> Any:
    """Alice is where Stripe does not pay, bob where it does; 30 USD is due to each, and alice has said where to."""
    set_details(party=poor, user=poor.user, **ACCOUNT)
    clock.advance(timedelta(hours=72))
    return poor


@pytest.fixture
def poor(alice: Any, bob: Any, carol: Any) -> Any:
    """As `unserved`, but nobody has said where to."""
    ServedCountries.objects.create(platform_country="US", countries=["DE", "US"])
    type(alice).objects.filter(pk=alice.pk).update(country="CU", name="=cmd|alice")
    for party in (alice, bob):
        version = PublishedVersionFactory(contributions={party: 1})
        sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    clock.advance(timedelta(days=40))
    user = alice.user
    alice = type(alice).objects.get(pk=alice.pk)
    alice.user = user
    return alice


def funded(ann: User, ben: User, dollars: int) -> None:
    """Own revenue withdrawn from Stripe to the bank."""
    legs = {"bank:USD": dollars * DOLLAR, "cash:available:USD": -dollars * DOLLAR}
    manual = propose(
        user=ann, key=f"fund {dollars}", legs=legs, reason="Withdrawn", balance_transaction_id=f"txn_fund_{dollars}"
    )
    approve(manual=manual, user=ben)


def confirmed(record: Any, payout: RailPayout, ann: User, ben: User, reference: str) -> None:
    """What the bank did, recorded by one and seen by another; twice, as a second click would."""
    for _ in range(2):
        recorded = record(payout=payout, user=ann, reference=reference)
    for _ in range(2):
        decide_confirmation(confirmation=recorded, approved=True, user=ben)


def test_who_is_not_reached_accrues_and_is_paid_over_another_rail(unserved: Any, ann: User, ben: User) -> None:
    (is_alice, is_bob) = is_served("CU"), is_served("DE")
    export = propose_export(user=ann, currency="USD", key="e1")
    assert propose_export(user=ann, currency="USD", key="e1") == export
    assert (is_alice, is_bob) == (False, True)
    assert [(one.party, one.amount_micros) for one in export.payouts.all()] == [(unserved, 30 * DOLLAR)]
    assert ledger.balances(prefix="in_transit_rail") == {}
    funded(ann, ben, 30)

    approve_export(export=export, user=ben)
    rows = list(export_file(export=export, user=ann))
    payout = export.payouts.get()
    confirmed(record_sent, payout, ann, ben, "SWIFT 1")

    assert ledger.balances(prefix="in_transit_rail") == ledger.balances(prefix="bank") == {}
    assert ledger.balance(f"payable:{unserved.pk}:USD") == 0
    assert due_micros(party_id=unserved.pk, currency="USD", until=clock.now()) == 0
    (earned,) = earnings_of(unserved)
    assert (earned.paid.micros, earned.due.micros) == (30 * DOLLAR, 0)
    assert "'=cmd|alice" in rows[1] and "30.00" in rows[1] and len(rows) == 2
    (row,) = csv.DictReader(rows)
    assert [row[name] for name in ("account_holder", "iban", "account_number", "address")] == [
        "Alice Example",
        "DE89370400440532013000",
        "",
        "1 Calle\nLa Habana\nCuba",
    ]
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []
    assert set(AuditEvent.objects.filter(action__startswith="rail").values_list("action", flat=True)) == {
        "rail_export.proposed",
        "rail_export.approved",
        "rail_export.downloaded",
        "rail_confirmation.recorded",
        "rail_payout.sent",
    }


def test_a_file_whose_accounts_cannot_be_opened_does_not_begin(
    unserved: Any, ann: User, ben: User, settings: Any
) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    settings.BANK_DETAILS_KEY = "another"

    with pytest.raises(InvalidInput, match="sealed under another BANK_DETAILS_KEY"):
        export_file(export=export, user=ann)

    assert not AuditEvent.objects.filter(action="rail_export.downloaded").exists()


def test_an_account_is_not_erased_while_a_transfer_to_it_is_under_way(unserved: Any, ann: User, ben: User) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    payout = export.payouts.get()
    with pytest.raises(BankDetailsInUse, match=rf"Transfer {payout.pk} of 30\.00 USD"):
        erase_details(party=unserved, user=unserved.user)
    erasure = {"details": payout.details, "erased_by": ann, "erased_at": clock.now()}
    with pytest.raises(IntegrityError, match="is under way"), transaction.atomic():
        BankDetailsErasure.objects.create(**erasure)
    assert not BankDetailsErasure.objects.exists() and len(list(export_file(export=export, user=ann))) == 2
    confirmed(record_sent, payout, ann, ben, "SWIFT 1")

    assert erase_details(party=unserved, user=unserved.user) == 1

    payout = export.payouts.get()
    assert str(payout.details) == "An account that was erased"
    confirmed(record_returned, payout, ann, ben, "SWIFT 2")  # owed again, and nobody knows where to
    assert [one.sentence for one in waiting_for_details("USD")] == ["Waits for their bank details."]
    with pytest.raises(NothingOwed, match="waits for their bank details"):
        propose_export(user=ann, currency="USD", key="e2")
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []


def test_an_account_that_was_erased_after_the_proposal_is_dropped_from_the_export(
    unserved: Any, ann: User, ben: User
) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    assert erase_details(party=unserved, user=unserved.user) == 1
    with pytest.raises(IntegrityError, match="the account was erased"), transaction.atomic():
        RailExport.objects.update(status="approved", decided_by=ben, decided_at=clock.now())
        export.payouts.update(status="intended", intended_at=clock.now())

    approve_export(export=export, user=ben)

    assert export.payouts.get().status == "dropped"
    assert ledger.balances(prefix="in_transit_rail") == {}


@pytest.mark.as_owner
def test_what_came_back_is_owed_again(unserved: Any, ann: User, ben: User) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    payout = export.payouts.get()
    confirmed(record_sent, payout, ann, ben, "SWIFT 1")
    confirmed(record_returned, payout, ann, ben, "SWIFT 2")

    assert ledger.balance(f"payable:{unserved.pk}:USD") == -30 * DOLLAR
    assert ledger.balances(prefix="bank") == {"bank:USD": 30 * DOLLAR}
    assert due_micros(party_id=unserved.pk, currency="USD", until=clock.now()) == 30 * DOLLAR
    with pytest.raises(InvalidInput, match="is returned"):
        record_sent(payout=payout, user=ann, reference="again")
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []
    with connection.cursor() as cursor:  # somebody with the owner's rights marks it as still out
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # nothing may be pending
        cursor.execute("ALTER TABLE payouts_railpayout DISABLE TRIGGER USER")
        cursor.execute("UPDATE payouts_railpayout SET status = 'intended'")
    assert {"rail_stage_differs", "in_transit_differs", "rail_confirmation_differs"} <= {
        one.code for one in check_books().findings
    }


def test_it_takes_two_people_and_money_in_the_bank(unserved: Any, ann: User, ben: User, alice: Any) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")

    for user, refusal in ((ann, FourEyes), (alice.user, NotAllowed)):
        with pytest.raises(refusal):
            approve_export(export=export, user=user)
    with pytest.raises(NothingOwed, match=r"30\.00 USD too little"):
        approve_export(export=export, user=ben)

    assert RailExport.objects.get().status == "awaiting" and RailPayout.objects.get().status == "proposed"
    assert not JournalEntry.objects.filter(kind="rail_intent").exists()


def test_who_has_not_said_where_to_waits_and_is_named(poor: Any, ann: User, carol: Any) -> None:
    with pytest.raises(NothingOwed, match="waits for their bank details"):
        propose_export(user=ann, currency="USD", key="e1")
    (one,) = waiting_for_details()
    assert (one.party, one.amount.micros, one.sentence) == (poor, 30 * DOLLAR, "Waits for their bank details.")
    assert [(s.code, s.is_for_payee) for s in standings_of(poor)] == [("bank_details_needed", True)]
    set_details(party=poor, user=poor.user, **ACCOUNT)

    (one,) = waiting_for_details()

    assert "were changed, and are not used before" in one.sentence
    assert [s.code for s in standings_of(poor)] == ["bank_details_held"]
    with pytest.raises(NothingOwed):
        propose_export(user=ann, currency="USD", key="e1")
    clock.advance(timedelta(hours=72))
    assert waiting_for_details() == []
    assert [s.code for s in standings_of(poor)] == ["next_transfers"]
    assert propose_export(user=ann, currency="USD", key="e1").payouts.get().details == poor.bank_details.get()


def test_a_change_before_the_approval_takes_the_payee_out(unserved: Any, ann: User, ben: User) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    set_details(party=unserved, user=unserved.user, **ACCOUNT | {"account": "GB82 WEST 1234 5698 7654 32"})

    approve_export(export=export, user=ben)

    assert export.payouts.get().status == "dropped"
    assert ledger.balance(f"payable:{unserved.pk}:USD") == -30 * DOLLAR
    assert len(list(export_file(export=export, user=ann))) == 1


def test_less_than_a_payee_wants_at_once_waits_and_says_so(unserved: Any, ann: User, ben: User) -> None:
    funded(ann, ben, 30)
    set_minimum(party=unserved, amount=Money.parse("30.01", "USD"), user=None)
    with pytest.raises(NothingOwed, match="less than each of them wants at once"):
        propose_export(user=ann, currency="USD", key="e1")
    assert waiting_for_details() == []
    assert [(s.code, s.amount.micros) for s in standings_of(unserved)] == [("below_minimum", 30 * DOLLAR)]
    set_minimum(party=unserved, amount=Money.parse("30", "USD"), user=None)
    export = propose_export(user=ann, currency="USD", key="e1")
    set_minimum(party=unserved, amount=Money.parse("40", "USD"), user=None)

    approve_export(export=export, user=ben)

    assert export.payouts.get().status == "dropped"
    assert ledger.balance(f"payable:{unserved.pk}:USD") == -30 * DOLLAR


def test_what_is_on_hold_stays(unserved: Any, ann: User, carol: Any) -> None:
    version = PublishedVersionFactory(contributions={unserved: 1})
    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    assert ledger.balance(f"payable:{unserved.pk}:USD") == -60 * DOLLAR

    export = propose_export(user=ann, currency="USD", key="e1")

    assert export.payouts.get().amount_micros == 30 * DOLLAR


def test_an_export_asks_as_often_for_three_payees_as_for_one(db: Any, ann: User, ben: User) -> None:
    ServedCountries.objects.create(platform_country="US", countries=["DE", "US"])
    funded(ann, ben, 150)
    asked = []
    for n_payees in (1, 1, 3):  # the first opens the accounts
        for party in [PartyFactory(country="CU") for _ in range(n_payees)]:
            version = PublishedVersionFactory(contributions={party: 1})
            sell(OrderFactory(offers=[OfferFactory(version=version)]))
            set_details(party=party, user=party.user, **ACCOUNT)
        clock.advance(timedelta(days=40))
        with CaptureQueriesContext(connection) as proposing:
            export = propose_export(user=ann, currency="USD", key=f"{len(asked)}")
        with CaptureQueriesContext(connection) as approving:
            approve_export(export=export, user=ben)
        asked.append((len(proposing), len(approving)))

    assert export.payouts.filter(status="intended", amount_micros=30 * DOLLAR).count() == 3
    assert asked[1] == asked[2]
    assert ledger.balances(prefix="in_transit_rail") == {"in_transit_rail:USD": -150 * DOLLAR}
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []


def test_a_payee_over_another_rail_is_told_what_is_true(unserved: Any, ann: User, ben: User) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    assert list(paid_out_of(unserved)[:10]) == []
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    (earned,) = earnings_of(unserved)
    assert (earned.on_its_way_in_words, earned.paid_in_words) == (
        "With our bank, on its way to yours.",
        "Nothing has arrived yet.",
    )
    assert [s.code for s in standings_of(unserved)] == ["transfer_under_way"]
    confirmed(record_sent, export.payouts.get(), ann, ben, "SWIFT 1")

    (earned,) = earnings_of(unserved)
    assert (earned.on_its_way_in_words, earned.paid_in_words) == (
        "Nothing is on its way.",
        "Sent to your bank by ours.",
    )
    (paid,) = paid_out_of(unserved)[:10]
    assert (paid.rail, paid.status, paid.words) == ("bank", "sent", "sent by bank transfer, SWIFT 1")
    month = (clock.now().year, clock.now().month)
    assert month in open_months_of(unserved)
    clock.advance(timedelta(days=40))
    confirmed(record_returned, export.payouts.get(), ann, ben, "SWIFT 2")
    assert {s.code: s.is_for_payee for s in standings_of(unserved)} == {
        "next_transfers": False,
        "transfer_returned": True,
    }
    assert open_months_of(unserved)[0] == (clock.now().year, clock.now().month)


def test_payouts_of_both_rails_are_one_list(unserved: Any, ann: User, ben: User, carol: Any, client: Any) -> None:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    run = PayoutRun.objects.create(key="r", currency="USD", due_until=clock.now())
    for number in range(3):
        of_run = run if number == 0 else None
        pay_out(unserved, Money(DOLLAR, "USD"), run=of_run, is_owed=False)
    _, secret = create_api_key(party=unserved, user=unserved.user, name="k", scopes=[ApiKey.Scope.READ])
    headers = {"Authorization": f"Bearer {secret}"}

    pages, address = [], "/api/v1/payouts/?page_size=2"
    while address:
        answer = client.get(address, headers=headers).json()
        pages.append([(one["rail"], one["amount"]["amount"]) for one in answer["results"]])
        address = answer["next"]

    assert pages == [[("stripe", "1.00"), ("stripe", "1.00")], [("stripe", "1.00"), ("bank", "30.00")]]
    back = client.get(
        client.get("/api/v1/payouts/?page_size=3", headers=headers).json()["next"], headers=headers
    ).json()
    assert len(client.get(back["previous"], headers=headers).json()["results"]) == 3
    rail = export.payouts.get()
    one = client.get(f"/api/v1/payouts/{rail.pk}/?rail=bank", headers=headers).json()
    assert (one["rail"], one["status"], one["amount"]["amount"]) == ("bank", "intended", "30.00")
    assert client.get(f"/api/v1/payouts/{rail.pk + 99}/?rail=bank", headers=headers).status_code == 404
    _, strangers = create_api_key(party=carol, user=carol.user, name="k", scopes=[ApiKey.Scope.READ])
    strange = {"Authorization": f"Bearer {strangers}"}
    assert client.get(f"/api/v1/payouts/{rail.pk}/?rail=bank", headers=strange).status_code == 404
    assert client.get("/api/v1/payouts/", headers=strange).json()["results"] == []


def test_money_of_buyers_pays_no_payee(unserved: Any, ann: User, ben: User) -> None:
    receipt = record_unapplied(
        payer="X", amount=Money.parse("30", "USD"), reference="IN 1", received_on=clock.today(), by=ann
    )
    decide_receipt(receipt=receipt, approved=True, by=ben)
    export = propose_export(user=ann, currency="USD", key="e1")

    with pytest.raises(NothingOwed, match=r"30\.00 USD too little"):
        approve_export(export=export, user=ben)


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
        lambda: RailConfirmation.objects.create(
            payout=export.payouts.get(), outcome="sent", reference="x", recorded_by=ann, recorded_at=clock.now()
        ),
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


@pytest.fixture
def promised(unserved: Any, ann: User, ben: User) -> RailPayout:
    export = propose_export(user=ann, currency="USD", key="e1")
    funded(ann, ben, 30)
    approve_export(export=export, user=ben)
    made: RailPayout = export.payouts.get()
    return made


def test_what_the_bank_did_takes_two_people(promised: RailPayout, ann: User, ben: User, alice: Any) -> None:
    recorded = record_sent(payout=promised, user=ann, reference=" SWIFT  1 ")
    assert (recorded.status, recorded.reference) == ("recorded", "SWIFT 1")

    with pytest.raises(FourEyes):
        decide_confirmation(confirmation=recorded, approved=True, user=ann)
    with pytest.raises(NotAllowed):
        decide_confirmation(confirmation=recorded, approved=True, user=alice.user)
    with pytest.raises(NotAllowed):
        record_returned(payout=promised, user=alice.user, reference="x")
    with pytest.raises(TransferNotPossible, match=r"recorded as sent by SWIFT 1, and waits for a second person"):
        record_returned(payout=promised, user=ben, reference="SWIFT 2")
    with pytest.raises(InvalidInput) as refused:
        record_sent(payout=promised, user=ann, reference="  ")

    assert refused.value.pointers == {"/reference": "missing"}
    promised.refresh_from_db()
    assert (promised.status, promised.reference, promised.confirmed_by) == ("intended", "", None)
    assert ledger.balances(prefix="in_transit_rail") == {"in_transit_rail:USD": -30 * DOLLAR}
    assert RailConfirmation.objects.count() == 1


def test_a_wrong_record_is_rejected_and_its_reference_is_free_again(promised: RailPayout, ann: User, ben: User) -> None:
    wrong = record_sent(payout=promised, user=ann, reference="SWIFT 1")
    for _ in range(2):
        decide_confirmation(confirmation=wrong, approved=False, user=ann)  # whoever was wrong may say so
    with pytest.raises(AlreadyDecided):
        decide_confirmation(confirmation=wrong, approved=True, user=ben)

    confirmed(record_returned, promised, ann, ben, "SWIFT 1")

    promised.refresh_from_db()
    assert (promised.status, promised.reference, promised.confirmed_by) == ("returned", "SWIFT 1", ben)
    assert ledger.balance(f"payable:{promised.party_id}:USD") == -30 * DOLLAR
    assert ledger.balances(prefix="in_transit_rail") == {}
    assert [one for one in check_books().findings if one.code != "cash_negative"] == []


def test_a_transfer_on_the_statement_is_one_thing(promised: RailPayout, ann: User, ben: User) -> None:
    told = {"received_on": clock.today(), "by": ann}
    receipt = record_unapplied(payer="X", amount=Money.parse("9", "USD"), reference="IN 1", **told)
    decide_receipt(receipt=receipt, approved=True, by=ben)
    back = {"receipt": receipt, "amount": Money.parse("4", "USD"), "sent_on": clock.today(), "by": ann}
    outgoing.record_money_returned(reference="OUT 1", **back)
    record_sent(payout=promised, user=ann, reference="OUT 2")

    for attempt in (
        lambda: outgoing.record_money_returned(reference="OUT 2", **back),
        lambda: (
            decide_confirmation(confirmation=RailConfirmation.objects.get(), approved=False, user=ann)
            and record_sent(payout=promised, user=ann, reference="OUT 1")
        ),
    ):
        with pytest.raises(TransferNotPossible) as refused:
            attempt()
        assert refused.value.pointers == {"/reference": "taken"}

    assert OutgoingTransfer.objects.count() == 1
    assert list(RailConfirmation.objects.values_list("status", "reference")) == [("rejected", "OUT 2")]


def test_the_database_lets_no_single_person_end_a_payout(
    promised: RailPayout, ann: User, ben: User, alice: Any
) -> None:
    recorded = record_sent(payout=promised, user=ann, reference="SWIFT 1")
    one, payout = RailConfirmation.objects.filter(pk=recorded.pk), RailPayout.objects.filter(pk=promised.pk)
    at = clock.now()

    def booked_alone() -> None:
        one.update(status="booked", decided_by=ben, decided_at=at)
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")

    tries: list[Any] = [
        lambda: payout.update(status="sent", reference="SWIFT 1", confirmed_by=ben, confirmed_at=at),
        lambda: payout.update(reference="SWIFT 1"),
        lambda: one.update(status="booked", decided_by=ann, decided_at=at),
        lambda: one.update(status="booked", decided_by=alice.user, decided_at=at),
        lambda: one.update(reference="SWIFT 2"),
        booked_alone,
        lambda: one.delete(),
        lambda: RailConfirmation.objects.create(
            payout=promised, outcome="returned", reference="SWIFT 2", recorded_by=ann, recorded_at=at
        ),
    ]
    for attempt in tries:
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()

    decide_confirmation(confirmation=recorded, approved=True, user=ben)
    for attempt in (
        lambda: payout.update(reference="SWIFT 3"),
        lambda: payout.update(status="returned", confirmed_by=ann),
        lambda: one.update(status="rejected"),
    ):
        with pytest.raises(DatabaseError), transaction.atomic():
            attempt()
    assert payout.get().reference == "SWIFT 1"


def test_where_stripe_pays_is_asked_of_stripe_and_kept_when_it_changes(db: Any, stripe: Any) -> None:
    assert is_served("DE") is None
    assert ask_served_countries() == ask_served_countries()
    assert (is_served("DE"), is_served("CU"), is_served("")) == (True, False, None)
