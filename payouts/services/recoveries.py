"""What a party owes: netted with what it is owed, fetched from its balance at Stripe, or written off.

A party owes money when something it was paid for went back to the buyer after it had been sent. It stands as `receivable:PARTY`,
and whatever becomes payable to the party pays it first.
"""

import logging
from collections.abc import Collection, Iterable
from datetime import datetime

from django.db import connection, transaction
from django.db.models import Sum
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.errors import InvalidInput
from marketplace.models import Party, User
from marketplace.money import Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, gateway, ledger
from payouts.errors import NothingOwed
from payouts.models import Clawback, JournalEntry, Movement, Payout, TransferReversal, WriteOff
from payouts.services import attempts, movements

logger = logging.getLogger(__name__)


def net(*, parties: Collection[int], currency: str) -> None:
    """Inside the transaction that holds the payables' lock: nobody owes while being owed.

    A balance on the wrong side (a debt that was paid and then forgiven) is put right the same way.
    """
    codes = [chart.payable(party, currency) for party in parties]
    codes += [chart.receivable(party, currency) for party in parties]
    held = ledger.balances_of(codes)
    for party in sorted(parties):
        payable = -held.get(chart.payable(party, currency), 0)
        receivable = held.get(chart.receivable(party, currency), 0)
        if receivable >= 0 and payable >= 0 and not (payable and receivable):
            continue
        position = payable - receivable
        micros = payable - max(position, 0)  # what leaves the payable; negative: what joins it
        number = JournalEntry.objects.filter(
            kind=JournalEntry.Kind.RECOVERY, postings__account__code=chart.receivable(party, currency)
        ).count()
        ledger.post(
            key=f"recovery:{party}:{currency}:{number + 1}",
            kind=JournalEntry.Kind.RECOVERY,
            postings={chart.payable(party, currency): micros, chart.receivable(party, currency): -micros},
        )
        logger.info("Recovered party=%s micros=%s %s", party, micros, currency)


def owing(parties: Iterable[int] | None = None) -> dict[tuple[int, str], Money]:
    """(party, currency) → what it owes; of everybody, or of some."""
    statement = _OWING
    given = None if parties is None else list(parties)
    if given is not None:
        statement += " AND party_id = ANY(%(parties)s)"
    with connection.cursor() as cursor:
        cursor.execute(f"{statement} ORDER BY party_id, currency", {"parties": given})
        return {(party, currency): Money(int(micros), currency) for party, currency, micros in cursor.fetchall()}


_OWING = f"SELECT party_id, currency, micros FROM {ledger.ACCOUNTS} WHERE code ~ '^receivable:' AND micros > 0"  # noqa: S608
_OWING_AND_OWED = f"""
SELECT owing.party_id, owing.currency FROM ({_OWING}) owing
JOIN {ledger.ACCOUNTS} ON accounts.code = 'payable:' || owing.party_id || ':' || owing.currency
WHERE accounts.micros < 0 ORDER BY owing.party_id, owing.currency
"""  # noqa: S608


def net_what_became_payable() -> int:
    """Net every party that owes something and is owed something; returns how many. Divisions wait for nobody, so this looks."""
    with connection.cursor() as cursor:
        cursor.execute(_OWING_AND_OWED)
        both = cursor.fetchall()
    for party, currency in both:
        with transaction.atomic():
            lock(currency)
            net(parties=[party], currency=currency)
    return len(both)


