"""Exports over another rail by a key: proposed, approved by another person, sent to a bank, and confirmed."""

import csv
import io
from typing import Any

import pytest

from marketplace import clock
from marketplace.models import AuditEvent
from payouts import ledger
from payouts.models import BankDetails, RailExport, RailPayout, ServedCountries
from payouts.models.bank_details import HOLD
from payouts.services.bank_details import set_details
from payouts.services.manual_entries import approve, propose
from payouts.services.proofs import check_books
from tests.desk import BASE, Desk, code_of
from tests.payouts.services.test_other_rails import ACCOUNT
from tests.payouts.services.test_transfers import earn

DOLLAR = 1_000_000
USD = {"currency": "USD"}


@pytest.fixture
def unserved(alice: Any, ann: Desk, ben: Desk) -> Any:
    """Stripe does not pay where alice is; 36 USD are due to her, and in the bank, and she has said to which account."""
    ServedCountries.objects.create(platform_country="US", countries=["DE", "US"])
    type(alice).objects.filter(pk=alice.pk).update(country="CU")
    alice.refresh_from_db()
    set_details(party=alice, user=alice.user, **ACCOUNT)
    clock.advance(HOLD)
    earn({alice: 1}, price="40")
    legs = {"bank:USD": 36 * DOLLAR, "cash:available:USD": -36 * DOLLAR}
    funded = propose(user=ann.user, key="fund", legs=legs, reason="Withdrawn", balance_transaction_id="txn_fund")
    approve(manual=funded, user=ben.user)
    return alice


def test_what_stripe_does_not_reach_is_exported_by_two_people_and_confirmed(
    unserved: Any, ann: Desk, ann_again: Desk, ben: Desk
) -> None:
    made, again = (ann.act("rail-exports/", USD, 201, key="k", code="") for _ in range(2))
    path = f"rail-exports/{made['id']}/"
    assert made == again and (made["status"], made["proposed_by"]) == ("awaiting", "ann@desk.example")
    (payout,) = ann.get(f"{path}payouts/")["results"]
    assert (payout["party"]["id"], payout["amount"]["amount"]) == (unserved.pk, "36.00")
    assert payout["account_ends_in"] == "3000"
    ann.act(f"{path}csv/", None, 404)  # nothing is promised yet
    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{path}approve/", None, "One-Time-Code", status=403, code="")
    assert ledger.balances(prefix="in_transit_rail") == {}

    approved = ben.act(f"{path}approve/")

    assert (approved["status"], approved["decided_by"]) == ("approved", "ben@desk.example")
    assert ann.get("rail-exports/", status="approved", currency="USD")["results"] == [approved] == [ann.get(path)]
    assert ann.get("rail-exports/", currency="EUR")["results"] == []
    ann.refused(f"{path}csv/", None, "One-Time-Code", status=403, code="")
    told = ann.client.post(f"{BASE}{path}csv/", headers={"One-Time-Code": code_of(ann.user)})
    (row,) = csv.DictReader(io.StringIO(told.getvalue().decode()))
    assert (row["iban"], row["amount"], told["Cache-Control"]) == ("DE89370400440532013000", "36.00", "no-store")
    act = f"rail-payouts/{payout['id']}/"
    ann.refused(f"{act}sent/", {"reference": " "}, "/reference", code="")
    sent = ann.act(f"{act}sent/", {"reference": "B-1"}, 201, code="")
    assert (sent["status"], sent["outcome"], sent["recorded_by"]) == ("recorded", "sent", "ann@desk.example")
    assert ann.act(f"{act}returned/", {"reference": "B-9"}, 409, code="")["code"] == "transfer_not_possible"
    confirm = f"rail-confirmations/{sent['id']}/"
    assert ann.act(f"{confirm}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{confirm}approve/", None, "One-Time-Code", status=403, code="")
    assert ledger.balances(prefix="bank") == {"bank:USD": 36 * DOLLAR}
    booked = ben.act(f"{confirm}approve/")
    assert (booked["status"], booked["decided_by"]) == ("booked", "ben@desk.example")
    assert ann.get("rail-confirmations/", status="booked", payout=payout["id"])["results"] == [booked]
    assert ann.get(confirm) == booked and ann.get("rail-confirmations/", status="recorded")["results"] == []
    (told,) = ann.get(f"{path}payouts/")["results"]
    assert (told["status"], told["reference"], told["confirmed_by"]) == ("sent", "B-1", "ben@desk.example")
    assert ledger.balances(prefix="bank") == {}
    told = ann.client.post(f"{BASE}{path}csv/", headers={"One-Time-Code": code_of(ann.user)})
    assert list(csv.DictReader(io.StringIO(told.getvalue().decode()))) == []  # made once more, it pays nobody twice
    ann.refused(f"{act}returned/", {"reference": "B-1"}, "/reference", status=409, code="")
    wrong = ann.act(f"{act}returned/", {"reference": "B-2"}, 201, code="")
    assert ann.act(f"rail-confirmations/{wrong['id']}/reject/", code="")["status"] == "rejected"
    returned = ann.act(f"{act}returned/", {"reference": "B-2"}, 201, code="")
    ben.act(f"rail-confirmations/{returned['id']}/approve/")
    assert RailPayout.objects.get().status == "returned"
    assert ann.act(f"{act}sent/", {"reference": "B-3"}, 422, code="")["code"] == "invalid_input"
    assert AuditEvent.objects.get(action="rail_payout.sent").actor == ben.user
    assert check_books().findings == []


