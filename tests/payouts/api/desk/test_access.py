"""Who gets to the desk's addresses, and by what: every one of them, as the OpenAPI document lists them."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from allauth.mfa.models import Authenticator
from django.utils import timezone
from rest_framework.test import APIClient

from marketplace.api.keys import create_api_key
from marketplace.api.staff_keys import revoke_staff_key
from marketplace.models import ApiKey, AuditEvent, StaffAct, StaffKey, User
from payouts.api.desk.urls import paths
from payouts.models import ReconciliationRun
from tests.desk import BASE, Desk, code_of

#: The acts that only propose, stop or look; every other one needs the person's one-time code.
WITHOUT_CODE = {
    "applications/",
    "applications/{id}/reject/",
    "corrections/{id}/reject/",
    "divisions/{id}/corrections/",
    "manual-entries/",
    "manual-entries/{id}/reject/",
    "outgoing-transfers/{id}/reject/",
    "payout-runs/{id}/pause/",
    "payout-runs/{id}/reject/",
    "proofs/",
    "rail-confirmations/{id}/reject/",
    "rail-exports/",
    "rail-exports/{id}/reject/",
    "rail-payouts/{id}/returned/",
    "rail-payouts/{id}/sent/",
    "receipts/",
    "receipts/{id}/reject/",
    "reconciliations/",
    "refunds/{id}/sent/",
    "settlements/{id}/reject/",
    "stripe-events/{id}/retry/",
    "stripe-events/{id}/settlements/",
    "unapplied/",
    "unapplied/{id}/returns/",
}
#: A POST for its code alone, which does nothing that could be done twice: so without an Idempotency-Key.
READ_BY_CODE = "rail-exports/{id}/csv/"
GIVEN = {
    "id": 1,
    "currency": "USD",
    "code": "bank:USD",
    "month": "2028-03",
    "reference": "INV-2028-000001",
    "year": 2028,
}


@pytest.fixture
def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, template below the desk, operation) of each."""
    return [
        (method, path.removeprefix(BASE), operation)
        for path, methods in document["paths"].items()
        if path.startswith(BASE)
        for method, operation in methods.items()
    ]


def call(client: APIClient, method: str, template: str, **headers: str) -> Any:
    return getattr(client, method)(BASE + template.format(**GIVEN), format="json", headers=headers)


def statuses(client: APIClient, operations: Any, **headers: str) -> dict[str, tuple[int, str]]:
    found = {}
    for method, template, _ in operations:
        answer = call(client, method, template, **headers)
        assert answer["Content-Type"] == "application/problem+json", (method, template, answer.content)
        found[f"{method} {template}"] = (answer.status_code, answer.json()["code"])
    return found


def test_the_document_has_every_address_and_says_what_it_takes(operations: Any) -> None:
    listed = {template for _, template, _ in operations}

    assert listed == {re.sub(r"<\w+:(\w+)>", r"{\1}", str(one.pattern)) for one in paths}
    assert len(operations) > 100
    for method, template, operation in operations:
        headers = {one["name"]: one["required"] for one in operation.get("parameters", []) if one["in"] == "header"}
        scope = "desk:read" if method == "get" else "desk:act"
        assert operation["security"] == [{"staffKey": []}] and f"scope `{scope}`" in operation["description"]
        wanted = {} if method == "get" or template == READ_BY_CODE else {"Idempotency-Key": True}
        if method == "post" and template not in WITHOUT_CODE:
            wanted["One-Time-Code"] = True
        assert headers == wanted, (method, template)
        assert operation["summary"] and "default" in operation["responses"]


def test_lists_are_paged_and_their_pages_bounded(operations: Any) -> None:
    """What is not paged is small by its nature: the chart, the currencies, one thing."""
    unbounded = set()
    for method, template, operation in operations:
        schema = operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
        if method == "get" and schema.get("type") == "array":
            unbounded.add(template)
    assert unbounded == {"trial-balance/", "payables/totals/"}
    for one in paths:
        view = one.callback.view_class
        pages = getattr(view, "pagination_class", None)
        if pages is not None:
            assert (getattr(pages, "max_page_size", None) or pages.max_limit) == 200, one.pattern


def test_without_a_key_there_is_nothing(db: Any, operations: Any) -> None:
    assert set(statuses(APIClient(), operations).values()) == {(401, "not_authenticated")}


