"""Payouts: intent, then effect (DESIGN §5).

    intended   payable → in_transit, committed before Stripe is called
    sent       Stripe made the transfer: in_transit → cash
    refused    Stripe definitely refused: booked back to payable; the next run tries anew
    paid       the connected account's payout reached the bank

A refusal is definite, and yet a worker that was suspended in the middle of its call may wake and make the transfer after
its successor was refused: the next run, and the bank's word, find it and book it as sent.

A worker may die anywhere. The next attempt finds the intent, asks Stripe whether the transfer was made, and repeats the
call with the same idempotency key while Stripe remembers it.
"""

import logging
import time
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet, Sum
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.jobs import Job
from marketplace.money import MINOR_DIGITS, Money
from payouts import chart, gateway, ledger
from payouts.errors import TransferMismatch
from payouts.models import (
    Dispute,
    DivisionLine,
    JournalEntry,
    PayeeAccount,
    Payout,
    PayoutRun,
    Reclaim,
    RoyaltyPool,
    TransferReversal,
    WriteOff,
)
from payouts.services import clawbacks, recoveries
from payouts.services.attempts import KEY_LIFE, LONGEST_WAIT_SECONDS, TRIES, StillUncertain

logger = logging.getLogger(__name__)

__all__ = ["KEY_LIFE", "StillUncertain", "confirm_in_bank", "due_micros", "execute_payout_run", "request_payout_run"]

#: How long after its last try a refused payout's transfer is looked for: no HTTP call sleeps longer.
LATE = timedelta(days=2)


@transaction.atomic
def request_payout_run(*, currency: str, key: str) -> PayoutRun:
    """Ask for everything that is due by now in one currency; the same key asks once.

    Raises:
        ValueError: a currency in which the platform holds no balance.
    """
    if currency not in MINOR_DIGITS:
        raise ValueError(f"No balance is held in {currency!r}")
    run, is_new = PayoutRun.objects.get_or_create(key=key, defaults={"currency": currency, "due_until": clock.now()})
    if is_new:
        logger.info("Requested payout run=%s key=%s due_until=%s", run.pk, key, run.due_until)
        jobs.wake(run)
    return run


def execute_payout_run(run: PayoutRun) -> None:
    """Intend what is due, then send what is intended, this run's and what finished runs have left behind.

    Harmless to run again: a payee has one payout in a run, and each transfer happens once.

    Raises:
        LostLease: another worker has taken the run over.
        StillUncertain: some payouts wait for a clear answer of Stripe's.
        TransferMismatch: some need a person; all others have been sent.
        gateway.StripeRefused: Stripe refused us rather than a payout (the key is wrong, say); the intents stay.
    """
    if run.planned_at is None:
        _book_late_transfers(run)
        for payee in _payees_with_something_due(run):
            with transaction.atomic():
                run.lock()
                _intend(run, payee)
        run.write(planned_at=clock.now())
    left_behind = Q(run__currency=run.currency, run__status__in=[Job.Status.DONE, Job.Status.FAILED])
    waiting = list(
        Payout.objects.filter(Q(run=run) | left_behind, status=Payout.Status.INTENDED)
        .order_by("pk")
        .values_list("pk", flat=True)
    )
    n_uncertain, mismatches = 0, []
    for number, pk in enumerate(waiting, start=1):
        try:
            n_uncertain += not _send(run, pk)
        except TransferMismatch as error:  # one of them must not stop everybody else's money
            logger.exception("Payout needs a person payout=%s", pk)
            mismatches.append(str(error))
        run.progress(done=number, total=len(waiting))
    if mismatches:
        raise TransferMismatch(" ".join(mismatches))
    if n_uncertain:
        raise StillUncertain(f"{n_uncertain} of {len(waiting)} payouts of run {run.pk}")


