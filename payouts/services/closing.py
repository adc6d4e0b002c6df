"""Closing a month: from then on PostgreSQL refuses every entry in it, and its statements go out.

open → over → closed (trial balance kept) → statements issued and mailed
"""

import logging
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from django.db import OperationalError, connection, transaction
from django.db.models import Min

from marketplace import clock, jobs
from marketplace.models import User
from marketplace.services import audit
from payouts import books
from payouts.errors import NotClosable
from payouts.models import (
    BalanceCheck,
    BankReceipt,
    ClosedBalance,
    ClosedPeriod,
    JournalEntry,
    ManualEntry,
    OutgoingTransfer,
    RailConfirmation,
    RailExport,
    ReceiptApplication,
    ReconciliationRun,
    StatementRun,
    StripeEvent,
)
from payouts.services.proving import latest_proof

logger = logging.getLogger(__name__)

#: So long after its end a month is closed by itself, if nothing is open: late news of Stripe's have come by then.
CLOSES_AFTER = timedelta(days=3)
LOCK_WAIT_MILLISECONDS = 5_000


#: What an obstacle may be about, each settled at one place.
ABOUT = ("looks", "proof", "balances", "events", "manual", "receipts", "bank", "rails")


@dataclass(frozen=True)
class Obstacle:
    """One thing that is open, in words, and by what it is settled: `ABOUT`."""

    about: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class NextPeriod:
    """The month that would be closed next, and what stands in the way."""

    starts_on: date
    ends_at: datetime
    is_over: bool
    obstacles: list[Obstacle]

    @property
    def month(self) -> str:
        return f"{self.starts_on:%Y-%m}"


def find_next_period() -> NextPeriod | None:
    """The month after the last closed one; before any is closed, that of the first entry. None while nothing was booked."""
    last = ClosedPeriod.objects.order_by("-starts_on").first()
    if last is not None:
        starts_at = last.ends_at.astimezone(UTC)
    else:
        first = JournalEntry.objects.aggregate(first=Min("booked_at"))["first"]
        if first is None:
            return None
        first = first.astimezone(UTC)
        starts_at = datetime(first.year, first.month, 1, tzinfo=UTC)
    ends_at = _next_month(starts_at)
    return NextPeriod(
        starts_on=starts_at.date(),
        ends_at=ends_at,
        is_over=clock.now() >= ends_at,
        obstacles=_obstacles(ends_at),
    )


@transaction.atomic
def close_period(*, starts_on: date, by: User | None, note: str = "") -> ClosedPeriod:
    """Close one month for good, keep its trial balance and queue its statements; again, nothing happens.

    Args:
        note: why it is closed although something is open; staff must give it then, and the auditor reads it.

    Raises:
        NotClosable: it is not the next one or not over, something is open and no reason was given, or the ledger is
            being written to for too long.
    """
    if found := ClosedPeriod.objects.filter(starts_on=starts_on).first():
        return found
    coming = find_next_period()
    if coming is None or coming.starts_on != starts_on:
        expected = f"the next one is {coming.month}" if coming else "nothing has been booked yet"
        raise NotClosable(f"{starts_on:%Y-%m} cannot be closed: {expected}.", pointers={"/month": "not the next one"})
    if not coming.is_over:
        raise NotClosable(
            f"{coming.month} ends on {coming.ends_at - timedelta(days=1):%d %B %Y}; close it after that.",
            pointers={"/month": "not over"},
        )
    if coming.obstacles and not note.strip():
        raise NotClosable(
            f"{coming.month} is not clean: {' '.join(map(str, coming.obstacles))} Settle it, or say why it is closed nevertheless.",
            pointers={"/note": "missing"},
        )
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = {LOCK_WAIT_MILLISECONDS}")
            # Its trigger waits until no entry is being made; the next one sees that the month is closed.
            period = ClosedPeriod.objects.create(
                starts_on=starts_on,
                ends_at=coming.ends_at,
                closed_by=by,
                closed_at=clock.now(),
                note=note.strip(),
            )
    except OperationalError as error:
        raise NotClosable("The ledger is being written to without a pause; try again in a minute.") from error
    for trial in books.trial_balance(as_of=coming.ends_at):
        if not trial.balances:
            raise NotClosable(f"Debits and credits in {trial.currency} differ: run check_ledger before anything else.")
        ClosedBalance.objects.bulk_create(
            ClosedBalance(
                period=period,
                purpose=line.purpose,
                currency=line.currency,
                debit_micros=line.debit.micros,
                credit_micros=line.credit.micros,
            )
            for line in trial.lines
        )
    audit.record(
        actor=by,
        action="period.closed",
        target=f"period:{period}",
        note=period.note,
        obstacles=[str(one) for one in coming.obstacles],
    )
    jobs.wake(StatementRun.objects.create(period=period))
    logger.info("Closed period=%s by=%s", period, by and by.pk)
    return period


