"""What a party may know of its money; the only doors to it for who is not staff."""

import contextlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from django.db.models import Count, Exists, Min, OuterRef, Q, QuerySet, Sum
from django.utils import timezone

from marketplace import clock
from marketplace.models import License, Order, Party, TrainedModel
from marketplace.money import Money
from marketplace.templatetags.residual import money
from payouts.asked import words_asked
from payouts.models import (
    BankReceipt,
    Clawback,
    Dispute,
    Division,
    DivisionCorrection,
    DivisionLine,
    Document,
    EventSettlement,
    IssuedStatement,
    ManualEntry,
    OutgoingTransfer,
    PayeeAccount,
    Payment,
    Payout,
    PayoutRun,
    PlannedPayout,
    RailConfirmation,
    RailPayout,
    ReceiptApplication,
    Reclaim,
    Refund,
    Reminder,
    ReportDuty,
    RoyaltyInvoice,
    RoyaltyPool,
    RoyaltyReport,
    StripeEvent,
    TransferReversal,
    WriteOff,
)
from payouts.services import bank_details, clawbacks, other_rails, recoveries
from payouts.services.plans import minimum_of
from payouts.services.reach import is_served

#: An intent that Stripe has not answered for so long is shown among a run's failures.
UNANSWERED = timedelta(minutes=15)


@dataclass(frozen=True)
class Wait:
    """Money that is earned and not due yet, and until when; lines of one day are one."""

    due_at: datetime
    amount: Money
    n_lines: int


@dataclass(frozen=True)
class TakenBack:
    """Something earned that went back to the buyer, is held for a dispute, or was another's by a correction; and why."""

    at: datetime
    dataset: str
    version: int
    reason: str
    amount: Money
    is_frozen: bool  # comes back if the dispute is won


@dataclass(frozen=True)
class Earnings:
    """One currency's money: earned − taken back = pending + due + in transit + sent + paid, to the micro."""

    currency: str
    earned: Money
    taken_back: Money  # refunded to buyers, or frozen by a dispute; less what was forgiven
    frozen: Money  # of it: held while a dispute is open
    pending: Money  # held, or not yet available at Stripe
    due: (
        Money  # goes out with the next run, remainders of a cent included; below zero: what the next earnings pay first
    )
    in_transit: Money  # promised; Stripe has not answered yet
    sent: Money  # at Stripe, on its way to the bank
    paid: Money  # in the bank
    waits: list[Wait]
    reason: str  # what the due money waits for, in words
    is_over_a_rail: bool  # Stripe does not reach the party: our bank pays it
    rail_on_its_way: Money  # of what was sent: our bank has it, not Stripe
    rail_sent: Money  # of what was paid: by our bank, not by Stripe

    @property
    def on_its_way_in_words(self) -> str:
        """Who has what is on its way."""
        if self.in_transit:
            return "Handed to Stripe; waiting for its answer."
        by_stripe = self.sent - self.rail_on_its_way
        if self.rail_on_its_way and by_stripe:
            return f"{money(by_stripe)} at Stripe, {money(self.rail_on_its_way)} with our bank, on their way to yours."
        if self.rail_on_its_way:
            return "With our bank, on its way to yours."
        return "At Stripe, on its way to your bank." if by_stripe else "Nothing is on its way."

    @property
    def paid_in_words(self) -> str:
        """Who says that what was paid is in the bank."""
        by_stripe = self.paid - self.rail_sent
        if self.rail_sent and by_stripe:
            return f"{money(by_stripe)} confirmed by Stripe, {money(self.rail_sent)} sent by our bank."
        if self.rail_sent:
            return "Sent to your bank by ours."
        return "Confirmed by Stripe." if by_stripe else "Nothing has arrived yet."

    @property
    def kept(self) -> Money:
        """Earned, less what went back: the two figures below together."""
        return self.earned - self.taken_back

    @property
    def outstanding(self) -> Money:
        """Held, or due and not sent yet."""
        return self.pending + self.due

    @property
    def paid_out(self) -> Money:
        """In the bank, or on its way there."""
        return self.in_transit + self.sent + self.paid

    @property
    def still_waits_for(self) -> str:
        """What the outstanding money waits for, in a sentence."""
        if self.pending.micros > 0 and self.due.micros <= 0:
            return f"held until {self.waits[0].due_at:%-d %b %Y} at the earliest." if self.waits else "held."
        if self.pending.micros > 0:
            return f"{self.pending} is held. {self.reason}"
        return self.reason or "nothing waits."

    @property
    def payable_now(self) -> Money:
        return max(self.due.floor_to_minor(), Money(0, self.currency))

    @property
    def owed_back(self) -> Money:
        """What was sent and went back to buyers since, and no earning has paid yet."""
        balance = self.due.micros + self.pending.micros
        return Money(max(0, -balance), self.currency)


@dataclass(frozen=True)
class NextPayout:
    currency: str
    at: datetime
    amount: Money


#: Which lines are behind which of the three figures; a balance is paid from what fell due first.
SHOWN = ("pending", "due")