def confirm_in_bank(*, account: str, bank_payout: str) -> list[Payout]:
    """A connected account's money has reached its bank: mark the payouts whose transfers it was made of.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    transfers = gateway.transfers_in_payout(account=account, payout=bank_payout)
    known = set(Payout.objects.filter(transfer_id__in=transfers).values_list("transfer_id", flat=True))
    if set(transfers) - known:
        # Stripe can be faster than our own book-keeping: a transfer may be in the bank while its payout is still intended.
        lately = Q(status=Payout.Status.REFUSED, first_tried_at__gt=timezone.now() - LATE)
        unsent = Payout.objects.filter(lately | Q(status=Payout.Status.INTENDED), destination=account, transfer_id=None)
        for payout in unsent.order_by("pk"):
            found = gateway.find_transfer(group_of(payout))
            if found is not None and found.id in transfers:
                _book_sent(payout, found)
    arrived = []
    for payout in Payout.objects.filter(transfer_id__in=transfers, destination=account).order_by("pk"):
        changed = Payout.objects.filter(pk=payout.pk, status=Payout.Status.SENT).update(
            status=Payout.Status.PAID, bank_payout_id=bank_payout, paid_at=clock.now()
        )
        if changed:
            logger.info("Reached the bank payout=%s bank_payout=%s", payout.pk, bank_payout)
            arrived.append(payout)
    return arrived


def group_of(payout: Payout) -> str:
    """By this the transfer is found again when its key is forgotten."""
    return f"payout:{payout.pk}"


def due_micros(*, party_id: int, currency: str, until: object) -> int:
    """What has fallen due to a party and was neither sent nor intended, in micros; before rounding.

    Below zero where more went back to buyers than the party was still owed; what it earns next pays that first.
    """
    lines = DivisionLine.objects.filter(party=party_id, division__currency=currency, due_at__lte=until)
    taken_back = Reclaim.objects.filter(
        division_line__party=party_id,
        division_line__division__currency=currency,
        division_line__due_at__lte=until,
        clawback_line__clawback__undo=None,
    )
    payouts = Payout.objects.filter(party=party_id, currency=currency).exclude(status=Payout.Status.REFUSED)
    fetched_back = TransferReversal.objects.filter(
        payout__party=party_id, currency=currency, state=TransferReversal.State.SENT
    )
    forgiven = WriteOff.objects.filter(party=party_id, currency=currency)
    return _sum(lines) - _sum(taken_back) - _sum(payouts) + _sum(fetched_back) + _sum(forgiven)


def _sum(rows: "QuerySet[Any]") -> int:
    return int(rows.aggregate(sum=Sum("amount_micros", default=0))["sum"])


# --- intent -----------------------------------------------------------------------------------------------------------


def _payees_with_something_due(run: PayoutRun) -> list[PayeeAccount]:
    due = DivisionLine.objects.filter(division__currency=run.currency, due_at__lte=run.due_until)
    return list(PayeeAccount.objects.filter(party__in=due.values("party"), transfers_active=True).order_by("pk"))


def _intend(run: PayoutRun, payee: PayeeAccount) -> None:
    """Inside a transaction: promise one payee what is due, as far as it is payable and Stripe's available funds go."""
    recoveries.lock(run.currency)  # two runs must not promise the same available funds, nor what a refund takes back
    payee = PayeeAccount.objects.select_for_update().get(pk=payee.pk)
    if not payee.is_ready or Payout.objects.filter(run=run, party=payee.party_id).exists():
        return
    recoveries.net(parties=[payee.party_id], currency=run.currency)
    due = due_micros(party_id=payee.party_id, currency=run.currency, until=run.due_until)
    payable = -ledger.balance(chart.payable(payee.party_id, run.currency))
    amount = Money(max(0, min(due, payable)), run.currency).floor_to_minor()
    if not amount:
        return
    # in_transit and refunding are liabilities, so adding them takes off what is promised already.
    free = sum(ledger.balance(of(run.currency)) for of in (chart.cash_available, chart.in_transit, chart.refunding))
    if amount.micros > free:
        logger.warning(
            "Funds do not suffice run=%s party=%s micros=%s free=%s", run.pk, payee.party_id, amount.micros, free
        )
        return
    payout = Payout.objects.create(
        run=run,
        party_id=payee.party_id,
        destination=payee.stripe_account_id,
        amount_micros=amount.micros,
        currency=amount.currency,
        intended_at=clock.now(),
    )
    _book_intent(payout, key=f"payout:{payout.pk}:intent")
    logger.info("Intended payout=%s run=%s party=%s micros=%s", payout.pk, run.pk, payee.party_id, amount.micros)


