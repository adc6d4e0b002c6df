"""Reconciliation, Stripe's events and the audit log by a key."""

import json
from typing import Any

import pytest
from django.utils import timezone

from marketplace.models import AuditEvent
from marketplace.services import audit
from payouts.models import ReconciliationDifference, ReconciliationRun, StripeEvent
from tests.desk import Desk


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
