"""Reconciliation, proofs of the books, Stripe's events and the audit log by a key."""

import json
from typing import Any

import pytest
from django.utils import timezone

from marketplace.models import AuditEvent, StaffAct
from marketplace.services import audit
from payouts import tasks
from payouts.models import EventSettlement, ReconciliationDifference, ReconciliationRun, Refund, StripeEvent
from payouts.services.proofs import check_books
from tests.desk import Desk
from tests.payouts.services.test_proving import plant
from tests.payouts.services.test_settlements import paid_for_a_cancelled_order


def test_everything_is_compared_where_it_is_asked_for(ann: Desk) -> None:
    new = ann.act("reconciliations/", None, 201, code="")
    full = ann.act("reconciliations/", {"is_full": True}, 201, code="")
    ann.refused("reconciliations/", {"is_full": "perhaps"}, "/is_full", code="")

    assert (new["is_full"], full["is_full"], full["since"]) == (False, True, None)
    assert [one["id"] for one in ann.get("reconciliations/", is_full=True)["results"]] == [full["id"]]
    assert [one["id"] for one in ann.get("reconciliations/", is_full=False)["results"]] == [new["id"]]
    assert [one["id"] for one in ann.get("reconciliations/")["results"]] == [full["id"], new["id"]]
    assert AuditEvent.objects.filter(action="reconciliation.requested", detail__full=True).count() == 1


def test_a_proof_of_the_books_is_asked_for_without_a_code_and_read_with_its_findings(ann: Desk) -> None:
    ann.get("proofs/latest/", 404)
    made, again = (ann.act("proofs/", None, 201, key="k", code="") for _ in range(2))
    assert made == again and (made["status"], made["n_findings"]) == ("queued", None)
    assert made["requested_by"] == "ann@desk.example"
    ann.get("proofs/latest/", 404)  # it has not ended
    plant(3)
    tasks.execute_proof(made["id"])

    latest = ann.get("proofs/latest/")

    assert (latest["id"], latest["status"], latest["n_findings"]) == (made["id"], "done", 3)
    assert latest["checked"]["entries"] == 3
    assert ann.get(f"proofs/{made['id']}/") == latest
    page = ann.get(f"proofs/{made['id']}/findings/", page_size=2)
    found = page["results"] + ann.get(page["next"])["results"]
    assert [one["code"] for one in found] == ["clearing_not_empty"] * 3 and "clearing:upfront:900" in found[0]["detail"]
    assert ann.get("proofs/", status="done")["results"] == [latest]
    assert ann.get("proofs/", status="failed")["results"] == []
    assert AuditEvent.objects.get(action="proof.requested").actor == ann.user


def test_a_look_is_asked_for_without_a_code_and_read_with_its_differences(ann: Desk) -> None:
    made = ann.act("reconciliations/", None, 201, code="")
    assert (made["status"], made["requested_by"], made["cash"]) == ("queued", "ann@desk.example", [])
    assert made["n_differences"] is None
    ReconciliationRun.objects.update(
        status="done",
        n_differences=2,
        cash=[
            {"currency": "USD", "agrees": False, "ledger": [1_000_000, 5], "coming": [0, 0], "stripe": [2_000_000, 5]}
        ],
    )
    run = ReconciliationRun.objects.get()
    for number in (1, 2):
        ReconciliationDifference.objects.create(
            run=run,
            code="missing",
            subject=f"txn_{number}",
            detail="d",
            cause="c",
            first_seen_at=timezone.now(),
            amount_micros=-5_000_000 if number == 1 else None,
            currency="USD" if number == 1 else "",
        )

    seen = ann.get(f"reconciliations/{run.pk}/")
    page = ann.get(f"reconciliations/{run.pk}/differences/", page_size=1)

    assert (seen["agrees"], seen["n_differences"]) == (False, 2)
    assert [(one["side"], one["ledger"]["amount"], one["stripe"]["amount"]) for one in seen["cash"]] == [
        ("pending", "1.00", "2.00"),
        ("available", "0.000005", "0.000005"),
    ]
    (first,), (second,) = page["results"], ann.get(page["next"])["results"]
    assert (first["subject"], first["amount"]) == ("txn_1", {"amount": "-5.00", "currency": "USD"})
    assert (second["subject"], second["amount"]) == ("txn_2", None)
    assert [one["id"] for one in ann.get("reconciliations/", status="done")["results"]] == [run.pk]
    assert ann.get("reconciliations/", status="failed")["results"] == []
    assert AuditEvent.objects.get(action="reconciliation.requested").actor == ann.user


def told(number: int, **fields: Any) -> StripeEvent:
    payload = json.dumps({"id": f"evt_{number}", "data": {"object": {"id": "re_1"}}})
    given = {"event_id": f"evt_{number}", "endpoint": "platform", "type": "refund.updated", "payload": payload}
    return StripeEvent.objects.create(**given | fields)


