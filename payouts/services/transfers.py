"""Payouts: a run plans what is due; then intent and effect, batch by batch (DESIGN §5).

    planned    who is to be paid and how much at most, whose money has waited longest first
    intended   payable → in_transit, committed before Stripe is called
    sent       Stripe made the transfer: in_transit → cash
    refused    Stripe definitely refused: booked back to payable; the next run tries anew
    paid       the connected account's payout reached the bank

A refusal is definite, and yet a worker that was suspended in the middle of its call may wake and make the transfer after
its successor was refused: the next run, and the bank's word, find it and book it as sent.

A worker may die anywhere. The next attempt finds the intent, asks Stripe whether the transfer was made, and repeats the
call with the same idempotency key while Stripe remembers it. Of a batch the tries are committed in one transaction, the calls
made side by side at the rate that `pacing` allows, and the answers booked in one transaction.

A run stops for a person (approval, pause) and for funds; it goes on where it was, hours or days later. A large one is cut into
shards of about a minute, which several workers carry out.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache, partial
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Count, Q, QuerySet
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.errors import InvalidInput
from marketplace.jobs import Job
from marketplace.models import User
from marketplace.money import MINOR_DIGITS, Money
from marketplace.services import audit
from marketplace.services.authority import require_staff
from payouts import chart, gateway, ledger
from payouts.errors import FourEyes, PayoutRunNotStoppable, TransferMismatch
from payouts.models import (
    Dispute,
    JournalEntry,
    PayeeAccount,
    Payout,
    PayoutRun,
    PayoutShard,
    PlannedPayout,
    RoyaltyPool,
)
from payouts.services import attempts, clawbacks, pacing, plans, recoveries
from payouts.services.attempts import KEY_LIFE, StillUncertain
from payouts.services.plans import due_micros
from payouts.services.refusals import OUR_FAULT

logger = logging.getLogger(__name__)

__all__ = [
    "KEY_LIFE",
    "StillUncertain",
    "approve_payout_run",
    "confirm_in_bank",
    "due_micros",
    "execute_payout_run",
    "execute_payout_shard",
    "pause_payout_run",
    "refresh_bank_payout",
    "reject_payout_run",
    "request_payout_run",
    "resume_payout_run",
    "resume_when_funded",
]

State, Outcome = PayoutRun.State, PlannedPayout.Outcome

#: How long after its last try a refused payout's transfer is looked for: no HTTP call sleeps longer.
LATE = timedelta(days=2)
#: So many payouts are intended, noted as tried, and booked in a transaction each.
AT_ONCE = 250
SHARD_SECONDS = 60
NO_FUNDS = "balance_insufficient"
#: What waits for somebody is looked at again so often, should nobody wake it.
LOOK_AGAIN = timedelta(hours=1)
FUNDS_LOOK_AGAIN = timedelta(minutes=10)
SHARDS_LOOK_AGAIN = timedelta(minutes=2)
BUSY_PAUSE = timedelta(seconds=30)


@transaction.atomic
def request_payout_run(*, currency: str, key: str, user: User | None = None) -> PayoutRun:
    """Ask for everything that is due by now in one currency; the same key asks once.

    Args:
        user: who started it; None: the schedule.

    Raises:
        ValueError: a currency in which the platform holds no balance.
        NotAllowed: the user is not staff.
    """
    if currency not in MINOR_DIGITS:
        raise ValueError(f"No balance is held in {currency!r}")
    if user is not None:
        require_staff(user=user, to="start a payout run")
    defaults = {"currency": currency, "due_until": clock.now(), "started_by": user}
    run, is_new = PayoutRun.objects.get_or_create(key=key, defaults=defaults)
    if is_new:
        _audit(run, user, "payout_run.requested")
        logger.info("Requested payout run=%s key=%s due_until=%s", run.pk, key, run.due_until)
        jobs.wake(run)
    return run


def open_runs(currency: str) -> QuerySet[PayoutRun]:
    """Those that are not at their end: what falls due meanwhile is the next one's."""
    return PayoutRun.objects.filter(currency=currency, status__in=[Job.Status.QUEUED, Job.Status.RUNNING])