def lines_of(party: Party, shown: str = "") -> QuerySet[DivisionLine]:
    """Every line of every division that pays the party, newest first; or only those that wait, or that have fallen due."""
    found = DivisionLine.objects.filter(party=party)
    if shown == "pending":
        found = found.filter(due_at__gt=clock.now())
    elif shown == "due":
        found = found.filter(due_at__lte=clock.now())
    return found.select_related(
        "division__version__dataset", "division__result__model", "division__order_line", "division__corrects"
    ).order_by("-division__divided_at", "-pk")


def payouts_of(party: Party) -> QuerySet[Payout]:
    """Stripe's, newest first."""
    return Payout.objects.filter(party=party).order_by("-pk")


@dataclass(frozen=True)
class PaidOut:
    """One payment to a party's bank, by Stripe or over another rail, as the party is told of it."""

    id: int
    rail: str  # "stripe" or "bank"
    amount: Money
    status: str  # intended, sent, paid, refused; over another rail intended, sent, returned
    refusal: str
    bank_failure: str
    reference: str  # of our bank's transfer
    intended_at: datetime
    sent_at: datetime | None
    paid_at: datetime | None
    created_at: datetime

    @property
    def words(self) -> str:
        """Where it is, in a few words."""
        if self.rail == "bank":
            return {
                "intended": "to be sent by our bank",
                "sent": f"sent by bank transfer, {self.reference}",
                "returned": "came back from your bank, kept for you",
            }[self.status]
        if self.status == Payout.Status.SENT and self.bank_failure:
            return "refused by your bank, kept at Stripe"
        return {
            "intended": "on its way to Stripe",
            "sent": "sent",
            "paid": "in your bank",
            "refused": "refused by Stripe, kept for you",
        }[self.status]

    @property
    def badge(self) -> str:
        """The badge's look."""
        if self.status in ("refused", "returned") or self.bank_failure:
            return "bad"
        if self.status == "intended":
            return "wait"
        return "good" if self.status == "paid" or self.rail == "bank" else "accent"


def paid_out_of(party: Party) -> "PaidOutList":
    """Every payment to the party's bank, newest first, by Stripe and over other rails alike."""
    return PaidOutList(Payout.objects.filter(party=party), rail_payouts_of(party))


def rail_payouts_of(party: Party) -> QuerySet[RailPayout]:
    """What was promised to the party over other rails than Stripe, newest first."""
    return RailPayout.objects.filter(party=party).exclude(status__in=["proposed", "dropped"]).order_by("-pk")


class PaidOutList:
    """Two tables as one list, by when each was made; it knows what a cursor's page asks of a queryset."""

    def __init__(self, payouts: QuerySet[Payout], rails: QuerySet[RailPayout], *, is_reversed: bool = True) -> None:
        self.payouts, self.rails, self.is_reversed = payouts, rails, is_reversed

    def order_by(self, ordering: str) -> "PaidOutList":
        assert ordering.lstrip("-") == "created_at", ordering
        return PaidOutList(self.payouts, self.rails, is_reversed=ordering.startswith("-"))

    def filter(self, *given: Any, **named: Any) -> "PaidOutList":
        return PaidOutList(
            self.payouts.filter(*given, **named), self.rails.filter(*given, **named), is_reversed=self.is_reversed
        )

    def find(self, *, rail: str, id: int) -> PaidOut | None:
        if rail == "bank":
            over_a_rail = self.rails.filter(pk=id).first()
            return paid_over_a_rail(over_a_rail) if over_a_rail else None
        by_stripe = self.payouts.filter(pk=id).first()
        return _by_stripe(by_stripe) if by_stripe else None

    def __getitem__(self, wanted: slice) -> list[PaidOut]:
        order = ("-created_at", "-pk") if self.is_reversed else ("created_at", "pk")
        found = [_by_stripe(one) for one in self.payouts.order_by(*order)[: wanted.stop]]
        found += [paid_over_a_rail(one) for one in self.rails.order_by(*order)[: wanted.stop]]
        found.sort(key=lambda one: (one.created_at, one.rail, one.id), reverse=self.is_reversed)
        return found[wanted.start : wanted.stop]


def _by_stripe(payout: Payout) -> PaidOut:
    return PaidOut(
        id=payout.pk,
        rail="stripe",
        amount=payout.amount,
        status=payout.status,
        refusal=payout.refusal_message,
        bank_failure=payout.bank_failure_code if payout.bank_failed_at else "",
        reference="",
        intended_at=payout.intended_at,
        sent_at=payout.sent_at,
        paid_at=payout.paid_at,
        created_at=payout.created_at,
    )


def paid_over_a_rail(payout: RailPayout) -> PaidOut:
    """As its payee is told of it."""
    assert payout.intended_at is not None  # what is only proposed is left out
    is_sent = payout.status == RailPayout.Status.SENT
    return PaidOut(
        id=payout.pk,
        rail="bank",
        amount=payout.amount,
        status=payout.status,
        refusal="",
        bank_failure="",
        reference=payout.reference,
        intended_at=payout.intended_at,
        sent_at=payout.confirmed_at if is_sent else None,
        paid_at=None,
        created_at=payout.created_at,
    )


def payee_of(party: Party) -> PayeeAccount | None:
    return PayeeAccount.objects.filter(party=party).first()


