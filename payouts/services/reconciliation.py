"""Our books against Stripe's: funds that became available are settled, and every difference is named.

Work goes on meanwhile, and must not look like a difference:

- Stripe's list is read from the newest on, so what is made later is not in it; each page is looked up here when it has come.
- What we have booked and the list does not hold is asked of Stripe by its id: it may have been made after the reading began.
- What Stripe has and we have not booked is on its way, if its intent stands here, or if it is younger than the grace.
- Cash is read here, at Stripe and here again; what is on its way explains its part of a difference.

Memory does not grow with the books: what was seen is a temporary table, and the rest is streamed.

A full look reads all that Stripe has. The looks between two of them read what came since an anchor: a clean look, some days before
the last clean one and no earlier than the oldest funds that are still pending. Until then a full look has proved both sides, since
then both are compared again: what Stripe made, and what we booked (the journal is numbered, so the anchor knows where it ended).
What was booked lately and made long ago is asked of Stripe by its id; if that is much, the look becomes a full one.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain, islice, takewhile
from typing import Any

from django.db import connection, transaction
from django.db.models import Exists, F, Max, OuterRef, Q, QuerySet, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone

from marketplace import clock, jobs
from marketplace.jobs import Job
from marketplace.models import User
from marketplace.money import Money
from marketplace.services import audit
from payouts import chart, gateway, ledger
from payouts.models import (
    BankReceipt,
    EventSettlement,
    JournalEntry,
    ManualLeg,
    Movement,
    OutgoingTransfer,
    Payment,
    Payout,
    RailConfirmation,
    RailPayout,
    ReconciliationDifference,
    ReconciliationRun,
    Refund,
    StripeEvent,
    SurplusCharge,
    TransferReversal,
)
from payouts.services import movements, pacing

logger = logging.getLogger(__name__)

#: An intent that Stripe has not answered for this long is for a person to look at.
IN_TRANSIT_LIMIT = timedelta(minutes=15)
#: What Stripe made so lately may be being booked; the stored looks, which go on beside everything else, leave it out.
GRACE = timedelta(minutes=15)
#: Money on another rail takes days.
RAIL_LIMIT = timedelta(days=7)
#: Of money that fits no invoice: its payer must have been asked by then.
UNAPPLIED_LIMIT = timedelta(days=30)
PAGE = 500
LISTED_AT_ONCE = 100  # of Stripe's, in one answer
#: What a look reads again of what an earlier one has proved: late bookings, clocks that differ, transactions that took hours.
OVERLAP = timedelta(days=3)
#: A full look that found something is repeated so soon once nothing new is wrong.
FULL_LOOK_AGAIN = timedelta(hours=1)
CASH_READINGS = 3
#: Rows that Stripe is asked about one by one; beyond it, something larger is wrong than a race.
ASKED_ONE_BY_ONE = 200
#: Stripe's kinds of balance transactions that refunds, disputes and reversals cause.
MOVED_BY = {
    "refund": "refund",
    "payment_refund": "refund",
    "refund_failure": "refund_failure",
    "payment_failure_refund": "refund_failure",
    "adjustment": "dispute",
    "transfer_refund": "reversal",
}
#: By code: the likely cause, and what to do.
CAUSES = {
    "cash_differs": "Something below explains it; otherwise an entry moved cash that Stripe did not, or the other way round. "
    "Run check_ledger, then look at the cash account's journal.",
    "charge_not_booked": "The webhook was lost, or its event failed. The sweep books it; if it stays, look at the events.",
    "charge_not_at_stripe": "It was booked without Stripe's word, or the key is of another Stripe account.",
    "charge_differs": "The fee or amount was changed after it was booked, or booked wrongly.",
    "transfer_not_booked": "A transfer was made in Stripe's dashboard, or a payout's answer was lost and its intent is gone.",
    "transfer_not_at_stripe": "The payout was marked as sent without a transfer, or the key is of another Stripe account.",
    "transfer_differs": "The transfer was made with another amount than was intended; correct it at Stripe.",
    "refund_not_booked": "It was refunded in Stripe's dashboard and the sweep has not written it down yet, or cannot.",
    "refund_failure_not_booked": "The card's bank sent a refund back and its event was lost; the sweep books it.",
    "dispute_not_booked": "The event of the dispute was lost; the sweep books it.",
    "refund_not_written_down": "It was made in Stripe's dashboard of what we cannot take back; the message says why.",
    "surplus_money": "Its refund was refused or came back: propose it again, or settle its event otherwise, at the desk.",
    "refund_failed_without_return": "Stripe says that it failed and did not give the money back: ask Stripe.",
    "dispute_not_written_down": "It is about a charge that we do not know, or cannot be booked; the message says why.",
    "reversal_not_booked": "A transfer was reversed in Stripe's dashboard.",
    "movement_differs": "It was booked wrongly, or changed after it was booked.",
    "movement_not_at_stripe": "It was booked without Stripe's word, or the key is of another Stripe account.",
    "manual_not_at_stripe": "A manual entry names a balance transaction that Stripe does not have.",
    "manual_differs": "A manual entry books another amount than the balance transaction that it names.",
    "unknown_movement": "Stripe moved it for a reason of its own (a fee, a payout to our bank, a top-up): book it by a manual "
    "entry that names it.",
    "settle_late": "Its funds have been available for more than a day and are still booked as pending: the settling job "
    "does not run.",
    "in_transit_too_long": "Stripe has not answered, or the worker died: the next run of payouts looks the transfer up.",
    "refund_too_long": "Stripe has not answered, or the worker died: the job looks it up when it comes back.",
    "transferreversal_too_long": "Stripe has not answered, or the worker died: the job looks it up when it comes back.",
    "rail_too_long": "Nobody has confirmed that the bank sent it, or that it came back.",
    "bank_refund_too_long": "It goes back by bank transfer, which a person sends: send it, record it, and have it confirmed; or "
    "say why it cannot be sent.",
    "rail_confirmation_too_long": "What the bank did with a payout over another rail was recorded, and no second person has confirmed "
    "or rejected it.",
    "outgoing_too_long": "A transfer out of our bank account was recorded, and no second person has confirmed or rejected it.",
    "receipt_too_long": "A transfer to our bank account was recorded, and no second person has confirmed or rejected it.",
    "unapplied_too_long": "Money in our bank account fits no invoice: apply it to the one it is for, or return it to its payer.",
    "event_not_applied": "Stripe told us something that could not be booked; the message says why. Settle it at the desk, "
    "under Stripe’s events.",
    "events_not_listed": "Stripe did not list what it told of that account: it was closed, or Stripe did not answer.",
    "sweep_failed": "A sweep ended by an error of ours or of Stripe's; the log has it.",
}


@dataclass(frozen=True)
class Difference:
    """One thing on which we and Stripe disagree, or that has waited too long."""

    code: str
    detail: str
    subject: str = ""  # the same at every look
    happened_at: datetime | None = None
    amount: Money | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"

    @property
    def cause(self) -> str:
        return CAUSES.get(self.code, "Look at what it names.")


@dataclass(frozen=True)
class Cash:
    """One currency's funds, by our ledger and by Stripe; what is on its way explains a part."""

    ledger_pending: Money
    ledger_available: Money
    stripe_pending: Money
    stripe_available: Money
    coming_pending: Money  # at Stripe, and not booked yet
    coming_available: Money

    @property
    def agrees(self) -> bool:
        return (
            self.ledger_pending + self.coming_pending,
            self.ledger_available + self.coming_available,
        ) == (self.stripe_pending, self.stripe_available)