# --- a person's word --------------------------------------------------------------------------------------------------


def approve_payout_run(*, run: PayoutRun, by: User) -> PayoutRun:
    """A second person agrees to a run above the limit: it sends what was planned, and nothing more.

    Raises:
        NotAllowed: not staff.
        FourEyes: the person who started it.
        PayoutRunNotStoppable: it does not wait for approval.
    """
    require_staff(user=by, to="approve a payout run")
    if run.started_by_id is not None and run.started_by_id == by.pk:
        raise FourEyes("Whoever started a payout run cannot approve it; ask a colleague.")
    wall = timezone.now()
    return _moved(run, by, "approved", [State.AWAITING_APPROVAL], State.SENDING, approved_by=by, approved_at=wall)


def reject_payout_run(*, run: PayoutRun, by: User, reason: str) -> PayoutRun:
    """A person says no before anything was sent; what is due stays due, and the next run plans it anew.

    Raises:
        NotAllowed: not staff.
        InvalidInput: no reason.
        PayoutRunNotStoppable: it does not wait for approval.
    """
    require_staff(user=by, to="reject a payout run")
    return _moved(run, by, "rejected", [State.AWAITING_APPROVAL], State.REJECTED, note=_reason(reason))


def pause_payout_run(*, run: PayoutRun, by: User, reason: str) -> PayoutRun:
    """Stop before the next batch, for as long as it takes; what is on its way to Stripe is brought to its end.

    Raises:
        NotAllowed: not staff.
        InvalidInput: no reason.
        PayoutRunNotStoppable: it does not send, or has ended.
    """
    require_staff(user=by, to="pause a payout run")
    states = [State.SENDING, State.SHORT_OF_FUNDS]
    return _moved(run, by, "paused", states, State.PAUSED, note=_reason(reason), paused_at=timezone.now())


def resume_payout_run(*, run: PayoutRun, by: User) -> PayoutRun:
    """Go on where it was.

    Raises:
        NotAllowed: not staff.
        PayoutRunNotStoppable: it is not paused.
    """
    require_staff(user=by, to="resume a payout run")
    return _moved(run, by, "resumed", [State.PAUSED], State.SENDING, note="")


@transaction.atomic
def _moved(run: PayoutRun, by: User, what: str, from_: Sequence[str], to: str, **changes: object) -> PayoutRun:
    unfinished = PayoutRun.objects.filter(
        pk=run.pk, state__in=from_, status__in=[Job.Status.QUEUED, Job.Status.RUNNING]
    )
    if not unfinished.update(state=to, **changes):
        run.refresh_from_db()
        raise PayoutRunNotStoppable(
            f"Payout run {run.pk} is {run.get_state_display().lower()}; it cannot be {what} now."
        )
    run.refresh_from_db()
    _audit(run, by, f"payout_run.{what}", **({"reason": run.note} if run.note else {}))
    for job in (run, *run.shards.filter(status=Job.Status.QUEUED)):
        jobs.resume(job)
    logger.info("Payout run=%s %s by user=%s", run.pk, what, by.pk)
    return run


def resume_when_funded() -> int:
    """Wake the runs whose rest waits for funds, after some became available; returns how many."""
    short = PayoutRun.objects.filter(state=State.SHORT_OF_FUNDS, status=Job.Status.QUEUED).order_by("due_until", "pk")
    return sum(jobs.resume(run) for run in short)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class _Done:
    """How a stretch of work ended."""

    n_tried: int = 0
    n_uncertain: int = 0
    is_busy: bool = True  # of the uncertain ones: Stripe only ever said that it was too much
    is_short: bool = False
    is_stopped: bool = False
    mismatches: list[str] = field(default_factory=list)

    def require_clear(self, of: Job) -> None:
        """
        Raises:
            TransferMismatch, StillUncertain: see `execute_payout_run`.
        """
        if self.mismatches:
            raise TransferMismatch(" ".join(self.mismatches))
        if self.n_uncertain:
            raise StillUncertain(f"{self.n_uncertain} of {self.n_tried} payouts of {of}")

    def waits_for_stripe(self, job: Job) -> bool:
        """Put the job off without counting a failure, if all that went wrong is that Stripe was asked too much."""
        if self.mismatches or not (self.n_uncertain and self.is_busy):
            return False
        job.postpone(timezone.now() + BUSY_PAUSE)
        return True


