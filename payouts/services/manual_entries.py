"""Entries that no service makes, with four eyes: one of the staff proposes, another one approves or rejects.

Payables, pools and what is on its way cannot be moved by hand: rows of other services prove them, and a refund, a write-off or
a correction is the way. Cash at Stripe moves only with the balance transaction that it books, which reconciliation then finds. Our
bank account gives only what is not promised to payees and buyers, or held for payers (PostgreSQL refuses the rest, too: migration
`0036_bank_keeps_promises`).
"""

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta

from django.db import IntegrityError, connection, transaction

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, ledger
from payouts.errors import AlreadyDecided, BankShort, FourEyes, PeriodClosed
from payouts.models import ClosedPeriod, JournalEntry, ManualDecision, ManualEntry, ManualLeg
from payouts.services import plans, recoveries

logger = logging.getLogger(__name__)

CASH = ("cash:pending", "cash:available")
#: What may be moved by hand.
BY_HAND = (
    *CASH,
    "bank",
    "surplus",  # returned to its buyer by bank transfer
    "tax",  # handed to its office
    "equity:owners",
    "revenue:platform_fee",
    "revenue:other",
    "expense:stripe_fees",
    "expense:dispute_fees",
    "expense:losses",
    "expense:other",
)
MAX_LEGS = 20


@transaction.atomic
def propose(
    *,
    user: User,
    key: str,
    legs: Mapping[str, int],
    reason: str,
    booked_at: datetime | None = None,
    balance_transaction_id: str = "",
) -> ManualEntry:
    """Propose an entry; nothing is booked. The same key proposes once.

    Args:
        legs: account code → micros, debits positive.
        booked_at: the business time that it will have; now, by default.
        balance_transaction_id: Stripe's, wherever the entry moves cash at Stripe.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: an account, amount or date that cannot be, or a missing reason; the pointer names it.
        BankShort: it would take what is promised out of our bank account.
        PeriodClosed: nothing is booked at that time any more.
    """
    require_staff(user=user, to="propose a manual entry")
    if known := ManualEntry.objects.filter(key=key).first():
        return known
    if not reason.strip():
        raise InvalidInput("Say why, in words: the auditor will ask.", pointers={"/reason": "missing"})
    currency = _check_legs(legs)
    moves_cash = any(chart.parse(code).name in CASH for code in legs)
    identifier = balance_transaction_id.strip()
    if moves_cash != bool(identifier):
        raise InvalidInput(
            "An entry that moves cash at Stripe names the balance transaction it books (txn_…), and no other entry does.",
            pointers={"/balance_transaction_id": "missing" if moves_cash else "not of this entry"},
        )
    if identifier and ManualEntry.objects.filter(balance_transaction_id=identifier).exists():
        raise InvalidInput(
            f"{identifier} has an entry already.", pointers={"/balance_transaction_id": "proposed before"}
        )
    now = clock.now()
    booked_at = booked_at or now
    if booked_at > now + timedelta(minutes=1):
        raise InvalidInput(
            "The date lies in the future; book it when it has happened.", pointers={"/booked_at": "future"}
        )
    _refuse_closed(booked_at)
    _refuse_promised(legs, currency)
    manual = ManualEntry.objects.create(
        key=key,
        currency=currency,
        booked_at=booked_at,
        reason=reason.strip(),
        balance_transaction_id=identifier or None,
        proposed_by=user,
    )
    ManualLeg.objects.bulk_create(
        ManualLeg(manual=manual, account_code=code, amount_micros=micros) for code, micros in legs.items()
    )
    audit.record(
        actor=user, action="manual_entry.proposed", target=f"manual_entry:{manual.pk}", after={"legs": dict(legs)}
    )
    logger.info("Proposed manual=%s by=%s", manual.pk, user.pk)
    return manual


def approve(*, manual: ManualEntry, user: User, note: str = "") -> ManualDecision:
    """Post a proposal, once.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user proposed it.
        AlreadyDecided: another one was first.
        BankShort: by now it would take what is promised out of our bank account; reject it, or wait until that holds more.
        PeriodClosed: its month was closed meanwhile.
    """
    return _decide(manual, user, is_approved=True, note=note)


def reject(*, manual: ManualEntry, user: User, note: str) -> ManualDecision:
    """Decide that a proposal is never posted. Whoever proposed it asks another one to reject it, too.

    Raises:
        NotAllowed, FourEyes, AlreadyDecided: see `approve`.
        InvalidInput: no reason was given.
    """
    if not note.strip():
        raise InvalidInput("Say why it is rejected.", pointers={"/note": "missing"})
    return _decide(manual, user, is_approved=False, note=note)