@dataclass(frozen=True)
class Reconciliation:
    differences: list[Difference]
    cash: list[Cash]
    n_transactions: int  # of Stripe's, compared one by one
    n_on_their_way: int
    last_transaction_id: str
    since: datetime | None = None  # by Stripe's clock; None: a full look
    newest_at: datetime | None = None
    last_entry_id: int = 0

    @property
    def agrees(self) -> bool:
        return not self.differences


@dataclass
class _Look:
    """What one look has seen so far."""

    grace: timedelta
    since: datetime | None = None
    after_entry: int = 0  # what was booked before is proved already
    newest_at: datetime | None = None
    n_transactions: int = 0
    last_id: str = ""
    n_on_their_way: int = 0
    #: At Stripe and being booked, or available there and not settled here yet: they explain a part of the cash.
    under_way: list[gateway.BalanceTransaction] = field(default_factory=list)
    used: Counter[tuple[str, int, str]] = field(default_factory=Counter)  # intents that explain something already


def settle_funds() -> int:
    """Book what Stripe has made available since; returns how many payments and other movements.

    Funds become available in the order of `available_on`, so one question beyond the last settled one is enough.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: ask again; what was settled stays settled.
    """
    n_settled = 0
    unsettled = Payment.objects.filter(status=Payment.Status.PAID, settled_at=None)
    for currency in unsettled.values_list("currency", flat=True).distinct().order_by("currency"):
        for payment in unsettled.filter(currency=currency).order_by("available_on", "pk").iterator(chunk_size=PAGE):
            assert payment.balance_transaction_id is not None  # a paid payment knows it (a database check)
            if not _is_available(payment.balance_transaction_id):
                break
            n_settled += _settle(payment)
    moved = Movement.objects.filter(settled_at=None)
    for currency in moved.values_list("currency", flat=True).distinct().order_by("currency"):
        for movement in moved.filter(currency=currency).order_by("available_on", "pk").iterator(chunk_size=PAGE):
            if not _is_available(movement.balance_transaction_id):
                break
            n_settled += movements.settle(movement, at=clock.now())
    return n_settled