def execute_payout_run(run: PayoutRun) -> None:
    """Plan what is due, then intend and send it, this run's and what finished runs have left behind.

    Harmless to run again: a payee has one payout in a run, and each transfer happens once.

    Raises:
        LostLease: another worker has taken the run over.
        StillUncertain: some payouts wait for a clear answer of Stripe's.
        TransferMismatch: some need a person; all others have been sent.
        gateway.StripeRefused: Stripe refused us rather than a payout (the key is wrong, say); the intents stay.
    """
    if run.planned_at is None:
        _book_late_transfers(run)
        recoveries.net_what_became_payable()  # also for whoever is owed just what they owe, and so not planned
        with transaction.atomic():
            run.lock()
            plans.write_plan(run)
    run.refresh_from_db(fields=["state"])
    if run.state in PayoutRun.STOPPED:
        if run.state != State.REJECTED:
            _wait_for_a_person(run, run)
        return
    done = _Done()
    left_behind = Payout.objects.filter(
        run__currency=run.currency,
        run__status__in=[Job.Status.DONE, Job.Status.FAILED],
        status=Payout.Status.INTENDED,
    )
    if left := list(left_behind.exclude(run=run).order_by("pk").values_list("pk", flat=True)):
        _send(run, left, done)
    if run.n_planned <= shard_size():
        _work(run, run, 0, plans.funded_until(run), done)
    else:
        if _have_shards_to_finish(run):
            return
        _work(run, run, 0, run.funded_until, done)  # what shards had to leave: funds that were gone after all
        if not (done.is_short or done.is_stopped or done.n_uncertain) and _cut(run):
            return
    _end(run, done)


def execute_payout_shard(shard: PayoutShard) -> None:
    """Intend and send one shard of a run; harmless to run again. Whoever ends last wakes the run.

    Raises: see `execute_payout_run`.
    """
    run, done = shard.run, _Done()
    _work(run, shard, shard.first, shard.end, done)
    if done.is_stopped:
        _wait_for_a_person(run, shard)
        return
    if done.waits_for_stripe(shard):
        return
    done.require_clear(shard)
    shard.finish()
    if not _unfinished_shards(run).exists():
        jobs.resume(run)


def shard_size() -> int:
    """Payees in about a minute at the rate that Stripe is asked at."""
    return max(AT_ONCE, int(SHARD_SECONDS * settings.STRIPE_REQUESTS_PER_SECOND))


def _unfinished_shards(run: PayoutRun) -> QuerySet[PayoutShard]:
    return run.shards.filter(status__in=[Job.Status.QUEUED, Job.Status.RUNNING])


def _have_shards_to_finish(run: PayoutRun) -> bool:
    """Put the run off while its shards work; the last one wakes it."""
    if not _unfinished_shards(run).exists():
        return False
    ended = run.planned_payouts.exclude(outcome=Outcome.WAITING).count()
    run.progress(done=ended, total=run.n_planned)
    run.postpone(timezone.now() + SHARDS_LOOK_AGAIN)
    if not _unfinished_shards(run).exists():
        jobs.resume(run)  # the last one ended in between and found the run running
    return True


def _cut(run: PayoutRun) -> bool:
    """Give what the funds reach to shards, and wait for them; False if there is nothing to give."""
    reach, size = plans.funded_until(run), shard_size()
    if reach <= run.funded_until:
        return False
    with transaction.atomic():
        run.lock()
        shards = PayoutShard.objects.bulk_create(
            PayoutShard(run=run, first=first, end=min(first + size, reach))
            for first in range(run.funded_until, reach, size)
        )
        run.write(funded_until=reach)
        for shard in shards:
            jobs.wake(shard)
    logger.info("Cut payout run=%s shards=%s until=%s of=%s", run.pk, len(shards), reach, run.n_planned)
    return _have_shards_to_finish(run)


