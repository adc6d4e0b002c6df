"""What licensees must still report and pay, the nearest due day first, and the mails that reminded them."""

from datetime import datetime
from typing import Any

from django.db.models import BooleanField, ExpressionWrapper, Q, QuerySet
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers

from marketplace import clock
from marketplace.api.fields import MoneyField
from marketplace.api.pagination import CreatedCursorPagination
from payouts.api.desk.base import CurrencyField, DeskList, DeskPartyOutput
from payouts.models import ReportDuty, RoyaltyInvoice
from payouts.selectors import mailed_at, reports_open, royalties_open


class NearestFirst(CreatedCursorPagination):
    ordering = ("due_on", "pk")


# --- what is said, and what is asked ----------------------------------------------------------------------------------
class _Owed(serializers.ModelSerializer):
    is_overdue = serializers.BooleanField()
    reminded_at = serializers.SerializerMethodField(help_text="When mails about it went out, to the minute.")

    @extend_schema_field(serializers.ListField(child=serializers.DateTimeField()))
    def get_reminded_at(self, row: Any) -> list[datetime]:
        return mailed_at(row.reminders.all())


class OwedReportOutput(_Owed):
    """The report that one license asks for; one report of the model's period meets all of its licenses."""

    licensee = DeskPartyOutput(source="license.licensee")
    model = serializers.SlugField(source="model.slug")
    license = serializers.UUIDField(source="license.public_id")
    dataset = serializers.SlugField(source="license.version.dataset.slug")
    is_suspended = serializers.SerializerMethodField(
        help_text="The license is, because this or something else of its licensee's has been overdue for too long."
    )

    class Meta:
        model = ReportDuty
        fields = [
            "id",
            "licensee",
            "model",
            "license",
            "dataset",
            "period_start",
            "period_end",
            "due_on",
            "is_overdue",
            "is_suspended",
            "reminded_at",
        ]

    @extend_schema_field(serializers.BooleanField())
    def get_is_suspended(self, duty: ReportDuty) -> bool:
        return duty.license.in_arrears_at is not None


class UnpaidRoyaltyOutput(_Owed):
    """`total` is the invoice's own; what was carried into it is paid with it."""

    licensee = DeskPartyOutput(source="report.licensee")
    model = serializers.SlugField(source="report.model.slug")
    period_start = serializers.DateField(source="report.period_start")
    period_end = serializers.DateField(source="report.period_end")
    total = MoneyField()

    class Meta:
        model = RoyaltyInvoice
        fields = [
            "id",
            "licensee",
            "model",
            "period_start",
            "period_end",
            "due_on",
            "is_overdue",
            "reminded_at",
            "total",
        ]


class OwedReportFilter(serializers.Serializer):
    overdue = serializers.BooleanField(
        required=False, default=None, allow_null=True, help_text="Only what is past its day, or only what is not."
    )


class UnpaidRoyaltyFilter(OwedReportFilter):
    currency = CurrencyField(required=False)


def _told(found: QuerySet[Any], *, overdue: bool | None) -> QuerySet[Any]:
    """Each row with whether it is past its day, as it is asked for."""
    found = found.annotate(is_overdue=ExpressionWrapper(Q(due_on__lt=clock.today()), output_field=BooleanField()))
    return found if overdue is None else found.filter(is_overdue=overdue)


# --- views ------------------------------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(
        summary="Revenue reports that are still owed, the nearest due day first", operation_id="desk_owed_reports_list"
    )
)
class OwedReportList(DeskList):
    serializer_class = OwedReportOutput
    filter_class = OwedReportFilter
    pagination_class = NearestFirst

    def get_queryset(self) -> QuerySet[ReportDuty]:
        return _told(reports_open(), **self.asked())


@extend_schema_view(
    get=extend_schema(
        summary="Royalties that are not paid yet, the nearest due day first", operation_id="desk_unpaid_royalties_list"
    )
)
class UnpaidRoyaltyList(DeskList):
    serializer_class = UnpaidRoyaltyOutput
    filter_class = UnpaidRoyaltyFilter
    pagination_class = NearestFirst

    def get_queryset(self) -> QuerySet[RoyaltyInvoice]:
        asked = self.asked()
        return _told(royalties_open(), overdue=asked.pop("overdue")).filter(**asked)
