"""What is watched over: reconciliation with Stripe, Stripe's events, and the log of who did what."""

import json
from typing import Any

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers

from marketplace.api.fields import SignedMoneyField
from marketplace.jobs import Job
from marketplace.models import AuditEvent
from marketplace.money import Money
from marketplace.selectors import audit_events
from payouts.api.desk.base import DeskAct, DeskDetail, DeskList, OldestFirst, PersonField
from payouts.errors import EventNotFailed
from payouts.models import ReconciliationDifference, ReconciliationRun, StripeEvent
from payouts.services import reconciliation, settlements


# --- reconciliation ---------------------------------------------------------------------------------------------------
class ReconciliationOutput(serializers.ModelSerializer):
    """One look at Stripe's books beside ours. `n_differences` is null until it has ended."""

    requested_by = PersonField("requested_by", help_text="null: the schedule.")

    class Meta:
        model = ReconciliationRun
        fields = [
            "id",
            "key",
            "status",
            "agrees",
            "n_differences",
            "n_transactions",
            "n_on_their_way",
            "compared_until",
            "requested_by",
            "requested_at",
            "finished_at",
            "error_message",
        ]


class ComparedCashOutput(serializers.Serializer):
    """ledger + coming = stripe, where they agree."""

    currency = serializers.CharField()
    side = serializers.ChoiceField(choices=["pending", "available"])
    ledger = SignedMoneyField()
    coming = SignedMoneyField(help_text="At Stripe, and being booked.")
    stripe = SignedMoneyField()


class ReconciliationDetailOutput(ReconciliationOutput):
    cash = serializers.SerializerMethodField()

    class Meta(ReconciliationOutput.Meta):
        fields = [*ReconciliationOutput.Meta.fields, "cash"]

    @extend_schema_field(ComparedCashOutput(many=True))
    def get_cash(self, run: ReconciliationRun) -> Any:
        told = [
            {"currency": held["currency"], "side": side}
            | {name: Money(held[name][index], held["currency"]) for name in ("ledger", "coming", "stripe")}
            for held in run.cash
            for index, side in enumerate(("pending", "available"))
        ]
        return ComparedCashOutput(told, many=True).data


class DifferenceOutput(serializers.ModelSerializer):
    """One thing on which we and Stripe disagree; null where it has no amount."""

    amount = SignedMoneyField(allow_null=True)

    class Meta:
        model = ReconciliationDifference
        fields = ["id", "code", "subject", "detail", "cause", "amount", "happened_at", "first_seen_at"]


class ReconciliationFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=Job.Status.choices, required=False)


@extend_schema_view(
    get=extend_schema(summary="Looks at Stripe's books, newest first", operation_id="desk_reconciliations_list"),
    post=extend_schema(
        summary="Ask for a look at Stripe's books",
        description="A worker does it, in seconds to minutes. Needs no one-time code.",
        operation_id="desk_reconciliations_request",
        request=None,
        responses={201: ReconciliationDetailOutput},
    ),
)
class ReconciliationList(DeskList, DeskAct):
    needs_code = False
    serializer_class = ReconciliationOutput
    filter_class = ReconciliationFilter
    answers = 201

    def get_queryset(self) -> QuerySet[ReconciliationRun]:
        return ReconciliationRun.objects.select_related("requested_by").filter(**self.asked())

    def act(self, **given: Any) -> Any:
        run = reconciliation.request_reconciliation(key=self.once(), user=self.person)
        return ReconciliationDetailOutput(run).data


@extend_schema_view(
    get=extend_schema(summary="One look, and the cash that it compared", operation_id="desk_reconciliations_retrieve")
)
class ReconciliationDetail(DeskDetail):
    serializer_class = ReconciliationDetailOutput
    queryset = ReconciliationRun.objects.select_related("requested_by")