def _end(run: PayoutRun, done: _Done) -> None:
    if done.is_stopped:
        _wait_for_a_person(run, run)
        return
    if done.waits_for_stripe(run):
        return
    if run.shards.filter(status=Job.Status.FAILED).exists():
        done.mismatches += run.shards.filter(status=Job.Status.FAILED).values_list("error_message", flat=True)
    done.require_clear(run)
    counted = dict(run.planned_payouts.values_list("outcome").annotate(n=Count("pk")))
    is_short = bool(counted.get(Outcome.WAITING))
    run.progress(done=run.n_planned - counted.get(Outcome.WAITING, 0), total=run.n_planned)
    moving = PayoutRun.objects.filter(pk=run.pk, state__in=[State.PLANNING, State.SENDING, State.SHORT_OF_FUNDS])
    moving.update(state=State.SHORT_OF_FUNDS if is_short else State.ENDED)
    if is_short:
        logger.warning("Funds do not suffice run=%s waiting=%s", run.pk, counted[Outcome.WAITING])
        run.postpone(timezone.now() + FUNDS_LOOK_AGAIN)


def _wait_for_a_person(run: PayoutRun, job: Job) -> None:
    """Put the job off until somebody lets the run go on, who may have done so a moment ago and found the job running."""
    job.postpone(timezone.now() + LOOK_AGAIN)
    run.refresh_from_db(fields=["state"])
    if run.state not in PayoutRun.STOPPED:
        jobs.resume(job)


def _work(run: PayoutRun, job: Job, first: int, end: int, done: _Done) -> None:
    """Intend and send the positions from `first` to `end`, batch by batch, until one must stop."""
    waiting = run.planned_payouts.filter(outcome=Outcome.WAITING, position__gte=first, position__lt=end)
    mine = Q(party__in=run.planned_payouts.filter(position__gte=first, position__lt=end).values("party"))
    unsent = Payout.objects.filter(run=run, status=Payout.Status.INTENDED).order_by("pk")
    if job is not run:
        unsent = unsent.filter(mine)
    left = list(unsent.values_list("pk", flat=True))  # by an attempt that died
    if left and not _is_stopped(run, done):
        _send(job, left, done)
    while not (done.is_short or _is_stopped(run, done)):
        batch = list(waiting.order_by("position").values_list("party", flat=True)[:AT_ONCE])
        if not batch:
            return
        with transaction.atomic():
            job.lock()
            intended, is_enough = _intend(run, batch)
        _send_batch(job, intended, done)
        done.is_short |= not is_enough
        n_waiting = waiting.count() if job is not run else run.planned_payouts.filter(outcome=Outcome.WAITING).count()
        total = end - first if job is not run else run.n_planned
        job.progress(done=total - n_waiting, total=total)


def _is_stopped(run: PayoutRun, done: _Done) -> bool:
    run.refresh_from_db(fields=["state"])
    done.is_stopped = run.state in PayoutRun.STOPPED
    return done.is_stopped


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


def refresh_bank_payout(*, account: str, bank_payout: str) -> None:
    """Write down how a connected account's payout to its bank stands now; events may come late or out of order.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again.
    """
    state = gateway.get_bank_payout(account=account, payout=bank_payout)
    if state.status == "paid":
        confirm_in_bank(account=account, bank_payout=bank_payout)
    elif state.status in ("failed", "canceled"):
        _note_bank_failure(account=account, bank_payout=bank_payout, code=state.failure_code or state.status)


def _note_bank_failure(*, account: str, bank_payout: str, code: str) -> list[Payout]:
    """The bank took the money for nobody: it lies in the payee's balance at Stripe, and is sent anew once they name another account."""
    transfers = gateway.transfers_in_payout(account=account, payout=bank_payout)
    failed = []
    for payout in Payout.objects.filter(transfer_id__in=transfers, destination=account).order_by("pk"):
        # A later payout that carried the same money to the bank has its own id there.
        standing = Q(status=Payout.Status.SENT) | Q(status=Payout.Status.PAID, bank_payout_id=bank_payout)
        changed = Payout.objects.filter(standing, pk=payout.pk).update(
            status=Payout.Status.SENT, bank_failure_code=code[:60], bank_failed_at=clock.now(), paid_at=None
        )
        if changed:
            logger.warning("Bank refused payout=%s bank_payout=%s code=%s", payout.pk, bank_payout, code)
            failed.append(payout)
    return failed


