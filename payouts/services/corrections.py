"""Our error in a division, put right: proposed with every difference in sight, booked once a second person approves.

A newer result is no error: it divides what comes later. A correction is a new version of the division. What it takes from a
payee comes out of what they were not sent yet, and beyond that out of later earnings; nobody is asked to pay anything in.
"""

import logging
from collections import defaultdict

from django.db import transaction
from django.db.models import Max, Q, Sum

from attribution.models import AttributionResult
from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts.errors import CorrectionNotPossible, FourEyes, ResultNotPublished
from payouts.models import (
    CorrectionLine,
    Dispute,
    Division,
    DivisionCorrection,
    DivisionLine,
    Payment,
    Reclaim,
)
from payouts.services import clawbacks, recoveries
from payouts.services.divisions import credit_gains, divided_by, dues_of, pots_of

logger = logging.getLogger(__name__)

Status = DivisionCorrection.Status
Place = tuple[int, str]  # party and role


@transaction.atomic
def propose_correction(
    *, division: Division, result: AttributionResult | None, reason: str, by: User
) -> DivisionCorrection:
    """Divide anew what a division still gives, and keep every difference for a second person to look at; nothing is booked.

    Args:
        result: the published result by which it should have been divided; None: by count, as the counts are now.
        reason: what went wrong, in words; the payees read it.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reason, or a result that did not measure this version.
        ResultNotPublished: its shares may still change.
        CorrectionNotPossible: another one waits, its payment is disputed, or nothing would change.
    """
    require_staff(user=by, to="correct a division")
    if not reason.strip():
        raise InvalidInput("Say what went wrong, in words: the payees read it.", pointers={"/reason": "missing"})
    if result is not None and result.status != AttributionResult.Status.PUBLISHED:
        raise ResultNotPublished(f"Result {result.pk} is still {result.status}; money waits for published shares.")
    if result is not None and not result.shares.filter(version=division.version_id).exists():
        raise InvalidInput(
            f"Result {result.number} of {result.model.name} did not measure {division.version}.",
            pointers={"/result": "of other data"},
        )
    if division.source == Division.Source.CORRECTION:
        raise InvalidInput("Correct the division itself, not its correction.", pointers={"/division": "a correction"})
    _hold_payment(division)
    if division.corrections.filter(status=Status.PROPOSED).exists():
        raise CorrectionNotPossible("A correction of this division waits for approval; decide that one first.")
    before = _standing(division)
    amount = Money(sum(before.values()), division.currency)
    if not amount:
        raise CorrectionNotPossible("All that this division gave has gone back; there is nothing to divide anew.")
    after, weights, counts, result = _anew(division, amount, result)
    if after == {place: micros for place, micros in before.items() if micros}:
        raise CorrectionNotPossible("Every payee would have what they have now; there is nothing to correct.")
    last = division.corrections.filter(status=Status.BOOKED).aggregate(last=Max("number"))["last"]
    correction = DivisionCorrection.objects.create(
        division=division,
        number=(last or 1) + 1,
        result=result,
        reason=reason.strip(),
        amount_micros=amount.micros,
        proposed_by=by,
        proposed_at=clock.now(),
    )
    CorrectionLine.objects.bulk_create(
        (
            CorrectionLine(
                correction=correction,
                party_id=party,
                role=role,
                n_records=counts.get((party, role), 0),
                weight=weights.get((party, role), 0),
                before_micros=before.get((party, role), 0),
                after_micros=after.get((party, role), 0),
            )
            for party, role in sorted(before.keys() | after.keys())
        ),
        batch_size=1_000,
    )
    _note(correction, "correction.proposed", by)
    return correction


@transaction.atomic
def decide_correction(*, correction: DivisionCorrection, approved: bool, by: User) -> DivisionCorrection:
    """Book a proposed correction, or reject it; the second call with the same decision finds it decided.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user proposed it.
        CorrectionNotPossible: it was decided otherwise, its payment is disputed, or the division has changed since.
    """
    require_staff(user=by, to="correct a division")
    payment = _hold_payment(correction.division)
    correction = (
        DivisionCorrection.objects.select_for_update(of=("self",))
        .select_related("division__order_line", "division__invoice_line", "division__version", "result")
        .get(pk=correction.pk)
    )
    wanted = Status.BOOKED if approved else Status.REJECTED
    if correction.status == wanted:
        return correction
    if correction.status != Status.PROPOSED:
        raise CorrectionNotPossible(f"This correction was {correction.status} already.")
    if approved and by.pk == correction.proposed_by_id:
        raise FourEyes("Somebody else has to approve it: you proposed it.")
    if approved:
        _book(correction, payment)
    correction.status, correction.decided_by, correction.decided_at = wanted, by, clock.now()
    correction.save(update_fields=["status", "decided_by", "decided_at"])
    _note(correction, f"correction.{wanted.value}", by)
    return correction


