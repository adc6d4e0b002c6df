"""Payees whom Stripe does not reach: told so beforehand, they accrue, and staff send it over another rail.

    proposed   by one of the staff: what is due to each of them and not below their minimum, nothing booked
    intended   another one approved: payable → in_transit_rail, out of what the platform's bank account holds
    sent       one has recorded the bank's reference, another has seen it: in_transit_rail → bank
    returned   the same, where it came back, or never left: booked back to payable

It goes to the bank account that the payee has entered (`bank_details`), once that has been held for 72 hours; until then nothing
does. The file for the other rail names holder, account, bank and address in plain, so each one that is made is in the audit log.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from cryptography.fernet import InvalidToken
from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from marketplace import clock
from marketplace.csv_cells import cell_text, written
from marketplace.errors import InvalidInput
from marketplace.models import Party, User
from marketplace.money import MINOR_DIGITS, Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, ledger
from payouts.errors import AlreadyDecided, FourEyes, NothingOwed, TransferNotPossible
from payouts.models import (
    BankDetails,
    DivisionLine,
    JournalEntry,
    RailConfirmation,
    RailExport,
    RailPayout,
)
from payouts.services import bank_details, plans, recoveries
from payouts.services.reach import unserved_parties
from payouts.services.receipts import checked_reference

logger = logging.getLogger(__name__)

Outcome = RailConfirmation.Outcome

#: So many payouts are booked in a statement.
AT_ONCE = 500
COLUMNS = [
    "export",
    "payout",
    "party",
    "name",
    "country",
    "account_holder",
    "iban",
    "account_number",
    "bic",
    "bank",
    "address",
    "currency",
    "amount",
    "reference",
    "status",
]


@dataclass(frozen=True)
class WaitingPayee:
    """A payee to whom something is due over another rail and cannot be sent, and why."""

    party: Party
    amount: Money
    details: BankDetails | None  # the latest, if they entered any
    sentence: str


def waiting_for_details(currency: str | None = None) -> list[WaitingPayee]:
    """Whose money waits for bank details, or for the end of their hold; of one currency, or by currency; then by party."""
    found = []
    for one in MINOR_DIGITS if currency is None else [currency]:
        dues = _dues(one)
        usable = bank_details.usable_of([party.pk for party, _ in dues])
        latest = {one.party_id: one for one in bank_details.kept_of([party.pk for party, _ in dues]).order_by("pk")}
        found += [
            WaitingPayee(party, due, latest.get(party.pk), waits_for(latest.get(party.pk), "their"))
            for party, due in dues
            if party.pk not in usable
        ]
    return found


def waits_for(latest: BankDetails | None, whose: str) -> str:
    """What a payee over another rail waits for, in words."""
    if latest is None:
        return f"Waits for {whose} bank details."
    if latest.usable_from > clock.now():
        return (
            f"Waits until {latest.usable_from:%-d %B %Y}, {latest.usable_from:%H:%M} UTC: {whose} bank details were changed, and are "
            "not used before."
        )
    return "Goes out with the next bank transfers that our staff make."


# --- an export --------------------------------------------------------------------------------------------------------
@transaction.atomic
def propose_export(*, user: User, currency: str, key: str) -> RailExport:
    """Gather what is due to everybody whom Stripe does not reach, in one currency; the same key proposes once.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: a currency in which no balance is held.
        NothingOwed: nothing is due to anybody with bank details, or less than they want at once, or it is all in an open export.
    """
    require_staff(user=user, to="export payouts")
    if currency not in MINOR_DIGITS:
        raise InvalidInput(f"No balance is held in {currency!r}.", pointers={"/currency": "unknown"})
    if known := RailExport.objects.filter(key=key).first():
        return known
    now = clock.now()
    recoveries.lock(currency)  # nothing is promised or taken back meanwhile
    everybody = _dues(currency)
    usable = bank_details.usable_of([party.pk for party, _ in everybody])
    dues = [(party, due) for party, due in everybody if party.pk in usable]
    if not dues and everybody:
        raise NothingOwed(f"Everybody to whom something in {currency} is due waits for their bank details.")
    if not dues:
        raise NothingOwed(
            f"Nothing in {currency} is due to a payee whom Stripe does not reach, or less than each of them wants at once."
        )
    export = RailExport.objects.create(key=key, currency=currency, proposed_by=user, proposed_at=now)
    RailPayout.objects.bulk_create(
        RailPayout(export=export, party=party, details=usable[party.pk], amount_micros=due.micros, currency=currency)
        for party, due in dues
    )
    total = sum(due.micros for _, due in dues)
    audit.record(
        actor=user,
        action="rail_export.proposed",
        target=f"rail_export:{export.pk}",
        after={"payouts": len(dues), "micros": total, "currency": currency},
    )
    logger.info("Proposed export=%s payouts=%s micros=%s", export.pk, len(dues), total)
    return export


@transaction.atomic
def approve_export(*, export: RailExport, user: User) -> RailExport:
    """Book every payout of it as promised, as far as it is still due.

    Dropped is whoever has changed their bank details since, or has less due by now than they want at once.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user proposed it.
        AlreadyDecided: another one was first.
        NothingOwed: the platform's bank account does not hold enough.
    """
    require_staff(user=user, to="approve an export")
    recoveries.lock(export.currency)
    export = _undecided(export, user)
    RailExport.objects.filter(pk=export.pk).update(
        status=RailExport.Status.APPROVED, decided_by=user, decided_at=clock.now()
    )
    payouts = list(export.payouts.order_by("pk"))
    parties = [payout.party_id for payout in payouts]
    recoveries.net(parties=parties, currency=export.currency)
    payable = _payable(parties, export.currency)
    least = plans.minimums(parties, export.currency)
    usable = bank_details.usable_of(parties)
    now = clock.now()
    dropped: list[int] = []
    intended: list[RailPayout] = []
    for payout in payouts:
        party = payout.party_id
        micros = min(payout.amount_micros, payable[party])
        is_same_account = party in usable and usable[party].pk == payout.details_id
        if not is_same_account or micros < least[party]:
            dropped.append(payout.pk)
            continue
        payout.status, payout.amount_micros, payout.intended_at = RailPayout.Status.INTENDED, micros, now
        intended.append(payout)
    RailPayout.objects.filter(pk__in=dropped).update(status=RailPayout.Status.DROPPED)
    for start in range(0, len(intended), AT_ONCE):
        batch = intended[start : start + AT_ONCE]
        RailPayout.objects.bulk_update(batch, ["status", "amount_micros", "intended_at"])
        ledger.post_many([_intent_of(payout) for payout in batch])
    promised = sum(payout.amount_micros for payout in intended)
    held, promised_to_all = plans.bank_micros(export.currency)
    if promised and held < promised_to_all:
        short = Money(promised_to_all - held, export.currency)
        raise NothingOwed(
            f"The bank account holds {short} too little for it. Withdraw that from Stripe, book it by a manual entry "
            f"(debit bank:{export.currency}), then approve."
        )
    audit.record(
        actor=user,
        action="rail_export.approved",
        target=f"rail_export:{export.pk}",
        before={"status": "awaiting"},
        after={"status": "approved", "micros": promised, "currency": export.currency},
    )
    logger.info("Approved export=%s micros=%s", export.pk, promised)
    export.refresh_from_db()
    return export


@transaction.atomic
def reject_export(*, export: RailExport, user: User) -> RailExport:
    """
    Raises:
        NotAllowed, FourEyes, AlreadyDecided: see `approve_export`.
    """
    require_staff(user=user, to="reject an export")
    export = _undecided(export, user)
    RailExport.objects.filter(pk=export.pk).update(
        status=RailExport.Status.REJECTED, decided_by=user, decided_at=clock.now()
    )
    export.payouts.update(status=RailPayout.Status.DROPPED)
    audit.record(
        actor=user,
        action="rail_export.rejected",
        target=f"rail_export:{export.pk}",
        before={"status": "awaiting"},
        after={"status": "rejected"},
    )
    export.refresh_from_db()
    return export


# --- what the bank did ------------------------------------------------------------------------------------------------
def record_sent(*, payout: RailPayout, user: User, reference: str) -> RailConfirmation:
    """Write down that the bank has sent it; nothing is booked. The same again is the same row.

    Args:
        reference: the bank statement's own number of the transfer.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reference, or the payout is not on its way.
        TransferNotPossible: the reference is another transfer's, or another record about the payout waits.
    """
    return _record(payout, user, reference, Outcome.SENT)


def record_returned(*, payout: RailPayout, user: User, reference: str) -> RailConfirmation:
    """Write down that the bank has sent it back, or never sent it; nothing is booked. The same again is the same row.

    Args:
        reference: the bank statement's own number of what came back.

    Raises:
        NotAllowed, InvalidInput, TransferNotPossible: see `record_sent`.
    """
    return _record(payout, user, reference, Outcome.RETURNED)


@transaction.atomic
def decide_confirmation(*, confirmation: RailConfirmation, approved: bool, user: User) -> RailConfirmation:
    """Book what was recorded, or reject the record; the second call with the same decision finds it decided.

    What came back, or never left, is owed to its payee again.

    Raises:
        NotAllowed: the user is not staff.
        FourEyes: the user confirms what they recorded themselves.
        AlreadyDecided: it was decided otherwise.
    """
    require_staff(user=user, to="say how a payout ended")
    recoveries.lock(confirmation.payout.currency)
    payout = RailPayout.objects.select_for_update(of=("self",)).select_related("party").get(pk=confirmation.payout_id)
    confirmation = RailConfirmation.objects.select_for_update(of=("self",)).get(pk=confirmation.pk)
    wanted = RailConfirmation.Status.BOOKED if approved else RailConfirmation.Status.REJECTED
    if confirmation.status == wanted:
        return confirmation
    if confirmation.status != RailConfirmation.Status.RECORDED:
        raise AlreadyDecided(f"This record was {confirmation.status} already.")
    if approved and user.pk == confirmation.recorded_by_id:
        raise FourEyes("You recorded it; another one of the staff must have seen it on the bank’s statement.")
    confirmation.status, confirmation.decided_by, confirmation.decided_at = wanted, user, clock.now()
    confirmation.save(update_fields=["status", "decided_by", "decided_at"])
    if approved:
        _end(payout, confirmation)
    else:
        _note(payout, confirmation, "rail_confirmation.rejected", user)
    return confirmation


def confirmations_waiting() -> QuerySet[RailConfirmation]:
    """Recorded, and seen by one person only."""
    return (
        RailConfirmation.objects.filter(status=RailConfirmation.Status.RECORDED)
        .select_related("recorded_by", "payout__party")
        .order_by("pk")
    )


def _record(payout: RailPayout, user: User, reference: str, outcome: RailConfirmation.Outcome) -> RailConfirmation:
    require_staff(user=user, to="say how a payout ended")
    reference = checked_reference(reference)
    with transaction.atomic():
        payout = RailPayout.objects.select_for_update(of=("self",)).select_related("party").get(pk=payout.pk)
        records = payout.confirmations.exclude(status=RailConfirmation.Status.REJECTED)
        if (known := records.filter(outcome=outcome, reference=reference).first()) is not None:
            return known
        can_be = RailPayout.STANDING if outcome == Outcome.RETURNED else [RailPayout.Status.INTENDED]
        if payout.status not in can_be:
            raise InvalidInput(f"Rail payout {payout.pk} is {payout.status}; it cannot be {outcome} now.")
        if (waiting := records.filter(status=RailConfirmation.Status.RECORDED).first()) is not None:
            raise TransferNotPossible(
                f"It is recorded as {waiting.outcome} by {waiting.reference}, and waits for a second person. Reject that record "
                "first if it is wrong."
            )
        try:
            with transaction.atomic():
                confirmation = RailConfirmation.objects.create(
                    payout=payout,
                    outcome=outcome,
                    reference=reference,
                    recorded_by=user,
                    recorded_at=clock.now(),
                )
        except IntegrityError as error:
            raise TransferNotPossible(
                f"Transfer {reference} is recorded for something else. Give the number that the statement has for this one.",
                pointers={"/reference": "taken"},
            ) from error
        _note(payout, confirmation, "rail_confirmation.recorded", user)
    return confirmation


# --- the file ---------------------------------------------------------------------------------------------------------
def export_file(*, export: RailExport, user: User) -> Iterator[str]:
    """The file for the other rail, as CSV, streamed; that it was made, and by whom, is in the audit log.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: nobody approved the export, or an account in it was sealed under another key.
    """
    require_staff(user=user, to="have an export’s file")
    export = RailExport.objects.get(pk=export.pk)
    if export.status != RailExport.Status.APPROVED:
        raise InvalidInput(f"Export {export.pk} is {export.status}; only an approved one is sent.")
    _refuse_unreadable(export)
    audit.record(
        actor=user,
        action="rail_export.downloaded",
        target=f"rail_export:{export.pk}",
        after={"payouts": export.payouts.filter(status=RailPayout.Status.INTENDED).count()},
    )
    return _export_rows(export)


def _refuse_unreadable(export: RailExport) -> None:
    """Before the first line goes out: a file that broke off in the middle would pay some and not the others.

    Raises:
        InvalidInput: see `export_file`.
    """
    open_ones = export.payouts.filter(status=RailPayout.Status.INTENDED, details__isnull=False)
    for payout in open_ones.select_related("details").order_by("pk").iterator(chunk_size=500):
        assert payout.details is not None  # as asked for
        try:
            bank_details.opened(payout.details)
        except InvalidToken as error:
            raise InvalidInput(
                f"The account of rail payout {payout.pk} was sealed under another BANK_DETAILS_KEY. Set that one again, or confirm "
                "the payout as returned and ask the payee to enter their account anew."
            ) from error


def _export_rows(export: RailExport) -> Iterator[str]:
    """What is still to be sent: a file that is made once more must not pay anybody twice. No cell acts as a formula."""
    yield written(COLUMNS)
    payouts = export.payouts.filter(status=RailPayout.Status.INTENDED).select_related("party", "details")
    for payout in payouts.order_by("pk").iterator(chunk_size=500):
        account = bank_details.opened(payout.details) if payout.details is not None else bank_details.NONE
        yield written(
            [
                export.pk,
                payout.pk,
                str(payout.party.public_id),
                cell_text(payout.party.name),
                payout.party.country,
                cell_text(account.account_holder),
                cell_text(account.iban),
                cell_text(account.account_number),
                cell_text(account.bic),
                cell_text(account.bank),
                cell_text(account.address),
                payout.currency,
                payout.amount.amount_text(),
                f"RESIDUAL {payout.pk}",
                payout.status,
            ]
        )


def _end(payout: RailPayout, confirmation: RailConfirmation) -> None:
    """Inside the transaction that holds the payables' lock and both rows: book what two people have seen."""
    was, outcome = payout.status, RailConfirmation.Outcome(confirmation.outcome)
    assert confirmation.decided_by is not None
    payout.status, payout.reference = RailPayout.Status(outcome.value), confirmation.reference
    payout.confirmed_by, payout.confirmed_at = confirmation.decided_by, confirmation.decided_at
    payout.save(update_fields=["status", "reference", "confirmed_by", "confirmed_at"])
    payable, promised = chart.payable(payout.party_id, payout.currency), chart.in_transit_rail(payout.currency)
    bank = chart.bank(payout.currency)
    if outcome == Outcome.SENT:
        kind, debit, credit = JournalEntry.Kind.RAIL_SENT, promised, bank
    elif was == RailPayout.Status.SENT:
        kind, debit, credit = JournalEntry.Kind.RAIL_REVERSAL, bank, payable
    else:
        kind, debit, credit = JournalEntry.Kind.RAIL_REVERSAL, promised, payable
    ledger.post(
        key=f"rail:{payout.pk}:{outcome.value}",
        kind=kind,
        postings={debit: payout.amount_micros, credit: -payout.amount_micros},
        booked_at=payout.confirmed_at,
    )
    audit.record(
        actor=confirmation.decided_by,
        action=f"rail_payout.{outcome.value}",
        target=f"rail_payout:{payout.pk}",
        party=payout.party,
        before={"status": was},
        after={"status": outcome.value, "reference": payout.reference, "confirmation": confirmation.pk},
    )
    if outcome == Outcome.RETURNED:
        recoveries.net(parties=[payout.party_id], currency=payout.currency)
    logger.info("Ended rail payout=%s status=%s", payout.pk, outcome)