def group_of(payout: Payout) -> str:
    """By this the transfer is found again when its key is forgotten."""
    return f"payout:{payout.pk}"


# --- intent -----------------------------------------------------------------------------------------------------------


def _intend(run: PayoutRun, parties: list[int]) -> tuple[list[Payout], bool]:
    """Inside a transaction: promise parties what is due, in this order, as far as Stripe's available funds go.

    Nobody gets more than was planned for them, and whoever cannot be paid any more is passed over with the reason.

    Returns:
        The payouts, and whether the funds sufficed: with the first for whom they do not, it stops.
    """
    recoveries.lock(run.currency)  # two runs must not promise the same available funds, nor what a refund takes back
    held = {payee.party_id: payee for payee in _held(parties)}
    standing = Payout.objects.filter(run=run, party__in=parties).exclude(status=Payout.Status.REFUSED)
    paid_before = set(standing.values_list("party", flat=True))
    planned = dict(run.planned_payouts.filter(party__in=parties).values_list("party", "amount_micros"))
    recoveries.net(parties=parties, currency=run.currency)
    due = plans.due_of(parties, currency=run.currency, until=run.due_until)
    least = plans.minimums(parties, run.currency)
    free = plans.free_micros(run.currency)
    outcomes: dict[int, PlannedPayout.Outcome] = {}
    intended: list[Payout] = []
    now, is_enough = clock.now(), True
    for party in parties:
        amount = Money(max(0, min(due[party], planned.get(party, due[party]))), run.currency).floor_to_minor()
        if party in paid_before:
            outcomes[party] = Outcome.INTENDED
        elif party not in held or not held[party].is_ready:
            outcomes[party] = Outcome.NOT_READY
        elif not amount:
            outcomes[party] = Outcome.NOT_DUE
        elif amount.micros < least[party]:
            outcomes[party] = Outcome.BELOW_MINIMUM
        elif amount.micros > free:
            logger.warning("Funds do not suffice run=%s party=%s micros=%s free=%s", run.pk, party, amount.micros, free)
            is_enough = False
            break
        else:
            outcomes[party] = Outcome.INTENDED
            free -= amount.micros
            intended.append(
                Payout(
                    run=run,
                    party_id=party,
                    destination=held[party].stripe_account_id,
                    amount_micros=amount.micros,
                    currency=run.currency,
                    intended_at=now,
                )
            )
    Payout.objects.bulk_create(intended)
    ledger.post_many([_intent_of(payout, key=f"payout:{payout.pk}:intent") for payout in intended])
    for outcome in set(outcomes.values()):
        those = [party for party, one in outcomes.items() if one == outcome]
        run.planned_payouts.filter(party__in=those).update(outcome=outcome)
    if intended:
        micros = sum(payout.amount_micros for payout in intended)
        logger.info("Intended payouts=%s run=%s from=%s micros=%s", len(intended), run.pk, intended[0].pk, micros)
    return intended, is_enough


def _held(parties: Iterable[int]) -> QuerySet[PayeeAccount]:
    needed = ("party_id", "stripe_account_id", "transfers_active")
    return PayeeAccount.objects.select_for_update().filter(party__in=parties).order_by("pk").only(*needed)


def _intent_of(payout: Payout, *, key: str) -> ledger.Draft:
    return ledger.Draft(
        key=key,
        kind=JournalEntry.Kind.PAYOUT_INTENT,
        postings={
            chart.payable(payout.party_id, payout.currency): payout.amount_micros,
            chart.in_transit(payout.currency): -payout.amount_micros,
        },
        booked_at=clock.now() if payout.status == Payout.Status.REFUSED else payout.intended_at,
    )


