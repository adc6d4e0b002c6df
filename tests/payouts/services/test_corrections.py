"""Our own errors in divisions: what a correction moves, whom it takes two of, and what it never touches."""

from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction

from attribution.models import AttributionResult
from marketplace import clock
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.models import License, User
from marketplace.money import Money
from payouts import chart, ledger
from payouts.errors import CorrectionNotPossible, FourEyes
from payouts.models import Division, DivisionCorrection, Payout, Refund
from payouts.selectors import earnings_of, taken_back_of
from payouts.services import corrections, recoveries, refunds
from payouts.services.proofs import check_books
from payouts.services.royalties import release_pool
from payouts.services.statements import statement
from tests.factories.attribution import PublishedResultFactory
from tests.factories.marketplace import PublishedVersionFactory
from tests.factories.payouts import PoolFactory

DOLLAR = 1_000_000


@pytest.fixture
def people(db: Any) -> tuple[User, User]:
    """Two of the finance staff."""
    one, two = (
        User.objects.create_user(f"{name}@example.org", "correct horse battery staple", is_staff=True)
        for name in ("fay", "gil")
    )
    return one, two


@pytest.fixture
def wrong(alice: Any, bob: Any) -> Division:
    """A pool of 20.00 of which alice got 14.00 and bob 6.00."""
    pool = PoolFactory(
        amount=Money(20 * DOLLAR, "USD"), version=PublishedVersionFactory(contributions={alice: 4, bob: 4})
    )
    license = License.objects.get(order_line=pool.order_line)
    release_pool(pool=pool, result=PublishedResultFactory(license=license, shares={alice: 7, bob: 3}))
    return Division.objects.get(pool=pool)


def right(division: Division, **weights: Any) -> AttributionResult:
    assert division.result is not None
    return PublishedResultFactory(disclosure=division.result.disclosure, version=division.version, **weights)


def correct(
    division: Division, people: tuple[User, User], result: Any, reason: str = "The labels were swapped."
) -> Any:
    """Proposed by one, approved by another."""
    proposed = corrections.propose_correction(division=division, result=result, reason=reason, by=people[0])
    return corrections.decide_correction(correction=proposed, approved=True, by=people[1])


def test_a_correction_moves_the_difference_and_leaves_the_division(
    wrong: Division, people: Any, alice: Any, bob: Any
) -> None:
    cleo = PublishedVersionFactory().dataset.owner
    result = right(wrong, shares={alice: 1, bob: 2, cleo: 1})

    booked = correct(wrong, people, result)

    assert [(line.party_id, line.difference_micros) for line in booked.lines.order_by("party")] == sorted(
        [(alice.pk, -9 * DOLLAR), (bob.pk, 4 * DOLLAR), (cleo.pk, 5 * DOLLAR)]
    )
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -5 * DOLLAR,
        chart.payable(bob, "USD"): -10 * DOLLAR,
        chart.payable(cleo, "USD"): -5 * DOLLAR,
    }
    assert ledger.balances(prefix="clearing") == {}
    assert sum(line.amount_micros for line in wrong.lines.all()) == 20 * DOLLAR
    assert check_books().findings == []


def test_what_was_sent_already_comes_out_of_later_earnings_only(
    wrong: Division, people: Any, alice: Any, bob: Any
) -> None:
    run = Payout.run.field.related_model.objects.create(currency="USD", due_until=clock.now(), key="by hand")
    payout = Payout.objects.create(
        run=run, party=alice, destination="acct_1", amount_micros=14 * DOLLAR, currency="USD", intended_at=clock.now()
    )
    intent = {chart.payable(alice, "USD"): 14 * DOLLAR, chart.in_transit("USD"): -14 * DOLLAR}
    ledger.post(key=f"payout:{payout.pk}:intent", kind="payout_intent", postings=intent)

    correct(wrong, people, right(wrong, shares={alice: 1, bob: 3}))

    assert ledger.balances(prefix="payable") == {chart.payable(bob, "USD"): -15 * DOLLAR}
    assert recoveries.owing() == {(alice.pk, "USD"): Money(9 * DOLLAR, "USD")}
    assert check_books().findings == []


