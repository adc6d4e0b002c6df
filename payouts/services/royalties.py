"""Royalty pools released by results, and royalties on a model's revenue: reported, invoiced, paid and divided."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet, Sum

from attribution.grades import GRADES
from attribution.holding import holding_result
from attribution.models import PPQ, AttributionResult, Share
from attribution.selectors import published_results
from marketplace import clock
from marketplace.errors import InvalidInput, KeyReused
from marketplace.models import Citation, License, Offer, Party, TrainedModel
from marketplace.money import MAX_MICROS, MIN_CHARGE_MINOR, Money
from payouts import chart, gateway, ledger
from payouts.allocation import allocate
from payouts.errors import AlreadyPaid, NoResultYet, NotFound, PaymentMismatch, PeriodOverlaps, ResultNotPublished
from payouts.models import (
    Clawback,
    ClawbackLine,
    Division,
    JournalEntry,
    Payment,
    RoyaltyInvoice,
    RoyaltyInvoiceLine,
    RoyaltyPool,
    RoyaltyReport,
)
from payouts.services import billing, checkouts
from payouts.services.divisions import divide

logger = logging.getLogger(__name__)

PLATFORM_FEE_BPS = 1_000  # of a royalty; a sale's is on its offer


# --- pools ------------------------------------------------------------------------------------------------------------


@transaction.atomic
def release_pool(*, pool: RoyaltyPool, result: AttributionResult | None) -> list[JournalEntry]:
    """Owe every contributor their share of an order line's royalty pool, once; without a result, by count.

    Raises:
        ResultNotPublished: its shares may still change.
        ValueError: the result's model does not cite the license of this pool's order line.
    """
    if result and result.status != AttributionResult.Status.PUBLISHED:
        raise ResultNotPublished(f"Result {result.pk} is still {result.status}; money waits for published shares.")
    locked = RoyaltyPool.objects.select_for_update(of=("self",)).select_related(
        "version", "order_line__offer", "order_line__order__buyer", "order_line__order__payment"
    )
    pool = locked.get(pk=pool.pk)
    if result and not Citation.objects.filter(disclosure=result.disclosure_id, license__order_line=pool.order_line_id):
        raise ValueError(f"Result {result.pk} is of a model that does not cite the license behind pool {pool.pk}")

    order = pool.order_line.order
    left = Money(-ledger.balance(chart.royalty_pool(pool)), pool.currency)  # refunds may have taken some
    if not left and pool.released_at is None:
        return []
    division = divide(
        key=f"release:pool:{pool.pk}",
        source=Division.Source.POOL,
        version=pool.version,
        amount=left,
        labellers_bps=pool.order_line.offer.labellers_bps,
        buyer=order.buyer,
        payment=getattr(order, "payment", None),
        result=result,
        order_line=pool.order_line,
        pool=pool,
    )
    RoyaltyPool.objects.filter(pk=pool.pk, released_at=None).update(released_at=division.divided_at)
    return list(JournalEntry.objects.filter(key__startswith=f"{division.key}:").order_by("pk"))


@transaction.atomic
def release_returned(*, pool: RoyaltyPool, amount: Money, key: str) -> Division:
    """Divide what came back to a pool after its release, as the pool itself was divided; once per key.

    A refund took it while it was on its way to the buyer, and did not reach them.
    """
    order = pool.order_line.order
    return divide(
        key=key,
        source=Division.Source.POOL,
        version=pool.version,
        amount=amount,
        labellers_bps=pool.order_line.offer.labellers_bps,
        buyer=order.buyer,
        payment=getattr(order, "payment", None),
        result=pool.division.result,
        order_line=pool.order_line,
    )


def divide_what_is_ready() -> int:
    """Release every pool that a replayed result or its deadline frees, and divide every paid royalty; returns how many.

    One that fails does not hold up the others; the first failure is raised once all have had their turn.
    """
    failures: list[Exception] = []
    n_divided = 0
    for pool in _pools_to_release():
        try:
            release_pool(pool=pool, result=_releasing_result(pool))
            n_divided += 1
        except Exception as error:
            logger.exception("Pool was not released pool=%s", pool.pk)
            failures.append(error)
    undivided = RoyaltyInvoiceLine.objects.filter(invoice=OuterRef("pk"), division=None, amount_micros__gt=0)
    for invoice in RoyaltyInvoice.objects.filter(Exists(undivided), status=RoyaltyInvoice.Status.PAID).order_by("pk"):
        try:
            divide_royalty(invoice=invoice)
            n_divided += 1
        except Exception as error:
            logger.exception("Royalty was not divided invoice=%s", invoice.pk)
            failures.append(error)
    if failures:
        raise failures[0]
    return n_divided


def _citing_results(pool: RoyaltyPool | OuterRef) -> Q:
    line = pool.order_line_id if isinstance(pool, RoyaltyPool) else pool
    deadline = pool.deadline if isinstance(pool, RoyaltyPool) else OuterRef("deadline")
    return Q(
        disclosure__citations__license__order_line=line,
        status=AttributionResult.Status.PUBLISHED,
        published_at__lte=deadline,  # what came after it decides nothing, even if the pool was released late
    )


def _pools_to_release() -> Iterable[RoyaltyPool]:
    replayed = AttributionResult.objects.filter(
        _citing_results(OuterRef("order_line")), grade=AttributionResult.Grade.REPLAYED
    )
    ready = Q(Exists(replayed)) | Q(deadline__lte=clock.now())
    return RoyaltyPool.objects.with_left().filter(ready, released_at=None, left_micros__gt=0).order_by("pk")  # type: ignore[misc]


def _releasing_result(pool: RoyaltyPool) -> AttributionResult | None:
    """Of what was published by the deadline, the first result of the best grade; or none: by count.

    So it does not matter how soon after the deadline this runs.
    """
    citing = AttributionResult.objects.filter(_citing_results(pool), published_at__lte=pool.deadline).distinct()
    return max(citing.order_by("published_at", "pk"), key=lambda result: GRADES.index(_grade(result)), default=None)


def _grade(result: AttributionResult) -> AttributionResult.Grade:
    return AttributionResult.Grade(result.grade)


# --- royalties: report and invoice ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuotedLine:
    """One dataset's part before rounding to whole minor units: revenue · share · rate, up to the cap's remainder."""

    license: License
    share_ppq: int
    rate_bps: int
    micros: int
    is_capped: bool


@dataclass(frozen=True)
class Quote:
    """What a model would owe on a revenue: `lines` exactly, `total` as it would be charged."""

    result: AttributionResult
    lines: list[QuotedLine]
    total: Money


def is_chargeable(amount: Money) -> bool:
    """Whether Stripe charges so little."""
    return amount.to_minor() >= MIN_CHARGE_MINOR[amount.currency]


def dividing_result(model: TrainedModel, period_end: date) -> AttributionResult:
    """The result that divides what the model earned in a period: the one that held when the period ended, whenever it is reported.

    Where none held yet it is the first that was published, so that no later one changes what the period owes.

    Raises:
        NoResultYet: no published result says what the model owes to whom.
    """
    held = holding_result(model, datetime.combine(period_end, time.max, UTC))
    result = held or published_results(model).order_by("published_at", "pk").first()
    if result is None:
        raise NoResultYet(f"{model.name} has no published result yet; report its revenue once it has been measured.")
    return result


def quote_royalty(*, model: TrainedModel, revenue: Money, period_end: date | None = None) -> Quote:
    """What the model owes on the revenue of a period; without one, of a period that ends today.

    Raises:
        NoResultYet: no published result says what it owes to whom.
        InvalidInput: a revenue below zero or beyond the largest amount.
    """
    check_revenue(revenue)
    result = dividing_result(model, period_end or clock.today())
    lines = quoted_lines(result, revenue)
    total = Money(sum(line.micros for line in lines), revenue.currency).floor_to_minor()
    return Quote(result, lines, total)


def report_revenue(
    *,
    licensee: Party,
    model: TrainedModel,
    period_start: date,
    period_end: date,
    revenue: Money,
    key: str,
    purchase_order: str = "",
) -> RoyaltyInvoice:
    """Take a licensee's statement of a model's revenue and make the invoice; the same key and report give the same one.

    Raises:
        NotFound: the model is not theirs.
        InvalidInput: a period that is reversed or not over, or a revenue that cannot be.
        PeriodOverlaps: part of it has been reported in this currency.
        NoResultYet: see `quote_royalty`.
        KeyReused: the key stands for another report.
    """
    if model.owner_id != licensee.pk:
        raise NotFound("There is no such model, or it is not yours.")
    request_sha256 = digest_of(model.pk, str(period_start), str(period_end), revenue.micros, revenue.currency)
    if known := find_reported(licensee, key, request_sha256):
        return known
    check_report(period_start, period_end, revenue)
    try:
        with transaction.atomic():
            hold_reporting(licensee, model)
            if known := find_reported(licensee, key, request_sha256):
                return known
            refuse_overlap(model, period_start, period_end, revenue.currency)
            report = RoyaltyReport.objects.create(
                model=model,
                licensee=licensee,
                period_start=period_start,
                period_end=period_end,
                revenue_micros=revenue.micros,
                currency=revenue.currency,
                key=key,
                request_sha256=request_sha256,
                reported_at=clock.now(),
            )
            hold_caps(model)
            quote = quote_royalty(model=model, revenue=revenue, period_end=period_end)
            owed = {line.license.pk: line.micros for line in quote.lines}
            return make_invoice(report, quote.result, quote.lines, owed, purchase_order=purchase_order)
    except IntegrityError:  # the same key for another model of theirs, at the same moment
        if known := find_reported(licensee, key, request_sha256):
            return known
        raise


def digest_of(*asked: object) -> str:
    """Of what was asked under an idempotency key."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def check_report(period_start: date, period_end: date, revenue: Money) -> None:
    """What can be said of a report without looking at any other.

    Raises:
        InvalidInput: a period that is reversed or not over, or a revenue that cannot be.
    """
    check_revenue(revenue)
    if period_end < period_start:
        raise InvalidInput(
            f"The period ends on {period_end}, before it starts on {period_start}.",
            pointers={"/period_end": "before period_start"},
        )
    if period_end >= clock.today():
        raise InvalidInput(
            f"The period ends on {period_end}, which is not over; report it from the next day on.",
            pointers={"/period_end": "not over yet"},
        )