def _is_available(balance_transaction: str) -> bool:
    pacing.wait_for_turn()
    return gateway.get_balance_transaction(balance_transaction).is_available


def reconcile(
    *, also: Sequence[Difference] = (), grace: timedelta = timedelta(0), is_full: bool = True
) -> Reconciliation:
    """Compare balances and every balance transaction with the ledger, both ways; nothing is changed.

    Args:
        also: what was found before, by the sweeps; it is told with the rest.
        grace: what Stripe made so lately is not missed yet; zero at a quiet moment.
        is_full: whether all of Stripe's history is read, or what no clean look has proved yet, if there was one.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: Stripe did not tell.
    """
    last_entry_id = JournalEntry.objects.aggregate(last=Max("pk"))["last"] or 0
    look = _Look(grace)
    if not is_full and (anchor := _find_anchor()) is not None:
        look = _Look(grace, *anchor)
    try:
        of_transactions = _compare_transactions(look)
    except _TooMuchToAsk:
        logger.warning("Reconciliation reads all: too much was booked late since=%s", look.since)
        look = _Look(grace)
        of_transactions = _compare_transactions(look)
    cash = _compare_cash(look)
    differences = list(also)
    differences += [
        Difference(
            "cash_differs",
            f"the ledger has {held.ledger_pending} pending and {held.ledger_available} available, "
            f"Stripe {held.stripe_pending} and {held.stripe_available}",
            subject=held.ledger_pending.currency,
            amount=held.ledger_pending + held.ledger_available - held.stripe_pending - held.stripe_available,
        )
        for held in cash
        if not held.agrees
    ]
    differences += of_transactions
    differences += _waiting_too_long()
    for difference in differences:
        logger.error("Reconciliation found %s", difference)
    return Reconciliation(
        differences,
        cash,
        look.n_transactions,
        look.n_on_their_way,
        look.last_id,
        look.since,
        look.newest_at,
        last_entry_id,
    )


class _TooMuchToAsk(Exception):
    """More of ours was made at Stripe before the look's beginning than is asked about one by one."""


def clean_looks() -> QuerySet[ReconciliationRun]:
    """Those that ended and found nothing, the newest first."""
    return ReconciliationRun.objects.filter(status=Job.Status.DONE, n_differences=0)


def _find_anchor() -> tuple[datetime, int] | None:
    """From when on, by Stripe's clock, and after which of our entries both sides have to be compared again; None: all of them.

    Raises:
        gateway.StripeRefused, gateway.StripeUncertain: Stripe did not tell.
    """
    last = clean_looks().first()
    proved = clean_looks().filter(is_full=True, newest_at__isnull=False)
    if last is None or last.compared_until is None or not proved.exists():
        return None
    looks = clean_looks().filter(newest_at__isnull=False, compared_until__lte=last.compared_until - OVERLAP)
    anchor = looks.filter(pk__gte=proved.order_by("pk")[:1].values("pk")).first()
    if anchor is None or anchor.newest_at is None or anchor.last_entry_id is None:
        return None  # the first days: there is not much
    since = anchor.newest_at
    # What is still pending here may have become available there, whenever it was made.
    pending = Payment.objects.filter(status=Payment.Status.PAID, settled_at=None).order_by("pk")
    moved = Movement.objects.filter(settled_at=None).order_by("pk")
    for rows in (pending, moved):
        oldest = rows.values_list("balance_transaction_id", flat=True).first()
        if oldest is None:
            continue
        pacing.wait_for_turn()
        theirs = gateway.find_balance_transaction(oldest)
        if theirs is None:
            return None
        since = min(since, theirs.created_at)
    return since - OVERLAP, anchor.last_entry_id


