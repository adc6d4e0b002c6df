"""What is watched over: reconciliation with Stripe, proofs of the books, Stripe's events, and the log of who did what."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db.models import QuerySet
from django.http import Http404
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.fields import MoneyField, SignedMoneyField
from marketplace.jobs import Job
from marketplace.models import AuditEvent
from marketplace.money import Money
from marketplace.selectors import audit_events
from payouts import gateway
from payouts.api.desk.base import DeskAct, DeskDetail, DeskList, DeskView, OldestFirst, PersonField
from payouts.errors import EventNotFailed, StripeUnavailable
from payouts.models import (
    BooksProof,
    EventSettlement,
    ProofFinding,
    ReconciliationDifference,
    ReconciliationRun,
    StripeEvent,
    SurplusCharge,
)
from payouts.selectors import EVENT_STATES, stripe_events
from payouts.services import proving, reconciliation, refunds, settlements
from payouts.services.refusals import declined


# --- reconciliation ---------------------------------------------------------------------------------------------------
class ReconciliationOutput(serializers.ModelSerializer):
    """One look at Stripe's books beside ours. `n_differences` is null until it has ended.

    A full one compares everything; the others what Stripe made since `since`, which earlier looks have not proved.
    """

    requested_by = PersonField("requested_by", help_text="null: the schedule.")
    is_full = serializers.BooleanField(
        help_text="As asked for; one of what is new ends as a full one where much was booked late."
    )

    class Meta:
        model = ReconciliationRun
        fields = [
            "id",
            "key",
            "status",
            "is_full",
            "since",
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


class ReconciliationInput(serializers.Serializer):
    is_full = serializers.BooleanField(
        required=False, default=False, help_text="Compare everything; without, what is new since the last clean look."
    )


class ReconciliationFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=Job.Status.choices, required=False)
    is_full = serializers.BooleanField(
        required=False, default=None, allow_null=True, help_text="Only full looks, or only those of what is new."
    )


@extend_schema_view(
    get=extend_schema(summary="Looks at Stripe's books, newest first", operation_id="desk_reconciliations_list"),
    post=extend_schema(
        summary="Ask for a look at Stripe's books",
        description="A worker does it, in seconds to minutes. Needs no one-time code.",
        operation_id="desk_reconciliations_request",
        request=ReconciliationInput,
        responses={201: ReconciliationDetailOutput},
    ),
)
class ReconciliationList(DeskList, DeskAct):
    needs_code = False
    serializer_class = ReconciliationOutput
    filter_class = ReconciliationFilter
    input_class = ReconciliationInput
    answers = 201

    def get_queryset(self) -> QuerySet[ReconciliationRun]:
        asked = {name: value for name, value in self.asked().items() if value is not None}
        return ReconciliationRun.objects.select_related("requested_by").filter(**asked)

    def act(self, **given: Any) -> Any:
        run = reconciliation.request_reconciliation(key=self.once(), user=self.person, **given)
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


# --- proofs of the books ----------------------------------------------------------------------------------------------
class ProofOutput(serializers.ModelSerializer):
    """Every invariant of the books, derived once more from the rows. `n_findings` is null until it has ended."""

    requested_by = PersonField("requested_by", help_text="null: the schedule.")
    checked = serializers.DictField(child=serializers.IntegerField(), help_text="How many rows of what were read.")

    class Meta:
        model = BooksProof
        fields = [
            "id",
            "key",
            "status",
            "n_findings",
            "checked",
            "covers_until",
            "requested_by",
            "requested_at",
            "finished_at",
            "error_message",
        ]


class ProofFindingOutput(serializers.ModelSerializer):
    """One thing in the books that is not as it must be."""

    class Meta:
        model = ProofFinding
        fields = ["id", "code", "detail"]


class ProofFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=Job.Status.choices, required=False)


@extend_schema_view(
    get=extend_schema(summary="Proofs of the books, newest first", operation_id="desk_proofs_list"),
    post=extend_schema(
        summary="Ask for a proof of the books",
        description="A worker reads every row, which takes minutes where there are many. Needs no one-time code.",
        operation_id="desk_proofs_request",
        request=None,
        responses={201: ProofOutput},
    ),
)
class ProofList(DeskList, DeskAct):
    needs_code = False
    serializer_class = ProofOutput
    filter_class = ProofFilter
    answers = 201

    def get_queryset(self) -> QuerySet[BooksProof]:
        return BooksProof.objects.select_related("requested_by").filter(**self.asked())

    def act(self, **given: Any) -> Any:
        return ProofOutput(proving.request_proof(key=self.once(), user=self.person)).data


class LatestProof(DeskView):
    serializer_class = ProofOutput

    @extend_schema(
        summary="The latest proof that came to an end",
        description="What a month is closed on. 404 before the first.",
        operation_id="desk_proofs_latest",
        responses=ProofOutput,
    )
    def get(self, request: Request) -> Response:
        found = proving.latest_proof()
        if found is None:
            raise Http404("Nothing was proved yet")
        return Response(ProofOutput(found).data)


@extend_schema_view(get=extend_schema(summary="One proof", operation_id="desk_proofs_retrieve"))
class ProofDetail(DeskDetail):
    serializer_class = ProofOutput
    queryset = BooksProof.objects.select_related("requested_by")


@extend_schema_view(
    get=extend_schema(
        summary="What a proof found",
        description="The first thousand; `n_findings` counts all of them.",
        operation_id="desk_proofs_findings",
        responses=ProofFindingOutput(many=True),
    )
)
class ProofFindings(DeskList):
    serializer_class = ProofFindingOutput
    pagination_class = OldestFirst

    def get_queryset(self) -> QuerySet[ProofFinding]:
        return get_object_or_404(BooksProof, pk=self.kwargs["id"]).findings.all()


# --- Stripe's events --------------------------------------------------------------------------------------------------
class StripeEventOutput(serializers.ModelSerializer):
    """One thing that Stripe told. failed: `error_message` says why. It is then applied once more, or settled by two people."""

    is_settled = serializers.BooleanField(help_text="Otherwise than by applying it, for the reason that was confirmed.")
    is_proposed = serializers.BooleanField(help_text="Somebody has said how to settle it, and a second person decides.")

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
            "is_settled",
            "is_proposed",
            "received_at",
            "finished_at",
        ]


class SettlementOutput(serializers.ModelSerializer):
    """proposed → confirmed or rejected (withdrawn, where `decided_by` proposed it). refund: the charge behind the event is for nothing that we sell, and goes back."""

    amount = MoneyField(allow_null=True, help_text="What of the charge goes back.")
    proposed_by = PersonField("proposed_by")
    decided_by = PersonField("decided_by")

    class Meta:
        model = EventSettlement
        fields = [
            "id",
            "event",
            "act",
            "reason",
            "charge_id",
            "amount",
            "status",
            "proposed_by",
            "proposed_at",
            "decided_by",
            "decided_at",
            "note",
        ]


class SurplusChargeOutput(serializers.ModelSerializer):
    """A charge that is for nothing that we sell, as it was booked; `left`: what of it is on no way back."""

    amount = MoneyField()
    left = serializers.SerializerMethodField()
    refunds = serializers.SerializerMethodField()

    class Meta:
        model = SurplusCharge
        fields = ["charge_id", "payment", "amount", "left", "refunds", "booked_at"]

    @extend_schema_field(MoneyField)
    def get_left(self, charge: SurplusCharge) -> Any:
        return MoneyField().to_representation(refunds.left_of(charge))

    def get_refunds(self, charge: SurplusCharge) -> list[int]:
        return list(charge.refunds.order_by("pk").values_list("pk", flat=True))


class StripeEventDetailOutput(StripeEventOutput):
    settlements = serializers.SerializerMethodField(help_text="Newest first.")
    surplus_charges = SurplusChargeOutput(many=True)
    payload = serializers.SerializerMethodField(help_text="As it came; nothing in it is believed.")

    class Meta(StripeEventOutput.Meta):
        fields = [*StripeEventOutput.Meta.fields, "settlements", "surplus_charges", "payload"]

    @extend_schema_field(SettlementOutput(many=True))
    def get_settlements(self, event: StripeEvent) -> Any:
        return SettlementOutput(event.settlements.select_related("proposed_by", "decided_by"), many=True).data

    @extend_schema_field({"type": "object", "additionalProperties": True})
    def get_payload(self, event: StripeEvent) -> Any:
        return json.loads(event.payload)


class SettlementInput(serializers.Serializer):
    act = serializers.ChoiceField(
        choices=EventSettlement.Act.choices,
        help_text="explained: it was settled otherwise. refund: its charge is for nothing that we sell; Stripe is asked.",
    )
    reason = serializers.CharField(max_length=settlements.MAX_REASON, help_text="Why, in words, for the auditor.")


class SettlementNoteInput(serializers.Serializer):
    note = serializers.CharField(required=False, allow_blank=True, default="", max_length=settlements.MAX_REASON)


class SettlementRejectInput(serializers.Serializer):
    note = serializers.CharField(max_length=settlements.MAX_REASON, help_text="Why it is rejected.")


class StripeEventFilter(serializers.Serializer):
    state = serializers.ChoiceField(
        choices=list(EVENT_STATES),
        required=False,
        default="",
        help_text="As staff look for it; failed: to be settled, proposed: a second person decides.",
    )
    status = serializers.ChoiceField(choices=Job.Status.choices, required=False)
    type = serializers.CharField(required=False, max_length=100, help_text="charge.updated")
    account = serializers.CharField(required=False, max_length=64, help_text="Of one connected account.")


@extend_schema_view(get=extend_schema(summary="Stripe's events, newest first", operation_id="desk_stripe_events_list"))
class StripeEventList(DeskList):
    serializer_class = StripeEventOutput
    filter_class = StripeEventFilter

    def get_queryset(self) -> QuerySet[StripeEvent]:
        asked = self.asked()
        return stripe_events(state=asked.pop("state")).filter(**asked)


@extend_schema_view(
    get=extend_schema(
        summary="One event, as it came, and how it was settled", operation_id="desk_stripe_events_retrieve"
    )
)
class StripeEventDetail(DeskDetail):
    serializer_class = StripeEventDetailOutput

    def get_queryset(self) -> QuerySet[StripeEvent]:
        return stripe_events()


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
        return StripeEventOutput(stripe_events().get(pk=event.pk)).data


@contextmanager
def _stripe_asked() -> Iterator[None]:
    """Around a service that asks Stripe what a charge is: silence and refusals become problems that say so."""
    try:
        yield
    except gateway.StripeUncertain as error:
        raise StripeUnavailable("Stripe did not answer; nothing was changed. Try again in a minute.") from error
    except gateway.StripeRefused as error:
        raise declined(error, "Stripe did not tell about the charge") from error


@extend_schema_view(
    post=extend_schema(
        summary="Propose how a failed event is settled",
        description="Nothing happens until somebody else confirms it. Needs no one-time code.",
        operation_id="desk_stripe_events_settle",
        request=SettlementInput,
        responses={201: SettlementOutput},
    )
)
class StripeEventSettlements(DeskAct):
    needs_code = False
    serializer_class = SettlementOutput
    input_class = SettlementInput
    queryset = StripeEvent.objects.all()
    answers = 201

    def act(self, **given: Any) -> Any:
        how = EventSettlement.Act(given.pop("act"))
        with _stripe_asked():
            made = settlements.propose(event=self.get_object(), act=how, user=self.person, **given)
        return SettlementOutput(made).data


class _DecideSettlement(DeskAct):
    serializer_class = SettlementOutput
    queryset = EventSettlement.objects.select_related("event", "proposed_by", "decided_by")


@extend_schema_view(
    post=extend_schema(
        summary="Confirm a settlement",
        description="Another person than the one who proposed it. Nothing names the event any more; or its charge is booked, and "
        "refunded.",
        operation_id="desk_settlements_confirm",
        request=SettlementNoteInput,
        responses=SettlementOutput,
    )
)
class SettlementConfirm(_DecideSettlement):
    input_class = SettlementNoteInput

    def act(self, **given: Any) -> Any:
        with _stripe_asked():
            confirmed = settlements.confirm(settlement=self.get_object(), user=self.person, **given)
        return SettlementOutput(confirmed).data


@extend_schema_view(
    post=extend_schema(
        summary="Reject a settlement, or withdraw one's own",
        description="Whoever proposed it may take it back. Nothing is booked. Needs no one-time code.",
        operation_id="desk_settlements_reject",
        request=SettlementRejectInput,
        responses=SettlementOutput,
    )
)
class SettlementReject(_DecideSettlement):
    needs_code = False
    input_class = SettlementRejectInput

    def act(self, **given: Any) -> Any:
        rejected = settlements.reject(settlement=self.get_object(), user=self.person, **given)
        return SettlementOutput(rejected).data


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