def hold_reporting(licensee: Party, model: TrainedModel) -> None:
    """Inside a transaction: one report of a licensee's at a time, for overlaps, caps and what is carried over."""
    Party.objects.select_for_update(no_key=True).get(pk=licensee.pk)
    TrainedModel.objects.select_for_update(no_key=True).get(pk=model.pk)


def hold_caps(model: TrainedModel) -> None:
    """A license may stand behind several models: its cap is shared, so its row is held while the remainder is read."""
    cited = Citation.objects.filter(disclosure__model=model).values("license")
    list(License.objects.select_for_update(of=("self",)).filter(pk__in=cited).order_by("pk"))


def standing_reports(model: TrainedModel) -> QuerySet[RoyaltyReport]:
    """Those that no other replaces and whose invoice was not refunded wholly; in one currency none of them overlap."""
    return RoyaltyReport.objects.filter(model=model, replaced_by=None).exclude(
        invoice__status=RoyaltyInvoice.Status.REFUNDED
    )


def refuse_overlap(
    model: TrainedModel, period_start: date, period_end: date, currency: str, *, but: RoyaltyReport | None = None
) -> None:
    """Inside the transaction that holds the model's row.

    Raises:
        PeriodOverlaps: part of the period has been reported in this currency, by another report than `but`.
    """
    overlapping = standing_reports(model).filter(
        currency=currency, period_start__lte=period_end, period_end__gte=period_start
    )
    if but is not None:
        overlapping = overlapping.exclude(pk=but.pk)
    first = overlapping.order_by("period_start").first()
    if first is not None:
        raise PeriodOverlaps(
            f"{model.name}'s revenue from {first.period_start} to {first.period_end} has been reported in "
            f"{currency}; report the days outside it, or correct that report.",
            pointers={"/period_start": "overlaps an earlier report"},
        )