@transaction.atomic
def request_reconciliation(*, key: str, user: User | None = None, is_full: bool = False) -> ReconciliationRun:
    """Ask for a look; the same key asks once."""
    defaults = {"requested_by": user, "is_full": is_full}
    run, is_new = ReconciliationRun.objects.get_or_create(key=key, defaults=defaults)
    if is_new:
        jobs.wake(run)
        if user is not None:
            audit.record(actor=user, action="reconciliation.requested", target=f"reconciliation:{run.pk}", full=is_full)
    return run


def request_by_the_clock() -> ReconciliationRun:
    """A look every time that beat calls: a full one each business day, and soon again where the last of them found something."""
    today = f"day:{clock.today()}"
    if not ReconciliationRun.objects.filter(key=today).exists():
        return request_reconciliation(key=today, is_full=True)
    wall = timezone.now()
    ended = ReconciliationRun.objects.filter(n_differences__isnull=False)
    latest, full = ended.first(), ended.filter(is_full=True).first()
    is_to_be_cleared = (
        latest is not None
        and full is not None
        and bool(full.n_differences)
        and not latest.n_differences
        and full.finished_at is not None
        and full.finished_at < wall - FULL_LOOK_AGAIN
    )
    return request_reconciliation(key=f"clock:{wall.isoformat()}", is_full=is_to_be_cleared)


def execute_reconciliation(run: ReconciliationRun, *, also: Sequence[Difference] = ()) -> Reconciliation:
    """Do what was asked for and keep what was found; each difference with the day since which it is known.

    Raises:
        LostLease: another worker has taken it over; nothing was kept.
        gateway.StripeRefused, gateway.StripeUncertain: Stripe did not tell; the job comes back.
    """
    began_at, covers_until = timezone.now(), clock.now()
    found = reconcile(also=also, grace=GRACE, is_full=run.is_full)
    before = ReconciliationRun.objects.filter(status=Job.Status.DONE, pk__lt=run.pk).first()
    known = (
        {(one.code, one.subject): one.first_seen_at for one in before.differences.iterator()}
        if before is not None
        else {}
    )
    with transaction.atomic():
        run.lock()
        ReconciliationDifference.objects.bulk_create(
            (
                ReconciliationDifference(
                    run=run,
                    code=one.code,
                    subject=one.subject[:255],
                    detail=one.detail,
                    cause=one.cause,
                    happened_at=one.happened_at,
                    first_seen_at=known.get((one.code, one.subject[:255]), began_at),
                    amount_micros=one.amount.micros if one.amount else None,
                    currency=one.amount.currency if one.amount else "",
                )
                for one in found.differences
            ),
            batch_size=500,
        )
        run.write(
            compared_until=began_at,
            covers_until=covers_until,
            is_full=found.since is None,
            since=found.since,
            newest_at=found.newest_at,
            last_entry_id=found.last_entry_id,
            last_transaction_id=found.last_transaction_id,
            n_transactions=found.n_transactions,
            n_on_their_way=found.n_on_their_way,
            n_differences=len(found.differences),
            cash=[
                {
                    "currency": held.ledger_pending.currency,
                    "ledger": [held.ledger_pending.micros, held.ledger_available.micros],
                    "stripe": [held.stripe_pending.micros, held.stripe_available.micros],
                    "coming": [held.coming_pending.micros, held.coming_available.micros],
                    "agrees": held.agrees,
                }
                for held in found.cash
            ],
        )
    return found


@transaction.atomic
def _settle(payment: Payment) -> bool:
    payment = Payment.objects.select_for_update(of=("self",)).get(pk=payment.pk)
    if payment.settled_at is not None:
        return False
    assert payment.fee_micros is not None
    net = payment.amount_micros - payment.fee_micros
    payment.settled_at = clock.now()
    payment.save(update_fields=["settled_at"])
    ledger.post(
        key=f"settle:payment:{payment.pk}",
        kind=JournalEntry.Kind.SETTLE,
        postings={chart.cash_available(payment.currency): net, chart.cash_pending(payment.currency): -net},
        booked_at=payment.settled_at,
    )
    logger.info("Settled payment=%s net=%s %s", payment.pk, net, payment.currency)
    return True


def _compare_cash(look: _Look) -> list[Cash]:
    """Read here, there and here again: a movement between the readings must not look like a difference."""
    found: list[Cash] = []
    for reading in range(CASH_READINGS):
        before = ledger.balances(prefix="cash")
        pacing.wait_for_turn()
        theirs = gateway.balance()
        coming = _coming(look)
        after = ledger.balances(prefix="cash")
        for ours in (before, after):
            found = _cash(ours, theirs, coming)
            if all(held.agrees for held in found):
                return found
        if reading < CASH_READINGS - 1:
            _look_at_newer(look)
    return found


