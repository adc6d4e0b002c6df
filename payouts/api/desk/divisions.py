"""Royalty pools, what was divided, and our errors in a division: proposed by one person, approved by another."""

from typing import Any

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import serializers

from attribution.models import AttributionResult
from marketplace.api.fields import MoneyField
from payouts.api.desk.base import (
    AmountField,
    DeskAct,
    DeskDetail,
    DeskList,
    DeskPartyOutput,
    OldestFirst,
    PersonField,
    SearchFilter,
)
from payouts.models import CorrectionLine, Division, DivisionCorrection, DivisionLine, RoyaltyPool
from payouts.selectors import corrections_found, divisions_found, pools_found
from payouts.services import corrections


# --- what is said, and what is asked ----------------------------------------------------------------------------------
class DeskPoolOutput(serializers.ModelSerializer):
    """An order line's royalty pool: waits for a measured result or its deadline, then is released, once."""

    dataset = serializers.SlugField(source="version.dataset.slug")
    version = serializers.IntegerField(source="version.number")
    order = serializers.UUIDField(source="order_line.order.public_id")
    state = serializers.SerializerMethodField(help_text="waiting or released.")
    amount = MoneyField()
    left = AmountField("left_micros", help_text="Less what refunds and disputes took.")
    account = serializers.CharField(source="code")
    division = serializers.IntegerField(source="division.pk", default=None, allow_null=True)

    class Meta:
        model = RoyaltyPool
        fields = [
            "id",
            "account",
            "dataset",
            "version",
            "order",
            "state",
            "amount",
            "left",
            "deadline",
            "released_at",
            "division",
        ]

    def get_state(self, pool: RoyaltyPool) -> str:
        return "waiting" if pool.released_at is None else "released"


class DeskDivisionOutput(serializers.ModelSerializer):
    """One amount divided among one version's payees; without a result, by count."""

    dataset = serializers.SlugField(source="version.dataset.slug")
    version = serializers.IntegerField(source="version.number")
    model = serializers.CharField(source="result.model.slug", default=None, allow_null=True)
    amount = MoneyField()

    class Meta:
        model = Division
        fields = [
            "id",
            "key",
            "source",
            "dataset",
            "version",
            "model",
            "result",
            "amount",
            "labellers_bps",
            "holders_weight",
            "labellers_weight",
            "due_at",
            "divided_at",
        ]


class DeskCorrectionOutput(serializers.ModelSerializer):
    """A division anew: proposed → booked or rejected (withdrawn, where `decided_by` proposed it)."""

    amount = MoneyField(help_text="What the division still gives, and is divided anew.")
    model = serializers.CharField(source="result.model.slug", default=None, allow_null=True)
    proposed_by = PersonField("proposed_by")
    decided_by = PersonField("decided_by")

    class Meta:
        model = DivisionCorrection
        fields = [
            "id",
            "division",
            "number",
            "model",
            "result",
            "reason",
            "amount",
            "status",
            "proposed_by",
            "proposed_at",
            "decided_by",
            "decided_at",
        ]


class DeskDivisionDetail(DeskDivisionOutput):
    n_lines = serializers.SerializerMethodField()
    corrections = DeskCorrectionOutput(many=True)

    class Meta(DeskDivisionOutput.Meta):
        fields = [*DeskDivisionOutput.Meta.fields, "n_lines", "corrections"]

    def get_n_lines(self, division: Division) -> int:
        return division.lines.count()


class DeskDivisionLineOutput(serializers.ModelSerializer):
    """amount = the pot · weight / the sum of the pot's weights, to the micro."""

    party = DeskPartyOutput()
    amount = AmountField(currency="division.currency")

    class Meta:
        model = DivisionLine
        fields = ["id", "party", "role", "n_records", "weight", "amount", "due_at"]


class DeskCorrectionLineOutput(serializers.ModelSerializer):
    party = DeskPartyOutput()
    before = AmountField("before_micros", currency="correction.division.currency")
    after = AmountField("after_micros", currency="correction.division.currency")
    difference = AmountField("difference_micros", currency="correction.division.currency")

    class Meta:
        model = CorrectionLine
        fields = ["party", "role", "n_records", "weight", "before", "after", "difference"]


class CorrectionInput(serializers.Serializer):
    result = serializers.PrimaryKeyRelatedField(
        queryset=AttributionResult.objects.select_related("model"),
        required=False,
        allow_null=True,
        default=None,
        help_text="The published result by which it should have been divided; by count, without.",
    )
    reason = serializers.CharField(max_length=2_000, help_text="What went wrong; the payees read it.")


class PoolFilter(serializers.Serializer):
    state = serializers.ChoiceField(choices=["waiting", "released"], required=False)


class CorrectionFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=DivisionCorrection.Status.choices, required=False)


