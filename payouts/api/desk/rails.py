"""Payees whom Stripe does not reach: exports over another rail, proposed by one person, approved by another, then confirmed."""

from typing import Any

from django.db.models import QuerySet
from django.http import StreamingHttpResponse
from django.shortcuts import get_object_or_404
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request

from marketplace.api.fields import MoneyField
from payouts.api.desk.base import (
    ONE_TIME_CODE,
    CurrencyField,
    DeskAct,
    DeskDetail,
    DeskList,
    DeskPartyOutput,
    DeskView,
    OldestFirst,
    PersonField,
)
from payouts.book_files import as_download
from payouts.models import RailExport, RailPayout
from payouts.services import other_rails


# --- what is said, and what is asked ----------------------------------------------------------------------------------
class RailExportOutput(serializers.ModelSerializer):
    """awaiting → approved (booked as promised) or rejected."""

    proposed_by = PersonField("proposed_by")
    decided_by = PersonField("decided_by")

    class Meta:
        model = RailExport
        fields = ["id", "key", "currency", "status", "proposed_by", "proposed_at", "decided_by", "decided_at"]


class RailPayoutOutput(serializers.ModelSerializer):
    """proposed → intended → sent; or returned, or dropped where nothing was due any more."""

    party = DeskPartyOutput()
    amount = MoneyField()
    confirmed_by = PersonField("confirmed_by")

    class Meta:
        model = RailPayout
        fields = [
            "id",
            "export",
            "party",
            "amount",
            "status",
            "reference",
            "intended_at",
            "confirmed_by",
            "confirmed_at",
        ]


class RailExportInput(serializers.Serializer):
    currency = CurrencyField()


class RailReferenceInput(serializers.Serializer):
    reference = serializers.CharField(max_length=80, help_text="The bank's.")


class RailExportFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=RailExport.Status.choices, required=False)
    currency = CurrencyField(required=False)


def _exports() -> QuerySet[RailExport]:
    return RailExport.objects.select_related("proposed_by", "decided_by")


# --- views ------------------------------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(summary="Exports over other rails, newest first", operation_id="desk_rail_exports_list"),
    post=extend_schema(
        summary="Propose an export over another rail",
        description="Everything due in one currency to payees whom Stripe does not reach. Nothing is booked until somebody else "
        "approves it. Needs no one-time code.",
        operation_id="desk_rail_exports_propose",
        request=RailExportInput,
        responses={201: RailExportOutput},
    ),
)
class RailExportList(DeskList, DeskAct):
    needs_code = False
    serializer_class = RailExportOutput
    filter_class = RailExportFilter
    input_class = RailExportInput
    answers = 201

    def get_queryset(self) -> QuerySet[RailExport]:
        return _exports().filter(**self.asked())

    def act(self, **given: Any) -> Any:
        export = other_rails.propose_export(user=self.person, currency=given["currency"], key=self.once())
        return RailExportOutput(export).data


@extend_schema_view(get=extend_schema(summary="One export", operation_id="desk_rail_exports_retrieve"))
class RailExportDetail(DeskDetail):
    serializer_class = RailExportOutput

    def get_queryset(self) -> QuerySet[RailExport]:
        return _exports()


@extend_schema_view(
    get=extend_schema(
        summary="The payouts of an export",
        operation_id="desk_rail_exports_payouts",
        responses=RailPayoutOutput(many=True),
    )
)
class RailExportPayouts(DeskList):
    serializer_class = RailPayoutOutput
    pagination_class = OldestFirst

    def get_queryset(self) -> QuerySet[RailPayout]:
        export = get_object_or_404(RailExport, pk=self.kwargs["id"])
        return export.payouts.select_related("party", "confirmed_by")


class RailExportCsv(DeskView):
    def parameters(self, method: str) -> list[Any]:
        return [ONE_TIME_CODE]  # nothing is done that could be done twice

    @extend_schema(
        summary="An approved export, as CSV for the other rail",
        operation_id="desk_rail_exports_csv",
        description="It names bank accounts in full, so it is a POST, and each download is in the audit log.",
        request=None,
        responses={(200, "text/csv"): OpenApiTypes.STR},
    )
    def post(self, request: Request, id: int) -> StreamingHttpResponse:
        found = get_object_or_404(RailExport, pk=id, status=RailExport.Status.APPROVED)
        lines = other_rails.export_file(export=found, user=self.person)
        answer = as_download(lines, f"residual-export-{found.pk}.csv", "text/csv")
        answer.headers["Cache-Control"] = "no-store"
        return answer


class _ExportAct(DeskAct):
    serializer_class = RailExportOutput

    def get_queryset(self) -> QuerySet[RailExport]:
        return _exports()


@extend_schema_view(
    post=extend_schema(
        summary="Approve an export",
        description="Another person than the one who proposed it. Every payout of it that is still due is promised.",
        operation_id="desk_rail_exports_approve",
        request=None,
        responses=RailExportOutput,
    )
)
class RailExportApprove(_ExportAct):
    def act(self, **given: Any) -> Any:
        return RailExportOutput(other_rails.approve_export(export=self.get_object(), user=self.person)).data


@extend_schema_view(
    post=extend_schema(
        summary="Reject an export",
        description="Another person than the one who proposed it. Needs no one-time code: nothing is booked.",
        operation_id="desk_rail_exports_reject",
        request=None,
        responses=RailExportOutput,
    )
)
class RailExportReject(_ExportAct):
    needs_code = False

    def act(self, **given: Any) -> Any:
        return RailExportOutput(other_rails.reject_export(export=self.get_object(), user=self.person)).data


class _PayoutAct(DeskAct):
    serializer_class = RailPayoutOutput
    input_class = RailReferenceInput

    def get_queryset(self) -> QuerySet[RailPayout]:
        return RailPayout.objects.select_related("party", "confirmed_by")


@extend_schema_view(
    post=extend_schema(
        summary="Confirm that the bank has sent it",
        operation_id="desk_rail_payouts_sent",
        request=RailReferenceInput,
        responses=RailPayoutOutput,
    )
)
class RailPayoutSent(_PayoutAct):
    def act(self, **given: Any) -> Any:
        return RailPayoutOutput(other_rails.confirm_sent(payout=self.get_object(), user=self.person, **given)).data


@extend_schema_view(
    post=extend_schema(
        summary="Confirm that it came back, or never left",
        description="It is owed to the payee again.",
        operation_id="desk_rail_payouts_returned",
        request=RailReferenceInput,
        responses=RailPayoutOutput,
    )
)
class RailPayoutReturned(_PayoutAct):
    def act(self, **given: Any) -> Any:
        return RailPayoutOutput(other_rails.confirm_returned(payout=self.get_object(), user=self.person, **given)).data