def statements_of(party: Party) -> QuerySet[IssuedStatement]:
    """The party's issued statements, latest first; to anyone else they do not exist."""
    return IssuedStatement.objects.filter(party=party).select_related("party", "period").order_by("-sequence")


@dataclass(frozen=True)
class Onboarding:
    """How far a payee has come at Stripe, in words; `needs` is what they must do next."""

    state: str  # "not_started", "unfinished", "checking", "paused", "ready"
    title: str
    needs: list[str]


def onboarding_of(payee: PayeeAccount | None) -> Onboarding:
    """The state of a payee's account, as Stripe last described it."""
    if payee is None:
        return Onboarding("not_started", "Not set up yet", [])
    needs = words_asked(payee.requirements)
    if payee.is_ready and payee.payouts_enabled:
        return Onboarding("ready", "Set up: Stripe can pay you", needs)
    if payee.is_ready:
        return Onboarding("paused", "Stripe holds payouts to your bank until it has what it asked for", needs)
    if payee.details_submitted and not needs:
        return Onboarding("checking", "Stripe is checking what you entered", needs)
    return Onboarding("unfinished", "Stripe needs more from you", needs)


def waiting_pools_of(party: Party) -> QuerySet[RoyaltyPool]:
    """Pools that wait for a result or their deadline, of versions to which the party contributed; nearest deadline first."""
    return (
        RoyaltyPool.objects.with_left()
        .filter(released_at=None, version__contributions__party=party, left_micros__gt=0)  # type: ignore[misc]
        .select_related("version__dataset")
        .distinct()
        .order_by("deadline", "pk")
    )


def earnings_of(party: Party) -> list[Earnings]:
    """Per currency, what the party has earned and where each part of it is."""
    now = clock.now()
    lines = (
        DivisionLine.objects.filter(party=party)
        .values("division__currency")
        .annotate(
            earned=Sum("amount_micros"),
            matured=Sum("amount_micros", filter=Q(due_at__lte=now), default=0),
        )
        .order_by("division__currency")
    )
    back: dict[str, Any] = {
        row["division_line__division__currency"]: row
        for row in _reclaims_of(party)
        .values("division_line__division__currency")
        .annotate(
            all=Sum("amount_micros"),
            matured=Sum("amount_micros", filter=Q(division_line__due_at__lte=now), default=0),
            frozen=Sum("amount_micros", filter=Q(clawback_line__clawback__kind=Clawback.Kind.FREEZE), default=0),
        )
    }
    forgiven = _sums(WriteOff.objects.filter(party=party))
    fetched_back = TransferReversal.objects.filter(payout__party=party, state=TransferReversal.State.SENT)
    payouts = {
        (row["currency"], row["status"]): int(row["sum"])
        for row in Payout.objects.filter(party=party).values("currency", "status").annotate(sum=Sum("amount_micros"))
    }
    # Another rail's payouts count where Stripe's do: on their way, then in the bank.
    as_stripe = {RailPayout.Status.INTENDED: Payout.Status.SENT, RailPayout.Status.SENT: Payout.Status.PAID}
    rails = RailPayout.objects.filter(party=party, status__in=RailPayout.STANDING)
    over_rails: dict[tuple[str, str], int] = {}
    for row in rails.values("currency", "status").annotate(sum=Sum("amount_micros")):
        key = (row["currency"], as_stripe[RailPayout.Status(row["status"])].value)
        payouts[key] = payouts.get(key, 0) + int(row["sum"])
        over_rails[key] = int(row["sum"])
    for reversed_of in fetched_back.values("currency", "payout__status").annotate(sum=Sum("amount_micros")):
        payouts[reversed_of["currency"], reversed_of["payout__status"]] -= int(reversed_of["sum"])
    waits: dict[str, list[Wait]] = {}
    held = (
        DivisionLine.objects.filter(party=party, due_at__gt=now)
        .values("division__currency", "due_at__date")
        .annotate(due_at=Min("due_at"), micros=Sum("amount_micros"), n_lines=Count("pk"))
        .order_by("division__currency", "due_at")
    )
    back_before_due = {
        (row["division_line__division__currency"], row["division_line__due_at__date"]): int(row["sum"])
        for row in _reclaims_of(party)
        .filter(division_line__due_at__gt=now)
        .values("division_line__division__currency", "division_line__due_at__date")
        .annotate(sum=Sum("amount_micros"))
    }
    for day in held:
        currency = day["division__currency"]
        left = Money(int(day["micros"]) - back_before_due.get((currency, day["due_at__date"]), 0), currency)
        if left:
            waits.setdefault(currency, []).append(Wait(day["due_at"], left, day["n_lines"]))
    payee = payee_of(party)
    rail = rail_of(party, payee)
    return [
        _earnings(
            row["division__currency"],
            int(row["earned"]),
            int(row["matured"]),
            {name: int(back.get(row["division__currency"], {}).get(name, 0)) for name in ("all", "matured", "frozen")},
            forgiven.get(row["division__currency"], 0),
            payouts,
            over_rails,
            waits,
            party,
            payee,
            rail,
        )
        for row in lines
    ]