# --- views ------------------------------------------------------------------------------------------------------------
@extend_schema_view(get=extend_schema(summary="Royalty pools, newest first", operation_id="desk_pools_list"))
class PoolList(DeskList):
    serializer_class = DeskPoolOutput
    filter_class = PoolFilter

    def get_queryset(self) -> QuerySet[RoyaltyPool]:
        state = self.asked().get("state")
        return pools_found(is_released=None if state is None else state == "released")


@extend_schema_view(get=extend_schema(summary="One royalty pool", operation_id="desk_pools_retrieve"))
class PoolDetail(DeskDetail):
    serializer_class = DeskPoolOutput

    def get_queryset(self) -> QuerySet[RoyaltyPool]:
        return pools_found()


@extend_schema_view(
    get=extend_schema(
        summary="Divisions, newest first",
        description="All, or those of a dataset, model or number.",
        operation_id="desk_divisions_list",
    )
)
class DivisionList(DeskList):
    serializer_class = DeskDivisionOutput
    filter_class = SearchFilter

    def get_queryset(self) -> QuerySet[Division]:
        return divisions_found(self.asked()["q"].strip())


@extend_schema_view(
    get=extend_schema(summary="One division, and its corrections", operation_id="desk_divisions_retrieve")
)
class DivisionDetail(DeskDetail):
    serializer_class = DeskDivisionDetail

    def get_queryset(self) -> QuerySet[Division]:
        return divisions_found("").prefetch_related(
            "corrections__division", "corrections__proposed_by", "corrections__decided_by", "corrections__result__model"
        )


@extend_schema_view(
    get=extend_schema(
        summary="A division's lines",
        operation_id="desk_divisions_lines",
        responses=DeskDivisionLineOutput(many=True),
    )
)
class DivisionLines(DeskList):
    serializer_class = DeskDivisionLineOutput
    pagination_class = OldestFirst

    def get_queryset(self) -> QuerySet[DivisionLine]:
        division = get_object_or_404(Division, pk=self.kwargs["id"])
        return division.lines.select_related("party", "division")


@extend_schema_view(
    post=extend_schema(
        summary="Propose a correction of a division",
        description="Nothing is booked until somebody else approves it. Needs no one-time code.",
        operation_id="desk_divisions_correct",
        request=CorrectionInput,
        responses={201: DeskCorrectionOutput},
    )
)
class DivisionCorrections(DeskAct):
    needs_code = False
    input_class = CorrectionInput
    serializer_class = DeskCorrectionOutput
    answers = 201

    def get_queryset(self) -> QuerySet[Division]:
        return divisions_found("")

    def act(self, **given: Any) -> Any:
        proposed = corrections.propose_correction(division=self.get_object(), by=self.person, **given)
        return DeskCorrectionOutput(proposed).data


@extend_schema_view(
    get=extend_schema(summary="Corrections of divisions, newest first", operation_id="desk_corrections_list")
)
class CorrectionList(DeskList):
    serializer_class = DeskCorrectionOutput
    filter_class = CorrectionFilter

    def get_queryset(self) -> QuerySet[DivisionCorrection]:
        return corrections_found().filter(**self.asked())


@extend_schema_view(get=extend_schema(summary="One correction", operation_id="desk_corrections_retrieve"))
class CorrectionDetail(DeskDetail):
    serializer_class = DeskCorrectionOutput

    def get_queryset(self) -> QuerySet[DivisionCorrection]:
        return corrections_found()


@extend_schema_view(
    get=extend_schema(
        summary="What each payee has before and after a correction",
        operation_id="desk_corrections_lines",
        responses=DeskCorrectionLineOutput(many=True),
    )
)
class CorrectionLines(DeskList):
    serializer_class = DeskCorrectionLineOutput
    pagination_class = OldestFirst

    def get_queryset(self) -> QuerySet[CorrectionLine]:
        correction = get_object_or_404(DivisionCorrection, pk=self.kwargs["id"])
        return correction.lines.select_related("party", "correction__division")


class _Decide(DeskAct):
    serializer_class = DeskCorrectionOutput
    approved: bool

    def get_queryset(self) -> QuerySet[DivisionCorrection]:
        return corrections_found()

    def act(self, **given: Any) -> Any:
        decided = corrections.decide_correction(correction=self.get_object(), approved=self.approved, by=self.person)
        return self.told(decided.pk)


@extend_schema_view(
    post=extend_schema(
        summary="Approve and book a correction",
        description="Another person than the one who proposed it.",
        operation_id="desk_corrections_approve",
        request=None,
        responses=DeskCorrectionOutput,
    )
)
class CorrectionApprove(_Decide):
    approved = True


@extend_schema_view(
    post=extend_schema(
        summary="Reject a correction, or withdraw one's own",
        description="Nothing is booked. Needs no one-time code.",
        operation_id="desk_corrections_reject",
        request=None,
        responses=DeskCorrectionOutput,
    )
)
class CorrectionReject(_Decide):
    needs_code = False
    approved = False
