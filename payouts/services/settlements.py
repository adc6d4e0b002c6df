"""Failed events of Stripe's, settled by staff: tried again, explained, or their surplus money refunded; two of them for the latter.

    failed → tried again (the cause has passed) → done, or failed again
           → explained: it was settled otherwise, the reason says how; nothing names it any more
           → its charge is for nothing that we sell: booked to `surplus`, refunded, and the event applied

A surplus charge is a second payment of one order, one of a cancelled order or of a void invoice, or of another amount than was
asked for. What it is, Stripe is asked, when it is proposed and again when it is confirmed.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import Q

from marketplace import clock, jobs
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, gateway
from payouts.errors import AlreadyDecided, FourEyes, SettlementNotPossible
from payouts.models import EventSettlement, JournalEntry, Movement, Payment, StripeEvent, SurplusCharge
from payouts.services import movements, refunds

logger = logging.getLogger(__name__)

Act, Status = EventSettlement.Act, EventSettlement.Status
MAX_REASON = 2_000


@dataclass(frozen=True)
class Surplus:
    """A charge that is for nothing, and what of it is on no way back."""

    charge: gateway.Charge
    payment: Payment | None  # that it names
    left: Money


def object_of(event: StripeEvent) -> dict[str, Any]:
    """What the event is about, as it was told."""
    thing: dict[str, Any] = json.loads(event.payload)["data"]["object"]
    return thing


def find_surplus(event: StripeEvent) -> Surplus | None:
    """The charge behind the event, if its money belongs to nobody here and can be given back; Stripe is asked.

    Raises:
        SettlementNotPossible: there is such a charge, and it cannot be refunded from here; the message says why.
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    if event.endpoint != StripeEvent.Endpoint.PLATFORM:
        return None
    thing = object_of(event)
    if thing.get("object") == "checkout.session":
        charge_id = gateway.get_checkout(thing["id"]).charge
    elif thing.get("object") == "charge":
        charge_id = thing["id"]
    else:
        return None
    if not charge_id or Payment.objects.filter(charge_id=charge_id).exists():
        return None
    charge = gateway.get_charge(charge_id)
    if not charge.is_paid:
        return None
    known = SurplusCharge.objects.filter(charge_id=charge_id).first()
    left = refunds.left_of(known) if known else Money.from_minor(charge.amount_minor, charge.currency)
    if not left:
        return None
    if charge.booked is None:
        raise SettlementNotPossible("Stripe has not booked this charge yet; try again in some minutes.")
    if charge.booked.currency != charge.currency:
        raise SettlementNotPossible(
            f"Stripe booked this charge of {left} in {charge.booked.currency}. Refund it in Stripe's dashboard, book its balance "
            "transactions by manual entries, and settle the event otherwise."
        )
    if charge.is_disputed:
        raise SettlementNotPossible(
            "The charge is disputed at the card's bank, which decides on it. Book what it takes by manual entries, and settle the "
            "event otherwise."
        )
    named = charge.metadata.get("payment", "")
    payment = Payment.objects.filter(pk=int(named)).first() if named.isascii() and named.isdigit() else None
    return Surplus(charge, payment, left)


def retry(*, event: StripeEvent, user: User) -> bool:
    """Apply a failed event once more, whatever it failed by; False if it is not failed, or was settled.

    Raises:
        NotAllowed: the user is not staff.
    """
    require_staff(user=user, to="try an event again")
    with transaction.atomic():
        before = {"status": event.status, "error_code": event.error_code}
        is_open = StripeEvent.unsettled().filter(pk=event.pk).exists()
        if not is_open or not jobs.reopen(event, even_refused=True):
            return False
        audit.record(actor=user, action="stripe_event.retried", target=f"stripe_event:{event.pk}", before=before)
    logger.info("Tries again event=%s by=%s", event.event_id, user.pk)
    return True


def propose(*, event: StripeEvent, act: EventSettlement.Act, reason: str, user: User) -> EventSettlement:
    """Propose how a failed event is settled; nothing happens before another one of the staff confirms it.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reason in words.
        SettlementNotPossible: it is not failed, is settled, waits for a decision already, or its charge is not surplus.
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    require_staff(user=user, to="settle an event")
    reason = reason.strip()
    if not 1 <= len(reason) <= MAX_REASON:
        raise InvalidInput("Say why, in words: the auditor will ask.", pointers={"/reason": "missing"})
    surplus = find_surplus(event) if act == Act.REFUND else None
    if act == Act.REFUND and surplus is None:
        raise SettlementNotPossible("There is no surplus charge behind this event, so there is nothing to refund.")
    with transaction.atomic():
        event = StripeEvent.objects.select_for_update(of=("self",)).get(pk=event.pk)
        if known := event.settlements.filter(status=Status.PROPOSED).first():
            if (known.act, known.reason, known.proposed_by_id) == (act, reason, user.pk):
                return known  # a second click
            raise SettlementNotPossible(f"{known.proposed_by} has proposed a settlement; it is to be decided first.")
        if not is_open(event):
            raise SettlementNotPossible("This event needs no settlement: it did not fail, or it is settled.")
        settlement = EventSettlement.objects.create(
            event=event,
            object_id=object_of(event)["id"],
            act=act,
            reason=reason,
            charge_id=surplus.charge.id if surplus else "",
            amount_micros=surplus.left.micros if surplus else None,
            currency=surplus.left.currency if surplus else "",
            proposed_by=user,
        )
        _note(settlement, "stripe_event.settlement_proposed", user, after={"act": act.value})
    return settlement


def confirm(*, settlement: EventSettlement, user: User, note: str = "") -> EventSettlement:
    """Do what was proposed, once: nothing names the event any more, or its surplus charge is booked and goes back.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user proposed it.
        AlreadyDecided: another one was first.
        SettlementNotPossible: its charge is not surplus any more, or less of it is left; reject it.
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    require_staff(user=user, to="settle an event")
    settlement.refresh_from_db()
    if settlement.act == Act.EXPLAINED or settlement.status != Status.PROPOSED:
        return _decide(settlement, user, Status.CONFIRMED, note)
    if settlement.proposed_by_id == user.pk:
        raise FourEyes("You proposed it; another one of the staff must confirm it.")
    # Asked before any row is held: what Stripe says of a charge and its refunds only grows.
    surplus = find_surplus(settlement.event)
    if surplus is None or surplus.charge.id != settlement.charge_id or surplus.left != settlement.amount:
        raise SettlementNotPossible("The charge is not what it was when this was proposed; reject it, and look again.")
    given_back = [one for one in gateway.refunds_of(surplus.charge.id) if not one.has_failed]
    with transaction.atomic():
        decided = _decide(settlement, user, Status.CONFIRMED, note)
        row = _book(surplus, settlement.event)
        for answer in reversed(given_back):
            refunds.write_down(answer)  # by somebody in Stripe's dashboard
        if left := refunds.left_of(row):
            refunds.refund_surplus(
                surplus=row, amount=left, note=settlement.reason, user=user, key=f"settlement:{settlement.pk}"
            )
        # Whatever was told of the charge and could not be booked has its place now.
        told = Q(payload__contains=surplus.charge.id) | Q(payload__contains=surplus.charge.payment_intent)
        for event in StripeEvent.unsettled().filter(told).order_by("pk"):
            jobs.reopen(event, even_refused=True)
    return decided