def close_what_is_over() -> list[ClosedPeriod]:
    """Close every month that ended days ago and in which nothing is open; what is open waits for a person."""
    closed = []
    while (coming := find_next_period()) is not None:
        if clock.now() < coming.ends_at + CLOSES_AFTER or coming.obstacles:
            break
        closed.append(close_period(starts_on=coming.starts_on, by=None))
    return closed


def _obstacles(ends_at: datetime) -> list[Obstacle]:
    """What is open, or was not proved since the month's end: evidence that is older says nothing of its last entries."""
    awaiting = [
        ("manual", "manual entr{}", "y", "ies", ManualEntry.objects.filter(booked_at__lt=ends_at, decision=None)),
        (
            "receipts",
            "bank transfer{}",
            "",
            "s",
            BankReceipt.objects.filter(recorded_at__lt=ends_at, status=BankReceipt.Status.RECORDED),
        ),
        (
            "bank",
            "transfer{} out of the bank",
            "",
            "s",
            OutgoingTransfer.objects.filter(recorded_at__lt=ends_at, status=OutgoingTransfer.Status.RECORDED),
        ),
        (
            "bank",
            "use{} of money that fits no invoice",
            "",
            "s",
            ReceiptApplication.objects.filter(proposed_at__lt=ends_at, status=ReceiptApplication.Status.PROPOSED),
        ),
        (
            "rails",
            "export{} over another rail",
            "",
            "s",
            RailExport.objects.filter(proposed_at__lt=ends_at, status=RailExport.Status.AWAITING),
        ),
        (
            "rails",
            "record{} of what the bank did with payouts over other rails",
            "",
            "s",
            RailConfirmation.objects.filter(recorded_at__lt=ends_at, status=RailConfirmation.Status.RECORDED),
        ),
    ]
    found = []
    for about, words, one, many, rows in awaiting:
        if n := rows.count():
            what = words.format(one if n == 1 else many)
            found.append(Obstacle(about, f"{n} {what} of it wait{'s' if n == 1 else ''} for a second person."))
    failed = StripeEvent.unsettled().count()
    if failed:
        found.append(Obstacle("events", f"{failed} of Stripe's events could not be applied."))
    found += _not_reconciled(ends_at)
    proof = latest_proof()
    if proof is None or proof.covers_until is None or proof.covers_until < ends_at:
        found.append(Obstacle("proof", "The books were not proved from their rows since its end."))
    elif proof.n_findings:
        found.append(Obstacle("proof", f"The latest proof of the books found {proof.n_findings} things wrong."))
    check = BalanceCheck.objects.first()
    if check is not None and check.n_wrong:
        found.append(Obstacle("balances", f"{check.n_wrong} kept balances differ from their postings."))
    return found


def _not_reconciled(ends_at: datetime) -> list[Obstacle]:
    """The latest look and the latest full one have to be clean, and begun after the end."""
    done = ReconciliationRun.objects.filter(status=jobs.Job.Status.DONE, n_differences__isnull=False)
    latest, full = done.first(), done.filter(is_full=True).first()
    if latest is None or full is None:
        return [Obstacle("looks", "It was never reconciled with Stripe.")]
    for look, name in ((latest, "latest reconciliation"), (full, "latest full reconciliation")):
        if look.n_differences:
            return [Obstacle("looks", f"The {name} found {look.n_differences} differences.")]
        if look.covers_until is None or look.covers_until < ends_at:
            return [Obstacle("looks", f"The {name} with Stripe began before its end.")]
    return []


def _next_month(moment: datetime) -> datetime:
    year, month = (moment.year, moment.month + 1) if moment.month < 12 else (moment.year + 1, 1)
    return datetime(year, month, 1, tzinfo=UTC)
