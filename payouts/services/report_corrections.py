"""A revenue report that was wrong: another takes its place, and only the difference is asked for or given back.

Not paid yet: the invoice is void, and the corrected report's is in its place. Paid: more revenue gives an invoice of what is
missing, less gives back what was too much, the way it was paid, as a refund is; the payees give back their parts of it.
The corrected revenue is divided, among datasets and inside each, by the result of the report that it replaces: a newer one
changes later periods only.
"""

import logging
from datetime import date

from django.db import IntegrityError, transaction
from django.db.models import F, Sum

from marketplace import clock
from marketplace.errors import InvalidInput
from marketplace.models import Party
from marketplace.money import Money
from marketplace.services import audit
from payouts.allocation import allocate
from payouts.errors import NotFound, ReportNotCorrectable
from payouts.models import (
    Clawback,
    ClawbackLine,
    Dispute,
    Payment,
    Refund,
    RoyaltyInvoice,
    RoyaltyInvoiceLine,
    RoyaltyReport,
)
from payouts.services import checkouts, clawbacks, documents, refunds, royalties

logger = logging.getLogger(__name__)

Status = RoyaltyInvoice.Status
MAX_NOTE = 500


def correct_report(
    *,
    licensee: Party,
    report: RoyaltyReport,
    revenue: Money,
    note: str,
    key: str,
    period_start: date | None = None,
    period_end: date | None = None,
) -> RoyaltyInvoice:
    """Replace a report by a right one; the invoice asks for the difference, or for all where nothing was paid yet.

    The same key and correction give the same invoice.

    Args:
        note: what was wrong, in words; whoever gives something back reads it.
        period_start, period_end: as reported, unless the days were wrong too.

    Raises:
        NotFound: the report is not theirs.
        InvalidInput: no reason, nothing that differs, another currency, or a report that cannot be.
        ReportNotCorrectable: it was replaced, refunded, is asked for with another invoice, or its payment is on its way or
            disputed.
        PeriodOverlaps, KeyReused: as of any report.
    """
    if report.licensee_id != licensee.pk:
        raise NotFound("There is no such report, or it is not yours.")
    first, last = period_start or report.period_start, period_end or report.period_end
    note = note.strip()
    request_sha256 = royalties.digest_of(report.pk, str(first), str(last), revenue.micros, revenue.currency, note)
    if known := royalties.find_reported(licensee, key, request_sha256):
        return known
    royalties.check_report(first, last, revenue)
    if not 1 <= len(note) <= MAX_NOTE:
        raise InvalidInput(
            f"Say what was wrong, in 1 to {MAX_NOTE} characters: whoever gives something back reads it.",
            pointers={"/note": "missing" if not note else "too long"},
        )
    if revenue.currency != report.currency:
        raise InvalidInput(
            f"The report is in {report.currency}; correct it in {report.currency}, and report {revenue.currency} by itself.",
            pointers={"/revenue/currency": f"should be {report.currency}"},
        )
    if (first, last, revenue) == (report.period_start, report.period_end, report.revenue):
        raise InvalidInput("The correction says what the report says.", pointers={"/revenue/amount": "not changed"})
    try:
        with transaction.atomic():
            if report.invoice.status == Status.OPEN:
                # Locked in the order in which booking locks: the payment, then whatever it pays.
                list(Payment.objects.select_for_update(of=("self",)).filter(invoice=report.invoice))
            royalties.hold_reporting(licensee, report.model)
            if known := royalties.find_reported(licensee, key, request_sha256):
                return known
            return _replace(report, first, last, revenue, note, key, request_sha256)
    except IntegrityError:  # the same key, or another correction of the same report, at the same moment
        if known := royalties.find_reported(licensee, key, request_sha256):
            return known
        raise


def _replace(
    report: RoyaltyReport, first: date, last: date, revenue: Money, note: str, key: str, request_sha256: str
) -> RoyaltyInvoice:
    later = RoyaltyReport.objects.filter(replaces=report).first()
    if later is not None:
        raise ReportNotCorrectable(
            f"This report was replaced on {later.reported_at:%d %B %Y}; correct the one that did."
        )
    royalties.refuse_overlap(report.model, first, last, revenue.currency, but=report)
    _set_aside(report.invoice)
    royalties.hold_caps(report.model)
    chain = _chain(report)
    standing = _standing(chain)
    origin = RoyaltyInvoiceLine.objects.filter(invoice__report__in=chain).order_by("pk").first()
    # A report without a line kept no result; the end of its period says which one it was.
    result = origin.result if origin else royalties.dividing_result(report.model, chain[-1].period_end)
    asked = {license: sum(lines.values()) for license, lines in standing.items()}
    lines = royalties.quoted_lines(result, revenue, own=asked)
    corrected = RoyaltyReport.objects.create(
        model=report.model,
        licensee=report.licensee,
        period_start=first,
        period_end=last,
        revenue_micros=revenue.micros,
        currency=revenue.currency,
        key=key,
        request_sha256=request_sha256,
        reported_at=clock.now(),
        replaces=report,
        note=note,
    )
    differences = {line.license.pk: line.micros - asked.get(line.license.pk, 0) for line in lines}
    # A cap that another model's report has used or freed meanwhile changes nothing that goes the other way than the revenue.
    more = {pk: max(0, micros) for pk, micros in differences.items()}
    less = {pk: max(0, -micros) for pk, micros in differences.items()}
    grew = revenue.micros >= report.revenue_micros
    number = report.invoice.purchase_order
    invoice = royalties.make_invoice(corrected, result, lines, more if grew else {}, purchase_order=number)
    if not grew:
        _give_back(corrected, standing, less)
    audit.record(
        actor=None,
        party=report.licensee,
        action="report.corrected",
        target=f"report:{report.pk}",
        by=corrected.pk,
        from_micros=report.revenue_micros,
        to_micros=revenue.micros,
        currency=report.currency,
    )
    logger.info("Corrected report=%s by=%s micros=%s", report.pk, corrected.pk, revenue.micros)
    return invoice


