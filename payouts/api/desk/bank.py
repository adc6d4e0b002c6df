"""Our own bank account: money that fits no invoice, and transfers out of it to buyers and payers, each seen by two people.

What arrives for an invoice is in `billing`; whatever arrived is confirmed or rejected there (`receipts/`).
"""

from typing import Any

from django.db.models import QuerySet
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.fields import MoneyField
from payouts.api.desk.base import DeskAct, DeskDetail, DeskList, OffsetPages, PersonField
from payouts.api.desk.billing import ReceiptOutput, invoice_named
from payouts.api.desk.givebacks import DeskRefundOutput
from payouts.models import BankReceipt, Document, OutgoingTransfer, ReceiptApplication, ReceiptUse, Refund
from payouts.selectors import applications_found, outgoing_found, receipts_found, refunds_found
from payouts.services import outgoing, unapplied

MAX_TOGETHER = 100
MAX_ID = 2**63 - 1


# --- what is said, and what is asked ----------------------------------------------------------------------------------
class OutgoingTransferOutput(serializers.ModelSerializer):
    """recorded → booked → perhaps returned; or rejected (withdrawn, where `decided_by` recorded it). It carries a refund, or money of a receipt back to its payer."""

    amount = MoneyField()
    recorded_by = PersonField("recorded_by")
    decided_by = PersonField("decided_by")
    returned_by = PersonField("returned_by")

    class Meta:
        model = OutgoingTransfer
        fields = [
            "id",
            "refund",
            "receipt",
            "amount",
            "reference",
            "sent_on",
            "status",
            "recorded_by",
            "recorded_at",
            "decided_by",
            "decided_at",
            "return_reference",
            "return_note",
            "returned_by",
            "returned_at",
        ]


class ReceiptUseOutput(serializers.ModelSerializer):
    amount = MoneyField()

    class Meta:
        model = ReceiptUse
        fields = ["receipt", "application", "amount"]


class ApplicationOutput(serializers.ModelSerializer):
    """proposed → booked or rejected (withdrawn, where `decided_by` proposed it): money that fitted no invoice pays one, exactly. `uses`: how much of which receipt."""

    amount = MoneyField()
    uses = ReceiptUseOutput(many=True)
    proposed_by = PersonField("proposed_by")
    decided_by = PersonField("decided_by")

    class Meta:
        model = ReceiptApplication
        fields = [
            "id",
            "payment",
            "amount",
            "status",
            "uses",
            "proposed_by",
            "proposed_at",
            "decided_by",
            "decided_at",
        ]


class UnappliedOutput(serializers.Serializer):
    """Money that fits no invoice; what of it neither pays one nor goes back, proposals included."""

    receipt = ReceiptOutput()
    left = MoneyField(help_text="Nothing before it is booked.")
    days = serializers.IntegerField(help_text="Since it arrived.")


class UnappliedDetailOutput(UnappliedOutput):
    uses = serializers.SerializerMethodField()
    returns = serializers.SerializerMethodField()

    @extend_schema_field(ReceiptUseOutput(many=True))
    def get_uses(self, one: unapplied.Unapplied) -> Any:
        return ReceiptUseOutput(one.receipt.uses.all(), many=True).data

    @extend_schema_field(OutgoingTransferOutput(many=True))
    def get_returns(self, one: unapplied.Unapplied) -> Any:
        return OutgoingTransferOutput(outgoing_found().filter(receipt=one.receipt), many=True).data


class UnappliedInput(serializers.Serializer):
    payer = serializers.CharField(max_length=unapplied.MAX_PAYER, help_text="As the statement names them.")
    amount = MoneyField()
    reference = serializers.CharField(max_length=120, help_text="The bank statement's own number of the transfer.")
    received_on = serializers.DateField()
    note = serializers.CharField(
        required=False,
        allow_blank=True,
        default="",
        max_length=unapplied.MAX_NOTE,
        help_text="What it may have been meant for.",
    )


class ApplicationInput(serializers.Serializer):
    invoice = serializers.CharField(max_length=20, help_text="INV-2026-000017")
    money = serializers.ListField(
        child=serializers.IntegerField(min_value=1, max_value=MAX_ID),
        min_length=1,
        max_length=MAX_TOGETHER,
        help_text="Receipts that fit no invoice; what arrived first is used first, and what is over stays unapplied.",
    )

    def validate_invoice(self, reference: str) -> Document:
        return invoice_named(reference)

    def validate_money(self, numbers: list[int]) -> list[BankReceipt]:
        found = BankReceipt.objects.filter(payment=None).in_bulk(numbers)
        if missing := sorted(set(numbers) - set(found)):
            raise serializers.ValidationError(f"No money that fits no invoice has the number {missing[0]}.")
        return list(found.values())


class SentInput(serializers.Serializer):
    reference = serializers.CharField(max_length=120, help_text="The bank statement's own number of the transfer.")
    sent_on = serializers.DateField()


class MoneyReturnedInput(SentInput):
    amount = MoneyField(help_text="At most what is left.")