def rail_of(party: Party, payee: PayeeAccount | None) -> str:
    """What a party that Stripe does not reach waits for, in words; empty where Stripe pays it."""
    if (payee is not None and payee.is_ready) or is_served(party.country) is not False:
        return ""
    return other_rails.waits_for(bank_details.latest_of(party), "your")


def taken_back_of(party: Party) -> list[TakenBack]:
    """What was earned and went back, or is frozen, newest first: each with the reason the payee is told."""
    sums = (
        _reclaims_of(party)
        .values(
            "clawback_line__clawback",
            "clawback_line__clawback__kind",
            "clawback_line__clawback__taken_at",
            "clawback_line__clawback__currency",
            "clawback_line__clawback__refund__reason",
            "clawback_line__clawback__dispute__reason",
            "clawback_line__clawback__correction__reason",
            "division_line__division__version__dataset__title",
            "division_line__division__version__number",
        )
        .annotate(sum=Sum("amount_micros"))
        .order_by("-clawback_line__clawback", "division_line__division__version__number")
    )
    return [
        TakenBack(
            at=row["clawback_line__clawback__taken_at"],
            dataset=row["division_line__division__version__dataset__title"],
            version=row["division_line__division__version__number"],
            reason=_reason(
                row["clawback_line__clawback__kind"],
                row["clawback_line__clawback__refund__reason"],
                row["clawback_line__clawback__dispute__reason"],
                row["clawback_line__clawback__correction__reason"],
            ),
            amount=Money(int(row["sum"]), row["clawback_line__clawback__currency"]),
            is_frozen=row["clawback_line__clawback__kind"] == Clawback.Kind.FREEZE,
        )
        for row in sums
    ]


def refunds_of(order: Order) -> QuerySet[Refund]:
    """An order's refunds, newest first; whoever may see the order may see them."""
    is_of_order = Q(payment__order=order) | Q(surplus__payment__order=order)
    return Refund.objects.filter(is_of_order).prefetch_related("transfers").order_by("-pk")


def refundable_of_right(order: Order) -> Money | None:
    """What the buyer may have back without giving a reason: the price of what is in force and was never downloaded."""
    if open_dispute_of(order) is not None:
        return None
    lines = License.objects.filter(
        order_line__order=order, first_downloaded_at=None, revoked_at=None, expires_at__gt=clock.now()
    )
    refundable = set(lines.values_list("order_line", flat=True))
    payment = Payment.objects.select_related("order").filter(order=order).first()
    if payment is None or not refundable:
        return None
    left = sum(part.left.micros for part in clawbacks.parts_left(payment) if part.line.pk in refundable)
    return Money(left, order.currency) if left > 0 else None


def open_dispute_of(order: Order) -> Dispute | None:
    return Dispute.objects.filter(payment__order=order, status__in=Dispute.OPEN).first()


# --- for staff --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Debt:
    """What a party owes, and since when something went back."""

    party: Party
    amount: Money


def payments_found(query: str) -> QuerySet[Payment]:
    """Payments, newest first: all, or those that a number, a charge or a buyer's name says."""
    found = Payment.objects.select_related("order__buyer", "invoice__report__licensee").order_by("-pk")
    if not query:
        return found
    named = Q(charge_id=query) | Q(checkout_id=query)
    named |= Q(order__buyer__name__icontains=query) | Q(invoice__report__licensee__name__icontains=query)
    if query.isascii() and query.isdigit() and len(query) < 18:
        named |= Q(pk=int(query))
    with contextlib.suppress(ValueError):  # then it is no order's number
        named |= Q(order__public_id=uuid.UUID(query))
    return found.filter(named)


def open_disputes() -> QuerySet[Dispute]:
    """The nearest deadline first."""
    return (
        Dispute.objects.filter(status__in=Dispute.OPEN)
        .select_related("payment__order__buyer", "payment__invoice__report__licensee")
        .prefetch_related("answers")
        .order_by("evidence_due_at", "pk")
    )


def disputes_found(*, is_open: bool | None = None) -> QuerySet[Dispute]:
    """Disputes, newest first: all, or the open or the closed ones."""
    found = (
        Dispute.objects.select_related("payment__order__buyer", "payment__invoice__report__licensee")
        .prefetch_related("answers__given_by")
        .order_by("-pk")
    )
    if is_open is None:
        return found
    return found.filter(status__in=Dispute.OPEN) if is_open else found.exclude(status__in=Dispute.OPEN)


def refunds_found() -> QuerySet[Refund]:
    """Every refund, newest first."""
    return (
        Refund.objects.select_related(
            "payment__order__buyer", "payment__invoice__report__licensee", "surplus", "requested_by"
        )
        .prefetch_related("transfers")
        .order_by("-pk")
    )


def unfinished_refunds() -> QuerySet[Refund]:
    """On their way, refused or failed; newest first."""
    return (
        Refund.objects.exclude(state=Refund.State.SENT)
        .select_related("payment__order__buyer", "surplus")
        .prefetch_related("transfers")
        .order_by("-pk")
    )


#: How an event stands, as staff look for it; the first is what waits for them.
EVENT_STATES = {
    "failed": "failed, and to be settled",
    "proposed": "awaits a second person",
    "settled": "settled otherwise",
    "waiting": "about to be applied",
    "done": "applied",
}