def test_events_are_found_and_a_failed_one_tried_again(ann: Desk) -> None:
    done = told(1, status="done")
    failed = told(2, status="failed", error_code="payment_mismatch", error_message="Look.", type="charge.updated")

    (seen,) = ann.get("stripe-events/", status="failed")["results"]
    assert (seen["id"], seen["error_message"]) == (failed.pk, "Look.")
    assert [one["id"] for one in ann.get("stripe-events/", type="refund.updated")["results"]] == [done.pk]
    assert ann.get("stripe-events/", account="acct_1")["results"] == []
    assert ann.get(f"stripe-events/{failed.pk}/")["payload"]["data"] == {"object": {"id": "re_1"}}
    again = ann.act(f"stripe-events/{failed.pk}/retry/", code="")

    assert (again["status"], again["error_message"]) == ("queued", "")
    event = AuditEvent.objects.get(action="stripe_event.retried")
    assert (event.actor, event.target) == (ann.user, f"stripe_event:{failed.pk}")
    for one in (done, failed):
        assert ann.act(f"stripe-events/{one.pk}/retry/", None, 409, code="")["code"] == "event_not_failed"
    assert AuditEvent.objects.filter(action="stripe_event.retried").count() == 1


def broken(number: int = 1) -> StripeEvent:
    return told(number, status="failed", error_code="payment_mismatch", error_message="Of no payment of ours.")


def test_an_event_is_settled_otherwise_by_two_people(ann: Desk, ann_again: Desk, ben: Desk) -> None:
    event = broken()
    path = f"stripe-events/{event.pk}/"
    asked = {"act": "explained", "reason": "Of our other shop."}
    assert [one["id"] for one in ann.get("stripe-events/", state="failed")["results"]] == [event.pk]
    made, again = (ann.act(f"{path}settlements/", asked, 201, key="k", code="") for _ in range(2))
    decide = f"settlements/{made['id']}/"
    assert made == again and (made["status"], made["proposed_by"], made["amount"]) == (
        "proposed",
        "ann@desk.example",
        None,
    )
    assert ann.get("stripe-events/", state="proposed")["results"][0]["is_proposed"] is True
    for desk in (ann, ann_again):
        assert desk.act(f"{decide}confirm/", {}, 403)["code"] == "four_eyes"
    ben.refused(f"{decide}confirm/", {}, "One-Time-Code", status=403, code="")
    assert ben.act(f"{path}settlements/", asked, 409, code="")["code"] == "settlement_not_possible"
    assert StripeEvent.unsettled().count() == 1

    confirmed = ben.act(f"{decide}confirm/", {"note": "Seen."})

    assert (confirmed["status"], confirmed["decided_by"], confirmed["note"]) == (
        "confirmed",
        "ben@desk.example",
        "Seen.",
    )
    seen = ann.get(path)
    assert (seen["is_settled"], seen["is_proposed"], seen["settlements"]) == (True, False, [confirmed])
    assert [one["id"] for one in ann.get("stripe-events/", state="settled")["results"]] == [event.pk]
    assert ann.get("stripe-events/", state="failed")["results"] == []
    assert not StripeEvent.unsettled().exists()
    assert ben.act(f"{decide}reject/", {"note": "No."}, 409, code="")["code"] == "already_decided"
    assert ann.act(f"{path}retry/", None, 409, code="")["code"] == "event_not_failed"


def test_a_settlement_is_rejected_with_a_reason_and_without_a_code(ann: Desk, ben: Desk) -> None:
    event = broken()
    made = ann.act(f"stripe-events/{event.pk}/settlements/", {"act": "explained", "reason": "r"}, 201, code="")
    path = f"settlements/{made['id']}/"
    ben.refused(f"{path}reject/", {}, "/note", code="")

    rejected = ben.act(f"{path}reject/", {"note": "It is ours."}, code="")

    assert (rejected["status"], rejected["note"]) == ("rejected", "It is ours.")
    assert ben.act(f"{path}confirm/", {}, 409)["code"] == "already_decided"
    assert StripeEvent.unsettled().get() == event


@pytest.mark.parametrize(
    ("given", "pointers", "status"),
    [
        ({"act": "explained"}, ["/reason"], 422),
        ({"act": "explained", "reason": " "}, ["/reason"], 422),
        ({"act": "explained", "reason": "x" * 2_001}, ["/reason"], 422),
        ({"act": "forgotten", "reason": "r"}, ["/act"], 422),
        ({"act": "refund", "reason": "r"}, [], 409),  # there is no charge behind it
    ],
)
def test_a_settlement_that_cannot_be_leaves_nothing(ann: Desk, given: Any, pointers: list[str], status: int) -> None:
    event = broken()

    ann.refused(f"stripe-events/{event.pk}/settlements/", given, *pointers, status=status, code="")

    assert EventSettlement.objects.count() == StaffAct.objects.count() == 0