def _book_intent(payout: Payout, *, key: str) -> None:
    ledger.post(
        key=key,
        kind=JournalEntry.Kind.PAYOUT_INTENT,
        postings={
            chart.payable(payout.party_id, payout.currency): payout.amount_micros,
            chart.in_transit(payout.currency): -payout.amount_micros,
        },
        booked_at=clock.now(),
    )


def _book_late_transfers(run: PayoutRun) -> None:
    """Look again for transfers of payouts that were lately refused, before the same money is intended anew."""
    lately = timezone.now() - LATE
    refused = Payout.objects.filter(currency=run.currency, status=Payout.Status.REFUSED, first_tried_at__gt=lately)
    for payout in refused.order_by("pk"):
        if found := gateway.find_transfer(group_of(payout)):
            _book_sent(payout, found, run)


# --- effect -----------------------------------------------------------------------------------------------------------


def _send(run: PayoutRun, pk: int) -> bool:
    """Bring one intended payout to an end; False while its outcome is unknown."""
    payout = Payout.objects.get(pk=pk)
    if payout.status != Payout.Status.INTENDED:
        return True
    try:
        if payout.first_tried_at is not None:
            # Somebody tried before us and did not live to book the answer.
            if found := gateway.find_transfer(group_of(payout)):
                _book_sent(payout, found, run)
                return True
            if timezone.now() - payout.first_tried_at > KEY_LIFE:
                _next_attempt(run, payout)
        elif _is_disputed_since(payout):
            message = (
                "A payment that it is made of was disputed before it was sent; what is not disputed goes out next."
            )
            _book_refused(run, payout, code="disputed", message=message)
            return True
        else:
            _note_try(run, payout)
        for number in range(TRIES):
            outcome = _try(run, payout, wait_seconds=0.5 * 2**number)
            if outcome:
                return True
    except gateway.StripeUncertain as error:  # of a look-up
        logger.warning("Payout is uncertain payout=%s error=%s", payout.pk, error)
    return False


def _try(run: PayoutRun, payout: Payout, *, wait_seconds: float) -> bool:
    """One call to Stripe; True if its answer ended the payout one way or the other.

    Raises:
        gateway.StripeUncertain: of a look-up.
    """
    try:
        transfer = gateway.create_transfer(
            amount_minor=payout.amount.to_minor(),
            currency=payout.currency,
            destination=payout.destination,
            transfer_group=group_of(payout),
            key=f"payout:{payout.pk}:{payout.attempt}",
            metadata={"payout": str(payout.pk), "run": str(payout.run_id)},
        )
    except gateway.StripeRefused as error:
        if error.http_status in (401, 403):
            raise  # we were refused, not this payout; nothing was sent and the intent stays
        _book_refused(run, payout, code=error.code, message=error.message)
        return True
    except gateway.StripeUncertain as error:
        logger.warning("Payout is uncertain payout=%s attempt=%s error=%s", payout.pk, payout.attempt, error)
        if error.is_key_spent:
            # The key would only repeat this answer, which does not say whether a transfer was made.
            if found := gateway.find_transfer(group_of(payout)):
                _book_sent(payout, found, run)
                return True
            _next_attempt(run, payout)
        time.sleep(min(error.retry_after_seconds or wait_seconds, LONGEST_WAIT_SECONDS))
        return False
    _book_sent(payout, transfer, run)
    return True


def _is_disputed_since(payout: Payout) -> bool:
    """Whether a dispute that touches the payee was opened after the intent: its freeze took the intent for sent."""
    disputed = clawbacks.disputed_payments_of(party=payout.party_id, currency=payout.currency)
    return Dispute.objects.filter(
        payment__in=disputed, status__in=Dispute.OPEN, created_at__gt=payout.created_at
    ).exists()


@transaction.atomic
def _note_try(run: PayoutRun, payout: Payout) -> None:
    """Committed before the call: from here on the transfer may exist."""
    run.lock()
    payout.first_tried_at = timezone.now()
    payout.save(update_fields=["first_tried_at"])


