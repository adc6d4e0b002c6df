"""What licensees must report and pay by when: opened, reminded of, told in public when overdue, and in the end enforced.

    a period ends     a duty per license and model, due some days later
    before, on, after a mail each to whoever may act for the licensee, once, as long as it is not settled
    overdue           the model's page says so
    long overdue      the license is suspended: no download, no citation, and nothing is sold to the licensee
    settled           all of that ends, at once

Everything is business time, and harmless to run again.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q, QuerySet

from attribution.models import AttributionResult
from marketplace import clock, jobs
from marketplace.mail import send_mail
from marketplace.models import License, Party, TrainedModel
from marketplace.services.authority import owners_emails
from marketplace.services.licenses import match_arrears
from payouts.models import Reminder, ReportDuty, RoyaltyInvoice, RoyaltyInvoiceLine

logger = logging.getLogger(__name__)

Moment = Reminder.Moment
ONE_DAY = timedelta(days=1)
#: A licensee that was away for longer is asked for its latest periods only.
MAX_PERIODS = 40
PAGE = 500


@dataclass(frozen=True)
class Overdue:
    """Something that a model's owner should have done, as the public is told; amounts are nobody else's business."""

    what: str
    since: date


def follow_up() -> None:
    """One round of everything: what beat calls."""
    open_duties()
    match_reports()
    remind()
    enforce()


def open_duties() -> int:
    """A duty for every period that has ended, of every license with a rate behind a measured model; returns how many are new."""
    today = clock.today()
    settled = {
        "today": today,
        "months": settings.ROYALTY_REPORT_MONTHS,
        "days": settings.ROYALTY_REPORT_DUE_DAYS,
        "published": AttributionResult.Status.PUBLISHED,
    }
    n_new = 0
    with transaction.atomic(), connection.chunked_cursor() as cursor:
        cursor.execute(_PERIODS_OVER, settled)
        while rows := cursor.fetchmany(PAGE):
            duties = [
                ReportDuty(
                    model_id=model,
                    license_id=license,
                    period_start=first,
                    period_end=end,
                    due_on=end + timedelta(days=days),
                )
                for model, license, start, months, days in rows
                for first, end in periods(start, today, months=months)
            ]
            n_new += len(ReportDuty.objects.bulk_create(duties, ignore_conflicts=True, batch_size=PAGE))
    return n_new


# Every model and license for which a period has ended that no duty asks for: where the next one begins, and how long it is. What a
# model owes to whom nobody can say before a result is published, so until then it cannot report.
_PERIODS_OVER = """
SELECT model_id, license_id, start, months, days FROM (
    SELECT cited.model_id, cited.license_id, coalesce(last.period_end + 1, cited.since) AS start,
        coalesce(s.every_months, %(months)s) AS months, coalesce(s.due_days, %(days)s) AS days
    FROM (
        SELECT d.model_id, c.license_id, (min(d.disclosed_at) AT TIME ZONE 'UTC')::date AS since
        FROM marketplace_citation c
        JOIN marketplace_license l ON l.id = c.license_id AND l.revoked_at IS NULL
        JOIN marketplace_offer o ON o.id = l.offer_id AND o.royalty_bps > 0
        JOIN marketplace_disclosure d ON d.id = c.disclosure_id
        JOIN marketplace_trainedmodel m ON m.id = d.model_id
        JOIN marketplace_datasetversion v ON v.id = c.version_id
        JOIN marketplace_dataset s ON s.id = v.dataset_id AND s.owner_id <> m.owner_id
        GROUP BY d.model_id, c.license_id
    ) cited
    LEFT JOIN payouts_reportschedule s ON s.license_id = cited.license_id
    LEFT JOIN LATERAL (
        SELECT period_end FROM payouts_reportduty r WHERE r.license_id = cited.license_id AND r.model_id = cited.model_id
        ORDER BY period_end DESC LIMIT 1
    ) last ON true
    WHERE EXISTS (
        SELECT FROM attribution_attributionresult r WHERE r.model_id = cited.model_id AND r.status = %(published)s
    )
) next
-- The first of the month after the calendar's period that `start` lies in: its last day is over.
WHERE (date_trunc('month', start) + make_interval(months => months - (extract(month FROM start)::int - 1) %% months))::date
    <= %(today)s