def _book_late_transfers(run: PayoutRun) -> None:
    """Look again for transfers of payouts that were lately refused, before the same money is intended anew.

    That is for whoever is about to be planned, several side by side; nobody else's money moves.
    """
    lately = timezone.now() - LATE
    refused = Payout.objects.filter(currency=run.currency, status=Payout.Status.REFUSED, first_tried_at__gt=lately)
    pks = list(refused.order_by("pk").values_list("pk", flat=True))
    for start in range(0, len(pks), AT_ONCE):
        batch = list(Payout.objects.filter(pk__in=pks[start : start + AT_ONCE]).order_by("pk"))
        parties = {payout.party_id for payout in batch}
        due = plans.due_of(parties, currency=run.currency, until=run.due_until)
        least = plans.minimums(parties, run.currency)
        ready = set(
            PayeeAccount.objects.filter(party__in=parties, transfers_active=True).values_list("party", flat=True)
        )
        asked = [
            payout for payout in batch if payout.party_id in ready and due[payout.party_id] >= least[payout.party_id]
        ]
        side_by_side = map if settings.STRIPE_CONNECTIONS == 1 else _callers(settings.STRIPE_CONNECTIONS).map
        for payout, found in zip(asked, side_by_side(_found_late, asked), strict=True):
            if found is not None:
                _book_sent(payout, found, run)


def _found_late(payout: Payout) -> gateway.Transfer | None:
    """What Stripe made of a payout that it had refused. No database is touched here."""
    pacing.wait_for_turn()
    return gateway.find_transfer(group_of(payout))


# --- effect -----------------------------------------------------------------------------------------------------------


def _send(job: Job, pks: list[int], done: _Done) -> None:
    """Bring intended payouts to an end; how many have none yet, and what needs a person, is added to `done`."""
    for start in range(0, len(pks), AT_ONCE):
        found = Payout.objects.filter(pk__in=pks[start : start + AT_ONCE], status=Payout.Status.INTENDED)
        _send_batch(job, list(found.order_by("pk")), done)


def _send_batch(job: Job, batch: list[Payout], done: _Done) -> None:
    done.n_tried += len(batch)
    # Of those tried before, somebody did not live to book the answer: they are looked up first, one by one.
    for payout in batch:
        if payout.first_tried_at is not None:
            _pursue(job, payout, done)
    answers = _ask(_noted(job, [payout for payout in batch if payout.first_tried_at is None]))
    sent = [(payout, answer) for payout, answer in answers if isinstance(answer, gateway.Transfer)]
    right = [(payout, transfer) for payout, transfer in sent if _is_right(payout, transfer)]
    _book_all_sent(job, right)
    for payout, answer in answers:
        if isinstance(answer, gateway.StripeUncertain):
            _pursue(job, payout, done, answered=answer)
        elif isinstance(answer, gateway.StripeRefused):
            if answer.http_status in OUR_FAULT:
                raise answer  # we were refused, not this payout; nothing was sent and the intents stay
            _refuse(job, payout, answer, done)
        elif not _is_right(payout, answer):
            _found_wrong(job, payout, answer, done)


def _found_wrong(job: Job, payout: Payout, transfer: gateway.Transfer, done: _Done) -> None:
    try:
        _book_sent(payout, transfer, job)
    except TransferMismatch as error:  # one of them must not stop everybody else's money
        logger.exception("Payout needs a person payout=%s", payout.pk)
        done.mismatches.append(str(error))


def _noted(job: Job, payouts: list[Payout]) -> list[Payout]:
    """Those that may be tried now, committed as tried before any call; what is disputed since its intent is booked back."""
    if not payouts:
        return []
    first = min(payout.created_at for payout in payouts)
    if Dispute.objects.filter(status__in=Dispute.OPEN, created_at__gt=first).exists():
        for payout in [payout for payout in payouts if _is_disputed_since(payout)]:
            payouts.remove(payout)
            message = (
                "A payment that it is made of was disputed before it was sent; what is not disputed goes out next."
            )
            _book_refused(job, payout, code="disputed", message=message)
    wall = timezone.now()
    with transaction.atomic():
        job.lock()
        Payout.objects.filter(pk__in=[payout.pk for payout in payouts]).update(first_tried_at=wall)
    for payout in payouts:
        payout.first_tried_at = wall
    return payouts


