"""The books by a key: read in pages, closed a month at a time, and moved by hand by two people."""

from datetime import UTC, datetime
from typing import Any

import pytest

from marketplace import clock
from marketplace.models import AuditEvent, StaffAct
from payouts import ledger
from payouts.models import ClosedPeriod, JournalEntry, ManualEntry
from tests.desk import Desk
from tests.factories.marketplace import OfferFactory, OrderFactory, PublishedVersionFactory
from tests.factories.payouts import sell


@pytest.fixture
def spring(alice: Any, bob: Any, carol: Any) -> None:
    """A sale in March 2028; it is the second of April."""
    clock.advance(datetime(2028, 3, 10, 12, tzinfo=UTC) - clock.now())
    version = PublishedVersionFactory(contributions={alice: 3, bob: 1})
    sell(OrderFactory(buyer=carol, offers=[OfferFactory(version=version)]))
    clock.advance(datetime(2028, 4, 2, 12, tzinfo=UTC) - clock.now())


def usd(amount: str) -> dict[str, str]:
    return {"amount": amount, "currency": "USD"}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_trial_balance_is_read_as_of_a_day_and_exported(spring: None, ann: Desk) -> None:
    (trial,) = ann.get("trial-balance/")
    assert trial["balances"] and trial["debit"] == trial["credit"]
    assert (trial["for_others"], trial["own_revenue"]) == (usd("90.00"), usd("6.80"))
    assert {line["purpose"] for line in trial["lines"]} >= {"cash:pending", "pool", "payable"}
    assert ann.get("trial-balance/", as_of="2028-03-09") == []
    assert b"open Assets:Cash:Pending:USD" in ann.get("beancount/", as_of="2028-03-31").getvalue()
    assert b"Cash" not in ann.get("beancount/", as_of="2028-03-09").getvalue()
    rows = ann.get("yearly-totals/2028/csv/").getvalue().decode().splitlines()
    assert len(rows) == 3 and ",22.50," in rows[1]
    ann.get("yearly-totals/99/csv/", 404)
    for day in ("nonsense", "1999-12-31", "9999-01-01"):
        assert [error["pointer"] for error in ann.get("trial-balance/", 422, as_of=day)["errors"]] == ["/as_of"]


def test_journals_are_paged_with_the_balance_after_each_posting(spring: None, ann: Desk, ben: Desk, alice: Any) -> None:
    for number in range(5):
        ledger.post(
            key=f"more {number}",
            kind=JournalEntry.Kind.UPFRONT,
            postings={"bank:USD": 1_000_000, "equity:owners:USD": -1_000_000},
        )
    assert {one["code"] for one in ann.get("accounts/", q="bank")["results"]} == {"bank:USD"}
    assert f"payable:{alice.pk}:USD" in {one["code"] for one in ann.get("accounts/", q="Alice")["results"]}

    newest = ann.get("accounts/bank:USD/journal/", page_size=2)
    middle = ann.get(newest["next"])
    oldest = ann.get(middle["next"])

    assert [row["balance"]["amount"] for row in newest["results"]] == ["5.00", "4.00"]
    assert [row["balance"]["amount"] for row in middle["results"]] == ["3.00", "2.00"]
    assert [row["balance"]["amount"] for row in oldest["results"]] == ["1.00"]
    assert (newest["previous"], oldest["next"], newest["opening"]) == (None, None, usd("3.00"))
    assert ann.get(middle["previous"])["results"] == newest["results"]
    assert ann.get("accounts/bank:USD/journal/", since="2028-01-01")["results"][-1]["balance"] == usd("1.00")
    assert ann.get("accounts/bank:USD/journal/csv/").getvalue().decode().count("\r\n") == 6
    ann.get("accounts/bank:EUR/journal/", 404)
    ann.get("accounts/bank:EUR/journal/csv/", 404)
    problem = ann.get("accounts/bank:USD/journal/", 422, before="x", after=-1, since="x", page_size=0)
    assert {error["pointer"] for error in problem["errors"]} == {"/before", "/after", "/since", "/page_size"}
    entry = newest["results"][0]["entry"]
    assert ann.get(f"entries/{entry}/")["key"] == "more 4"
    assert [(leg["account"], leg["amount"]["amount"]) for leg in ann.get(f"entries/{entry}/legs/")["results"]] == [
        ("bank:USD", "1.00"),
        ("equity:owners:USD", "-1.00"),
    ]