ORDER BY model_id, license_id
"""


def periods(start: date, today: date, *, months: int) -> Iterator[tuple[date, date]]:
    """The calendar's periods of so many months that have ended before today, the first from `start` on; (2026-10-01, 2026-12-31)."""
    found = 0
    while found < MAX_PERIODS:
        index = start.year * 12 + (start.month - 1)
        after = index - (start.month - 1) % months + months
        end = date(after // 12, after % 12 + 1, 1) - ONE_DAY
        if end >= today:
            return
        yield start, end
        start, found = end + ONE_DAY, found + 1


def match_reports(models: QuerySet[TrainedModel] | None = None) -> int:
    """Note which duties are met: every day of the period is in a report that stands; returns how many changed."""
    with connection.cursor() as cursor:
        cursor.execute(
            _MATCH_REPORTS,
            {
                "models": None if models is None else list(models.values_list("pk", flat=True)),
                "refunded": RoyaltyInvoice.Status.REFUNDED,
                "today": clock.today(),
            },
        )
        return int(cursor.rowcount)


# A duty that is not met may be met now; one that is met stays so unless a report of its model no longer stands (it was replaced, or
# its invoice refunded: `standing_reports`). The days of several reports together cover it, so they are added up first.
_MATCH_REPORTS = """
WITH open AS (
    SELECT d.* FROM payouts_reportduty d
    WHERE (%(models)s::bigint[] IS NULL OR d.model_id = ANY (%(models)s)) AND (d.met_on IS NULL OR d.model_id IN (
        SELECT r.model_id FROM payouts_royaltyreport r JOIN payouts_royaltyreport later ON later.replaces_id = r.id
        UNION SELECT r.model_id FROM payouts_royaltyreport r
        JOIN payouts_royaltyinvoice i ON i.report_id = r.id AND i.status = %(refunded)s
    ))
), reported AS (
    SELECT r.model_id, range_agg(daterange(r.period_start, r.period_end, '[]')) AS days
    FROM payouts_royaltyreport r LEFT JOIN payouts_royaltyinvoice i ON i.report_id = r.id
    WHERE r.model_id IN (SELECT model_id FROM open) AND i.status IS DISTINCT FROM %(refunded)s
        AND NOT EXISTS (SELECT FROM payouts_royaltyreport later WHERE later.replaces_id = r.id)
    GROUP BY r.model_id
), matched AS (
    SELECT open.id, open.met_on IS NOT NULL AS was_met,
        coalesce(reported.days @> daterange(open.period_start, open.period_end, '[]'), false) AS is_met
    FROM open LEFT JOIN reported USING (model_id)
)
UPDATE payouts_reportduty d SET met_on = CASE WHEN matched.is_met THEN %(today)s::date END
FROM matched WHERE d.id = matched.id AND matched.was_met <> matched.is_met
"""


def remind() -> int:
    """Queue the mails whose day has come, each once; returns how many are new."""
    today = clock.today()
    n_new = 0
    open_things: list[tuple[str, QuerySet[ReportDuty] | QuerySet[RoyaltyInvoice]]] = [
        ("duty", ReportDuty.objects.filter(met_on=None)),
        ("invoice", RoyaltyInvoice.objects.filter(status=RoyaltyInvoice.Status.OPEN, due_on__isnull=False)),
    ]
    days = {
        Moment.BEFORE: -settings.ROYALTY_REMIND_DAYS_BEFORE,
        Moment.ON: 0,
        Moment.AFTER: settings.ROYALTY_REMIND_DAYS_AFTER,
    }
    for name, things in open_things:
        for moment, offset in days.items():
            # Who missed the day of one mail gets the next one, not both.
            later = [other for other in days.values() if other > offset]
            due = Q(due_on__lte=today - timedelta(days=offset))
            if later:
                due &= Q(due_on__gt=today - timedelta(days=min(later)))
            known = Reminder.objects.filter(moment=moment, **{f"{name}__isnull": False}).values(name)
            for thing in things.filter(due).exclude(pk__in=known).order_by("pk"):
                with transaction.atomic():
                    reminder, is_new = Reminder.objects.get_or_create(**{"moment": moment, name: thing})  # type: ignore[arg-type]
                    if is_new:
                        jobs.wake(reminder)
                        n_new += 1
    return n_new


def send_reminder(reminder: Reminder) -> None:
    """Mail it, unless what it is about was settled meanwhile."""
    if reminder.duty is not None:
        duty = reminder.duty
        is_open, licensee, due_on = duty.met_on is None, duty.license.licensee, duty.due_on
        what = f"revenue report of {duty.model.name} for {duty.period_start} to {duty.period_end}"
    else:
        assert reminder.invoice is not None  # a database check
        invoice = reminder.invoice
        assert invoice.due_on is not None
        is_open, licensee, due_on = (
            invoice.status == RoyaltyInvoice.Status.OPEN,
            invoice.report.licensee,
            invoice.due_on,
        )
        what = f"royalty invoice of {invoice.demand} for {invoice.report.model.name}"
    if not is_open:
        return
    for email in owners_emails(licensee):
        context = {
            "what": what,
            "due_on": due_on,
            "moment": reminder.moment,
            "licensee": licensee,
            "suspended_on": due_on + timedelta(days=settings.ROYALTY_SUSPEND_DAYS),
            "is_report": reminder.duty_id is not None,
        }
        words = {Moment.BEFORE: "Due soon", Moment.ON: "Due today", Moment.AFTER: "Overdue"}
        send_mail("royalty_reminder", to=email, subject=f"{words[Moment(reminder.moment)]}: {what}", context=context)
    reminder.write(mailed_at=clock.now())


def overdue_of(model: TrainedModel) -> list[Overdue]:
    """What is overdue of a model now, the oldest first; anyone may know it."""
    today = clock.today()
    duties = ReportDuty.objects.filter(model=model, met_on=None, due_on__lt=today, license__revoked_at=None)
    found = {
        (duty.period_start, duty.period_end): Overdue(
            f"The report of its revenue from {duty.period_start:%d %B %Y} to {duty.period_end:%d %B %Y}",
            duty.due_on + ONE_DAY,
        )
        for duty in duties.order_by("-due_on")
    }
    invoices = RoyaltyInvoice.objects.filter(
        report__model=model, status=RoyaltyInvoice.Status.OPEN, due_on__lt=today
    ).select_related("report")
    late = [
        Overdue(
            f"Royalties on its revenue from {invoice.report.period_start:%d %B %Y} to {invoice.report.period_end:%d %B %Y}",
            invoice.due_on + ONE_DAY,
        )
        for invoice in invoices
        if invoice.due_on is not None
    ]
    return sorted([*found.values(), *late], key=lambda one: (one.since, one.what))


def enforce() -> int:
    """Suspend what has been overdue for too long, and lift what was settled; returns for how many licensees that changed."""
    late = _in_arrears()
    marked: dict[int, set[int]] = {}
    for license, licensee in License.objects.exclude(in_arrears_at=None).values_list("pk", "licensee"):
        marked.setdefault(licensee, set()).add(license)
    differing = [pk for pk in late.keys() | marked.keys() if late.get(pk) != marked.get(pk)]
    return sum(
        match_arrears(licensee=party, overdue=late.get(party.pk, set()), at=clock.now())
        for party in Party.objects.filter(pk__in=differing).order_by("pk")
    )


def settle(licensee: Party) -> bool:
    """After a report or payment of theirs: what is settled is lifted at once; whether anything changed."""
    match_reports(TrainedModel.objects.filter(owner=licensee))
    return match_arrears(licensee=licensee, overdue=_in_arrears(licensee).get(licensee.pk, set()), at=clock.now())


def _in_arrears(licensee: Party | None = None) -> dict[int, set[int]]:
    """Licensee → the licenses whose report or invoice has been overdue for so long that they are suspended; of all, or of one."""
    since = clock.today() - timedelta(days=settings.ROYALTY_SUSPEND_DAYS)
    found: dict[int, set[int]] = {}
    duties = ReportDuty.objects.filter(met_on=None, due_on__lt=since, license__revoked_at=None)
    open_late = Q(invoice__status=RoyaltyInvoice.Status.OPEN, invoice__due_on__lt=since)
    open_late |= Q(invoice__carried_into__status=RoyaltyInvoice.Status.OPEN, invoice__carried_into__due_on__lt=since)
    lines = RoyaltyInvoiceLine.objects.filter(open_late, amount_micros__gt=0)
    whose = {} if licensee is None else {"license__licensee": licensee}
    for rows in (duties.filter(**whose), lines.filter(**whose)):
        for license, owing in rows.values_list("license", "license__licensee").distinct():
            found.setdefault(owing, set()).add(license)
    return found