Answer = gateway.Transfer | gateway.StripeRefused | gateway.StripeUncertain


def _ask(payouts: list[Payout]) -> list[tuple[Payout, Answer]]:
    """One call for each, several side by side; what Stripe said is returned, not raised. No database is touched here."""
    turns = pacing.Turns(len(payouts))
    if len(payouts) <= 1 or settings.STRIPE_CONNECTIONS == 1:
        return [(payout, _asked(payout, turns)) for payout in payouts]
    answers = _callers(settings.STRIPE_CONNECTIONS).map(partial(_asked, turns=turns), payouts)
    return list(zip(payouts, answers, strict=True))


@lru_cache(maxsize=1)
def _callers(n: int) -> ThreadPoolExecutor:
    """This process's threads that call Stripe: each keeps its connection open from batch to batch."""
    return ThreadPoolExecutor(n, thread_name_prefix="transfer")


def _asked(payout: Payout, turns: pacing.Turns) -> Answer:
    try:
        return _create_transfer(payout, turns)
    except (gateway.StripeRefused, gateway.StripeUncertain) as error:
        return error


def _create_transfer(payout: Payout, turns: pacing.Turns) -> gateway.Transfer:
    turns.wait()
    try:
        return gateway.create_transfer(
            amount_minor=payout.amount.to_minor(),
            currency=payout.currency,
            destination=payout.destination,
            transfer_group=group_of(payout),
            key=f"payout:{payout.pk}:{payout.attempt}",
            metadata={"payout": str(payout.pk), "run": str(payout.run_id)},
        )
    except gateway.StripeUncertain as error:
        if error.http_status == 429:
            pacing.back_off(retry_after_seconds=error.retry_after_seconds, number=0)
        raise


def _is_right(payout: Payout, transfer: gateway.Transfer) -> bool:
    return (transfer.amount_minor, transfer.currency) == (payout.amount.to_minor(), payout.currency)


def _pursue(job: Job, payout: Payout, done: _Done, *, answered: gateway.StripeUncertain | None = None) -> None:
    try:
        attempts.pursue(_Sending(job, payout, done), answered=answered)
    except StillUncertain as error:
        done.n_uncertain += 1
        done.is_busy &= error.is_busy
    except TransferMismatch as error:  # one of them must not stop everybody else's money
        logger.exception("Payout needs a person payout=%s", payout.pk)
        done.mismatches.append(str(error))


class _Sending:
    """See `attempts.Effect`."""

    def __init__(self, job: Job, payout: Payout, done: _Done) -> None:
        self.job = job
        self.payout = payout
        self.done = done

    def __str__(self) -> str:
        return f"payout={self.payout.pk}"

    @property
    def first_tried_at(self) -> datetime | None:
        return self.payout.first_tried_at

    def note_try(self) -> None:
        self._note(self.payout.attempt)

    def next_attempt(self) -> None:
        self._note(self.payout.attempt + 1)

    @transaction.atomic
    def _note(self, attempt: int) -> None:
        self.job.lock()
        self.payout.attempt, self.payout.first_tried_at = attempt, timezone.now()
        self.payout.save(update_fields=["attempt", "first_tried_at"])

    def find(self) -> gateway.Transfer | None:
        pacing.wait_for_turn()
        return gateway.find_transfer(group_of(self.payout))

    def call(self) -> gateway.Transfer:
        return _create_transfer(self.payout, pacing.Turns(1))

    def book(self, answer: gateway.Transfer) -> None:
        _book_sent(self.payout, answer, self.job)

    def refuse(self, error: gateway.StripeRefused) -> None:
        _refuse(self.job, self.payout, error, self.done)


def _refuse(job: Job, payout: Payout, error: gateway.StripeRefused, done: _Done) -> None:
    """Book it back; where only funds were missing at Stripe, its payee waits at their place for the run to go on."""
    _book_refused(job, payout, code=error.code, message=error.message)
    if error.code == NO_FUNDS:
        done.is_short = True
        PlannedPayout.objects.filter(run=payout.run_id, party=payout.party_id).update(outcome=Outcome.WAITING)