def test_a_correction_is_corrected_and_refunds_follow_the_latest_version(
    wrong: Division, people: Any, alice: Any, bob: Any
) -> None:
    correct(wrong, people, right(wrong, shares={bob: 1}))
    correct(wrong, people, right(wrong, shares={alice: 1, bob: 1}), reason="The first correction was wrong too.")
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -10 * DOLLAR,
        chart.payable(bob, "USD"): -10 * DOLLAR,
    }
    assert wrong.order_line is not None

    refunds.request_refund(
        payment=wrong.order_line.order.payment,
        amount=Money(5 * DOLLAR, "USD"),
        reason=Refund.Reason.GOODWILL,
        note="asked by mail",
        user=people[0],
        key="one",
    )

    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -8 * DOLLAR,
        chart.payable(bob, "USD"): -8 * DOLLAR,
    }
    assert check_books().findings == []
    assert sorted(DivisionCorrection.objects.values_list("number", flat=True)) == [2, 3]


def test_what_went_back_before_is_not_divided_anew(wrong: Division, people: Any, alice: Any, bob: Any) -> None:
    assert wrong.order_line is not None
    refunds.request_refund(
        payment=wrong.order_line.order.payment,
        amount=Money(12_500_000, "USD"),
        reason=Refund.Reason.GOODWILL,
        note="half of it",
        user=people[0],
        key="one",
    )

    booked = correct(wrong, people, None)

    assert booked.amount == Money(10 * DOLLAR, "USD")
    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -5 * DOLLAR,
        chart.payable(bob, "USD"): -5 * DOLLAR,
    }
    assert check_books().findings == []


def test_payees_see_a_correction_as_an_adjustment_with_its_reason(
    wrong: Division, people: Any, alice: Any, bob: Any
) -> None:
    correct(wrong, people, right(wrong, shares={bob: 1}))

    now = clock.now()
    for party, adjusted, earned in ((alice, -14, 14), (bob, 14, 6)):
        found = statement(party=party, year=now.year, month=now.month).currencies[0]
        assert [(one.what, one.amount) for one in found.adjustments] == [
            ("our error in an earlier division, corrected", Money(adjusted * DOLLAR, "USD"))
        ]
        assert (found.earned, found.recomputes) == (Money(earned * DOLLAR, "USD"), True)
    assert [(one.amount, one.reason) for one in taken_back_of(alice)] == [
        (Money(14 * DOLLAR, "USD"), "We had divided it wrongly, and corrected that: The labels were swapped.")
    ]
    assert [of.pending for of in earnings_of(bob)] == [Money(20 * DOLLAR, "USD")]


def test_one_person_cannot_correct_alone(wrong: Division, people: Any, bob: Any, mallory: Any) -> None:
    result = right(wrong, shares={bob: 1})
    before = ledger.balances()

    with pytest.raises(FourEyes, match="Somebody else"), transaction.atomic():
        correct(wrong, (people[0], people[0]), result)
    with pytest.raises(NotAllowed, match="Only staff"):
        corrections.propose_correction(division=wrong, result=result, reason="Mine.", by=mallory.user)
    proposed = corrections.propose_correction(division=wrong, result=result, reason="For later.", by=people[0])
    with pytest.raises(IntegrityError, match="correction_needs_a_second_person"), transaction.atomic():
        DivisionCorrection.objects.update(status="booked", decided_by=people[0], decided_at=clock.now())
    with pytest.raises(IntegrityError, match="lost"), transaction.atomic():
        DivisionCorrection.objects.update(status="booked", decided_by=people[1], decided_at=clock.now())
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # approved, and nothing was booked

    assert DivisionCorrection.objects.get() == proposed
    assert ledger.balances() == before