def make_invoice(
    report: RoyaltyReport,
    result: AttributionResult,
    lines: list[QuotedLine],
    owed: dict[int, int],
    *,
    purchase_order: str = "",
) -> RoyaltyInvoice:
    """Inside the transaction that holds the licensee's row: the report's invoice, with what was carried over if it suffices.

    Args:
        owed: license → micros to ask for, before rounding; at most what its line says.
    """
    currency = report.currency
    total = Money(sum(owed.values()), currency).floor_to_minor()
    waiting = list(
        RoyaltyInvoice.objects.select_for_update(of=("self",))
        .filter(
            report__licensee=report.licensee_id,
            currency=currency,
            status=RoyaltyInvoice.Status.CARRIED,
            carried_into=None,
        )
        .order_by("pk")
    )
    demand = total + Money(sum(one.total_micros for one in waiting), currency)
    if not total:
        status = RoyaltyInvoice.Status.NOTHING_DUE
    elif is_chargeable(demand):
        status = RoyaltyInvoice.Status.OPEN
    else:
        status = RoyaltyInvoice.Status.CARRIED
    is_open = status == RoyaltyInvoice.Status.OPEN
    invoice = RoyaltyInvoice.objects.create(
        report=report,
        total_micros=total.micros,
        currency=currency,
        platform_fee_bps=PLATFORM_FEE_BPS,
        status=status,
        issued_at=clock.now(),
        due_on=clock.today() + timedelta(days=settings.INVOICE_DUE_DAYS) if is_open else None,
        purchase_order=purchase_order.strip(),
    )
    asked = {pk: micros for pk, micros in owed.items() if micros > 0}
    # Each part is rounded in proportion, so none rises above what is exact, nor above its cap.
    charged = allocate(total, asked) if asked else {}
    RoyaltyInvoiceLine.objects.bulk_create(
        RoyaltyInvoiceLine(
            invoice=invoice,
            version_id=line.license.version_id,
            license=line.license,
            result=result,
            share_ppq=line.share_ppq,
            rate_bps=line.rate_bps,
            amount_micros=charged[line.license.pk].micros if line.license.pk in charged else 0,
            is_capped=line.is_capped,
        )
        for line in lines
    )
    if is_open:
        RoyaltyInvoice.objects.filter(pk__in=[one.pk for one in waiting]).update(carried_into=invoice)
        billing.ask_for_royalty(invoice)
    logger.info(
        "Invoiced royalty invoice=%s model=%s revenue=%s total=%s carried=%s %s",
        invoice.pk,
        report.model_id,
        report.revenue_micros,
        total.micros,
        len(waiting) if is_open else 0,
        currency,
    )
    return invoice


