"""What a licensee must report and pay by when, and the mails that remind of it."""

from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from marketplace.jobs import Job


class ReportSchedule(models.Model):
    """How often and how soon one license's royalties are reported; without a row, as the settings say."""

    license = models.OneToOneField("marketplace.License", models.PROTECT, related_name="report_schedule")
    every_months = models.PositiveIntegerField()
    due_days = models.PositiveIntegerField()  # after the period's last day

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(every_months__in=[1, 2, 3, 4, 6, 12], due_days__gte=1, due_days__lte=365),
                name="report_schedule_in_range",
            )
        ]

    def __str__(self) -> str:
        return f"Every {self.every_months} months, within {self.due_days} days"


class ReportDuty(models.Model):
    """One license asks for the report of one model's revenue in one period; met once every day of it is reported."""

    license = models.ForeignKey("marketplace.License", models.PROTECT, related_name="report_duties")
    model = models.ForeignKey("marketplace.TrainedModel", models.PROTECT, related_name="report_duties")
    period_start = models.DateField()
    period_end = models.DateField()  # inclusive
    due_on = models.DateField()  # the last day on which the report is in time
    met_on = models.DateField(null=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["license", "model", "period_end"], name="one_duty_per_license_model_and_period"
            ),
            models.CheckConstraint(
                condition=Q(period_end__gte=F("period_start"), due_on__gt=F("period_end")), name="duty_days_in_order"
            ),
        ]
        indexes = [models.Index(fields=["due_on"], condition=Q(met_on=None), name="open_duties_by_due_day")]

    def __str__(self) -> str:
        return f"Report of {self.model}, {self.period_start} to {self.period_end}"


class Reminder(Job):
    """One mail about one duty or one open royalty invoice: before it is due, on the day, and after. As a job: its sending."""

    class Moment(models.TextChoices):
        BEFORE = "before"
        ON = "on"
        AFTER = "after"

    task_name: ClassVar[str] = "payouts.tasks.send_reminder"

    moment = models.CharField(max_length=6, choices=Moment)
    duty = models.ForeignKey(ReportDuty, models.PROTECT, null=True, related_name="reminders")
    invoice = models.ForeignKey("payouts.RoyaltyInvoice", models.PROTECT, null=True, related_name="reminders")
    mailed_at = models.DateTimeField(null=True)  # null when done: what it was about was settled before it went out

    class Meta(Job.Meta):
        constraints = [
            *Job.Meta.constraints,
            models.UniqueConstraint(fields=["duty", "moment"], name="one_reminder_per_duty_and_moment"),
            models.UniqueConstraint(fields=["invoice", "moment"], name="one_reminder_per_invoice_and_moment"),
            models.CheckConstraint(
                condition=Q(duty__isnull=False, invoice=None) | Q(duty=None, invoice__isnull=False),
                name="reminder_is_about_one_thing",
            ),
        ]

    def __str__(self) -> str:
        return f"Reminder {self.moment} {self.duty or self.invoice}"