def stripe_events(*, state: str = "", query: str = "") -> QuerySet[StripeEvent]:
    """Stripe's events, newest first: all, those that stand so (`EVENT_STATES`), or those of an id, a type or an account."""
    settlements = EventSettlement.objects.filter(event=OuterRef("pk"))
    settled = Exists(settlements.filter(act=EventSettlement.Act.EXPLAINED, status=EventSettlement.Status.CONFIRMED))
    proposed = Exists(settlements.filter(status=EventSettlement.Status.PROPOSED))
    found = StripeEvent.objects.annotate(is_settled=settled, is_proposed=proposed).defer("payload").order_by("-pk")
    match state:
        case "failed":
            found = found.filter(status=StripeEvent.Status.FAILED, is_settled=False)
        case "proposed":
            found = found.filter(is_proposed=True)
        case "settled":
            found = found.filter(status=StripeEvent.Status.FAILED, is_settled=True)
        case "waiting":
            found = found.filter(status__in=[StripeEvent.Status.QUEUED, StripeEvent.Status.RUNNING])
        case "done":
            found = found.filter(status=StripeEvent.Status.DONE)
    if query:
        found = found.filter(Q(event_id=query) | Q(account=query) | Q(type__startswith=query))
    return found


@dataclass(frozen=True)
class Concerned:
    """What an event is about, as far as we know it."""

    payment: Payment | None
    dispute: Dispute | None
    payee: PayeeAccount | None


def concerned_by(event: StripeEvent) -> Concerned:
    thing = json.loads(event.payload)["data"]["object"]
    identifier, kind = thing.get("id", ""), thing.get("object", "")
    dispute = Dispute.objects.filter(dispute_id=identifier).first() if kind == "dispute" else None
    payee = PayeeAccount.objects.select_related("party").filter(stripe_account_id=event.account).first()
    named = (thing.get("metadata") or {}).get("payment", "")
    is_it = Q(checkout_id=identifier) | Q(charge_id=identifier)
    if charge := thing.get("charge"):  # of a refund or a dispute
        is_it |= Q(charge_id=charge)
    if named.isascii() and named.isdigit() and len(named) < 18:
        is_it |= Q(pk=int(named))
    payment = payments_found("").filter(is_it).first() if identifier and not event.account else None
    return Concerned(payment, dispute, payee)


def debts() -> list[Debt]:
    """Who owes what, the largest first."""
    owing = recoveries.owing()
    parties = Party.objects.in_bulk({party for party, _ in owing})
    found = [Debt(parties[party], amount) for (party, _), amount in owing.items()]
    return sorted(found, key=lambda debt: (-debt.amount.micros, debt.party.pk))


def outgoing_found() -> QuerySet[OutgoingTransfer]:
    """Every transfer out of our bank account, newest first."""
    return OutgoingTransfer.objects.select_related("recorded_by", "decided_by", "returned_by").order_by("-pk")


def rail_confirmations_found() -> QuerySet[RailConfirmation]:
    """Everything recorded of payouts over other rails, newest first."""
    return RailConfirmation.objects.select_related("payout", "recorded_by", "decided_by").order_by("-pk")


def applications_found() -> QuerySet[ReceiptApplication]:
    """Every use of money that fits no invoice for one, newest first."""
    return (
        ReceiptApplication.objects.select_related("proposed_by", "decided_by")
        .prefetch_related("uses__receipt")
        .order_by("-pk")
    )


def reversible_payouts_of(party: Party, currency: str) -> QuerySet[Payout]:
    """What Stripe sent and may give back, newest first."""
    sent = [Payout.Status.SENT, Payout.Status.PAID]
    return Payout.objects.filter(party=party, currency=currency, status__in=sent).order_by("-pk")


def reversals_of(party: Party, currency: str) -> QuerySet[TransferReversal]:
    return TransferReversal.objects.filter(payout__party=party, currency=currency).order_by("-pk")


@dataclass(frozen=True)
class RunFigures:
    """Where a payout run stands: payees and money by what became of them."""

    waiting: int
    intended: int  # Stripe has not answered
    sent: int
    paid: int
    refused: int
    bank_refused: int  # sent, and the payee's bank sent it back
    passed_over: int  # planned, and not to be paid after all
    sent_amount: Money


def payout_runs() -> QuerySet[PayoutRun]:
    """Newest first."""
    return PayoutRun.objects.select_related("started_by", "approved_by").order_by("-pk")


def run_figures(run: PayoutRun) -> RunFigures:
    outcomes = dict(run.planned_payouts.values_list("outcome").annotate(n=Count("pk")))
    by_status: dict[str, tuple[int, int]] = {
        row["status"]: (row["n"], int(row["sum"]))
        for row in run.payouts.values("status").annotate(n=Count("pk"), sum=Sum("amount_micros")).order_by()
    }

    def n(status: Payout.Status) -> int:
        return by_status.get(status, (0, 0))[0]

    gone = [by_status.get(status, (0, 0))[1] for status in (Payout.Status.SENT, Payout.Status.PAID)]
    bank_refused = run.payouts.filter(status=Payout.Status.SENT, bank_failed_at__isnull=False).count()
    waiting = int(outcomes.get(PlannedPayout.Outcome.WAITING, 0))
    return RunFigures(
        waiting=waiting,
        intended=n(Payout.Status.INTENDED),
        sent=n(Payout.Status.SENT) - bank_refused,
        paid=n(Payout.Status.PAID),
        refused=n(Payout.Status.REFUSED),
        bank_refused=bank_refused,
        passed_over=sum(outcomes.values()) - waiting - int(outcomes.get(PlannedPayout.Outcome.INTENDED, 0)),
        sent_amount=Money(sum(gone), run.currency),
    )