def _look_at_newer(look: _Look) -> None:
    """What Stripe made since the reading began explains a part of its balance; whether it is booked is the next look's."""
    newer = list(takewhile(lambda theirs: theirs.id != look.last_id, _listed(look.since)))
    for _ in _compare_page(look, newer):
        pass
    if newer:
        look.last_id = newer[0].id


def _coming(look: _Look) -> Counter[tuple[str, str]]:
    """(currency, pending or available) → micros that Stripe counts there and the ledger does not yet."""
    coming: Counter[tuple[str, str]] = Counter()
    for start in range(0, len(look.under_way), PAGE):
        some = look.under_way[start : start + PAGE]
        booked = _booked([theirs.id for theirs in some], [theirs.source or "" for theirs in some])
        for theirs in some:
            net = Money.from_minor(theirs.net_minor, theirs.currency)
            ours = booked.get(_key_of(theirs))
            if ours is None:
                coming[net.currency, "available" if theirs.is_available else "pending"] += net.micros
            elif theirs.is_available and not ours[1]:
                coming[net.currency, "pending"] -= net.micros
                coming[net.currency, "available"] += net.micros
    return coming


def _cash(ours: dict[str, int], theirs: dict[str, tuple[int, int]], coming: Counter[tuple[str, str]]) -> list[Cash]:
    currencies = sorted({chart.parse(code).currency for code in ours} | {c for c, held in theirs.items() if any(held)})
    return [
        Cash(
            ledger_pending=Money(ours.get(chart.cash_pending(currency), 0), currency),
            ledger_available=Money(ours.get(chart.cash_available(currency), 0), currency),
            stripe_pending=Money.from_minor(theirs.get(currency, (0, 0))[0], currency),
            stripe_available=Money.from_minor(theirs.get(currency, (0, 0))[1], currency),
            coming_pending=Money(coming[currency, "pending"], currency),
            coming_available=Money(coming[currency, "available"], currency),
        )
        for currency in currencies
    ]


def _listed(since: datetime | None) -> Iterator[gateway.BalanceTransaction]:
    """Stripe's list, newest first, each of its pages at the rate that payouts keep to as well."""
    listed = gateway.newest_balance_transactions() if since is None else gateway.newest_balance_transactions(since)
    while True:
        pacing.wait_for_turn()
        page = list(islice(listed, LISTED_AT_ONCE))
        yield from page
        if len(page) < LISTED_AT_ONCE:
            return


def _compare_transactions(look: _Look) -> list[Difference]:
    """Each of Stripe's has one of ours with its net; each of ours has one of Stripe's.

    Raises:
        _TooMuchToAsk: the look has to be a full one.
    """
    with connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE IF NOT EXISTS reconciliation_seen (id text PRIMARY KEY)")
        cursor.execute("TRUNCATE reconciliation_seen")
    return list(chain(_compare_listed(look), _not_seen(look)))


def _compare_listed(look: _Look) -> Iterator[Difference]:
    listed = _listed(look.since)
    while page := list(islice(listed, PAGE)):
        if not look.last_id:
            look.last_id, look.newest_at = page[0].id, page[0].created_at
        look.n_transactions += len(page)
        yield from _compare_page(look, page)
        with connection.cursor() as cursor:
            # A transfer is known here by its own id, everything else by its balance transaction's.
            ids = [(theirs.source or theirs.id) if theirs.kind == "transfer" else theirs.id for theirs in page]
            cursor.execute("INSERT INTO reconciliation_seen SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", [ids])


def _compare_page(look: _Look, page: list[gateway.BalanceTransaction]) -> Iterator[Difference]:
    booked = _booked([theirs.id for theirs in page], [theirs.source or "" for theirs in page])
    missing = [theirs for theirs in page if _name_of(theirs) and _key_of(theirs) not in booked]
    if missing:  # perhaps it was booked since the page's rows were read
        booked |= _booked([theirs.id for theirs in missing], [theirs.source or "" for theirs in missing])
    by_hand = _by_hand([theirs.id for theirs in page])
    for theirs in page:
        net = Money.from_minor(theirs.net_minor, theirs.currency)
        seen: dict[str, Any] = {"subject": theirs.id, "happened_at": theirs.created_at, "amount": net}
        name = _name_of(theirs)
        if theirs.id in by_hand:
            if by_hand[theirs.id] != net:
                yield Difference(
                    "manual_differs",
                    f"Stripe's {theirs.kind} {theirs.id} is {net}, booked {by_hand[theirs.id]}",
                    **seen,
                )
        elif not name:
            yield Difference(
                "unknown_movement", f"Stripe's {theirs.kind} {theirs.id} of {net} is not in the ledger", **seen
            )
        elif _key_of(theirs) not in booked:
            if _is_on_its_way(look, theirs, net, name):
                look.n_on_their_way += 1
                look.under_way.append(theirs)
            else:
                yield Difference(
                    f"{name}_not_booked", f"Stripe's {name} {theirs.id} of {net} is not in the ledger", **seen
                )
        else:
            ours, is_settled = booked[_key_of(theirs)]
            if ours != net:
                yield Difference(
                    f"{name}_differs", f"Stripe's {name} {theirs.id} is {net}, the ledger has {ours}", **seen
                )
            elif theirs.is_available and not is_settled:
                look.under_way.append(theirs)
                if theirs.available_on < timezone.now() - timedelta(days=1):
                    yield Difference(
                        "settle_late", f"{net} of {theirs.id} since {theirs.available_on:%Y-%m-%d}", **seen
                    )