def test_a_journals_page_is_bounded(ann: Desk) -> None:
    for number in range(205):
        ledger.post(
            key=f"many {number}",
            kind=JournalEntry.Kind.UPFRONT,
            postings={"bank:USD": 1_000_000, "equity:owners:USD": -1_000_000},
        )

    page = ann.get("accounts/bank:USD/journal/", page_size=100_000)

    assert len(page["results"]) == 200 and page["next"]
    assert len(ann.get(page["next"])["results"]) == 5


def test_payables_are_read_by_age(spring: None, ann: Desk, alice: Any, bob: Any) -> None:
    (total,) = ann.get("payables/totals/")
    assert (total["n_parties"], total["total"], total["by_age"]["not_due"]) == (2, usd("30.00"), usd("30.00"))
    page = ann.get("payables/", page_size=1)
    assert (page["results"][0]["party"], page["results"][0]["total"]) == (alice.pk, usd("22.50"))
    assert ann.get(page["next"])["results"][0]["party"] == bob.pk
    assert ann.get("payables/", offset=10**30)["results"] == []


# --- closing ----------------------------------------------------------------------------------------------------------


def test_a_month_is_closed_with_a_code_and_a_reason_where_it_is_not_clean(spring: None, ann: Desk) -> None:
    coming = ann.get("periods/next/")
    assert (coming["month"], coming["is_over"]) == ("2028-03", True)
    assert coming["obstacles"] == [
        {"about": "looks", "text": "It was never reconciled with Stripe."},
        {"about": "proof", "text": "The books were not proved from their rows since its end."},
    ]
    ann.refused("periods/", {"month": "2028-03"}, "/note", status=409)
    ann.refused("periods/", {"month": "2028-04", "note": "x"}, "/month", status=409)
    for month in ("March", "2028-13", "0000-01", ""):
        ann.refused("periods/", {"month": month}, "/month")
    ann.refused("periods/", {"month": "2028-03", "note": "x"}, "One-Time-Code", status=403, code="")
    assert ClosedPeriod.objects.count() == StaffAct.objects.count() == 0

    closed = ann.act("periods/", {"month": "2028-03", "note": "A first look."}, 201)

    assert (closed["month"], closed["closed_by"], closed["note"]) == ("2028-03", "ann@desk.example", "A first look.")
    assert {one["purpose"] for one in closed["balances"]} >= {"cash:pending", "pool"}
    assert ann.get("periods/2028-03/") == closed
    assert [one["month"] for one in ann.get("periods/")["results"]] == ["2028-03"]
    assert (ann.get("periods/next/")["month"], ann.get("periods/next/")["is_over"]) == ("2028-04", False)
    for wrong in ("2028-04", "2028-99", "March"):
        ann.get(f"periods/{wrong}/", 404)
    assert AuditEvent.objects.get(action="period.closed").actor == ann.user


def test_before_anything_is_booked_no_month_comes_next(ann: Desk) -> None:
    ann.get("periods/next/", 404)


# --- manual entries ---------------------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    legs = [{"account": "expense:other", "debit": usd("3.00")}, {"account": "equity:owners", "credit": usd("3.00")}]
    return {"reason": "Paper", "legs": legs} | changes