def _is_disputed_since(payout: Payout) -> bool:
    """Whether a dispute that touches the payee was opened after the intent: its freeze took the intent for sent."""
    disputed = clawbacks.disputed_payments_of(party=payout.party_id, currency=payout.currency)
    return Dispute.objects.filter(
        payment__in=disputed, status__in=Dispute.OPEN, created_at__gt=payout.created_at
    ).exists()


@transaction.atomic
def _book_all_sent(job: Job, sent: list[tuple[Payout, gateway.Transfer]]) -> None:
    """Book a batch of answers that are what was intended."""
    if not sent:
        return
    job.lock()
    now = clock.now()
    still = Payout.objects.select_for_update().filter(pk__in=[payout.pk for payout, _ in sent])
    unsent = set(still.filter(status=Payout.Status.INTENDED).order_by("pk").values_list("pk", flat=True))
    booked = [
        (payout, transfer) for payout, transfer in sent if payout.pk in unsent
    ]  # not what a webhook was faster with
    with connection.cursor() as cursor:
        cursor.execute(
            """
            UPDATE payouts_payout SET status = 'sent', sent_at = %s, transfer_id = told.transfer_id
            FROM unnest(%s::bigint[], %s::text[]) AS told (id, transfer_id) WHERE payouts_payout.id = told.id
            """,
            [now, [payout.pk for payout, _ in booked], [transfer.id for _, transfer in booked]],
        )
    ledger.post_many([_sent_of(payout, at=now) for payout, _ in booked])
    logger.info("Sent payouts=%s first=%s", len(booked), sent[0][0].pk)


def _sent_of(payout: Payout, *, at: datetime) -> ledger.Draft:
    return ledger.Draft(
        key=f"payout:{payout.pk}:sent",
        kind=JournalEntry.Kind.PAYOUT_SENT,
        postings={
            chart.in_transit(payout.currency): payout.amount_micros,
            chart.cash_available(payout.currency): -payout.amount_micros,
        },
        booked_at=at,
    )


@transaction.atomic
def _book_sent(payout: Payout, transfer: gateway.Transfer, job: Job | None = None) -> None:
    if job is not None:
        job.lock()
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
        ledger.post_many([_intent_of(locked, key=f"payout:{locked.pk}:intent-again")])
        recoveries.net(
            parties=[locked.party_id], currency=locked.currency
        )  # what it was sent beyond what is payable, it owes
    locked.status, locked.transfer_id, locked.sent_at = Payout.Status.SENT, transfer.id, now
    locked.save(update_fields=["status", "transfer_id", "sent_at"])
    ledger.post_many([_sent_of(locked, at=now)])
    logger.info("Sent payout=%s transfer=%s micros=%s", locked.pk, transfer.id, locked.amount_micros)


def _book_refused(job: Job, payout: Payout, *, code: str, message: str) -> None:
    """Book the intent back to payable; what of it an open dispute is about is frozen in the same transaction."""
    while not _booked_refused(job, payout, code=code, message=message):
        logger.info("A dispute was opened or closed meanwhile payout=%s", payout.pk)


@transaction.atomic
def _booked_refused(job: Job, payout: Payout, *, code: str, message: str) -> bool:
    """False, with nothing booked, if a dispute was opened or closed before the payables' lock was held: its freeze counted this as sent."""
    disputed = clawbacks.disputed_payments_of(party=payout.party_id, currency=payout.currency)
    payments = list(disputed.select_for_update(of=("self",)))  # before the payables' lock, as everywhere
    pools = RoyaltyPool.objects.filter(order_line__order__in=[one.order_id for one in payments]).order_by("pk")
    list(pools.select_for_update(of=("self",)))
    job.lock()
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


def _reason(text: str) -> str:
    if not text.strip():
        raise InvalidInput("Say why, in words: whoever looks at the run reads it.", pointers={"/reason": "missing"})
    return text.strip()


def _audit(run: PayoutRun, user: User | None, action: str, **detail: Any) -> None:
    audit.record(
        actor=user,
        action=action,
        target=f"payout_run:{run.pk}",
        key=run.key,
        currency=run.currency,
        **detail,
    )