def _name_of(theirs: gateway.BalanceTransaction) -> str:
    if theirs.kind in ("charge", "payment"):
        return "charge"
    return "transfer" if theirs.kind == "transfer" else MOVED_BY.get(theirs.kind, "")


def _key_of(theirs: gateway.BalanceTransaction) -> str:
    return (theirs.source or "") if theirs.kind == "transfer" else theirs.id


def _booked(ids: list[str], sources: list[str]) -> dict[str, tuple[Money, bool]]:
    """Id → the net that we have booked, and whether its funds count as available here."""
    charges = Payment.objects.filter(status=Payment.Status.PAID, balance_transaction_id__in=ids)
    found = {
        identifier: (Money(amount - (fee or 0), currency), settled_at is not None)
        for identifier, amount, fee, currency, settled_at in charges.values_list(
            "balance_transaction_id", "amount_micros", "fee_micros", "currency", "settled_at"
        )
        if identifier is not None
    }
    transfers = Payout.objects.filter(transfer_id__in=sources)
    found |= {
        identifier: (Money(-amount, currency), True)
        for identifier, amount, currency in transfers.values_list("transfer_id", "amount_micros", "currency")
        if identifier is not None
    }
    found |= {
        movement.balance_transaction_id: (
            Money(movement.net_micros, movement.currency),
            movement.settled_at is not None,
        )
        for movement in Movement.objects.filter(balance_transaction_id__in=ids)
    }
    return found


def _by_hand(ids: list[str] | None = None) -> dict[str, Money]:
    """Balance transaction → the cash that an approved manual entry booked of it."""
    legs = ManualLeg.objects.filter(
        manual__decision__is_approved=True,
        manual__balance_transaction_id__isnull=False,
        account_code__startswith="cash:",
    )
    if ids is not None:
        legs = legs.filter(manual__balance_transaction_id__in=ids)
    sums = legs.values("manual__balance_transaction_id", "manual__currency").annotate(sum=Sum("amount_micros"))
    return {
        row["manual__balance_transaction_id"]: Money(int(row["sum"]), row["manual__currency"])
        for row in sums.order_by()
        if row["manual__balance_transaction_id"] is not None
    }


def _is_on_its_way(look: _Look, theirs: gateway.BalanceTransaction, net: Money, name: str) -> bool:
    """Whether its intent stands here and its answer is not booked yet, or it is too young to be missed.

    The age of intents is checked by itself.
    """
    intents: QuerySet[Any]
    if name == "transfer":
        intents = Payout.objects.filter(status=Payout.Status.INTENDED, amount_micros=-net.micros, currency=net.currency)
    elif name == "refund":
        intents = Refund.objects.filter(
            state=Refund.State.INTENDED,
            method=Payment.Method.STRIPE,
            amount_micros=-net.micros,
            currency=net.currency,
        )
    elif name == "reversal":
        intents = TransferReversal.objects.filter(
            state=TransferReversal.State.INTENDED, amount_micros=net.micros, currency=net.currency
        )
    else:
        intents = Payout.objects.none()
    if intents.count() > look.used[name, net.micros, net.currency]:
        look.used[name, net.micros, net.currency] += 1
        return True
    # The demo moves Stripe's clock, so an age may be far below zero.
    return abs(timezone.now() - theirs.created_at) < look.grace


