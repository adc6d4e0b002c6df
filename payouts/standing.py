"""Why a payee's money is where it is, in sentences that a person understands, and what they can do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from django.utils import timezone

from marketplace import clock
from marketplace.models import Party
from marketplace.money import Money
from marketplace.templatetags.residual import money
from payouts.asked import asked_in_words
from payouts.models import DivisionLine, PayeeAccount, Payout, PayoutRun, PlannedPayout, RailPayout
from payouts.selectors import UNANSWERED, Earnings, earnings_of, payee_of
from payouts.services import bank_details, other_rails
from payouts.services.plans import minimum_of

BANKS = {
    "account_closed": "the account is closed",
    "account_frozen": "the account is frozen",
    "bank_account_restricted": "the account takes no payouts",
    "bank_ownership_changed": "the account belongs to somebody else now",
    "could_not_process": "it could not process it",
    "debit_not_authorized": "it does not allow it",
    "declined": "it declined it",
    "incorrect_account_holder_name": "the holder's name does not match",
    "incorrect_account_holder_address": "the holder's address does not match",
    "invalid_account_number": "the account number is wrong",
    "invalid_currency": "the account does not take this currency",
    "no_account": "no such account exists",
}


class Code(StrEnum):
    """What a client may rely on."""

    OWES = "owes"
    NOT_SET_UP = "not_set_up"
    OTHER_RAIL = "other_rail"  # Stripe does not reach the payee's country
    DETAILS_NEEDED = "details_needed"  # before anything can be sent
    DETAILS_SOON = "details_soon"  # or Stripe stops paying the bank
    BANK_REFUSED = "bank_refused"
    STRIPE_REFUSED = "stripe_refused"
    BELOW_MINIMUM = "below_minimum"
    AWAITING_APPROVAL = "awaiting_approval"
    PAUSED = "paused"
    AWAITING_FUNDS = "awaiting_funds"
    NEXT_RUN = "next_run"
    ON_HOLD = "on_hold"
    BANK_DETAILS_NEEDED = "bank_details_needed"  # of whoever is paid over another rail than Stripe
    BANK_DETAILS_HELD = "bank_details_held"  # they were changed, and are not used yet
    NEXT_TRANSFERS = "next_transfers"
    TRANSFER_UNDER_WAY = "transfer_under_way"
    TRANSFER_RETURNED = "transfer_returned"


#: What the payee mends on Stripe's pages.
AT_STRIPE = frozenset({Code.NOT_SET_UP, Code.DETAILS_NEEDED, Code.DETAILS_SOON, Code.BANK_REFUSED})


@dataclass(frozen=True)
class Standing:
    """One thing that part of the money waits for."""

    code: Code
    amount: Money
    sentence: str
    until: datetime | None = None

    @property
    def is_for_payee(self) -> bool:
        return self.code in AT_STRIPE or self.code in (Code.BANK_DETAILS_NEEDED, Code.TRANSFER_RETURNED)


def standings_of(party: Party, earnings: Iterable[Earnings] | None = None) -> list[Standing]:
    """What the party's money waits for, by currency, what the payee must do first; empty where nothing waits."""
    payee = payee_of(party)
    return [
        standing
        for of in (earnings_of(party) if earnings is None else earnings)
        for standing in _standings(party, of, payee)
    ]


def bank_in_words(code: str) -> str:
    return BANKS.get(code, code.replace("_", " "))


def payout_problem(payout: Payout) -> str:
    """What is wrong with a payout, for staff; empty where nothing is."""
    if payout.bank_failed_at and payout.status == Payout.Status.SENT:
        return f"The payee’s bank sent it back: {bank_in_words(payout.bank_failure_code)}."
    if payout.status == Payout.Status.REFUSED:
        return payout.refusal_message or payout.refusal_code
    late = payout.first_tried_at is not None and payout.first_tried_at < timezone.now() - UNANSWERED
    if payout.status == Payout.Status.INTENDED and (payout.attempt > 1 or late):
        return "Stripe has not answered clearly; it is looked up and tried again."
    return ""


def _standings(party: Party, of: Earnings, payee: PayeeAccount | None) -> Iterable[Standing]:
    due, least = of.payable_now, minimum_of(party, of.currency)
    if of.due.micros < 0:
        sentence = "More went back to buyers than you were still owed: what you earn next pays it first."
        yield Standing(Code.OWES, of.owed_back, sentence)
    if of.is_over_a_rail:
        yield from _over_a_rail(party, of, least)
    elif payee is None:
        yield Standing(Code.NOT_SET_UP, due, "Set up payouts with Stripe to be paid; until then it is kept for you.")
    elif not payee.is_ready:
        asked = asked_in_words(payee.requirements)
        yield Standing(Code.DETAILS_NEEDED, due, f"Stripe needs {asked} before it can pay you.")
    elif payee.requirements or not payee.payouts_enabled:
        asked = asked_in_words(payee.requirements)
        held = (
            "Stripe needs {} before it pays your bank."
            if not payee.payouts_enabled
            else "Stripe needs {} soon, or it stops paying your bank."
        )
        yield Standing(Code.DETAILS_SOON, of.sent, held.format(asked))
    yield from _refusals(party, of)
    if payee is not None and payee.is_ready and due:
        yield _waiting_for_a_run(party, due, least)
    if of.waits:
        first = of.waits[0]
        sentence = f"On hold until {first.due_at:%-d %B %Y} because {_why_held(party, of.currency, first.due_at)}."
        if len(of.waits) > 1:
            sentence += f" {money(of.pending - first.amount)} more later."
        yield Standing(Code.ON_HOLD, first.amount, sentence, until=first.due_at)