def test_a_partys_key_opens_nothing_whatever_it_may(operations: Any, carol: Any) -> None:
    User.objects.filter(pk=carol.user.pk).update(is_staff=True)  # its owner is on the staff: the key is the party's
    carol.user.refresh_from_db()
    _, text = create_api_key(party=carol, user=carol.user, name="k", scopes=list(ApiKey.Scope.values))
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {text}")

    assert set(statuses(client, operations).values()) == {(401, "authentication_failed")}
    assert "A party's key is none" in call(client, "get", "refunds/").json()["detail"]


def test_a_staff_key_opens_nothing_of_a_partys(ann: Desk) -> None:
    refused = ann.client.get("/api/v1/orders/")

    assert (refused.status_code, refused.json()["code"]) == (401, "authentication_failed")


def test_a_session_of_staff_is_no_key(ann: Desk, client: Any) -> None:
    client.force_login(ann.user)

    assert client.get(f"{BASE}refunds/").status_code == 401


@pytest.fixture(params=["expired", "revoked", "no staff", "inactive", "no second factor"])
def ended(request: Any, ann: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Ann, whose key has just ended."""
    match request.param:
        case "expired":
            now = timezone.now
            monkeypatch.setattr(timezone, "now", lambda: now() + timedelta(days=30, seconds=1))
        case "revoked":
            revoke_staff_key(key=ann.key, user=ann.user)
        case "no staff":
            User.objects.filter(pk=ann.user.pk).update(is_staff=False)
        case "inactive":
            User.objects.filter(pk=ann.user.pk).update(is_active=False)
        case "no second factor":
            Authenticator.objects.filter(user=ann.user).delete()
    return ann


def test_a_key_that_has_ended_opens_nothing(ended: Desk, operations: Any) -> None:
    assert set(statuses(ended.client, operations).values()) == {(401, "authentication_failed")}
    assert StaffAct.objects.count() == 0


@pytest.mark.parametrize("lost", ["staff", "factor"])
def test_what_was_lost_and_came_back_brings_no_key_back(ann: Desk, lost: str) -> None:
    factor = Authenticator.objects.get(user=ann.user)
    if lost == "staff":
        for is_staff in (False, True):
            User.objects.filter(pk=ann.user.pk).update(is_staff=is_staff)
    else:
        factor.delete()
        Authenticator.objects.create(user=ann.user, type="totp", data=factor.data)

    ann.get("refunds/", 401)
    event = AuditEvent.objects.get(action="staff_key.ended")
    assert (event.target, event.detail["user"]) == (f"staff_key:{ann.key.pk}", ann.user.pk)


def test_each_method_needs_its_scope(db: Any, document: Any, ann: Desk, operations: Any) -> None:
    reads, acts = (Desk(document, ann.user, [scope]) for scope in StaffKey.Scope.values)

    found = statuses(reads.client, [one for one in operations if one[0] == "post"])
    assert set(found.values()) == {(403, "permission_denied")}
    found = statuses(acts.client, [one for one in operations if one[0] == "get"])
    assert set(found.values()) == {(403, "permission_denied")}
    assert acts.get("refunds/", 403)["detail"] == "This key lacks the scope 'desk:read'."
    assert ReconciliationRun.objects.count() == StaffAct.objects.count() == 0


def test_every_act_but_those_that_propose_stop_or_look_needs_a_code(ann: Desk, operations: Any) -> None:
    needing = [one for one in operations if one[0] == "post" and one[1] not in WITHOUT_CODE]

    found = statuses(ann.client, needing, **{"Idempotency-Key": "k"})

    assert set(found.values()) == {(403, "second_factor")}
    assert len(needing) > 15
    assert StaffAct.objects.count() == 0


def test_every_act_needs_an_idempotency_key(ann: Desk, operations: Any) -> None:
    for method, template, _ in operations:
        if method == "post" and template != READ_BY_CODE:
            code = {} if template in WITHOUT_CODE else {"One-Time-Code": code_of(ann.user)}
            refused = call(ann.client, method, template, **code)
            assert refused.status_code == 422, (template, refused.content)
            assert [error["pointer"] for error in refused.json()["errors"]] == ["Idempotency-Key"]


def test_what_is_not_there_is_not_found(ann: Desk, operations: Any) -> None:
    """Nor is a number too large for any table an error of ours."""
    for method, template, _ in operations:
        if "{id}" in template and method == "get":
            path = template.format(**GIVEN | {"id": 10**30})
            ann.get(path, 404)


def test_a_code_is_good_once_and_only_while_it_is_shown(ann: Desk, ben: Desk, ann_again: Desk) -> None:
    body = {"currency": "USD"}
    code = code_of(ann.user)
    ann.act("payout-runs/", body, 201, code=code)

    for desk in (ann, ann_again):
        refused = desk.refused("payout-runs/", body, "One-Time-Code", status=403, code=code)
        assert "used before" in refused["detail"]
    ben.refused("payout-runs/", body, "One-Time-Code", status=403, code=code_of(ann.user))
    ben.refused("payout-runs/", body, "One-Time-Code", status=403, code="no code")
    assert StaffAct.objects.count() == 1


def test_who_guesses_codes_is_stopped_before_the_right_one(ann: Desk) -> None:
    for _ in range(5):
        ann.refused("payout-runs/", {"currency": "USD"}, "One-Time-Code", status=403, code="000000x")

    stopped = ann.refused("payout-runs/", {"currency": "USD"}, "One-Time-Code", status=429)

    assert stopped["code"] == "too_many_codes"
    assert StaffAct.objects.count() == 0


def test_the_same_request_is_answered_as_the_first_and_another_one_refused(
    ann: Desk, ann_again: Desk, ben: Desk
) -> None:
    first = ann.act("reconciliations/", None, 201, key="one")
    again = ann_again.act("reconciliations/", None, 201, key="one")  # the same person
    other = ben.act("reconciliations/", None, 201, key="one")

    assert first == again and other["id"] != first["id"]
    assert ann.act("rail-exports/", {"currency": "USD"}, 409, key="one")["code"] == "idempotency_key_reused"
    assert ReconciliationRun.objects.count() == 2
    kept = StaffAct.objects.get(user=ann.user)
    assert (kept.key, kept.path, kept.answer_status) == (ann.key, f"{BASE}reconciliations/", 201)
    assert kept.answer == first


def test_what_was_refused_leaves_its_key_free(ann: Desk) -> None:
    ann.act("rail-exports/", {"currency": "USD"}, 409, key="one")  # nothing is due

    ann.act("reconciliations/", None, 201, key="one")

    assert StaffAct.objects.count() == 1


def test_a_limit_is_a_persons_whatever_their_keys(ann: Desk, ann_again: Desk, ben: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr("marketplace.api.throttling.PartyThrottle.THROTTLE_RATES", {"party": "2/min", "anon": "9/min"})

    assert [desk.client.get(f"{BASE}refunds/").status_code for desk in (ann, ann_again, ann, ben)] == [
        200,
        200,
        429,
        200,
    ]
    assert ann.client.get(f"{BASE}refunds/")["RateLimit"] == '"default";r=0'


def test_an_address_says_nothing_of_itself_by_other_methods(ann: Desk) -> None:
    for method in ("put", "patch", "delete", "options"):
        assert getattr(ann.client, method)(f"{BASE}refunds/").status_code in (403, 405), method


def test_an_act_is_the_persons_in_the_log(ann: Desk) -> None:
    run = ann.act("payout-runs/", {"currency": "EUR"}, 201)

    event = AuditEvent.objects.get(action="payout_run.requested")
    assert (event.actor, event.target) == (ann.user, f"payout_run:{run['id']}")
    assert run["started_by"] == "ann@desk.example"


def test_the_readmes_examples_are_calls_that_there_are(document: dict[str, Any]) -> None:
    text = (Path(__file__).resolve().parents[4] / "payouts" / "README.md").read_text()
    section = text.partition("## The desk's API")[2].partition("\n## ")[0].replace("\\\n", " ")
    calls = re.findall(r"curl (.+)", section)
    templates = {path: methods for path, methods in document["paths"].items() if path.startswith(BASE)}

    for one in calls:
        path = BASE + (re.search(r'"\$API/([^"?]+)', one) or ["", ""])[1]
        method = "post" if "-X POST" in one else "get"
        (template,) = [known for known in templates if re.fullmatch(known.replace("{id}", r"\d+"), path)]
        operation = templates[template][method]
        for header in operation.get("parameters", []):
            if header["in"] == "header":
                assert f'-H "{header["name"]}: ' in one, (one, header["name"])
        body = re.search(r"-d '(.+)'", one)
        if body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            schema |= {"components": document["components"]}
            jsonschema.Draft202012Validator(schema).validate(json.loads(body[1]))
    assert len(calls) == 6