def reject(*, settlement: EventSettlement, user: User, note: str) -> EventSettlement:
    """Decide that it is not settled so; whoever proposed it may take it back.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reason was given.
        AlreadyDecided: another one was first.
    """
    if not note.strip():
        what = "withdrawn" if settlement.proposed_by_id == user.pk else "rejected"
        raise InvalidInput(f"Say why it is {what}.", pointers={"/note": "missing"})
    return _decide(settlement, user, Status.REJECTED, note)


def settled_objects() -> set[str]:
    """What the explained events are about: a sweep that finds the same finds nothing new."""
    explained = EventSettlement.objects.filter(act=Act.EXPLAINED, status=Status.CONFIRMED)
    return set(explained.values_list("object_id", flat=True))


@transaction.atomic
def _decide(settlement: EventSettlement, user: User, status: EventSettlement.Status, note: str) -> EventSettlement:
    require_staff(user=user, to="settle an event")
    held = EventSettlement.objects.select_for_update(of=("self",)).get(pk=settlement.pk)
    if status == Status.CONFIRMED and held.proposed_by_id == user.pk:
        raise FourEyes("You proposed it; another one of the staff must confirm it.")
    if held.status != Status.PROPOSED:
        if (held.status, held.decided_by_id) == (status, user.pk):
            return held  # a second click
        is_own = held.status == Status.REJECTED and held.decided_by_id == held.proposed_by_id
        raise AlreadyDecided(f"{held.decided_by} has {'withdrawn' if is_own else held.status} it.")
    held.status, held.decided_by, held.decided_at, held.note = status, user, clock.now(), note.strip()[:MAX_REASON]
    held.save(update_fields=["status", "decided_by", "decided_at", "note"])
    _note(held, f"stripe_event.settlement_{status.value}", user, before={"status": "proposed"})
    return held


def _book(surplus: Surplus, event: StripeEvent) -> SurplusCharge:
    """Inside a transaction: the charge's place in the books, once."""
    if surplus.payment is not None:
        # Whoever books a paid page holds this row: a charge pays for something, or it is surplus.
        Payment.objects.select_for_update(of=("self",)).get(pk=surplus.payment.pk)
    if Payment.objects.filter(charge_id=surplus.charge.id).exists():
        raise SettlementNotPossible("The charge has been booked meanwhile; reject this.")
    if known := SurplusCharge.objects.filter(charge_id=surplus.charge.id).first():
        return known
    assert surplus.charge.booked is not None
    amount = Money.from_minor(surplus.charge.amount_minor, surplus.charge.currency)
    row = SurplusCharge.objects.create(
        charge_id=surplus.charge.id,
        payment=surplus.payment,
        event=event,
        amount_micros=amount.micros,
        currency=amount.currency,
        booked_at=clock.now(),
    )
    movements.record(
        surplus.charge.booked,
        kind=Movement.Kind.SURPLUS,
        entry_kind=JournalEntry.Kind.SURPLUS,
        against=chart.surplus(amount.currency),
        fees_to=chart.stripe_fees(amount.currency),
        surplus=row,
    )
    return row


def is_open(event: StripeEvent) -> bool:
    """It failed and nobody has settled it, or the refund of its surplus charge did not go through and nobody said what became of it."""
    if StripeEvent.unsettled().filter(pk=event.pk).exists():
        return True
    last = event.settlements.filter(status=Status.CONFIRMED).order_by("-pk").first()
    if last is not None and last.act == Act.EXPLAINED:
        return False  # it went back some other way
    return any(refunds.left_of(charge) for charge in event.surplus_charges.all())


def _note(
    settlement: EventSettlement,
    action: str,
    user: User,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    audit.record(
        actor=user,
        action=action,
        target=f"stripe_event:{settlement.event_id}",
        settlement=settlement.pk,
        charge=settlement.charge_id,
        amount_micros=settlement.amount_micros,
        currency=settlement.currency,
        reason=settlement.reason,
        note=settlement.note,
        before=before,
        after=after,
    )
    logger.info("%s settlement=%s event=%s by=%s", action, settlement.pk, settlement.event_id, user.pk)