def _book(correction: DivisionCorrection, payment: Payment) -> None:
    recoveries.lock(payment.currency)
    division = correction.division
    lines = {(line.party_id, line.role): line for line in correction.lines.all()}
    standing = _standing(division)
    if {place: line.before_micros for place, line in lines.items() if line.before_micros} != standing:
        raise CorrectionNotPossible("Something went back since this was proposed; reject it and propose it anew.")
    missing = {place: -line.difference_micros for place, line in lines.items()}
    losses: dict[int, int] = {}
    for place, pk, left in _lefts(division):
        if missing[place] > 0:
            losses[pk] = min(left, missing[place])
            missing[place] -= losses[pk]
    clawbacks.take_for_correction(correction=correction, payment=payment, losses=losses)
    credit_gains(correction)
    changed = {party for (party, _), line in lines.items() if line.difference_micros}
    recoveries.net(parties=changed, currency=payment.currency)
    logger.info("Corrected division=%s correction=%s micros=%s", division.pk, correction.pk, sum(losses.values()))


def _lefts(division: Division) -> list[tuple[Place, int, int]]:
    """Each line of the division and of what its corrections added: whose it is, its id, what reclaims have left of it."""
    mine = Q(division=division) | Q(division__corrects__division=division)
    lines = DivisionLine.objects.filter(mine).order_by("pk")
    taken = dict(
        Reclaim.objects.filter(division_line__in=lines, clawback_line__clawback__undo=None)
        .values("division_line")
        .annotate(sum=Sum("amount_micros"))
        .values_list("division_line", "sum")
    )
    found = [
        ((party, role), pk, micros - int(taken.get(pk, 0)))
        for pk, party, role, micros in lines.values_list("pk", "party", "role", "amount_micros")
    ]
    return [(place, pk, left) for place, pk, left in found if left]


def _standing(division: Division) -> dict[Place, int]:
    standing: dict[Place, int] = defaultdict(int)
    for place, _, left in _lefts(division):
        standing[place] += left
    return dict(standing)


def _anew(
    division: Division, amount: Money, result: AttributionResult | None
) -> tuple[dict[Place, int], dict[Place, int], dict[Place, int], AttributionResult | None]:
    """What each gets of the amount by the result, with the weight and the records behind it; and the result, if it gave weights."""
    pots = pots_of(version=division.version, amount=amount, labellers_bps=division.labellers_bps, result=result)
    after, weights, counts = {}, {}, {}
    for pot in pots:
        for due in dues_of(pot):
            place = (due.party, pot.role.value)
            after[place], weights[place], counts[place] = due.micros, due.weight, due.n_records
    return after, weights, counts, divided_by(pots, result)[0]


def payment_of(division: Division) -> Payment:
    """What was paid of which this division divides a part."""
    if division.invoice_line is not None:
        invoice = division.invoice_line.invoice
        payment: Payment = (invoice.carried_into or invoice).payment
        return payment
    assert division.order_line is not None
    return Payment.objects.get(order=division.order_line.order_id)


def _hold_payment(division: Division) -> Payment:
    payment = Payment.objects.select_for_update(of=("self",)).get(pk=payment_of(division).pk)
    if payment.disputes.filter(status__in=Dispute.OPEN).exists():
        raise CorrectionNotPossible("Its payment is disputed at the card's bank; correct it once that is decided.")
    return payment


def _note(correction: DivisionCorrection, action: str, by: User) -> None:
    audit.record(
        actor=by,
        action=action,
        target=f"division:{correction.division_id}",
        correction=correction.pk,
        version=correction.number,
        amount_micros=correction.amount_micros,
        currency=correction.division.currency,
    )
