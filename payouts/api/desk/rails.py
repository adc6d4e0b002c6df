"""Payees whom Stripe does not reach: exports over another rail, and what the bank did with each payout; both take two people."""

from typing import Any

from django.db.models import QuerySet
from django.http import StreamingHttpResponse
from django.shortcuts import get_object_or_404
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.fields import MoneyField
from marketplace.models import Party
from payouts.api.desk.base import (
    ONE_TIME_CODE,
    CurrencyField,
    DeskAct,
    DeskDetail,
    DeskList,
    DeskPartyOutput,
    DeskView,
    OffsetPages,
    OldestFirst,
    PersonField,
    ReasonInput,
)
from payouts.book_files import as_download
from payouts.models import RailConfirmation, RailExport, RailPayout
from payouts.selectors import rail_confirmations_found
from payouts.services import bank_details, other_rails

MAX_ID = 2**63 - 1


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
    account_ends_in = serializers.SerializerMethodField(
        help_text="Of the payee's account; null: one that is not kept, or was erased."
    )
    amount = MoneyField()
    confirmed_by = PersonField("confirmed_by")

    class Meta:
        model = RailPayout
        fields = [
            "id",
            "export",
            "party",
            "account_ends_in",
            "amount",
            "status",
            "reference",
            "intended_at",
            "confirmed_by",
            "confirmed_at",
        ]

    @extend_schema_field(serializers.CharField(allow_null=True))
    def get_account_ends_in(self, payout: RailPayout) -> str | None:
        return (payout.details.last_four or None) if payout.details is not None else None


class RailWaitingOutput(serializers.Serializer):
    """A payee to whom something is due over another rail and cannot be sent yet. Their account is named by its last four alone."""

    party = DeskPartyOutput()
    amount = MoneyField()
    account_ends_in = serializers.CharField(
        source="details.last_four", default=None, allow_null=True, help_text="null: they have entered none."
    )
    usable_from = serializers.DateTimeField(
        source="details.usable_from", default=None, allow_null=True, help_text="When what they entered is used."
    )
    sentence = serializers.CharField(help_text="What it waits for, in words.")


class RailWaitingFilter(serializers.Serializer):
    currency = CurrencyField(required=False)


class RailExportInput(serializers.Serializer):
    currency = CurrencyField()


class RailConfirmationOutput(serializers.ModelSerializer):
    """recorded → booked or rejected: that a payout was sent, or came back."""

    amount = MoneyField()
    recorded_by = PersonField("recorded_by")
    decided_by = PersonField("decided_by")

    class Meta:
        model = RailConfirmation
        fields = [
            "id",
            "payout",
            "outcome",
            "amount",
            "reference",
            "status",
            "recorded_by",
            "recorded_at",
            "decided_by",
            "decided_at",
        ]


class RailReferenceInput(serializers.Serializer):
    reference = serializers.CharField(max_length=120, help_text="The bank statement's own number of it.")


class RailExportFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=RailExport.Status.choices, required=False)
    currency = CurrencyField(required=False)


class RailConfirmationFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=RailConfirmation.Status.choices, required=False)
    payout = serializers.IntegerField(required=False, min_value=1, max_value=MAX_ID)


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
        return export.payouts.select_related("party", "details", "confirmed_by")


class RailWaiting(DeskView):
    serializer_class = RailWaitingOutput
    filter_class = RailWaitingFilter
    pagination_class = OffsetPages

    @extend_schema(
        summary="Payees whose money waits for bank details, or for the end of their hold",
        operation_id="desk_rail_waiting_list",
        responses=RailWaitingOutput(many=True),
    )
    def get(self, request: Request) -> Response:
        page = self.paginate_queryset(other_rails.waiting_for_details(**self.asked()))
        return self.get_paginated_response(RailWaitingOutput(page, many=True).data)


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


# --- what the bank did ------------------------------------------------------------------------------------------------
class _PayoutAct(DeskAct):
    needs_code = False
    serializer_class = RailConfirmationOutput
    input_class = RailReferenceInput
    answers = 201

    def get_queryset(self) -> QuerySet[RailPayout]:
        return RailPayout.objects.all()