class CameBackInput(serializers.Serializer):
    reference = serializers.CharField(max_length=120, help_text="The bank statement's own number of what came back.")
    note = serializers.CharField(max_length=500, help_text="Why, as the bank says it; the buyer reads it.")


class NotSentInput(serializers.Serializer):
    note = serializers.CharField(max_length=500, help_text="Why it cannot be sent; the buyer reads it.")


class ApplicationFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=ReceiptApplication.Status.choices, required=False)
    payment = serializers.IntegerField(required=False, min_value=1, max_value=MAX_ID)


class OutgoingFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=OutgoingTransfer.Status.choices, required=False)
    refund = serializers.IntegerField(required=False, min_value=1, max_value=MAX_ID)
    receipt = serializers.IntegerField(required=False, min_value=1, max_value=MAX_ID)


# --- money that fits no invoice ---------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(
        summary="Money that fits no invoice and is not used up, the oldest first",
        description="What waits for a second person is at `desk/receipts/?fits_invoice=false&status=recorded`.",
        operation_id="desk_unapplied_list",
    ),
    post=extend_schema(
        summary="Record money that fits no invoice",
        description="Nothing is booked until somebody else confirms it at `desk/receipts/{id}/approve/`. Needs no one-time code.",
        operation_id="desk_unapplied_record",
        request=UnappliedInput,
        responses={201: ReceiptOutput},
    ),
)
class UnappliedList(DeskList, DeskAct):
    needs_code = False
    serializer_class = UnappliedOutput
    pagination_class = OffsetPages
    input_class = UnappliedInput
    answers = 201

    def list(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        page = unapplied.with_age(self.paginate_queryset(unapplied.unapplied()) or [])
        return self.get_paginated_response(UnappliedOutput(page, many=True).data)

    def act(self, **given: Any) -> Any:
        return ReceiptOutput(unapplied.record_unapplied(by=self.person, **given)).data


def _unmatched() -> QuerySet[BankReceipt]:
    return receipts_found().filter(payment=None)


@extend_schema_view(
    get=extend_schema(
        summary="Money that fits no invoice: what it pays, and what went back of it",
        operation_id="desk_unapplied_retrieve",
    )
)
class UnappliedDetail(DeskDetail):
    serializer_class = UnappliedDetailOutput

    def get_queryset(self) -> QuerySet[BankReceipt]:
        return _unmatched().prefetch_related("uses__application", "uses__receipt", "returns")

    def retrieve(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        receipt: BankReceipt = self.get_object()
        (one,) = unapplied.with_age([receipt])
        return Response(UnappliedDetailOutput(one).data)


@extend_schema_view(
    post=extend_schema(
        summary="Record that money that fits no invoice was sent back to its payer",
        description="All that is left of it, or a part. Nothing is booked until somebody else confirms it at "
        "`desk/outgoing-transfers/{id}/approve/`. Needs no one-time code.",
        operation_id="desk_unapplied_return",
        request=MoneyReturnedInput,
        responses={201: OutgoingTransferOutput},
    )
)
class UnappliedReturn(DeskAct):
    needs_code = False
    serializer_class = OutgoingTransferOutput
    input_class = MoneyReturnedInput
    answers = 201

    def get_queryset(self) -> QuerySet[BankReceipt]:
        return _unmatched()

    def act(self, **given: Any) -> Any:
        made = outgoing.record_money_returned(receipt=self.get_object(), by=self.person, **given)
        return OutgoingTransferOutput(made).data


# --- it pays an invoice after all -------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(summary="Uses of money that fits no invoice, for one", operation_id="desk_applications_list"),
    post=extend_schema(
        summary="Propose that money that fits no invoice pays one",
        description="Exactly: together it must be what the invoice asks for, or more. Nothing is booked until somebody else "
        "approves it. Needs no one-time code.",
        operation_id="desk_applications_propose",
        request=ApplicationInput,
        responses={201: ApplicationOutput},
    ),
)
class ApplicationList(DeskList, DeskAct):
    needs_code = False
    serializer_class = ApplicationOutput
    filter_class = ApplicationFilter
    input_class = ApplicationInput
    answers = 201

    def get_queryset(self) -> QuerySet[ReceiptApplication]:
        return applications_found().filter(**self.asked())

    def act(self, **given: Any) -> Any:
        payment = given.pop("invoice").payment
        return ApplicationOutput(unapplied.propose_application(payment=payment, by=self.person, **given)).data


@extend_schema_view(get=extend_schema(summary="One use", operation_id="desk_applications_retrieve"))
class ApplicationDetail(DeskDetail):
    serializer_class = ApplicationOutput

    def get_queryset(self) -> QuerySet[ReceiptApplication]:
        return applications_found()


class _DecideApplication(DeskAct):
    serializer_class = ApplicationOutput
    approved: bool

    def get_queryset(self) -> QuerySet[ReceiptApplication]:
        return applications_found()

    def act(self, **given: Any) -> Any:
        decided = unapplied.decide_application(application=self.get_object(), approved=self.approved, by=self.person)
        return self.told(decided.pk)


@extend_schema_view(
    post=extend_schema(
        summary="Book that the money pays the invoice",
        description="Another person than the one who proposed it.",
        operation_id="desk_applications_approve",
        request=None,
        responses=ApplicationOutput,
    )
)
class ApplicationApprove(_DecideApplication):
    approved = True


@extend_schema_view(
    post=extend_schema(
        summary="Reject a use, or withdraw one's own",
        description="Nothing is booked. Needs no one-time code.",
        operation_id="desk_applications_reject",
        request=None,
        responses=ApplicationOutput,
    )
)
class ApplicationReject(_DecideApplication):
    needs_code = False
    approved = False


# --- refunds that a person sends --------------------------------------------------------------------------------------
class _OfRefund(DeskAct):
    def get_queryset(self) -> QuerySet[Refund]:
        return refunds_found()


@extend_schema_view(
    post=extend_schema(
        summary="Record that a refund was sent by bank transfer",
        description="Nothing is booked until somebody else confirms it at `desk/outgoing-transfers/{id}/approve/`. Needs no "
        "one-time code.",
        operation_id="desk_refunds_sent",
        request=SentInput,
        responses={201: OutgoingTransferOutput},
    )
)
class RefundSent(_OfRefund):
    needs_code = False
    serializer_class = OutgoingTransferOutput
    input_class = SentInput
    answers = 201

    def act(self, **given: Any) -> Any:
        made = outgoing.record_refund_sent(refund=self.get_object(), by=self.person, **given)
        return OutgoingTransferOutput(made).data


@extend_schema_view(
    post=extend_schema(
        summary="Say that a refund by bank transfer cannot be sent",
        description="It is booked back at once: everything is where it was, and the buyer reads why.",
        operation_id="desk_refunds_refuse",
        request=NotSentInput,
        responses=DeskRefundOutput,
    )
)
class RefundRefuse(_OfRefund):
    serializer_class = DeskRefundOutput
    input_class = NotSentInput

    def act(self, **given: Any) -> Any:
        refused = outgoing.refuse_refund(refund=self.get_object(), by=self.person, **given)
        return self.told(refused.pk)


# --- transfers out of the bank ----------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(
        summary="Transfers out of our bank account, newest first",
        description="They are recorded at `desk/refunds/{id}/sent/` and `desk/unapplied/{id}/returns/`.",
        operation_id="desk_outgoing_transfers_list",
    )
)
class OutgoingTransferList(DeskList):
    serializer_class = OutgoingTransferOutput
    filter_class = OutgoingFilter

    def get_queryset(self) -> QuerySet[OutgoingTransfer]:
        return outgoing_found().filter(**self.asked())