def test_a_manual_entry_is_proposed_by_one_person_and_posted_by_another(ann: Desk, ann_again: Desk, ben: Desk) -> None:
    made, again = (ann.act("manual-entries/", entry(), 201, key="k", code="") for _ in range(2))
    path = f"manual-entries/{made['id']}/"
    assert made == again and (made["state"], made["proposed_by"]) == ("awaiting", "ann@desk.example")
    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{path}approve/", None, "One-Time-Code", status=403, code="")
    assert ledger.balances() == {}

    posted = ben.act(f"{path}approve/", {"note": "Seen."})

    assert (posted["state"], posted["decided_by"], posted["note"]) == ("approved", "ben@desk.example", "Seen.")
    assert posted["entry"] == JournalEntry.objects.get().pk
    assert ledger.balances() == {"equity:owners:USD": -3_000_000, "expense:other:USD": 3_000_000}
    assert ann.get("manual-entries/", state="approved", currency="USD")["results"] == [posted] == [ann.get(path)]
    assert ann.get("manual-entries/", state="awaiting")["results"] == []


def test_a_manual_entry_is_rejected_with_a_reason_and_without_a_code(ann: Desk, ben: Desk) -> None:
    made = ann.act("manual-entries/", entry(), 201, code="")
    path = f"manual-entries/{made['id']}/"
    ben.refused(f"{path}reject/", {}, "/note", code="")

    rejected = ben.act(f"{path}reject/", {"note": "Not ours."}, code="")

    assert (rejected["state"], rejected["note"], rejected["entry"]) == ("rejected", "Not ours.", None)
    assert ben.act(f"{path}approve/", None, 409)["code"] == "already_decided"
    assert ledger.balances() == {}


def test_taxes_are_handed_to_their_office_from_their_rates_own_account(ann: Desk, ben: Desk) -> None:
    rate = ann.act(
        "tax-rates/", {"jurisdiction": "DE", "name": "VAT", "rate_bps": 1_900, "valid_from": f"{clock.today()}"}, 201
    )
    leg = {"account": "tax", "tax_rate": rate["id"], "debit": usd("114.00")}
    made = ann.act("manual-entries/", entry(legs=[leg, {"account": "bank", "credit": usd("114.00")}]), 201, code="")

    ben.act(f"manual-entries/{made['id']}/approve/")

    assert ledger.balances() == {f"tax:{rate['id']}:USD": 114_000_000, "bank:USD": -114_000_000}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"legs": [{"account": "tax", "debit": usd("1")}]}, "/legs/0/tax_rate"),
        ({"legs": [{"account": "tax", "tax_rate": 999_999_999, "debit": usd("1")}]}, "/legs/0/tax_rate"),
        ({"legs": []}, "/legs"),
        ({"legs": "none"}, "/legs"),
        ({"legs": [{"account": "payable", "debit": usd("1")}]}, "/legs/0/account"),
        ({"legs": [{"account": "bank", "debit": usd("-1")}]}, "/legs/0/debit"),
        ({"legs": [{"account": "bank", "debit": usd("1"), "credit": usd("1")}]}, "/legs/0/debit"),
        ({"legs": [{"account": "bank"}]}, "/legs/0/debit"),
        ({"legs": [{"account": "bank", "debit": usd("1")}, {"account": "bank", "credit": usd("1")}]}, "/legs"),
        ({"legs": [{"account": "bank", "debit": usd("1")}, {"account": "equity:owners", "credit": usd("2")}]}, "/legs"),
        (
            {"legs": [{"account": "bank", "debit": usd("0")}, {"account": "equity:owners", "credit": usd("0")}]},
            "/legs/0",
        ),
        ({"reason": ""}, "/reason"),
        ({"booked_on": "2999-01-01"}, "/booked_at"),
        ({"booked_on": "someday"}, "/booked_on"),
        ({"balance_transaction_id": "txn_1"}, "/balance_transaction_id"),
    ],
)
def test_a_manual_entry_that_cannot_be_leaves_nothing(ann: Desk, changes: Any, pointer: str) -> None:
    ann.refused("manual-entries/", entry(**changes), pointer, code="")

    assert ManualEntry.objects.count() == StaffAct.objects.count() == 0


def test_nothing_is_proposed_into_a_closed_month(spring: None, ann: Desk) -> None:
    ann.act("periods/", {"month": "2028-03", "note": "x"}, 201)

    refused = ann.refused("manual-entries/", entry(booked_on="2028-03-20"), "/booked_at", status=409, code="")

    assert refused["code"] == "period_closed" and ManualEntry.objects.count() == 0