def test_an_event_that_was_applied_needs_no_settlement(ann: Desk) -> None:
    event = told(1, status="done")
    asked = {"act": "explained", "reason": "r"}

    refused = ann.act(f"stripe-events/{event.pk}/settlements/", asked, 409, code="")

    assert refused["code"] == "settlement_not_possible" and EventSettlement.objects.count() == 0


def test_what_was_paid_for_nothing_goes_back_and_is_read_with_its_event(
    stripe: Any, carol: Any, ann: Desk, ben: Desk
) -> None:
    paid_for_a_cancelled_order(stripe, carol)
    event = StripeEvent.unsettled().get(type="checkout.session.completed")
    path = f"stripe-events/{event.pk}/"
    asked = {"act": "refund", "reason": "It was cancelled."}
    made = ann.act(f"{path}settlements/", asked, 201, code="")
    assert made["amount"] == {"amount": "100.00", "currency": "USD"} and made["charge_id"].startswith("ch_")
    assert ann.get(path)["surplus_charges"] == [] and Refund.objects.count() == 0  # nothing is booked yet

    confirmed = ben.act(f"settlements/{made['id']}/confirm/")

    (charge,) = ann.get(path)["surplus_charges"]
    (refund,) = ann.get("refunds/")["results"]
    assert confirmed["status"] == "confirmed"
    assert (charge["left"]["amount"], charge["refunds"]) == ("0.00", [refund["id"]])
    assert (refund["payment"], refund["buyer"], refund["surplus_charge"]) == (None, None, made["charge_id"])
    assert (refund["reason"], refund["method"], refund["requested_by"]) == ("surplus", "stripe", "ben@desk.example")
    assert check_books().findings == []
    sent = {"reference": "OUT 1", "sent_on": "2026-01-01"}
    assert ann.act(f"refunds/{refund['id']}/sent/", sent, 409, code="")["code"] == "transfer_not_possible"
    assert ann.act(f"refunds/{refund['id']}/refuse/", {"note": "n"}, 409)["code"] == "transfer_not_possible"


def test_a_stripe_that_is_silent_or_refuses_us_changes_nothing(
    stripe: Any, carol: Any, ann: Desk, settings: Any
) -> None:
    paid_for_a_cancelled_order(stripe, carol)
    event = StripeEvent.unsettled().get(type="checkout.session.completed")
    path, asked = f"stripe-events/{event.pk}/settlements/", {"act": "refund", "reason": "It was cancelled."}

    settings.STRIPE_API_KEY = "sk_test_of_somebody_else"
    assert ann.act(path, asked, 503, code="")["code"] == "stripe_unavailable"
    stripe.handle.kill()
    assert ann.act(path, asked, 503, code="")["code"] == "stripe_unavailable"

    assert EventSettlement.objects.count() == StaffAct.objects.count() == 0


@pytest.fixture
def log(ann: Desk, alice: Any) -> None:
    AuditEvent.objects.bulk_create(
        AuditEvent(actor=ann.user, action="thing.done", target=f"thing:{number}", detail={"n": number})
        for number in range(205)
    )
    audit.record(actor=alice.user, action="offer.published", target="offer:1", party=alice)


@pytest.mark.parametrize(
    ("asked", "n"),
    [
        ({"target": "thing:7"}, 1),
        ({"action": "offer."}, 1),
        ({"who": "alice"}, 1),
        ({"who": "ann@desk", "action": "thing"}, 200),
        ({"action": "offer", "staff": True}, 0),
        ({"since": "2999-01-01"}, 0),
        ({"action": "thing", "until": "2000-01-01"}, 0),
    ],
)
def test_the_log_is_filtered(log: None, ann: Desk, asked: Any, n: int) -> None:
    assert len(ann.get("audit/", page_size=100_000, **asked)["results"]) == n


def test_the_log_is_paged_to_its_end_with_a_bound(log: None, ann: Desk) -> None:
    first = ann.get("audit/", page_size=100_000, action="thing")
    second = ann.get(first["next"])

    targets = [one["target"] for one in first["results"] + second["results"]]
    assert targets == [f"thing:{number}" for number in range(204, -1, -1)]
    assert (len(first["results"]), second["next"]) == (200, None)
    (published,) = ann.get("audit/", action="offer")["results"]
    assert (published["party"], published["detail"]) == ("Alice", {})
    assert [error["pointer"] for error in ann.get("audit/", 422, since="x")["errors"]] == ["/since"]


def test_a_keys_life_is_in_the_log(ann: Desk) -> None:
    (made,) = ann.get("audit/", action="staff_key.made")["results"]

    assert (made["actor"], made["target"]) == ("ann@desk.example", f"staff_key:{ann.key.pk}")
    assert made["detail"]["after"]["scopes"] == ["desk:act", "desk:read"]
    assert ann.text not in json.dumps(made) and ann.key.key_sha256 not in json.dumps(made)