#: What must be at Stripe, of what the reading did not see: id, net in micros, currency and when it was booked. A look that is not
#: full asks for what was booked since its anchor, by the entries that did it.
_UNSEEN = {
    "charge": """
        SELECT r.balance_transaction_id, r.amount_micros - r.fee_micros, r.currency, r.paid_at FROM {since} payouts_payment r
        WHERE r.status = 'paid' AND r.method = 'stripe' {booked}
            AND NOT EXISTS (SELECT FROM reconciliation_seen s WHERE s.id = r.balance_transaction_id) ORDER BY r.id""",
    "transfer": """
        SELECT r.transfer_id, -r.amount_micros, r.currency, r.sent_at FROM {since} payouts_payout r
        WHERE r.transfer_id IS NOT NULL {booked}
            AND NOT EXISTS (SELECT FROM reconciliation_seen s WHERE s.id = r.transfer_id) ORDER BY r.id""",
    "movement": """
        SELECT r.balance_transaction_id, r.amount_micros - r.fee_micros, r.currency, r.booked_at FROM {since} payouts_movement r
        WHERE NOT EXISTS (SELECT FROM reconciliation_seen s WHERE s.id = r.balance_transaction_id) {booked} ORDER BY r.id""",
}
#: The key of the entry that booked it, and which row that names.
_BOOKED_BY = {
    "charge": ("substring(key FROM '^(?:sale|royalty):payment:([0-9]+)$')::bigint", "r.id"),
    "transfer": ("substring(key FROM '^payout:([0-9]+):sent$')::bigint", "r.id"),
    "movement": ("substring(key FROM '^movement:(.+)$')", "r.balance_transaction_id"),
}


def _asked_for(name: str, identifier: str) -> Money | None:
    """What moved at Stripe under an id of ours; None where it has none."""
    pacing.wait_for_turn()
    if name == "transfer":
        transfer = gateway.get_transfer(identifier)
        return None if transfer is None else -Money.from_minor(transfer.amount_minor, transfer.currency)
    theirs = gateway.find_balance_transaction(identifier)
    return None if theirs is None else Money.from_minor(theirs.net_minor, theirs.currency)


def _unseen(name: str, look: _Look) -> tuple[str, dict[str, Any]]:
    if look.since is None:
        return _UNSEEN[name].format(since="", booked=""), {}
    named, row = _BOOKED_BY[name]
    since = f"(SELECT {named} AS named FROM payouts_journalentry WHERE id > %(after)s) e,"  # noqa: S608
    return _UNSEEN[name].format(since=since, booked=f"AND e.named = {row}"), {"after": look.after_entry}


def _not_seen(look: _Look) -> Iterator[Difference]:
    """Ours that the list does not hold; Stripe is asked for each, since it may have been made while the list was read, or before it.

    Raises:
        _TooMuchToAsk: of a look that is not full.
    """
    n_asked = 0
    for name in _UNSEEN:
        statement, parameters = _unseen(name, look)
        with transaction.atomic(), connection.chunked_cursor() as cursor:
            cursor.execute(statement, parameters)
            while found := cursor.fetchmany(PAGE):
                for identifier, amount, currency, happened_at in found:
                    n_asked += 1
                    if look.since is not None and n_asked > ASKED_ONE_BY_ONE:
                        raise _TooMuchToAsk
                    booked = Money(int(amount), currency)
                    theirs = _asked_for(name, identifier) if n_asked <= ASKED_ONE_BY_ONE else None
                    if theirs == booked:
                        continue
                    given: dict[str, Any] = {"subject": identifier, "happened_at": happened_at}
                    if theirs is None:
                        yield Difference(
                            f"{name}_not_at_stripe",
                            f"{identifier} of {booked} is booked, and Stripe does not have it",
                            amount=booked,
                            **given,
                        )
                    else:
                        yield Difference(
                            f"{name}_differs",
                            f"Stripe's {name} {identifier} is {theirs}, the ledger has {booked}",
                            amount=theirs,
                            **given,
                        )
    by_hand = _by_hand()  # there are few
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM reconciliation_seen WHERE id = ANY(%s)", [list(by_hand)])
        seen = {identifier for (identifier,) in cursor.fetchall()}
    for identifier, booked in by_hand.items():
        if identifier not in seen and gateway.find_balance_transaction(identifier) is None:
            yield Difference(
                "manual_not_at_stripe", f"{identifier} of {booked} is booked by hand", subject=identifier, amount=booked
            )