@transaction.atomic
def _next_attempt(run: PayoutRun, payout: Payout) -> None:
    run.lock()
    payout.attempt += 1
    payout.first_tried_at = timezone.now()
    payout.save(update_fields=["attempt", "first_tried_at"])


@transaction.atomic
def _book_sent(payout: Payout, transfer: gateway.Transfer, run: PayoutRun | None = None) -> None:
    if run is not None:
        run.lock()
    if Payout.objects.filter(pk=payout.pk, status=Payout.Status.REFUSED).exists():
        recoveries.lock(payout.currency)  # before the payout's row, as everywhere
    locked = Payout.objects.select_for_update().get(pk=payout.pk)
    if locked.transfer_id is not None:
        return  # a webhook was faster, or another attempt
    if (transfer.amount_minor, transfer.currency) != (locked.amount.to_minor(), locked.currency):
        raise TransferMismatch(
            f"Transfer {transfer.id} of {transfer.amount_minor} {transfer.currency} is not payout {locked.pk} of "
            f"{locked.amount}; correct it at Stripe."
        )
    now = clock.now()
    if locked.status == Payout.Status.REFUSED:
        logger.error("A refused payout was sent after all payout=%s transfer=%s", locked.pk, transfer.id)
        _book_intent(locked, key=f"payout:{locked.pk}:intent-again")
        recoveries.net(
            parties=[locked.party_id], currency=locked.currency
        )  # what it was sent beyond what is payable, it owes
    locked.status, locked.transfer_id, locked.sent_at = Payout.Status.SENT, transfer.id, now
    locked.save(update_fields=["status", "transfer_id", "sent_at"])
    ledger.post(
        key=f"payout:{locked.pk}:sent",
        kind=JournalEntry.Kind.PAYOUT_SENT,
        postings={
            chart.in_transit(locked.currency): locked.amount_micros,
            chart.cash_available(locked.currency): -locked.amount_micros,
        },
        booked_at=now,
    )
    logger.info("Sent payout=%s transfer=%s micros=%s", locked.pk, transfer.id, locked.amount_micros)


def _book_refused(run: PayoutRun, payout: Payout, *, code: str, message: str) -> None:
    """Book the intent back to payable; what of it an open dispute is about is frozen in the same transaction."""
    while not _booked_refused(run, payout, code=code, message=message):
        logger.info("A dispute was opened or closed meanwhile payout=%s", payout.pk)


@transaction.atomic
def _booked_refused(run: PayoutRun, payout: Payout, *, code: str, message: str) -> bool:
    """False, with nothing booked, if a dispute was opened or closed before the payables' lock was held: its freeze counted this as sent."""
    disputed = clawbacks.disputed_payments_of(party=payout.party_id, currency=payout.currency)
    payments = list(disputed.select_for_update(of=("self",)))  # before the payables' lock, as everywhere
    pools = RoyaltyPool.objects.filter(order_line__order__in=[one.order_id for one in payments]).order_by("pk")
    list(pools.select_for_update(of=("self",)))
    run.lock()
    recoveries.lock(payout.currency)
    if set(disputed.values_list("pk", flat=True)) != {one.pk for one in payments}:
        return False
    locked = Payout.objects.select_for_update().get(pk=payout.pk)
    if locked.status != Payout.Status.INTENDED:
        return True
    locked.status = Payout.Status.REFUSED
    locked.refusal_code, locked.refusal_message = code[:60], message
    locked.save(update_fields=["status", "refusal_code", "refusal_message"])
    ledger.reverse(
        JournalEntry.objects.get(key=f"payout:{locked.pk}:intent"),
        key=f"payout:{locked.pk}:refused",
        kind=JournalEntry.Kind.PAYOUT_REVERSAL,
    )
    recoveries.net(parties=[locked.party_id], currency=locked.currency)  # a refund may have been waiting for it
    for payment in payments:
        clawbacks.freeze_again(payment)
    logger.warning("Refused payout=%s code=%s", locked.pk, code)
    return True
