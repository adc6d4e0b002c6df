"""Payout runs by a key: planned, stopped, decided by another person, and what became of each payee."""

from typing import Any

import pytest
from django.test import override_settings

from marketplace.models import AuditEvent, StaffAct
from payouts import gateway
from payouts.models import Payout, PayoutRun
from payouts.services import attempts, pacing
from payouts.services.transfers import request_payout_run
from tests.desk import Desk
from tests.factories.payouts import PayeeAccountFactory
from tests.payouts.services.test_transfers import Stripe, earn, execute

USD = {"currency": "USD"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Stripe:
    stripe = Stripe()
    monkeypatch.setattr(gateway, "create_transfer", stripe.create_transfer)
    monkeypatch.setattr(gateway, "find_transfer", stripe.find_transfer)
    monkeypatch.setattr(attempts.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(pacing, "wait_for_turn", lambda: 0.0)
    return stripe


@pytest.fixture
def due(told: Stripe, alice: Any, bob: Any) -> None:
    """18 USD to alice and 9 to bob."""
    earn({alice: 2, bob: 1}, price="30")
    for party in (alice, bob):
        PayeeAccountFactory(party=party)


def test_a_run_is_started_once_and_says_what_became_of_each_payee(
    told: Stripe, due: None, ann: Desk, alice: Any, bob: Any
) -> None:
    told.answers = [gateway.StripeRefused("account_closed", "The account is closed.", 400)]
    made, again = (ann.act("payout-runs/", USD, 201, key="today") for _ in range(2))
    assert made == again and (made["state"], made["started_by"]) == ("planning", "ann@desk.example")

    run = execute(PayoutRun.objects.get())

    seen = ann.get(f"payout-runs/{run.pk}/")
    assert (seen["state"], seen["planned"]) == ("ended", {"amount": "27.00", "currency": "USD"})
    figures = seen["figures"]
    assert (figures["sent"], figures["refused"], figures["waiting"]) == (1, 1, 0)
    (failure,) = ann.get(f"payout-runs/{run.pk}/failures/")["results"]
    assert (failure["problem"], failure["status"]) == ("The account is closed.", "refused")
    payouts = ann.get(f"payout-runs/{run.pk}/payouts/")["results"]
    assert {(one["party"]["id"], one["problem"]) for one in payouts if one["status"] == "sent"} <= {
        (alice.pk, ""),
        (bob.pk, ""),
    }
    assert len(payouts) == 2
    assert ann.get(f"payout-runs/{run.pk}/waiting/")["results"] == []
    assert ann.get(f"payout-runs/{run.pk}/passed-over/")["results"] == []
    assert [one["id"] for one in ann.get("payout-runs/", state="ended")["results"]] == [run.pk]
    assert ann.get("payout-runs/", state="paused")["results"] == []
    refused = Payout.objects.get(status="refused")
    payee = ann.get(f"payees/{refused.party_id}/")
    assert payee["onboarding"] == "ready" and payee["party"]["id"] == refused.party_id
    assert "stripe_refused" in {one["code"] for one in payee["earnings"][0]["standings"]}
    assert [one["id"] for one in ann.get(f"payees/{refused.party_id}/payouts/")["results"]] == [refused.pk]


def test_whom_a_run_passes_over_is_counted(told: Stripe, ann: Desk, alice: Any) -> None:
    earn({alice: 1}, price="30")
    ann.act("payout-runs/", USD, 201)

    run = execute(PayoutRun.objects.get())

    assert ann.get(f"payout-runs/{run.pk}/")["skipped"] == [{"why": "not_ready", "n": 1, "micros": 27_000_000}]
    assert ann.get(f"payees/{alice.pk}/")["onboarding"] == "not_started"


@override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 1})
def test_another_person_approves_and_no_second_key_makes_another_person(
    due: None, ann: Desk, ann_again: Desk, ben: Desk
) -> None:
    run = ann.act("payout-runs/", USD, 201)
    execute(PayoutRun.objects.get())
    path = f"payout-runs/{run['id']}/"
    assert len(ann.get(f"{path}waiting/")["results"]) == 2

    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    assert PayoutRun.objects.get().state == "awaiting_approval" and Payout.objects.count() == 0
    approved = ben.act(f"{path}approve/")

    assert (approved["state"], approved["approved_by"]) == ("sending", "ben@desk.example")
    assert execute(PayoutRun.objects.get()).state == "ended"
    assert AuditEvent.objects.get(action="payout_run.approved").actor == ben.user
    assert ben.act(f"{path}approve/", None, 409)["code"] == "payout_run_state"


@override_settings(PAYOUT_RUN_APPROVAL_ABOVE={"USD": 1})
def test_a_run_is_rejected_with_a_reason_and_without_a_code(due: None, ann: Desk, ben: Desk) -> None:
    run = ann.act("payout-runs/", USD, 201)
    execute(PayoutRun.objects.get())
    path = f"payout-runs/{run['id']}/reject/"
    for wrong in ({}, {"reason": " "}):
        ben.refused(path, wrong, "/reason", code="")

    rejected = ben.act(path, {"reason": "Twice what we expect."}, code="")

    assert (rejected["state"], rejected["note"]) == ("rejected", "Twice what we expect.")
    assert Payout.objects.count() == 0


def test_a_run_is_paused_without_a_code_and_resumed_with_one(due: None, ann: Desk, ben: Desk) -> None:
    run = request_payout_run(currency="USD", key="one")
    PayoutRun.objects.update(state="sending", planned_at=run.due_until)
    path = f"payout-runs/{run.pk}/"

    assert ann.act(f"{path}pause/", {"reason": "Wait."}, code="")["state"] == "paused"
    ann.refused(f"{path}resume/", None, "One-Time-Code", status=403, code="")
    assert PayoutRun.objects.get().state == "paused"

    assert ann.act(f"{path}resume/")["state"] == "sending"
    assert ann.act(f"{path}resume/", None, 409)["code"] == "payout_run_state"


@pytest.mark.parametrize("wrong", [{}, {"currency": "CHF"}, {"currency": 5}, {"currency": None}])
def test_a_run_that_cannot_be_leaves_nothing(ann: Desk, wrong: Any) -> None:
    ann.refused("payout-runs/", wrong, "/currency")

    assert PayoutRun.objects.count() == StaffAct.objects.count() == 0


def test_filters_that_cannot_be_are_named(ann: Desk) -> None:
    problem = ann.get("payout-runs/", 422, state="gone", currency="CHF")

    assert {error["pointer"] for error in problem["errors"]} == {"/state", "/currency"}