def _over_a_rail(party: Party, of: Earnings, least: Money) -> Iterable[Standing]:
    """Of a payee whom Stripe does not reach."""
    latest = bank_details.latest_of(party)
    sentence = other_rails.waits_for(latest, "your")
    if latest is None:
        yield Standing(
            Code.BANK_DETAILS_NEEDED,
            of.payable_now,
            f"{sentence} Stripe does not pay to {party.country}; we do, by transfer.",
        )
    elif latest.usable_from > clock.now():
        yield Standing(Code.BANK_DETAILS_HELD, of.payable_now, sentence, until=latest.usable_from)
    elif of.payable_now and of.payable_now.micros < least.micros:
        yield _below(least, of.payable_now)
    elif of.payable_now:
        yield Standing(Code.NEXT_TRANSFERS, of.payable_now, sentence)
    if of.rail_on_its_way:
        yield Standing(
            Code.TRANSFER_UNDER_WAY,
            of.rail_on_its_way,
            "Our staff are sending it by bank transfer; the bank’s reference stands below once it has left.",
        )
    last = (
        RailPayout.objects.filter(party=party, currency=of.currency).exclude(status="dropped").order_by("-pk").first()
    )
    if last is not None and last.status == RailPayout.Status.RETURNED:
        yield Standing(
            Code.TRANSFER_RETURNED,
            last.amount,
            f"Our transfer of {money(last.amount)} came back. It is kept; look whether your bank details are right.",
        )


def _refusals(party: Party, of: Earnings) -> Iterable[Standing]:
    latest = Payout.objects.filter(party=party, currency=of.currency).order_by("-pk").first()
    failed = Payout.objects.filter(
        party=party, currency=of.currency, status=Payout.Status.SENT, bank_failed_at__isnull=False
    )
    for payout in failed.order_by("pk"):
        yield Standing(
            Code.BANK_REFUSED,
            payout.amount,
            f"Your bank refused the payout of {money(payout.amount)}: {bank_in_words(payout.bank_failure_code)}. The money is at Stripe; "
            "name another account there and it is sent again.",
        )
    if (
        latest is not None
        and latest.status == Payout.Status.REFUSED
        and latest.refusal_code not in ("disputed", "balance_insufficient")
    ):
        yield Standing(
            Code.STRIPE_REFUSED,
            latest.amount,
            f"Stripe refused the payout of {money(latest.amount)}: {latest.refusal_message.rstrip('.')}. It is kept, and tried again with "
            "the next run.",
        )


def _waiting_for_a_run(party: Party, due: Money, least: Money) -> Standing:
    planned = (
        PlannedPayout.objects.filter(
            party=party,
            run__currency=due.currency,
            run__status__in=["queued", "running"],
            outcome=PlannedPayout.Outcome.WAITING,
        )
        .select_related("run")
        .order_by("-pk")
        .first()
    )
    if planned is not None:
        match planned.run.state:
            case PayoutRun.State.AWAITING_APPROVAL:
                return Standing(
                    Code.AWAITING_APPROVAL, due, "In a payout run that a second person looks at before it is sent."
                )
            case PayoutRun.State.PAUSED:
                return Standing(Code.PAUSED, due, "In a payout run that is paused; it goes on where it was.")
            case PayoutRun.State.SHORT_OF_FUNDS:
                sentence = "Waits until the buyers' payments are available at Stripe; whoever has waited longest is paid first."
                return Standing(Code.AWAITING_FUNDS, due, sentence)
    if due.micros < least.micros:
        return _below(least, due)
    return Standing(
        Code.NEXT_RUN, due, "Goes out with the next payout run, as soon as Stripe has made the funds available."
    )


def _below(least: Money, due: Money) -> Standing:
    sentence = f"Below your threshold of {money(least)}: {money(due)} waits until there is more."
    return Standing(Code.BELOW_MINIMUM, due, sentence)


def _why_held(party: Party, currency: str, due_at: datetime) -> str:
    """By the first line of that day: the division's own date is the buyer's and the charge's, a later one the payee's."""
    line = (
        DivisionLine.objects.filter(
            party=party, division__currency=currency, due_at__gte=due_at, due_at__gt=clock.now()
        )
        .select_related("division")
        .order_by("due_at", "pk")
        .first()
    )
    if line is None or line.due_at <= line.division.due_at:
        return "the buyer's payment is new and could still be taken back"
    is_new = not Payout.objects.filter(party=party, status__in=[Payout.Status.SENT, Payout.Status.PAID]).exists()
    if is_new:
        return "you're new"
    return "the records repeat earlier ones, whose owners can still claim them"
