"""Payout runs: what each pays, what failed and why, and a person's word on it; and one payee as they see it."""

from typing import Any

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.fields import MoneyField
from marketplace.models import Party
from payouts.api.desk.base import (
    CurrencyField,
    DeskAct,
    DeskDetail,
    DeskList,
    DeskPartyOutput,
    DeskView,
    InOrder,
    PersonField,
    ReasonInput,
)
from payouts.api.serializers import EarningsOutput
from payouts.models import Payout, PayoutRun, PlannedPayout
from payouts.selectors import (
    earnings_of,
    onboarding_of,
    passed_over_in,
    payee_of,
    payout_runs,
    payouts_of,
    run_failures,
    run_figures,
    waiting_in,
)
from payouts.services import transfers
from payouts.standing import payout_problem

State = PayoutRun.State


# --- what is said, and what is asked ----------------------------------------------------------------------------------
class DeskPayoutRunOutput(serializers.ModelSerializer):
    """`state` says what it waits for; `status` how its work stands."""

    planned = MoneyField(help_text="At most this is paid.")
    started_by = PersonField("started_by", help_text="null: the schedule.")
    approved_by = PersonField("approved_by")

    class Meta:
        model = PayoutRun
        fields = [
            "id",
            "key",
            "currency",
            "due_until",
            "state",
            "status",
            "n_planned",
            "planned",
            "started_by",
            "approved_by",
            "approved_at",
            "paused_at",
            "note",
            "planned_at",
            "finished_at",
        ]


class RunFiguresOutput(serializers.Serializer):
    """Payees by what became of them, and the money that is gone."""

    waiting = serializers.IntegerField()
    intended = serializers.IntegerField(help_text="Stripe has not answered.")
    sent = serializers.IntegerField()
    paid = serializers.IntegerField()
    refused = serializers.IntegerField()
    bank_refused = serializers.IntegerField(help_text="Sent, and the payee's bank sent it back.")
    passed_over = serializers.IntegerField(help_text="Planned, and not to be paid after all.")
    sent_amount = MoneyField()


class SkippedOutput(serializers.Serializer):
    """Payees who were not planned, and why: below_minimum or not_ready."""

    why = serializers.CharField()
    n = serializers.IntegerField()
    micros = serializers.IntegerField()


class DeskPayoutRunDetail(DeskPayoutRunOutput):
    figures = serializers.SerializerMethodField()
    skipped = serializers.SerializerMethodField()

    class Meta(DeskPayoutRunOutput.Meta):
        fields = [*DeskPayoutRunOutput.Meta.fields, "figures", "skipped"]

    @extend_schema_field(RunFiguresOutput)
    def get_figures(self, run: PayoutRun) -> Any:
        return RunFiguresOutput(run_figures(run)).data

    @extend_schema_field(SkippedOutput(many=True))
    def get_skipped(self, run: PayoutRun) -> Any:
        return SkippedOutput([{"why": why, **told} for why, told in run.skipped.items()], many=True).data


class DeskPayoutOutput(serializers.ModelSerializer):
    """One payee's money in one run; `problem` says in words what is wrong with it, if something is."""

    party = DeskPartyOutput()
    amount = MoneyField()
    problem = serializers.SerializerMethodField()

    class Meta:
        model = Payout
        fields = [
            "id",
            "run",
            "party",
            "amount",
            "status",
            "attempt",
            "destination",
            "transfer_id",
            "refusal_code",
            "bank_failure_code",
            "problem",
            "intended_at",
            "sent_at",
            "paid_at",
        ]

    def get_problem(self, payout: Payout) -> str:
        return payout_problem(payout)


class DeskPlannedPayoutOutput(serializers.ModelSerializer):
    party = DeskPartyOutput()
    amount = MoneyField(help_text="At most this is paid.")

    class Meta:
        model = PlannedPayout
        fields = ["position", "party", "amount", "oldest_due_at", "outcome"]


class DeskPayeeOutput(serializers.Serializer):
    """One payee as they see it: how far they are at Stripe, and what their money waits for."""

    party = DeskPartyOutput()
    stripe_account = serializers.CharField(allow_null=True)
    onboarding = serializers.CharField(help_text="not_started, unfinished, checking, paused or ready.")
    onboarding_needs = serializers.ListField(child=serializers.CharField())
    earnings = EarningsOutput(many=True)


class PayoutRunFilter(serializers.Serializer):
    state = serializers.ChoiceField(choices=State.choices, required=False)
    currency = CurrencyField(required=False)


class PayoutRunInput(serializers.Serializer):
    currency = CurrencyField()


# --- views ------------------------------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(summary="Payout runs", operation_id="desk_payout_runs_list"),
    post=extend_schema(
        summary="Start a payout run",
        description="Everything due by now in one currency. Above the limit it waits for a colleague; otherwise it sends.",
        operation_id="desk_payout_runs_request",
        request=PayoutRunInput,
        responses={201: DeskPayoutRunDetail},
    ),
)
class PayoutRunList(DeskList, DeskAct):
    serializer_class = DeskPayoutRunOutput
    filter_class = PayoutRunFilter
    input_class = PayoutRunInput
    answers = 201

    def get_queryset(self) -> QuerySet[PayoutRun]:
        return payout_runs().filter(**self.asked())

    def act(self, **given: Any) -> Any:
        currency = given["currency"]
        run = transfers.request_payout_run(currency=currency, key=self.once(), user=self.person)
        return DeskPayoutRunDetail(run).data