def test_an_export_is_rejected_by_another_person_without_a_code(unserved: Any, ann: Desk, ben: Desk) -> None:
    made = ann.act("rail-exports/", USD, 201, code="")
    path = f"rail-exports/{made['id']}/"

    assert ann.act(f"{path}reject/", None, 403, code="")["code"] == "four_eyes"
    assert ben.act(f"{path}reject/", code="")["status"] == "rejected"
    assert RailPayout.objects.get().status == "dropped"
    assert ben.act(f"{path}approve/", None, 409)["code"] == "already_decided"


def test_whose_money_waits_for_an_account_is_listed_with_its_last_digits_alone(
    unserved: Any, bob: Any, ann: Desk
) -> None:
    assert ann.get("rail-waiting/")["results"] == []  # what she entered can be used
    type(bob).objects.filter(pk=bob.pk).update(country="CU")
    earn({bob: 1}, price="40")
    changed = set_details(party=unserved, user=unserved.user, **ACCOUNT | {"address": "2 Calle, La Habana"})

    hers, his = ann.get("rail-waiting/")["results"]

    assert (hers["party"]["id"], hers["amount"], hers["account_ends_in"]) == (
        unserved.pk,
        {"amount": "36.00", "currency": "USD"},
        "3000",
    )
    assert hers["usable_from"] == f"{changed.usable_from:%Y-%m-%dT%H:%M:%S.%fZ}" and "were changed" in hers["sentence"]
    assert (his["party"]["id"], his["account_ends_in"], his["usable_from"]) == (bob.pk, None, None)
    assert his["sentence"] == "Waits for their bank details."
    assert "DE89" not in str(hers)
    assert ann.get("rail-waiting/", currency="USD", page_size=1)["results"] == [hers]
    assert ann.get("rail-waiting/", currency="EUR")["results"] == []
    ann.get("rail-waiting/", 422, currency="CHF")


def test_a_payees_account_is_erased_on_request_by_a_code(unserved: Any, ann: Desk, ben: Desk) -> None:
    path, why = f"payees/{unserved.pk}/bank-details/erase/", {"reason": "By mail, ticket 7."}
    ann.refused(path, why, "One-Time-Code", status=403, code="")
    ann.refused(path, {"reason": " "}, "/reason")
    made = ann.act("rail-exports/", USD, 201, code="")
    ben.act(f"rail-exports/{made['id']}/approve/")
    assert ann.act(path, why, 409)["code"] == "bank_details_in_use"
    assert BankDetails.objects.get().sealed
    sent = ann.act(f"rail-payouts/{RailPayout.objects.get().pk}/sent/", {"reference": "B-1"}, 201, code="")
    ben.act(f"rail-confirmations/{sent['id']}/approve/")

    told, again = (ann.act(path, why, key="erase") for _ in range(2))

    assert told == again and (told["party"]["id"], told["n_erased"]) == (unserved.pk, 1)
    assert BankDetails.objects.get().sealed == ""
    event = AuditEvent.objects.get(action="bank_details.erased")
    assert (event.actor, event.detail["reason"]) == (ann.user, "By mail, ticket 7.")
    assert ann.act(path, why)["n_erased"] == 0
    (payout,) = ann.get(f"rail-exports/{made['id']}/payouts/")["results"]
    assert payout["account_ends_in"] is None


def test_an_export_of_nothing_or_in_no_currency_is_refused(ann: Desk) -> None:
    assert ann.act("rail-exports/", USD, 409, code="")["code"] == "nothing_owed"
    ann.refused("rail-exports/", {"currency": "CHF"}, "/currency", code="")
    ann.refused("rail-exports/", {}, "/currency", code="")

    assert RailExport.objects.count() == 0
