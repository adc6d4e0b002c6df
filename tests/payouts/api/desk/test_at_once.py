"""The same act asked for at once, by threads of one person: it happens once, and a code opens once."""

from collections import Counter
from typing import Any

from marketplace.models import StaffAct, StaffKey
from payouts.models import PayoutRun, ReconciliationRun
from tests.desk import BASE, Desk, code_of
from tests.factories.marketplace import UserFactory
from tests.marketplace.services.test_orders import at_once

N = 5


def post(desk: Desk, path: str, headers: dict[str, str], body: Any = None) -> Any:
    return desk.client.post(BASE + path, body, format="json", headers=headers)


def ann(document: dict[str, Any]) -> Desk:
    return Desk(document, UserFactory(is_staff=True), list(StaffKey.Scope.values))


def test_one_key_sent_by_several_at_once_is_one_act(committed_db: str, document: dict[str, Any]) -> None:
    desk = ann(document)

    answers = at_once(N, lambda n: post(desk, "reconciliations/", {"Idempotency-Key": "one"}))

    assert {answer.status_code for answer in answers} == {201}
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert ReconciliationRun.objects.count() == StaffAct.objects.count() == 1


def test_one_code_sent_by_several_at_once_opens_once(committed_db: str, document: dict[str, Any]) -> None:
    desk = ann(document)

    code = code_of(desk.user)

    def ask(n: int) -> Any:
        return post(desk, "payout-runs/", {"Idempotency-Key": f"{n}", "One-Time-Code": code}, {"currency": "USD"})

    answers = at_once(N, ask)

    assert Counter(answer.status_code for answer in answers) == {201: 1, 403: N - 1}
    assert PayoutRun.objects.count() == StaffAct.objects.count() == 1