def _surplus_money() -> Iterator[Difference]:
    """What surplus charges took and is on no way back to the buyer; unless two of the staff have settled it otherwise."""
    standing = Q(refunds__state__in=Refund.STANDING)
    charges = SurplusCharge.objects.annotate(back=Coalesce(Sum("refunds__amount_micros", filter=standing), 0))
    settled = EventSettlement.objects.filter(
        event__surplus_charges=OuterRef("pk"),
        act=EventSettlement.Act.EXPLAINED,
        status=EventSettlement.Status.CONFIRMED,
    )
    left = charges.filter(~Exists(settled), back__lt=F("amount_micros"))
    for charge in left.order_by("pk").iterator(chunk_size=PAGE):
        rest = Money(charge.amount_micros - charge.back, charge.currency)
        yield Difference(
            "surplus_money",
            f"{rest} of charge {charge.charge_id} is for nothing that we sell, and on no way back",
            subject=charge.charge_id,
            happened_at=charge.booked_at,
            amount=rest,
        )


def _waiting_too_long() -> Iterator[Difference]:
    wall = timezone.now()
    old_payouts = Payout.objects.filter(status=Payout.Status.INTENDED, created_at__lt=wall - IN_TRANSIT_LIMIT)
    for payout in old_payouts.order_by("pk").iterator(chunk_size=PAGE):
        minutes = int((wall - payout.created_at).total_seconds() // 60)
        yield Difference(
            "in_transit_too_long",
            f"payout {payout.pk} of {payout.amount} for {minutes} minutes",
            subject=f"payout:{payout.pk}",
            happened_at=payout.intended_at,
            amount=payout.amount,
        )
    tried: dict[str, QuerySet[Any]] = {
        "refund": Refund.objects.filter(method=Payment.Method.STRIPE),
        "transferreversal": TransferReversal.objects.all(),
    }
    for name, intents in tried.items():
        old = intents.filter(state="intended", created_at__lt=wall - IN_TRANSIT_LIMIT)
        for intent in old.order_by("pk").iterator(chunk_size=PAGE):
            minutes = int((wall - intent.created_at).total_seconds() // 60)
            yield Difference(
                f"{name}_too_long",
                f"{intent} for {minutes} minutes",
                subject=f"{name}:{intent.pk}",
                happened_at=intent.intended_at,
                amount=intent.amount,
            )
    yield from _surplus_money()
    rails = RailPayout.objects.filter(status=RailPayout.Status.INTENDED, intended_at__lt=clock.now() - RAIL_LIMIT)
    for rail in rails.order_by("pk").iterator(chunk_size=PAGE):
        assert rail.intended_at is not None
        days = (clock.now() - rail.intended_at).days
        yield Difference(
            "rail_too_long",
            f"{rail} for {days} days",
            subject=f"rail_payout:{rail.pk}",
            happened_at=rail.intended_at,
            amount=rail.amount,
        )
    yield from _waiting_at_the_bank()
    for event in StripeEvent.unsettled().order_by("pk").iterator(chunk_size=PAGE):
        yield Difference(
            "event_not_applied",
            f"{event.type} {event.event_id}: {event.error_message}",
            subject=event.event_id,
            happened_at=event.received_at,
        )


def _waiting_at_the_bank() -> Iterator[Difference]:
    """What people do at our bank account, and have not done for long."""
    now = clock.now()
    waiting: list[tuple[str, str, QuerySet[Any], str]] = [
        (
            "bank_refund_too_long",
            "refund",
            Refund.objects.filter(method=Payment.Method.BANK, state=Refund.State.INTENDED),
            "intended_at",
        ),
        ("outgoing_too_long", "transfer", OutgoingTransfer.objects.filter(status="recorded"), "recorded_at"),
        (
            "rail_confirmation_too_long",
            "rail_confirmation",
            RailConfirmation.objects.filter(status="recorded").select_related("payout"),
            "recorded_at",
        ),
        ("receipt_too_long", "receipt", BankReceipt.objects.filter(status="recorded"), "recorded_at"),
    ]
    for code, name, rows, since in waiting:
        for row in rows.filter(**{f"{since}__lt": now - RAIL_LIMIT}).order_by("pk").iterator(chunk_size=PAGE):
            begun = getattr(row, since)
            yield Difference(
                code,
                f"{row} for {(now - begun).days} days",
                subject=f"{name}:{row.pk}",
                happened_at=begun,
                amount=row.amount,
            )
    unapplied = BankReceipt.objects.with_left().filter(received_on__lt=(now - UNAPPLIED_LIMIT).date())
    for receipt in unapplied.order_by("pk").iterator(chunk_size=PAGE):
        yield Difference(
            "unapplied_too_long",
            f"{receipt.left} of {receipt} since {receipt.received_on}",
            subject=f"receipt:{receipt.pk}",
            happened_at=receipt.decided_at,
            amount=receipt.left,
        )