@extend_schema_view(get=extend_schema(summary="One transfer out", operation_id="desk_outgoing_transfers_retrieve"))
class OutgoingTransferDetail(DeskDetail):
    serializer_class = OutgoingTransferOutput

    def get_queryset(self) -> QuerySet[OutgoingTransfer]:
        return outgoing_found()


class _OutgoingAct(DeskAct):
    serializer_class = OutgoingTransferOutput

    def get_queryset(self) -> QuerySet[OutgoingTransfer]:
        return outgoing_found()


@extend_schema_view(
    post=extend_schema(
        summary="Confirm and book a transfer out",
        description="Another person than the one who recorded it: both have seen it on the bank's statement. A refund's credit note "
        "is issued.",
        operation_id="desk_outgoing_transfers_approve",
        request=None,
        responses=OutgoingTransferOutput,
    )
)
class OutgoingTransferApprove(_OutgoingAct):
    def act(self, **given: Any) -> Any:
        decided = outgoing.decide_transfer(transfer=self.get_object(), approved=True, by=self.person)
        return self.told(decided.pk)


@extend_schema_view(
    post=extend_schema(
        summary="Reject the record of a transfer out, or withdraw one's own",
        description="Nothing is booked, and what it was for waits for a transfer again. Needs no one-time code.",
        operation_id="desk_outgoing_transfers_reject",
        request=None,
        responses=OutgoingTransferOutput,
    )
)
class OutgoingTransferReject(_OutgoingAct):
    needs_code = False

    def act(self, **given: Any) -> Any:
        decided = outgoing.decide_transfer(transfer=self.get_object(), approved=False, by=self.person)
        return self.told(decided.pk)


@extend_schema_view(
    post=extend_schema(
        summary="Note that a booked transfer came back",
        description="The money is in the bank again, and where it was taken from; a refund failed, and its credit note is cancelled.",
        operation_id="desk_outgoing_transfers_returned",
        request=CameBackInput,
        responses=OutgoingTransferOutput,
    )
)
class OutgoingTransferReturned(_OutgoingAct):
    input_class = CameBackInput

    def act(self, **given: Any) -> Any:
        returned = outgoing.note_returned(transfer=self.get_object(), by=self.person, **given)
        return self.told(returned.pk)
