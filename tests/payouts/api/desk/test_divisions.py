"""Pools, divisions and their corrections by a key: read in pages, proposed by one person, booked by another."""

from typing import Any

import pytest

from marketplace.models import StaffAct
from marketplace.money import Money
from payouts import ledger
from payouts.models import Division, DivisionCorrection, RoyaltyPool
from payouts.services.proofs import check_books
from payouts.services.royalties import release_pool
from tests.desk import Desk
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import PublishedVersionFactory
from tests.factories.payouts import PoolFactory

DOLLAR = 1_000_000


@pytest.fixture
def pool(alice: Any, bob: Any) -> RoyaltyPool:
    """20 USD that wait for a result of alice's and bob's data."""
    made: RoyaltyPool = PoolFactory(
        amount=Money(20 * DOLLAR, "USD"), version=PublishedVersionFactory(contributions={alice: 4, bob: 4})
    )
    return made


@pytest.fixture
def wrong(pool: RoyaltyPool, alice: Any) -> Division:
    """All of it went to alice."""
    release_pool(pool=pool, result=PublishedResultFactory(license=pool.order_line.license, shares={alice: 1}))
    return Division.objects.get(pool=pool)


def usd(amount: str) -> dict[str, str]:
    return {"amount": amount, "currency": "USD"}


def test_pools_say_what_they_wait_for_and_what_is_left(pool: RoyaltyPool, ann: Desk) -> None:
    (seen,) = ann.get("pools/", state="waiting")["results"]

    assert (seen["id"], seen["left"], seen["state"], seen["division"]) == (pool.pk, usd("20.00"), "waiting", None)
    assert seen["account"] == pool.code
    assert ann.get("pools/", state="released")["results"] == []
    assert ann.get(f"pools/{pool.pk}/") == seen
    release_pool(pool=pool, result=None)
    assert ann.get("pools/", state="waiting")["results"] == []
    assert ann.get(f"pools/{pool.pk}/")["division"] == Division.objects.get().pk
    assert [error["pointer"] for error in ann.get("pools/", 422, state="gone")["errors"]] == ["/state"]


def test_a_divisions_lines_are_read_in_pages(pool: RoyaltyPool, ann: Desk, alice: Any, bob: Any) -> None:
    release_pool(pool=pool, result=None)
    division = Division.objects.get()
    path = f"divisions/{division.pk}/"

    seen = ann.get(path)
    first = ann.get(f"{path}lines/", page_size=1)
    second = ann.get(first["next"])

    assert (seen["amount"], seen["n_lines"], seen["model"], seen["corrections"]) == (usd("20.00"), 2, None, [])
    lines = first["results"] + second["results"]
    assert {line["party"]["id"]: line["amount"] for line in lines} == {alice.pk: usd("10.00"), bob.pk: usd("10.00")}
    assert second["next"] is None
    assert [one["id"] for one in ann.get("divisions/", q=str(division.pk))["results"]] == [division.pk]
    assert ann.get("divisions/", q="nothing like it")["results"] == []


def test_a_correction_takes_two_people_who_saw_every_difference(
    wrong: Division, ann: Desk, ann_again: Desk, ben: Desk, alice: Any, bob: Any
) -> None:
    asked = {"reason": "The wrong file was measured."}
    made, again = (ann.act(f"divisions/{wrong.pk}/corrections/", asked, 201, key="k", code="") for _ in range(2))
    path = f"corrections/{made['id']}/"
    assert made == again and (made["status"], made["proposed_by"]) == ("proposed", "ann@desk.example")
    differences = {line["party"]["id"]: line["difference"] for line in ann.get(f"{path}lines/")["results"]}
    assert differences == {alice.pk: usd("-10.00"), bob.pk: usd("10.00")}

    before = ledger.balances()
    for desk in (ann, ann_again):
        assert desk.act(f"{path}approve/", None, 403)["code"] == "four_eyes"
    ben.refused(f"{path}approve/", None, "One-Time-Code", status=403, code="")
    assert ledger.balances() == before
    booked = ben.act(f"{path}approve/")

    assert (booked["status"], booked["decided_by"]) == ("booked", "ben@desk.example")
    assert ann.get("corrections/", status="booked")["results"] == [booked]
    assert ann.get("corrections/", status="proposed")["results"] == []
    assert ann.get(path) == booked == ann.get(f"divisions/{wrong.pk}/")["corrections"][0]
    assert ben.act(f"{path}reject/", None, 409, code="")["code"] == "correction_not_possible"
    assert check_books().findings == []


def test_a_correction_by_a_result_is_rejected_without_a_code(
    wrong: Division, ann: Desk, ben: Desk, alice: Any, bob: Any
) -> None:
    assert wrong.result is not None
    result = PublishedResultFactory(
        disclosure=wrong.result.disclosure, version=wrong.version, shares={alice: 1, bob: 3}
    )
    made = ann.act(f"divisions/{wrong.pk}/corrections/", {"result": result.pk, "reason": "Swapped."}, 201, code="")
    assert made["result"] == result.pk and made["model"] == result.model.slug

    assert ben.act(f"corrections/{made['id']}/reject/", code="")["status"] == "rejected"


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({}, "/reason"),
        ({"reason": " "}, "/reason"),
        ({"reason": "x" * 2_001}, "/reason"),
        ({"reason": "r", "result": 999_999_999}, "/result"),
        ({"reason": "r", "result": "first"}, "/result"),
    ],
)
def test_a_correction_that_cannot_be_leaves_nothing(wrong: Division, ann: Desk, given: Any, pointer: str) -> None:
    ann.refused(f"divisions/{wrong.pk}/corrections/", given, pointer, code="")

    assert DivisionCorrection.objects.count() == StaffAct.objects.count() == 0