def test_a_decision_is_made_once_and_a_rejected_proposal_books_nothing(
    wrong: Division, people: Any, alice: Any, bob: Any
) -> None:
    before = ledger.balances()
    proposed = corrections.propose_correction(
        division=wrong, result=right(wrong, shares={bob: 1}), reason="Perhaps.", by=people[0]
    )
    with pytest.raises(CorrectionNotPossible, match="waits for approval"):
        corrections.propose_correction(division=wrong, result=None, reason="Another.", by=people[1])

    for _ in range(2):
        corrections.decide_correction(correction=proposed, approved=False, by=people[0])
    with pytest.raises(CorrectionNotPossible, match="rejected already"):
        corrections.decide_correction(correction=proposed, approved=True, by=people[1])
    with pytest.raises(IntegrityError, match="decided once"), transaction.atomic():
        DivisionCorrection.objects.filter(pk=proposed.pk).update(reason="Nicer words.")

    assert ledger.balances() == before
    again = correct(wrong, people, right(wrong, shares={alice: 1, bob: 3}))
    after = ledger.balances()
    corrections.decide_correction(correction=again, approved=True, by=people[1])
    assert (again.number, ledger.balances()) == (2, after)


def test_a_proposal_is_refused_when_something_went_back_since(wrong: Division, people: Any, bob: Any) -> None:
    proposed = corrections.propose_correction(
        division=wrong, result=right(wrong, shares={bob: 1}), reason="Slowly.", by=people[0]
    )
    assert wrong.order_line is not None
    refunds.request_refund(
        payment=wrong.order_line.order.payment,
        amount=Money(5 * DOLLAR, "USD"),
        reason=Refund.Reason.GOODWILL,
        note="in between",
        user=people[0],
        key="one",
    )
    before = ledger.balances()

    with pytest.raises(CorrectionNotPossible, match="since this was proposed"):
        corrections.decide_correction(correction=proposed, approved=True, by=people[1])

    proposed.refresh_from_db()
    assert (proposed.status, ledger.balances()) == ("proposed", before)


def test_corrections_that_cannot_be_are_refused_in_words(wrong: Division, people: Any, alice: Any, bob: Any) -> None:
    elsewhere = PublishedResultFactory(version=PublishedVersionFactory())
    for refusal, result, reason in (
        (InvalidInput, None, "  "),
        (InvalidInput, elsewhere, "By other data."),
        (CorrectionNotPossible, right(wrong, shares={alice: 7, bob: 3}), "The same again."),
    ):
        with pytest.raises(refusal):
            corrections.propose_correction(division=wrong, result=result, reason=reason, by=people[0])

    assert DivisionCorrection.objects.count() == 0


def test_two_approvals_at_once_book_a_correction_once(committed_db: str) -> None:
    from tests.factories.marketplace import PartyFactory
    from tests.marketplace.services.test_orders import at_once

    people = [
        User.objects.create_user(f"{name}@example.org", "correct horse battery staple", is_staff=True)
        for name in ("fay", "gil", "hal")
    ]
    alice, bob = PartyFactory(), PartyFactory()
    pool = PoolFactory(
        amount=Money(20 * DOLLAR, "USD"), version=PublishedVersionFactory(contributions={alice: 4, bob: 4})
    )
    license = License.objects.get(order_line=pool.order_line)
    release_pool(pool=pool, result=PublishedResultFactory(license=license, shares={alice: 1}))
    proposed = corrections.propose_correction(
        division=Division.objects.get(), result=None, reason="Nobody was counted.", by=people[0]
    )

    at_once(4, lambda n: corrections.decide_correction(correction=proposed, approved=True, by=people[1 + n % 2]).pk)

    assert ledger.balances(prefix="payable") == {
        chart.payable(alice, "USD"): -10 * DOLLAR,
        chart.payable(bob, "USD"): -10 * DOLLAR,
    }
    assert check_books().findings == []