@dataclass(frozen=True)
class DatasetDue:
    """One cited dataset with a rate: its part of the model, and what its license asks of it."""

    license: License
    share_ppq: int
    rate_bps: int


def datasets_due(result: AttributionResult) -> list[DatasetDue]:
    """Every cited dataset with a rate, and its part of the model.

    The trainer's own data never dilutes the others; data without a rate does only where its share was replayed.
    """
    citations = (
        Citation.objects.filter(disclosure=result.disclosure_id)
        .select_related("license__offer", "version__dataset")
        .order_by("position")
    )
    shares = dict(
        Share.objects.filter(result=result, partition=Share.Partition.RIGHTS_HOLDER)
        .values("version")
        .annotate(ppq=Sum("paid_ppq"))
        .values_list("version", "ppq")
    )
    owner = result.model.owner_id
    others = [citation for citation in citations if citation.version.dataset.owner_id != owner]
    rated = [citation for citation in others if citation.license.offer.royalty_bps]
    diluting = others if result.grade == AttributionResult.Grade.REPLAYED else rated
    whole = sum(shares.get(citation.version_id, 0) for citation in diluting)
    if whole == 0:
        return []
    return [
        DatasetDue(
            license=citation.license,
            share_ppq=shares.get(citation.version_id, 0) * PPQ // whole,
            rate_bps=citation.license.offer.royalty_bps,
        )
        for citation in rated
    ]


def quoted_lines(
    result: AttributionResult, revenue: Money, *, own: Mapping[int, int] | None = None
) -> list[QuotedLine]:
    """`revenue · paid_share_d · rate_d` for every cited dataset with a rate, in whole micros, rounded down.

    Args:
        own: license → micros that were asked for the same revenue before, and so use up none of its cap.
    """
    lines = []
    for due in datasets_due(result):
        micros = revenue.micros * due.share_ppq * due.rate_bps // (PPQ * 10_000)
        left = _left_of_cap(due.license, due.license.offer, revenue.currency)
        if left is not None and own is not None:
            left += own.get(due.license.pk, 0)
        is_capped = left is not None and micros > left
        lines.append(
            QuotedLine(
                license=due.license,
                share_ppq=due.share_ppq,
                rate_bps=due.rate_bps,
                micros=left if is_capped and left is not None else micros,
                is_capped=is_capped,
            )
        )
    return lines