def _set_aside(invoice: RoyaltyInvoice) -> None:
    """What was not paid is void; what is on its way cannot be corrected now."""
    invoice = RoyaltyInvoice.objects.select_for_update(of=("self",)).get(pk=invoice.pk)
    match Status(invoice.status):
        case Status.REFUNDED:
            raise ReportNotCorrectable("This report's invoice was refunded, so its days are free: report them anew.")
        case Status.CARRIED if invoice.carried_into is not None:
            raise ReportNotCorrectable(
                f"This report's amount is asked for with invoice {invoice.carried_into_id}; pay that one first, or correct its report."
            )
        case Status.OPEN:
            payment = Payment.objects.filter(invoice=invoice).first()
            if payment is not None:
                if payment.is_on_its_way or not checkouts.close_checkout(payment):
                    raise ReportNotCorrectable(
                        "The invoice has just been paid, and its confirmation is on its way (a bank takes days to confirm a debit); "
                        "correct the report after it."
                    )
                documents.cancel_invoice(payment, why="Its report was corrected.")
            _void(invoice)
        case Status.CARRIED:
            _void(invoice)


def _void(invoice: RoyaltyInvoice) -> None:
    RoyaltyInvoice.objects.filter(carried_into=invoice).update(carried_into=None)  # waits for the next one again
    RoyaltyInvoice.objects.filter(pk=invoice.pk).update(status=Status.VOID)


def _chain(report: RoyaltyReport | None) -> list[RoyaltyReport]:
    chain = []
    while report is not None:
        chain.append(report)
        report = report.replaces
    return chain


def _standing(chain: list[RoyaltyReport]) -> dict[int, dict[int, int]]:
    """License → invoice line → what of it was paid and not given back, before tax; the latest line first."""
    lines = RoyaltyInvoiceLine.objects.filter(
        invoice__report__in=chain, invoice__status__in=[Status.PAID, Status.REFUNDED], amount_micros__gt=0
    ).order_by("-pk")
    back = dict(
        ClawbackLine.objects.filter(invoice_line__in=lines, clawback__undo=None)
        .exclude(clawback__kind__in=[Clawback.Kind.FREEZE, Clawback.Kind.CORRECTION])
        .values("invoice_line")
        .annotate(sum=Sum(F("amount_micros") - F("tax_micros")))
        .values_list("invoice_line", "sum")
    )
    standing: dict[int, dict[int, int]] = {}
    for line in lines:
        standing.setdefault(line.license_id, {})[line.pk] = line.amount_micros - int(back.get(line.pk, 0))
    return standing


def _give_back(corrected: RoyaltyReport, standing: dict[int, dict[int, int]], less: dict[int, int]) -> None:
    """Refund what was too much, in whole minor units, of the payments that paid it."""
    total = Money(sum(less.values()), corrected.currency).floor_to_minor()
    if not total:
        return
    parts = allocate(total, {pk: micros for pk, micros in less.items() if micros})
    of_lines: dict[int, int] = {}
    for license, part in parts.items():
        missing = part.micros
        for line, left in standing[license].items():
            of_lines[line] = min(left, missing)
            missing -= of_lines[line]
    invoices = RoyaltyInvoice.objects.filter(lines__in=of_lines).distinct()
    payments = sorted({(invoice.carried_into or invoice).payment.pk for invoice in invoices})
    for pk in payments:
        payment = Payment.objects.select_for_update(of=("self",)).select_related("order", "invoice").get(pk=pk)
        if payment.disputes.filter(status__in=Dispute.OPEN).exists():
            raise ReportNotCorrectable(
                "The invoice's payment is disputed at the card's bank; correct the report once that is decided."
            )
        mine = {part.line.pk: part for part in clawbacks.parts_left(payment) if of_lines.get(part.line.pk)}
        gross = {
            line: clawbacks.gross_of(part, Money(of_lines[line], corrected.currency)) for line, part in mine.items()
        }
        whole = Money(sum(amount.micros for amount in gross.values()), corrected.currency).floor_to_minor()
        if whole:
            spread = allocate(whole, {line: amount.micros for line, amount in gross.items() if amount})
            refunds.give_back_corrected(
                payment=payment,
                amounts={line: amount.micros for line, amount in spread.items() if amount},
                note=corrected.note,
                key=f"correction:{corrected.pk}",
            )


def refunds_of(report: RoyaltyReport) -> list[Refund]:
    """What a correction gave back."""
    return list(Refund.objects.filter(key=f"correction:{report.pk}").prefetch_related("transfers").order_by("pk"))
