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
from django.db import transaction
from django.db.models import F, Max, Min, Q, QuerySet

from attribution.selectors import published_results
from marketplace import clock, jobs
from marketplace.mail import send_mail
from marketplace.models import Citation, Membership, Party, TrainedModel
from marketplace.services.licenses import match_arrears
from payouts.models import Reminder, ReportDuty, ReportSchedule, RoyaltyInvoice, RoyaltyInvoiceLine
from payouts.services.royalties import standing_reports

logger = logging.getLogger(__name__)

Moment = Reminder.Moment
ONE_DAY = timedelta(days=1)
#: A licensee that was away for longer is asked for its latest periods only.
MAX_PERIODS = 40


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
    n_new = 0
    cited = (
        Citation.objects.filter(license__offer__royalty_bps__gt=0, license__revoked_at=None)
        .exclude(version__dataset__owner=F("disclosure__model__owner"))
        .values("disclosure__model", "license")
        .annotate(since=Min("disclosure__disclosed_at"))
        .order_by("disclosure__model", "license")
    )
    schedules = {schedule.license_id: schedule for schedule in ReportSchedule.objects.all()}
    last = _last_periods()
    models: dict[int, bool] = {}
    for row in cited.iterator():
        model, license = row["disclosure__model"], row["license"]
        if model not in models:
            models[model] = published_results(TrainedModel.objects.get(pk=model)).exists()
        if not models[model]:
            continue  # nothing says yet what it owes to whom, so it cannot report
        schedule = schedules.get(license)
        months = schedule.every_months if schedule else settings.ROYALTY_REPORT_MONTHS
        days = schedule.due_days if schedule else settings.ROYALTY_REPORT_DUE_DAYS
        start = last[model, license] + ONE_DAY if (model, license) in last else row["since"].date()
        duties = [
            ReportDuty(
                model_id=model,
                license_id=license,
                period_start=first,
                period_end=end,
                due_on=end + timedelta(days=days),
            )
            for first, end in periods(start, clock.today(), months=months)
        ]
        n_new += len(ReportDuty.objects.bulk_create(duties, ignore_conflicts=True))
    return n_new


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
    duties = ReportDuty.objects.select_related("model").order_by("model", "pk")
    if models is not None:
        duties = duties.filter(model__in=models)
    reported: dict[int, list[tuple[date, date]]] = {}
    n_changed = 0
    for duty in duties.iterator():
        if duty.model_id not in reported:
            spans = standing_reports(duty.model).values_list("period_start", "period_end")
            reported[duty.model_id] = sorted(spans)
        is_met = _covers(reported[duty.model_id], duty.period_start, duty.period_end)
        if is_met != (duty.met_on is not None):
            n_changed += ReportDuty.objects.filter(pk=duty.pk).update(met_on=clock.today() if is_met else None)
    return n_changed


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
    owners = Membership.objects.filter(party=licensee, role=Membership.Role.OWNER, user__is_active=True)
    for email in owners.order_by("pk").values_list("user__email", flat=True):
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
    licensees = set(Party.objects.filter(licenses__in=[pk for pks in late.values() for pk in pks]))
    licensees |= set(Party.objects.filter(licenses__in_arrears_at__isnull=False))
    return sum(
        match_arrears(licensee=party, overdue=late.get(party.pk, set()), at=clock.now())
        for party in sorted(licensees, key=lambda party: party.pk)
    )


def settle(licensee: Party) -> bool:
    """After a report or payment of theirs: what is settled is lifted at once; whether anything changed."""
    match_reports(TrainedModel.objects.filter(owner=licensee))
    return match_arrears(licensee=licensee, overdue=_in_arrears().get(licensee.pk, set()), at=clock.now())


def _in_arrears() -> dict[int, set[int]]:
    """Licensee → the licenses whose report or invoice has been overdue for so long that they are suspended."""
    since = clock.today() - timedelta(days=settings.ROYALTY_SUSPEND_DAYS)
    found: dict[int, set[int]] = {}
    duties = ReportDuty.objects.filter(met_on=None, due_on__lt=since, license__revoked_at=None)
    open_late = Q(invoice__status=RoyaltyInvoice.Status.OPEN, invoice__due_on__lt=since)
    open_late |= Q(invoice__carried_into__status=RoyaltyInvoice.Status.OPEN, invoice__carried_into__due_on__lt=since)
    lines = RoyaltyInvoiceLine.objects.filter(open_late, amount_micros__gt=0)
    for rows in (duties, lines):
        for license, licensee in rows.values_list("license", "license__licensee").distinct():
            found.setdefault(licensee, set()).add(license)
    return found


def _covers(spans: list[tuple[date, date]], start: date, end: date) -> bool:
    """Whether sorted spans of days, both ends included, leave no day of the period out."""
    for first, last in spans:
        if first > start:
            return False
        start = max(start, last + ONE_DAY)
        if start > end:
            return True
    return start > end


def _last_periods() -> dict[tuple[int, int], date]:
    """(model, license) → the last day that a duty asks for."""
    rows = ReportDuty.objects.values("model", "license").annotate(last=Max("period_end"))
    return {(row["model"], row["license"]): row["last"] for row in rows}