def run_failures(run: PayoutRun) -> QuerySet[Payout]:
    """What needs a look, newest first: refused by Stripe, sent back by a bank, or without an answer for long."""
    return run.payouts.filter(_has_failed()).select_related("party").order_by("-pk")


def failures_by_run(runs: Iterable[PayoutRun]) -> dict[int, int]:
    """How many of each run's payouts need a look; a run without any is left out."""
    failed = Payout.objects.filter(_has_failed(), run__in=list(runs))
    return dict(failed.order_by().values_list("run").annotate(n=Count("pk")))


def payouts_at_a_bank_that_refused() -> QuerySet[Payout]:
    """Sent, and sent back by the payee's bank: the money lies at Stripe until the payee names another account."""
    return Payout.objects.filter(status=Payout.Status.SENT, bank_failed_at__isnull=False)


def _has_failed() -> Q:
    unanswered = Q(status=Payout.Status.INTENDED, attempt__gt=1)
    unanswered |= Q(status=Payout.Status.INTENDED, first_tried_at__lt=timezone.now() - UNANSWERED)
    bank = Q(status=Payout.Status.SENT, bank_failed_at__isnull=False)
    return unanswered | bank | Q(status=Payout.Status.REFUSED)


def passed_over_in(run: PayoutRun) -> QuerySet[PlannedPayout]:
    """Planned, and then not paid, in the order of the plan."""
    done = [PlannedPayout.Outcome.WAITING, PlannedPayout.Outcome.INTENDED]
    return run.planned_payouts.exclude(outcome__in=done).select_related("party", "run").order_by("position")


def waiting_in(run: PayoutRun) -> QuerySet[PlannedPayout]:
    """Who comes next, whose money has waited longest first."""
    waiting = run.planned_payouts.filter(outcome=PlannedPayout.Outcome.WAITING)
    return waiting.select_related("party", "run").order_by("position")


def _reclaims_of(party: Party) -> QuerySet[Reclaim]:
    return Reclaim.objects.filter(division_line__party=party, clawback_line__clawback__undo=None)


def _sums(rows: QuerySet[Any]) -> dict[str, int]:
    return {row["currency"]: int(row["sum"]) for row in rows.values("currency").annotate(sum=Sum("amount_micros"))}


def _reason(kind: str, refund: str | None, dispute: str | None, correction: str | None) -> str:
    if correction is not None:
        return f"We had divided it wrongly, and corrected that: {correction}"
    if kind == Clawback.Kind.REFUND and refund is not None:
        return f"Refunded to the buyer: {Refund.Reason(refund).label}."
    what = (dispute or "").replace("_", " ")
    if kind == Clawback.Kind.FREEZE:
        return f"Held while the card's bank decides a dispute ({what}); it is yours again if the sale stands."
    return f"The card's bank gave the buyer their money back ({what})."


def next_payout(party: Party, earnings: Iterable[Earnings] | None = None) -> list[NextPayout]:
    """Per currency, when the next run has enough for the party and how much, if nothing else is earned until then."""
    now = clock.now()
    coming = []
    for of in earnings_of(party) if earnings is None else earnings:
        due, least = of.due, minimum_of(party, of.currency)
        if due.floor_to_minor().micros >= least.micros:
            coming.append(NextPayout(of.currency, now, due.floor_to_minor()))
            continue
        for wait in of.waits:
            due += wait.amount
            if due.floor_to_minor().micros >= least.micros:
                coming.append(NextPayout(of.currency, wait.due_at, due.floor_to_minor()))
                break
    return coming


def royalty_reports_of(party: Party) -> QuerySet[RoyaltyReport]:
    """What the party has reported, newest first, with the invoices."""
    return (
        RoyaltyReport.objects.filter(licensee=party)
        .select_related("model", "invoice")
        .prefetch_related("invoice__lines__version__dataset", "invoice__lines__result", "invoice__lines__license")
        .order_by("-pk")
    )


def royalty_invoices_of(party: Party) -> QuerySet[RoyaltyInvoice]:
    """Newest first; to anyone else they do not exist."""
    return (
        RoyaltyInvoice.objects.filter(report__licensee=party)
        .select_related(
            "report__model",
            "report__replaces",
            "report__replaced_by",
            "carried_into__report__model",
            "payment__tax_rate",
        )
        .prefetch_related("lines__version__dataset", "lines__result", "lines__license", "carried__report__model")
        .order_by("-pk")
    )


def reportable_models_of_nobody() -> QuerySet[TrainedModel]:
    """For whoever acts for no party."""
    return TrainedModel.objects.none()


def reportable_models_of(party: Party) -> QuerySet[TrainedModel]:
    return TrainedModel.objects.filter(owner=party).order_by("-pk")