def _note(payout: RailPayout, confirmation: RailConfirmation, action: str, by: User) -> None:
    audit.record(
        actor=by,
        action=action,
        target=f"rail_payout:{payout.pk}",
        party=payout.party,
        after={
            "confirmation": confirmation.pk,
            "status": confirmation.status,
            "outcome": confirmation.outcome,
            "reference": confirmation.reference,
        },
    )
    logger.info("Rail confirmation=%s payout=%s status=%s", confirmation.pk, payout.pk, confirmation.status)


def _intent_of(payout: RailPayout) -> ledger.Draft:
    return ledger.Draft(
        key=f"rail:{payout.pk}:intent",
        kind=JournalEntry.Kind.RAIL_INTENT,
        postings={
            chart.payable(payout.party_id, payout.currency): payout.amount_micros,
            chart.in_transit_rail(payout.currency): -payout.amount_micros,
        },
        booked_at=payout.intended_at,
    )


def _dues(currency: str) -> list[tuple[Party, Money]]:
    """Everybody whom Stripe does not reach, with what is due to them and in no open export; not what is below their minimum."""
    with_lines = DivisionLine.objects.filter(division__currency=currency, due_at__lte=clock.now())
    open_ones = RailPayout.objects.filter(currency=currency, status__in=["proposed", "intended"])
    unserved = unserved_parties().filter(pk__in=with_lines.values("party")).exclude(pk__in=open_ones.values("party"))
    parties = {party.pk: party for party in unserved.order_by("pk")}
    payable, least = _payable(parties.keys(), currency), plans.minimums(parties.keys(), currency)
    return [(party, Money(payable[pk], currency)) for pk, party in parties.items() if payable[pk] >= least[pk]]


def _payable(parties: Collection[int], currency: str) -> dict[int, int]:
    """Party → what may be promised to it now, in micros: due, payable, and in whole minor units."""
    due = plans.due_of(parties, currency=currency, until=clock.now())
    held = ledger.balances_of([chart.payable(party, currency) for party in parties])
    payable = {party: -held.get(chart.payable(party, currency), 0) for party in parties}
    return {
        party: Money(max(0, min(due[party], payable[party])), currency).floor_to_minor().micros for party in parties
    }


def _undecided(export: RailExport, user: User) -> RailExport:
    export = RailExport.objects.select_for_update().get(pk=export.pk)
    if export.proposed_by_id == user.pk:
        raise FourEyes("You proposed it; another one of the staff must decide.")
    if export.status != RailExport.Status.AWAITING:
        raise AlreadyDecided(f"Export {export.pk} is {export.status} already.")
    return export
