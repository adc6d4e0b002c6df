"""What a party may know of its money; the only doors to it for who is not staff."""

from dataclasses import dataclass
from datetime import datetime

from django.db.models import Count, Min, Q, QuerySet, Sum

from marketplace import clock
from marketplace.models import Party, TrainedModel
from marketplace.money import Money
from payouts.models import (
    DivisionLine,
    PayeeAccount,
    Payout,
    RoyaltyInvoice,
    RoyaltyPool,
    RoyaltyReport,
)


@dataclass(frozen=True)
class Wait:
    """Money that is earned and not due yet, and until when; lines of one day are one."""

    due_at: datetime
    amount: Money
    n_lines: int


@dataclass(frozen=True)
class Earnings:
    """One currency's money: earned = pending + due + in transit + sent + paid, to the micro."""

    currency: str
    earned: Money
    pending: Money  # held, or not yet available at Stripe
    due: Money  # goes out with the next run, remainders of a cent included
    in_transit: Money  # promised; Stripe has not answered yet
    sent: Money  # at Stripe, on its way to the bank
    paid: Money  # in the bank
    waits: list[Wait]
    reason: str  # what the due money waits for, in words

    @property
    def payable_now(self) -> Money:
        return self.due.floor_to_minor()


@dataclass(frozen=True)
class NextPayout:
    currency: str
    at: datetime
    amount: Money


def lines_of(party: Party) -> QuerySet[DivisionLine]:
    """Every line of every division that pays the party, newest first."""
    return (
        DivisionLine.objects.filter(party=party)
        .select_related("division__version__dataset", "division__result__model", "division__order_line")
        .order_by("-division__divided_at", "-pk")
    )


def payouts_of(party: Party) -> QuerySet[Payout]:
    """Newest first."""
    return Payout.objects.filter(party=party).order_by("-pk")


def payee_of(party: Party) -> PayeeAccount | None:
    return PayeeAccount.objects.filter(party=party).first()


def waiting_pools_of(party: Party) -> QuerySet[RoyaltyPool]:
    """Pools that wait for a result or their deadline, of versions to which the party contributed; nearest deadline first."""
    return (
        RoyaltyPool.objects.filter(released_at=None, version__contributions__party=party)
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
    payouts = {
        (row["currency"], row["status"]): int(row["sum"])
        for row in Payout.objects.filter(party=party).values("currency", "status").annotate(sum=Sum("amount_micros"))
    }
    waits: dict[str, list[Wait]] = {}
    held = (
        DivisionLine.objects.filter(party=party, due_at__gt=now)
        .values("division__currency", "due_at__date")
        .annotate(due_at=Min("due_at"), micros=Sum("amount_micros"), n_lines=Count("pk"))
        .order_by("division__currency", "due_at")
    )
    for row in held:
        currency = row["division__currency"]
        waits.setdefault(currency, []).append(Wait(row["due_at"], Money(row["micros"], currency), row["n_lines"]))
    payee = payee_of(party)
    return [
        _earnings(row["division__currency"], int(row["earned"]), int(row["matured"]), payouts, waits, payee)
        for row in lines
    ]


def next_payout(party: Party) -> list[NextPayout]:
    """Per currency, when the next run has something for the party and how much, if nothing else is earned until then."""
    now = clock.now()
    coming = []
    for of in earnings_of(party):
        due = of.due
        if due.floor_to_minor():
            coming.append(NextPayout(of.currency, now, due.floor_to_minor()))
            continue
        for wait in of.waits:
            due += wait.amount
            if due.floor_to_minor():
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
        .select_related("report__model")
        .prefetch_related("lines__version__dataset", "lines__result", "lines__license")
        .order_by("-pk")
    )


def reportable_models_of(party: Party) -> QuerySet[TrainedModel]:
    return TrainedModel.objects.filter(owner=party).order_by("-pk")


def months_of(party: Party) -> list[tuple[int, int]]:
    """Years and months in which something moved, latest first."""
    months = {
        (moment.year, moment.month)
        for moment in DivisionLine.objects.filter(party=party).datetimes("division__divided_at", "month")
    } | {(moment.year, moment.month) for moment in Payout.objects.filter(party=party).datetimes("intended_at", "month")}
    return sorted(months, reverse=True)


def _earnings(
    currency: str,
    earned: int,
    matured: int,
    payouts: dict[tuple[str, str], int],
    waits: dict[str, list[Wait]],
    payee: PayeeAccount | None,
) -> Earnings:
    def paid_out(*statuses: Payout.Status) -> int:
        return sum(payouts.get((currency, status), 0) for status in statuses)

    taken = paid_out(Payout.Status.INTENDED, Payout.Status.SENT, Payout.Status.PAID)
    due = Money(matured - taken, currency)
    if payee is None:
        reason = "Set up payouts with Stripe to be paid; until then it is kept."
    elif not payee.is_ready:
        reason = "Stripe still needs something from you before it can pay."
    elif not due.floor_to_minor():
        reason = "Less than the smallest coin is kept until there is more." if due else ""
    else:
        reason = "Goes out with the next payout run, as soon as Stripe has made the funds available."
    return Earnings(
        currency=currency,
        earned=Money(earned, currency),
        pending=Money(earned - matured, currency),
        due=due,
        in_transit=Money(paid_out(Payout.Status.INTENDED), currency),
        sent=Money(paid_out(Payout.Status.SENT), currency),
        paid=Money(paid_out(Payout.Status.PAID), currency),
        waits=waits.get(currency, []),
        reason=reason,
    )