def _left_of_cap(license: License, offer: Offer, currency: str) -> int | None:
    """What the license may still cost in royalties, over its whole life; `None`: no cap in this currency."""
    if offer.royalty_cap_micros is None or offer.currency != currency:
        return None  # nothing is exchanged, so a cap binds what is reported in its own currency
    asked = RoyaltyInvoiceLine.objects.filter(license=license, invoice__currency=currency).exclude(
        invoice__status__in=[RoyaltyInvoice.Status.NOTHING_DUE, RoyaltyInvoice.Status.VOID]
    )
    back = ClawbackLine.objects.filter(invoice_line__in=asked, clawback__undo=None).exclude(
        clawback__kind__in=[Clawback.Kind.FREEZE, Clawback.Kind.CORRECTION]
    )
    used = int(asked.aggregate(sum=Sum("amount_micros", default=0))["sum"])
    # Tax is none of what the license costs, and what was refunded costs nothing.
    used -= int(back.aggregate(sum=Sum(F("amount_micros") - F("tax_micros"), default=0))["sum"])
    return max(0, offer.royalty_cap_micros - used)


def check_revenue(revenue: Money) -> None:
    if not 0 <= revenue.micros <= MAX_MICROS:
        raise InvalidInput(
            f"A revenue is between 0 and {Money(MAX_MICROS, revenue.currency)}; {revenue} is not.",
            pointers={"/revenue/amount": "negative" if revenue.micros < 0 else "too large"},
        )


def find_reported(licensee: Party, key: str, request_sha256: str) -> RoyaltyInvoice | None:
    """The invoice of what a key stands for.

    Raises:
        KeyReused: it stands for another report.
    """
    report = RoyaltyReport.objects.filter(licensee=licensee, key=key).select_related("invoice").first()
    if report is None:
        return None
    if report.request_sha256 != request_sha256:
        raise KeyReused(
            "This Idempotency-Key was used for another report; send a new key for a new report.",
            pointers={"Idempotency-Key": "belongs to another report"},
        )
    invoice: RoyaltyInvoice = report.invoice
    return invoice


# --- royalties: payment and division ----------------------------------------------------------------------------------


def start_invoice_checkout(*, invoice: RoyaltyInvoice, success_url: str, cancel_url: str) -> str:
    """The address at Stripe where the licensee pays the invoice.

    Raises:
        AlreadyPaid: it is paid, or asks for nothing.
        PayByBankTransfer: it is more than Stripe takes at once.
        StripeUnavailable, StripeDeclined: see `payouts.errors`.
    """
    if invoice.status != RoyaltyInvoice.Status.OPEN:
        raise AlreadyPaid(WHY_NOT_PAYABLE[RoyaltyInvoice.Status(invoice.status)])
    payment = Payment.objects.filter(invoice=invoice).first() or billing.ask_for_royalty(invoice)
    checkouts.refuse_too_much(payment)
    report = invoice.report
    name = f"Royalties of {report.model.name}, {report.period_start} to {report.period_end}"
    lines = [gateway.CheckoutLine(name, payment.net.to_minor())]  # one item: parts may be fractions of a cent
    lines += billing.tax_line(payment)
    return checkouts.open_checkout(
        payment=payment,
        lines=lines,
        success_url=success_url,
        cancel_url=cancel_url,
        still_due=lambda: _hold_open(invoice),
    )


WHY_NOT_PAYABLE = {
    RoyaltyInvoice.Status.PAID: "This invoice has been paid.",
    RoyaltyInvoice.Status.REFUNDED: "This invoice was paid, and refunded.",
    RoyaltyInvoice.Status.NOTHING_DUE: "This invoice asks for nothing.",
    RoyaltyInvoice.Status.CARRIED: "This invoice is too small to be charged; your next one asks for it too.",
    RoyaltyInvoice.Status.VOID: "A correction took this invoice's place; pay the one that it made.",
}


def _hold_open(invoice: RoyaltyInvoice) -> None:
    held = RoyaltyInvoice.objects.select_for_update(of=("self",)).get(pk=invoice.pk)
    if held.status != RoyaltyInvoice.Status.OPEN:
        raise AlreadyPaid(WHY_NOT_PAYABLE[RoyaltyInvoice.Status(held.status)])