def lock(currency: str) -> None:
    """Inside a transaction: the one lock of everything that plans payouts or takes back payables."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"payouts:{currency}"])


def unsent_of(*, lines: Collection[int], parties: Collection[int], currency: str) -> dict[int, int]:
    """Division line → what of it has not been sent to its payee: payouts pay what fell due first.

    Lines count for what refunds and disputes have left of them; of those named, only the ones with something unsent are told.
    What a standing freeze has left of a line was counted as sent when it was made, so it stays so: were it to be counted anew,
    one transfer could be taken for two disputed payments' money, and the same amount of the other's would be free to go.
    """
    if not lines:
        return {}
    with connection.cursor() as cursor:
        cursor.execute(
            """
            WITH frozen AS (
                SELECT order_id, invoice_id FROM payouts_payment WHERE id IN (
                    SELECT payment_id FROM payouts_clawback c WHERE c.kind = 'freeze'
                        AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = c.id)
                )
            ), kept AS (
                -- A royalty names its license's order line too, and is divided out of its own payment.
                SELECT l.id, l.party_id, l.due_at, coalesce(
                    coalesce(d.invoice_line_id, corrected.invoice_line_id) IS NULL AND d.order_line_id IN (
                        SELECT o.id FROM marketplace_orderline o JOIN frozen f ON f.order_id = o.order_id
                    ), false
                ) OR coalesce(
                    coalesce(d.invoice_line_id, corrected.invoice_line_id) IN (
                        SELECT i.id FROM payouts_royaltyinvoiceline i JOIN payouts_royaltyinvoice v ON v.id = i.invoice_id
                            JOIN frozen f ON f.invoice_id = coalesce(v.carried_into_id, v.id)
                    ), false
                ) AS is_frozen, l.amount_micros - coalesce((
                    SELECT sum(r.amount_micros) FROM payouts_reclaim r
                        JOIN payouts_clawbackline c ON c.id = r.clawback_line_id
                        WHERE r.division_line_id = l.id
                        AND NOT EXISTS (SELECT 1 FROM payouts_clawbackundo u WHERE u.clawback_id = c.clawback_id)
                ), 0) AS micros
                FROM payouts_divisionline l JOIN payouts_division d ON d.id = l.division_id
                    LEFT JOIN payouts_divisioncorrection correction ON correction.id = d.corrects_id
                    LEFT JOIN payouts_division corrected ON corrected.id = correction.division_id
                WHERE l.party_id = ANY(%(parties)s) AND d.currency = %(currency)s
            ), sent AS (
                SELECT party_id, sum(micros) AS micros FROM (
                    SELECT party_id, amount_micros AS micros FROM payouts_payout
                        WHERE party_id = ANY(%(parties)s) AND currency = %(currency)s AND status <> 'refused'
                    UNION ALL
                    SELECT party_id, amount_micros FROM payouts_railpayout
                        WHERE party_id = ANY(%(parties)s) AND currency = %(currency)s AND status IN ('intended', 'sent')
                    UNION ALL
                    SELECT p.party_id, -r.amount_micros FROM payouts_transferreversal r
                        JOIN payouts_payout p ON p.id = r.payout_id
                        WHERE p.party_id = ANY(%(parties)s) AND r.currency = %(currency)s AND r.state = 'sent'
                    UNION ALL
                    SELECT party_id, -amount_micros FROM payouts_writeoff
                        WHERE party_id = ANY(%(parties)s) AND currency = %(currency)s
                ) moved GROUP BY party_id
            ), summed AS (
                SELECT id, party_id, micros, sum(micros) OVER (
                    PARTITION BY party_id ORDER BY is_frozen DESC, due_at, id
                ) AS until_here
                FROM kept
            )
            SELECT s.id, least(s.micros, s.until_here - coalesce(sent.micros, 0))
            FROM summed s LEFT JOIN sent ON sent.party_id = s.party_id
            WHERE s.id = ANY(%(lines)s) AND least(s.micros, s.until_here - coalesce(sent.micros, 0)) > 0
            """,
            {"parties": sorted(parties), "currency": currency, "lines": sorted(lines)},
        )
        return {pk: int(micros) for pk, micros in cursor.fetchall()}


# --- from the payee's balance at Stripe ---------------------------------------------------------------------------------


@transaction.atomic
def request_reversal(*, payout: Payout, amount: Money, user: User | None, note: str) -> TransferReversal:
    """Ask for part of a sent payout back, as far as the payee owes it and still has it at Stripe. A courtesy: it may be refused.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no note, or not a whole positive amount in the payout's currency.
        NothingOwed: the payee owes less, or this payout carried less.
    """
    if not note.strip():
        raise InvalidInput("Say why, in words: the payee reads it.", pointers={"/note": "missing"})
    if amount.micros <= 0 or amount.currency != payout.currency or amount.floor_to_minor() != amount:
        raise InvalidInput(
            f"Ask for a positive amount of {payout.currency} in whole cents; {amount} is not.",
            pointers={"/amount": "cannot be asked for"},
        )
    require_staff(user=user, to="ask for a transfer back")
    lock(payout.currency)
    payout = Payout.objects.select_for_update(of=("self",)).select_related("party").get(pk=payout.pk)
    asked = _asked_back(payout.party_id, payout.currency)
    owed = ledger.balance(chart.receivable(payout.party_id, payout.currency)) - asked
    reversed_before = payout.reversals.exclude(state=TransferReversal.State.REFUSED).aggregate(
        sum=Sum("amount_micros", default=0)
    )["sum"]
    carried = payout.amount_micros - int(reversed_before)
    if payout.status not in (Payout.Status.SENT, Payout.Status.PAID) or amount.micros > min(owed, carried):
        raise NothingOwed(
            f"{payout.party.name} owes {Money(max(owed, 0), payout.currency)}, and payout {payout.pk} carried "
            f"{Money(carried, payout.currency)}; {amount} cannot be asked back."
        )
    reversal = TransferReversal.objects.create(
        payout=payout,
        amount_micros=amount.micros,
        currency=amount.currency,
        requested_by=user,
        note=note.strip(),
        intended_at=clock.now(),
    )
    audit.record(
        actor=user,
        party=payout.party,
        action="reversal.requested",
        target=f"payout:{payout.pk}",
        reversal=reversal.pk,
        amount_micros=amount.micros,
        currency=amount.currency,
    )
    jobs.wake(reversal)
    return reversal


def execute_reversal(reversal: TransferReversal) -> None:
    """Ask Stripe, and book what came back; harmless to run again.

    Raises:
        LostLease: another worker has taken it over.
        attempts.StillUncertain: come back.
        gateway.StripeRefused: Stripe refused us; the intent stays.
    """
    if reversal.state == TransferReversal.State.INTENDED:
        attempts.pursue(_Reversing(reversal))


class _Reversing:
    """See `attempts.Effect`."""

    def __init__(self, reversal: TransferReversal) -> None:
        self.reversal = reversal

    def __str__(self) -> str:
        return f"reversal={self.reversal.pk}"

    @property
    def first_tried_at(self) -> datetime | None:
        return self.reversal.first_tried_at

    def note_try(self) -> None:
        self.reversal.write(first_tried_at=timezone.now())

    def next_attempt(self) -> None:
        self.reversal.write(stripe_attempt=self.reversal.stripe_attempt + 1, first_tried_at=timezone.now())

    def find(self) -> gateway.Reversal | None:
        assert self.reversal.payout.transfer_id is not None
        return gateway.find_reversal(transfer=self.reversal.payout.transfer_id, mark=str(self.reversal.pk))

    def call(self) -> gateway.Reversal:
        assert self.reversal.payout.transfer_id is not None
        return gateway.create_reversal(
            transfer=self.reversal.payout.transfer_id,
            amount_minor=self.reversal.amount.to_minor(),
            key=f"reversal:{self.reversal.pk}:{self.reversal.stripe_attempt}",
            metadata={"reversal": str(self.reversal.pk)},
        )

    @transaction.atomic
    def book(self, answer: gateway.Reversal) -> None:
        assert answer.taken is not None, f"reversal {answer.id} has no balance transaction"
        lock(self.reversal.currency)
        held = self.reversal.lock()
        if held.state != TransferReversal.State.INTENDED:
            return
        assert (answer.amount_minor, answer.currency) == (held.amount.to_minor(), held.currency), (
            f"reversal {answer.id} is not what {held} intended"
        )
        held.state, held.reversal_id, held.made_at = TransferReversal.State.SENT, answer.id, clock.now()
        held.save(update_fields=["state", "reversal_id", "made_at"])
        party = held.payout.party_id
        movements.record(
            answer.taken,
            kind=Movement.Kind.REVERSAL,
            entry_kind=JournalEntry.Kind.TRANSFER_BACK,
            against=chart.receivable(party, held.currency),
            fees_to=chart.stripe_fees(held.currency),
            reversal=held,
        )
        net(parties=[party], currency=held.currency)  # it may have earned the debt meanwhile

    @transaction.atomic
    def refuse(self, error: gateway.StripeRefused) -> None:
        held = self.reversal.lock()
        if held.state != TransferReversal.State.INTENDED:
            return
        held.state = TransferReversal.State.REFUSED
        held.refusal_code, held.refusal_message = error.code[:60], error.message
        held.save(update_fields=["state", "refusal_code", "refusal_message"])
        logger.info("Stripe refused reversal=%s code=%s", held.pk, error.code)


# --- at the platform's expense -------------------------------------------------------------------------------------------


@transaction.atomic
def write_off(*, party: Party, amount: Money, user: User | None, reason: str) -> WriteOff:
    """Bear what a party owes: its later earnings are its own again.

    Raises:
        NotAllowed: the user is not staff.
        InvalidInput: no reason, or no positive amount.
        NothingOwed: it owes less, or it is being fetched from its balance at Stripe.
    """
    if not reason.strip():
        raise InvalidInput("Say why, in words: an auditor reads it.", pointers={"/reason": "missing"})
    if amount.micros <= 0:
        raise InvalidInput(f"Write off a positive amount; {amount} is not.", pointers={"/amount": "not positive"})
    require_staff(user=user, to="write off a debt")
    lock(amount.currency)
    asked = _asked_back(party.pk, amount.currency)  # may be on its way out of the payee's balance
    owed = Money(max(0, ledger.balance(chart.receivable(party, amount.currency)) - asked), amount.currency)
    if owed < amount:
        raise NothingOwed(f"{party.name} owes {owed} that is not being fetched; {amount} cannot be written off.")
    row = WriteOff.objects.create(
        party=party,
        amount_micros=amount.micros,
        currency=amount.currency,
        reason=reason.strip(),
        decided_by=user,
        decided_at=clock.now(),
    )
    _book_write_off(row)
    audit.record(
        actor=user,
        party=party,
        action="debt.written_off",
        target=f"party:{party.pk}",
        write_off=row.pk,
        amount_micros=amount.micros,
        currency=amount.currency,
    )
    logger.info("Wrote off write_off=%s party=%s micros=%s", row.pk, party.pk, amount.micros)
    return row


def undo_write_offs(*, parties: Iterable[int], returned: Clawback) -> None:
    """Inside the transaction that holds the payables' lock: what came back was never a debt, so it needs no forgiving.

    Of each party the write-offs decided since the clawback was made are taken back, as far as its receivable stands below zero;
    otherwise it would be paid what it had been sent already.
    """
    for party in sorted(parties):
        beyond = -ledger.balance(chart.receivable(party, returned.currency))
        if beyond <= 0:
            continue
        forgiven = WriteOff.objects.filter(party=party, currency=returned.currency, decided_at__gte=returned.taken_at)
        micros = min(beyond, int(forgiven.aggregate(sum=Sum("amount_micros", default=0))["sum"]))
        if micros <= 0:
            continue
        row = WriteOff.objects.create(
            party_id=party,
            amount_micros=-micros,
            currency=returned.currency,
            reason="What went back to the buyer came back, so there was no debt to forgive.",
            returned=returned,
            decided_at=clock.now(),
        )
        _book_write_off(row)
        logger.info("Undid write-offs write_off=%s party=%s micros=%s", row.pk, party, micros)


def _book_write_off(row: WriteOff) -> None:
    ledger.post(
        key=f"write_off:{row.pk}",
        kind=JournalEntry.Kind.WRITE_OFF,
        postings={
            chart.losses(row.currency): row.amount_micros,
            chart.receivable(row.party_id, row.currency): -row.amount_micros,
        },
        booked_at=row.decided_at,
    )


def _asked_back(party: int, currency: str) -> int:
    """Micros that Stripe was asked to take from a party's balance, and has not answered for."""
    asked = TransferReversal.objects.filter(
        payout__party=party, currency=currency, state=TransferReversal.State.INTENDED
    )
    return int(asked.aggregate(sum=Sum("amount_micros", default=0))["sum"])