@transaction.atomic
def _decide(manual: ManualEntry, user: User, *, is_approved: bool, note: str) -> ManualDecision:
    require_staff(user=user, to="decide on a manual entry")
    with connection.cursor() as cursor:
        # Two who decide at once wait here. The row itself cannot be locked: whoever may lock it could change it.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"manual_entry:{manual.pk}"])
    if manual.proposed_by_id == user.pk:
        raise FourEyes("You proposed it; another one of the staff must decide.")
    known = ManualDecision.objects.filter(manual=manual).select_related("decided_by").first()
    if known is not None:
        if known.decided_by_id == user.pk and known.is_approved == is_approved:
            return known  # a second click
        done = "approved" if known.is_approved else "rejected"
        raise AlreadyDecided(f"{known.decided_by} has {done} it.")
    entry = None
    if is_approved:
        legs = {leg.account_code: leg.amount_micros for leg in manual.legs.order_by("pk")}
        recoveries.lock(manual.currency)  # nothing is promised meanwhile
        _refuse_promised(legs, manual.currency)
        entry = ledger.post(
            key=f"manual:{manual.pk}", kind=JournalEntry.Kind.MANUAL, postings=legs, booked_at=manual.booked_at
        )
    try:
        with transaction.atomic():
            decision = ManualDecision.objects.create(
                manual=manual, is_approved=is_approved, entry=entry, note=note.strip(), decided_by=user
            )
    except IntegrityError as error:  # the database's own four eyes
        raise FourEyes("This person may not decide on it.") from error
    action = "manual_entry.approved" if is_approved else "manual_entry.rejected"
    audit.record(
        actor=user,
        action=action,
        target=f"manual_entry:{manual.pk}",
        before={"state": "awaiting"},
        after={"state": "approved" if is_approved else "rejected", "entry": entry and entry.pk},
        note=decision.note,
    )
    logger.info("Decided manual=%s approved=%s by=%s", manual.pk, is_approved, user.pk)
    return decision


def _check_legs(legs: Mapping[str, int]) -> str:
    """The currency of the legs."""
    if not 2 <= len(legs) <= MAX_LEGS:
        raise InvalidInput(
            f"An entry has 2 to {MAX_LEGS} legs, one per account, not {len(legs)}.", pointers={"/legs": "number"}
        )
    currencies = set()
    for number, (code, micros) in enumerate(legs.items()):
        try:
            parsed = chart.parse(code)
        except ValueError as error:
            raise InvalidInput(
                f"{code!r} is no account of the chart.", pointers={f"/legs/{number}": "no account"}
            ) from error
        if parsed.name not in BY_HAND:
            raise InvalidInput(
                f"{code} is not moved by hand: its amount is proved by rows of its own. Use a refund, a write-off or a "
                "correction instead.",
                pointers={f"/legs/{number}": "not by hand"},
            )
        if micros == 0:
            raise InvalidInput(f"{code} is given no amount.", pointers={f"/legs/{number}": "zero"})
        currencies.add(parsed.currency)
    if len(currencies) != 1:
        raise InvalidInput(
            f"An entry is in one currency, not in {', '.join(sorted(currencies))}.", pointers={"/legs": "currencies"}
        )
    currency = currencies.pop()
    if total := sum(legs.values()):
        raise InvalidInput(
            f"Debits and credits differ by {Money(abs(total), currency)}.", pointers={"/legs": "do not balance"}
        )
    return str(currency)


def _refuse_promised(legs: Mapping[str, int], currency: str) -> None:
    """Of our bank account nobody takes what is another's; where nothing is, an overdraft is between us and the bank."""
    bank = chart.bank(currency)
    taken = -legs.get(bank, 0)
    if taken <= 0:
        return
    held, promised = plans.bank_micros(currency)
    free = max(held - promised, 0)
    if promised > 0 and taken > free:
        raise BankShort(
            f"{Money(free, currency)} of the {Money(max(held, 0), currency)} in {bank} is free, and this takes {Money(taken, currency)}: "
            f"{Money(promised, currency)} is promised to payees and buyers, or held for payers. Take less, or withdraw more from "
            f"Stripe and book that first (debit {bank}).",
            pointers={f"/legs/{list(legs).index(bank)}": "more than is free"},
        )


def _refuse_closed(booked_at: datetime) -> None:
    last = ClosedPeriod.objects.order_by("-ends_at").first()
    if last is not None and booked_at < last.ends_at:
        raise PeriodClosed(
            f"The month of {booked_at:%d %B %Y} is closed; book it in an open one and name the date in the reason.",
            pointers={"/booked_at": "closed"},
        )