@extend_schema_view(get=extend_schema(summary="One payout run", operation_id="desk_payout_runs_retrieve"))
class PayoutRunDetail(DeskDetail):
    serializer_class = DeskPayoutRunDetail

    def get_queryset(self) -> QuerySet[PayoutRun]:
        return payout_runs()


class _OfRun(DeskList):
    def run(self) -> PayoutRun:
        return get_object_or_404(payout_runs(), pk=self.kwargs["id"])


@extend_schema_view(
    get=extend_schema(
        summary="What failed in a payout run",
        description="Refused by Stripe, sent back by a bank, or without a clear answer for long; newest first.",
        operation_id="desk_payout_runs_failures",
        responses=DeskPayoutOutput(many=True),
    )
)
class PayoutRunFailures(_OfRun):
    serializer_class = DeskPayoutOutput

    def get_queryset(self) -> QuerySet[Payout]:
        return run_failures(self.run())


@extend_schema_view(
    get=extend_schema(
        summary="Every payout of a run, newest first",
        operation_id="desk_payout_runs_payouts",
        responses=DeskPayoutOutput(many=True),
    )
)
class PayoutRunPayouts(_OfRun):
    serializer_class = DeskPayoutOutput

    def get_queryset(self) -> QuerySet[Payout]:
        return self.run().payouts.select_related("party")


@extend_schema_view(
    get=extend_schema(
        summary="Who comes next in a payout run",
        operation_id="desk_payout_runs_waiting",
        responses=DeskPlannedPayoutOutput(many=True),
    )
)
class PayoutRunWaiting(_OfRun):
    serializer_class = DeskPlannedPayoutOutput
    pagination_class = InOrder

    def get_queryset(self) -> QuerySet[PlannedPayout]:
        return waiting_in(self.run())


@extend_schema_view(
    get=extend_schema(
        summary="Who was planned and passed over, and why",
        operation_id="desk_payout_runs_passed_over",
        responses=DeskPlannedPayoutOutput(many=True),
    )
)
class PayoutRunPassedOver(_OfRun):
    serializer_class = DeskPlannedPayoutOutput
    pagination_class = InOrder

    def get_queryset(self) -> QuerySet[PlannedPayout]:
        return passed_over_in(self.run())


class _RunAct(DeskAct):
    serializer_class = DeskPayoutRunDetail

    def get_queryset(self) -> QuerySet[PayoutRun]:
        return payout_runs()

    def word(self, run: PayoutRun, **given: Any) -> PayoutRun:
        raise NotImplementedError

    def act(self, **given: Any) -> Any:
        return DeskPayoutRunDetail(self.word(self.get_object(), **given)).data


@extend_schema_view(
    post=extend_schema(
        summary="Pause a payout run",
        description="What is on its way to Stripe is brought to its end, and nothing more is sent. Needs no one-time code.",
        operation_id="desk_payout_runs_pause",
        request=ReasonInput,
        responses=DeskPayoutRunDetail,
    )
)
class PayoutRunPause(_RunAct):
    needs_code = False
    input_class = ReasonInput

    def word(self, run: PayoutRun, **given: Any) -> PayoutRun:
        return transfers.pause_payout_run(run=run, by=self.person, **given)


@extend_schema_view(
    post=extend_schema(
        summary="Let a paused payout run go on",
        operation_id="desk_payout_runs_resume",
        request=None,
        responses=DeskPayoutRunDetail,
    )
)
class PayoutRunResume(_RunAct):
    def word(self, run: PayoutRun, **given: Any) -> PayoutRun:
        return transfers.resume_payout_run(run=run, by=self.person)


@extend_schema_view(
    post=extend_schema(
        summary="Approve a payout run above the limit",
        description="Another person than the one who started it. It sends what was planned.",
        operation_id="desk_payout_runs_approve",
        request=None,
        responses=DeskPayoutRunDetail,
    )
)
class PayoutRunApprove(_RunAct):
    def word(self, run: PayoutRun, **given: Any) -> PayoutRun:
        return transfers.approve_payout_run(run=run, by=self.person)


@extend_schema_view(
    post=extend_schema(
        summary="Reject a payout run above the limit",
        description="What is due stays due. Needs no one-time code: nothing is sent.",
        operation_id="desk_payout_runs_reject",
        request=ReasonInput,
        responses=DeskPayoutRunDetail,
    )
)
class PayoutRunReject(_RunAct):
    needs_code = False
    input_class = ReasonInput

    def word(self, run: PayoutRun, **given: Any) -> PayoutRun:
        return transfers.reject_payout_run(run=run, by=self.person, **given)


class PayeeView(DeskView):
    serializer_class = DeskPayeeOutput

    @extend_schema(summary="One payee, as they see it", operation_id="desk_payees_retrieve", responses=DeskPayeeOutput)
    def get(self, request: Request, id: int) -> Response:
        party = get_object_or_404(Party, pk=id)
        account = payee_of(party)
        onboarding = onboarding_of(account)
        told = {
            "party": party,
            "stripe_account": account and account.stripe_account_id,
            "onboarding": onboarding.state,
            "onboarding_needs": onboarding.needs,
            "earnings": earnings_of(party),
        }
        return Response(DeskPayeeOutput(told, context={"party": party}).data)


@extend_schema_view(
    get=extend_schema(
        summary="One payee's payouts, newest first",
        operation_id="desk_payees_payouts",
        responses=DeskPayoutOutput(many=True),
    )
)
class PayeePayouts(DeskList):
    serializer_class = DeskPayoutOutput

    def get_queryset(self) -> QuerySet[Payout]:
        return payouts_of(get_object_or_404(Party, pk=self.kwargs["id"])).select_related("party")