@extend_schema_view(
    get=extend_schema(
        summary="What a look found to differ",
        operation_id="desk_reconciliations_differences",
        responses=DifferenceOutput(many=True),
    )
)
class ReconciliationDifferences(DeskList):
    serializer_class = DifferenceOutput
    pagination_class = OldestFirst

    def get_queryset(self) -> QuerySet[ReconciliationDifference]:
        run = get_object_or_404(ReconciliationRun, pk=self.kwargs["id"])
        return run.differences.all()


# --- Stripe's events --------------------------------------------------------------------------------------------------
class StripeEventOutput(serializers.ModelSerializer):
    """One thing that Stripe told. failed: `error_message` says why."""

    class Meta:
        model = StripeEvent
        fields = [
            "id",
            "event_id",
            "endpoint",
            "type",
            "account",
            "status",
            "n_failures",
            "error_code",
            "error_message",
            "received_at",
            "finished_at",
        ]


class StripeEventDetailOutput(StripeEventOutput):
    payload = serializers.SerializerMethodField(help_text="As it came; nothing in it is believed.")

    class Meta(StripeEventOutput.Meta):
        fields = [*StripeEventOutput.Meta.fields, "payload"]

    @extend_schema_field({"type": "object", "additionalProperties": True})
    def get_payload(self, event: StripeEvent) -> Any:
        return json.loads(event.payload)


class StripeEventFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=Job.Status.choices, required=False)
    type = serializers.CharField(required=False, max_length=100, help_text="charge.updated")
    account = serializers.CharField(required=False, max_length=64, help_text="Of one connected account.")


@extend_schema_view(get=extend_schema(summary="Stripe's events, newest first", operation_id="desk_stripe_events_list"))
class StripeEventList(DeskList):
    serializer_class = StripeEventOutput
    filter_class = StripeEventFilter

    def get_queryset(self) -> QuerySet[StripeEvent]:
        return StripeEvent.objects.defer("payload").filter(**self.asked())


@extend_schema_view(get=extend_schema(summary="One event, as it came", operation_id="desk_stripe_events_retrieve"))
class StripeEventDetail(DeskDetail):
    serializer_class = StripeEventDetailOutput
    queryset = StripeEvent.objects.all()


@extend_schema_view(
    post=extend_schema(
        summary="Apply a failed event once more",
        description="Stripe itself is asked how things stand, so it is harmless. Needs no one-time code.",
        operation_id="desk_stripe_events_retry",
        request=None,
        responses=StripeEventOutput,
    )
)
class StripeEventRetry(DeskAct):
    needs_code = False
    serializer_class = StripeEventOutput
    queryset = StripeEvent.objects.all()

    def act(self, **given: Any) -> Any:
        event = self.get_object()
        if not settlements.retry(event=event, user=self.person):
            raise EventNotFailed(f"Event {event.event_id} is {event.status}; only what failed is tried again.")
        event.refresh_from_db()
        return StripeEventOutput(event).data


# --- audit log --------------------------------------------------------------------------------------------------------
class AuditEventOutput(serializers.ModelSerializer):
    actor = PersonField("actor", help_text="null: nobody signed in; a key of the party's, or the system itself.")
    party = serializers.CharField(source="party.name", default=None, allow_null=True)

    class Meta:
        model = AuditEvent
        fields = ["id", "happened_at", "actor", "party", "action", "target", "detail"]


class AuditFilter(serializers.Serializer):
    who = serializers.CharField(
        required=False, max_length=100, help_text="Part of an e-mail address or a party's name."
    )
    action = serializers.CharField(required=False, max_length=60, help_text="How it begins: payout_run.")
    target = serializers.CharField(required=False, max_length=120, help_text="period:2026-03")
    since = serializers.DateField(required=False)
    until = serializers.DateField(required=False, help_text="Inclusive.")
    staff = serializers.BooleanField(required=False, default=False, help_text="Only what staff did.")


@extend_schema_view(
    get=extend_schema(summary="Who did what to what and when, newest first", operation_id="desk_audit_list")
)
class AuditList(DeskList):
    serializer_class = AuditEventOutput
    filter_class = AuditFilter

    def get_queryset(self) -> QuerySet[AuditEvent]:
        return audit_events(**self.asked())