def _months_of(party: Party) -> list[tuple[int, int]]:
    """Years and months in which something moved, latest first."""
    months = {
        (moment.year, moment.month)
        for moment in DivisionLine.objects.filter(party=party).datetimes("division__divided_at", "month")
    }
    moved = list(Payout.objects.filter(party=party).datetimes("intended_at", "month"))
    rails = RailPayout.objects.filter(party=party, intended_at__isnull=False)
    for intended_at, status, confirmed_at in rails.values_list("intended_at", "status", "confirmed_at"):
        # What came back was booked when it did.
        times = (intended_at, confirmed_at) if status == RailPayout.Status.RETURNED else (intended_at,)
        moved += [moment for moment in times if moment is not None]
    months |= {(moment.year, moment.month) for moment in moved}
    return sorted(months, reverse=True)


def open_months_of(party: Party) -> list[tuple[int, int]]:
    """Of these, the ones without a numbered statement."""
    issued = {
        (day.year, day.month) for day in statements_of(party).order_by().values_list("period__starts_on", flat=True)
    }
    return [month for month in _months_of(party) if month not in issued]


def _earnings(
    currency: str,
    earned: int,
    matured: int,
    back: dict[str, int],
    forgiven: int,
    payouts: dict[tuple[str, str], int],
    over_rails: dict[tuple[str, str], int],
    waits: dict[str, list[Wait]],
    party: Party,
    payee: PayeeAccount | None,
    rail: str,
) -> Earnings:
    def paid_out(*statuses: Payout.Status) -> int:
        return sum(payouts.get((currency, status), 0) for status in statuses)

    taken = paid_out(Payout.Status.INTENDED, Payout.Status.SENT, Payout.Status.PAID)
    due = Money(matured - back["matured"] + forgiven - taken, currency)
    if due.micros < 0:
        reason = "More went back to buyers than you were still owed: what you earn next pays it first."
    elif rail:
        reason = (
            rail if due.floor_to_minor() else "Less than the smallest coin is kept until there is more." if due else ""
        )
    elif payee is None:
        reason = "Set up payouts with Stripe to be paid; until then it is kept."
    elif not payee.is_ready:
        reason = "Stripe still needs something from you before it can pay."
    elif not due.floor_to_minor():
        reason = "Less than the smallest coin is kept until there is more." if due else ""
    elif due.micros < minimum_of(party, currency).micros:
        reason = f"Below your threshold of {money(minimum_of(party, currency))}: it waits until there is more."
    else:
        reason = "Goes out with the next payout run, as soon as Stripe has made the funds available."
    return Earnings(
        currency=currency,
        earned=Money(earned, currency),
        taken_back=Money(back["all"] - forgiven, currency),
        frozen=Money(back["frozen"], currency),
        pending=Money(earned - matured - (back["all"] - back["matured"]), currency),
        due=due,
        in_transit=Money(paid_out(Payout.Status.INTENDED), currency),
        sent=Money(paid_out(Payout.Status.SENT), currency),
        paid=Money(paid_out(Payout.Status.PAID), currency),
        waits=waits.get(currency, []),
        reason=reason,
        is_over_a_rail=bool(rail),
        rail_on_its_way=Money(over_rails.get((currency, Payout.Status.SENT), 0), currency),
        rail_sent=Money(over_rails.get((currency, Payout.Status.PAID), 0), currency),
    )


# --- invoices and what is due -----------------------------------------------------------------------------------------


def documents_of(party: Party) -> QuerySet[Document]:
    """A buyer's invoices and credit notes, newest first; to anyone else they do not exist."""
    return Document.objects.filter(buyer=party).select_related("payment", "cancelled_by").order_by("-pk")


def find_document(documents: QuerySet[Document], reference: str) -> Document | None:
    """By its number, "INV-2026-000017"."""
    kind, year, number = ([*reference.split("-"), "", "", ""])[:3]
    if reference.count("-") != 2 or not (year.isascii() and year.isdigit() and number.isascii() and number.isdigit()):
        return None
    if len(year) > 4 or len(number) > 9:
        return None
    found = documents.filter(kind=kind, year=int(year), number=int(number)).first()
    return found if found is not None and found.reference == reference else None


def payment_for(order: Order) -> Payment | None:
    return Payment.objects.filter(order=order).select_related("tax_rate").first()


def invoice_document_of(payment: Payment | None) -> Document | None:
    return None if payment is None else payment.documents.filter(kind="INV", cancels=None).first()


def reports_due_of(party: Party) -> QuerySet[ReportDuty]:
    """The reports that a licensee still owes, the nearest first."""
    return (
        ReportDuty.objects.filter(license__licensee=party, met_on=None, license__revoked_at=None)
        .select_related("model", "license__version__dataset")
        .prefetch_related("reminders")
        .order_by("due_on", "pk")
    )


def divisions_found(query: str) -> QuerySet[Division]:
    """Divisions, newest first: all, or those of a dataset, model or number."""
    found = (
        Division.objects.exclude(source=Division.Source.CORRECTION)
        .select_related("version__dataset", "result__model")
        .order_by("-pk")
    )
    if not query:
        return found
    named = Q(key=query) | Q(version__dataset__title__icontains=query) | Q(result__model__name__icontains=query)
    if query.isascii() and query.isdigit() and len(query) < 18:
        named |= Q(pk=int(query))
    return found.filter(named)