@extend_schema_view(
    post=extend_schema(
        summary="Record that the bank has sent a payout",
        description="Nothing is booked until somebody else confirms it at `desk/rail-confirmations/{id}/approve/`. Needs no "
        "one-time code.",
        operation_id="desk_rail_payouts_sent",
        request=RailReferenceInput,
        responses={201: RailConfirmationOutput},
    )
)
class RailPayoutSent(_PayoutAct):
    def act(self, **given: Any) -> Any:
        made = other_rails.record_sent(payout=self.get_object(), user=self.person, **given)
        return RailConfirmationOutput(made).data


@extend_schema_view(
    post=extend_schema(
        summary="Record that a payout came back, or never left",
        description="Nothing is booked until somebody else confirms it at `desk/rail-confirmations/{id}/approve/`; then it is owed "
        "to the payee again. Needs no one-time code.",
        operation_id="desk_rail_payouts_returned",
        request=RailReferenceInput,
        responses={201: RailConfirmationOutput},
    )
)
class RailPayoutReturned(_PayoutAct):
    def act(self, **given: Any) -> Any:
        made = other_rails.record_returned(payout=self.get_object(), user=self.person, **given)
        return RailConfirmationOutput(made).data


@extend_schema_view(
    get=extend_schema(
        summary="What was recorded of payouts over other rails, newest first",
        description="It is recorded at `desk/rail-payouts/{id}/sent/` and `desk/rail-payouts/{id}/returned/`.",
        operation_id="desk_rail_confirmations_list",
    )
)
class RailConfirmationList(DeskList):
    serializer_class = RailConfirmationOutput
    filter_class = RailConfirmationFilter

    def get_queryset(self) -> QuerySet[RailConfirmation]:
        return rail_confirmations_found().filter(**self.asked())


@extend_schema_view(get=extend_schema(summary="One record", operation_id="desk_rail_confirmations_retrieve"))
class RailConfirmationDetail(DeskDetail):
    serializer_class = RailConfirmationOutput

    def get_queryset(self) -> QuerySet[RailConfirmation]:
        return rail_confirmations_found()


class _DecideConfirmation(DeskAct):
    serializer_class = RailConfirmationOutput
    approved: bool

    def get_queryset(self) -> QuerySet[RailConfirmation]:
        return rail_confirmations_found()

    def act(self, **given: Any) -> Any:
        decided = other_rails.decide_confirmation(
            confirmation=self.get_object(), approved=self.approved, user=self.person
        )
        return self.told(decided.pk)


@extend_schema_view(
    post=extend_schema(
        summary="Confirm and book what the bank did",
        description="Another person than the one who recorded it: both have seen it on the bank's statement.",
        operation_id="desk_rail_confirmations_approve",
        request=None,
        responses=RailConfirmationOutput,
    )
)
class RailConfirmationApprove(_DecideConfirmation):
    approved = True


@extend_schema_view(
    post=extend_schema(
        summary="Reject a record of what the bank did",
        description="Nothing is booked, and the payout is where it was. Needs no one-time code.",
        operation_id="desk_rail_confirmations_reject",
        request=None,
        responses=RailConfirmationOutput,
    )
)
class RailConfirmationReject(_DecideConfirmation):
    needs_code = False
    approved = False


class ErasedOutput(serializers.Serializer):
    """Of how many accounts, changes included, nothing but that they were erased is kept now; 0: there were none."""

    party = DeskPartyOutput()
    n_erased = serializers.IntegerField()


@extend_schema_view(
    post=extend_schema(
        summary="Erase a payee's bank details, because they asked for it",
        description="Every account that they entered, for good; what is due to them waits until they enter another. Refused while a "
        "transfer to one of them is under way (`bank_details_in_use`).",
        operation_id="desk_payees_erase_bank_details",
        request=ReasonInput,
        responses=ErasedOutput,
    )
)
class PayeeBankDetailsErase(DeskAct):
    serializer_class = ErasedOutput
    input_class = ReasonInput

    def get_queryset(self) -> QuerySet[Party]:
        return Party.objects.all()

    def act(self, **given: Any) -> Any:
        party = self.get_object()
        n_erased = bank_details.erase_on_request(party=party, by=self.person, reason=given["reason"])
        return ErasedOutput({"party": party, "n_erased": n_erased}).data