@transaction.atomic
def book_payment(*, payment: Payment, checkout: gateway.PaidCheckout) -> Payment:
    """Book a paid invoice, the platform's fee first, and divide what is left; again, nothing happens.

    Raises:
        PaymentMismatch: what Stripe took is not what was asked for; nothing is booked.
    """
    taken = checkouts.take_payment(payment=payment, checkout=checkout)
    if taken is None:
        return Payment.objects.get(pk=payment.pk)
    return book_taken(taken)


def book_taken(taken: Payment) -> Payment:
    """Inside the transaction that marked the payment paid: the money's place, and its division."""
    invoice = taken.invoice
    assert invoice is not None
    together = invoice.asked_with_it
    changed = RoyaltyInvoice.objects.filter(
        pk__in=[one.pk for one in together], status__in=[RoyaltyInvoice.Status.OPEN, RoyaltyInvoice.Status.CARRIED]
    ).update(status=RoyaltyInvoice.Status.PAID, paid_at=taken.paid_at)
    if changed != len(together):
        raise PaymentMismatch(
            f"Payment {taken.pk} is for royalty invoice {invoice.pk}, which is {invoice.status}: a correction took its place. "
            "Refund it."
        )
    currency = taken.currency
    postings = checkouts.cash_legs(taken) | billing.tax_legs(taken)
    fee = 0
    for one in together:
        parts = parts_of(one)
        lines = {line.pk: line for line in one.lines.all()}
        postings |= {chart.royalty(lines[pk], currency): -part.micros for pk, part in parts.items()}
        fee += one.total_micros - sum(part.micros for part in parts.values())
    if len(postings) >= ledger.MAX_LEGS:
        raise PaymentMismatch(f"Payment {taken.pk} has more lines than one entry holds.")
    postings[chart.platform_fee(currency)] = -fee
    ledger.post(
        key=f"royalty:payment:{taken.pk}",
        kind=JournalEntry.Kind.ROYALTY,
        postings=postings,
        booked_at=taken.paid_at,
    )
    logger.info("Booked royalty invoice=%s payment=%s micros=%s", invoice.pk, taken.pk, taken.amount_micros)
    for one in together:
        divide_royalty(invoice=one)
    invoice.refresh_from_db()
    return taken


def parts_of(invoice: RoyaltyInvoice) -> dict[int, Money]:
    """What each line's payees divide: its amount less its part of the platform's fee, itself divided by largest remainder."""
    amounts = {pk: micros for pk, micros in invoice.lines.values_list("pk", "amount_micros") if micros}
    fees = fees_of(invoice, amounts)
    return {pk: Money(micros, invoice.currency) - fees[pk] for pk, micros in amounts.items()}


def fees_of(invoice: RoyaltyInvoice, amounts: Mapping[int, int]) -> dict[int, Money]:
    """Each line's part of the platform's fee, by the micros of those that ask for something."""
    return allocate(invoice.total.share(invoice.platform_fee_bps), amounts) if amounts else {}


@transaction.atomic
def divide_royalty(*, invoice: RoyaltyInvoice) -> list[Division]:
    """Divide each dataset's part inside that dataset, by the result that its line was made by; harmless to call twice.

    Raises:
        ValueError: the invoice is not paid.
    """
    invoice = (
        RoyaltyInvoice.objects.select_for_update(of=("self",))
        .select_related("report__licensee", "report__model")
        .get(pk=invoice.pk)
    )
    if invoice.status != RoyaltyInvoice.Status.PAID:
        raise ValueError(f"{invoice} is {invoice.status}")
    payment = (invoice.carried_into or invoice).payment
    parts = parts_of(invoice)
    lines = invoice.lines.select_related("version", "license__offer", "license__order_line", "result").order_by("pk")
    return [
        divide(
            key=f"royalty:line:{line.pk}",
            source=Division.Source.ROYALTY,
            version=line.version,
            amount=part,
            labellers_bps=line.license.offer.labellers_bps,
            buyer=invoice.report.licensee,
            payment=payment,
            result=line.result,
            order_line=line.license.order_line,
            invoice_line=line,
        )
        for line in lines
        if (part := parts.get(line.pk))
    ]