def corrections_found() -> QuerySet[DivisionCorrection]:
    """Every correction of a division, newest first."""
    return DivisionCorrection.objects.select_related("division", "proposed_by", "decided_by", "result__model").order_by(
        "-pk"
    )


def pools_found(*, is_released: bool | None = None) -> QuerySet[RoyaltyPool]:
    """Royalty pools with what is left of each, newest first: all, or the released or the waiting ones."""
    found = (
        RoyaltyPool.objects.with_left()
        .select_related("version__dataset", "order_line__order", "division__result__model")
        .order_by("-pk")
    )
    return found if is_released is None else found.filter(released_at__isnull=not is_released)


def corrections_waiting() -> QuerySet[DivisionCorrection]:
    return (
        DivisionCorrection.objects.filter(status=DivisionCorrection.Status.PROPOSED)
        .select_related("division__version__dataset", "proposed_by")
        .order_by("pk")
    )


def manual_entries_found(*, state: str | None = None) -> QuerySet[ManualEntry]:
    """Manual entries, newest first: all, or those that are awaiting, approved or rejected."""
    found = (
        ManualEntry.objects.select_related("proposed_by", "decision__decided_by")
        .prefetch_related("legs")
        .order_by("-pk")
    )
    if state is None:
        return found
    return (
        found.filter(decision=None) if state == "awaiting" else found.filter(decision__is_approved=state == "approved")
    )


def receipts_found() -> QuerySet[BankReceipt]:
    """Every transfer that was recorded, newest first."""
    return BankReceipt.objects.select_related(
        "payment__order__buyer", "payment__invoice__report__licensee", "recorded_by", "decided_by"
    ).order_by("-pk")


def receipts_waiting() -> QuerySet[BankReceipt]:
    return (
        BankReceipt.objects.filter(status=BankReceipt.Status.RECORDED, payment__isnull=False)
        .select_related("payment", "recorded_by")
        .order_by("pk")
    )


def unmatched_receipts_waiting() -> QuerySet[BankReceipt]:
    """Money that fits no invoice, seen by one person only."""
    waiting = BankReceipt.objects.filter(status=BankReceipt.Status.RECORDED, payment=None)
    return waiting.select_related("recorded_by").order_by("pk")


def unpaid_invoices() -> QuerySet[Document]:
    """What was invoiced and is not paid, the nearest due day first."""
    return (
        Document.objects.filter(kind="INV", cancels=None, cancelled_by=None, payment__status=Payment.Status.OPEN)
        .select_related("buyer", "payment")
        .order_by("due_on", "pk")
    )


def receipts_that_paid(payment: Payment) -> QuerySet[BankReceipt]:
    """The transfers that paid it, by themselves or as money that had fitted no invoice; none where Stripe took it."""
    booked = BankReceipt.objects.filter(
        Q(payment=payment) | Q(uses__application__payment=payment, uses__application__status="booked"),
        status=BankReceipt.Status.BOOKED,
    )
    return booked.distinct().order_by("received_on", "pk")


@dataclass(frozen=True)
class OwedReport:
    """A report of one model's period, which several licenses may ask for at once."""

    duty: ReportDuty  # the first of them
    titles: list[str]  # of what was licensed
    mailed: list[datetime]  # when its licensee was reminded
    is_suspended: bool  # a license is, for this or something else that is overdue


def by_report(duties: Iterable[ReportDuty]) -> list[OwedReport]:
    """Duties that one report meets are one, in the order of the first."""
    found: dict[tuple[int, date, date], list[ReportDuty]] = {}
    for duty in duties:
        found.setdefault((duty.model_id, duty.period_start, duty.period_end), []).append(duty)
    return [
        OwedReport(
            duty=same[0],
            titles=[duty.license.version.dataset.title for duty in same],
            mailed=sorted({at for duty in same for at in mailed_at(duty.reminders.all())}),
            is_suspended=any(duty.license.in_arrears_at for duty in same),
        )
        for same in found.values()
    ]


def mailed_at(reminders: Iterable[Reminder]) -> list[datetime]:
    """When mails went out, to the minute: those of one round are one."""
    return sorted({one.mailed_at.replace(second=0, microsecond=0) for one in reminders if one.mailed_at})


def reports_open() -> QuerySet[ReportDuty]:
    """Every licensee's reports that are still owed, the nearest due day first, each with the mails that went out about it."""
    return (
        ReportDuty.objects.filter(met_on=None, license__revoked_at=None)
        .select_related("model", "license__licensee", "license__version__dataset")
        .prefetch_related("reminders")
        .order_by("due_on", "pk")
    )


def royalties_open() -> QuerySet[RoyaltyInvoice]:
    """Royalties that were asked for and are not paid, the nearest due day first, each with the mails that went out about it."""
    return (
        RoyaltyInvoice.objects.filter(status=RoyaltyInvoice.Status.OPEN, due_on__isnull=False)
        .select_related("report__model", "report__licensee")
        .prefetch_related("reminders")
        .order_by("due_on", "pk")
    )
