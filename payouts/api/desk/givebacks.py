"""What goes back: refunds that staff decide, disputes and the answer to the bank, and what payees owe."""

from typing import Any

from django.db.models import QuerySet
from django.http import Http404
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.fields import MoneyField, SignedMoneyField
from marketplace.models import Party
from marketplace.money import MINOR_DIGITS, Money
from payouts.api.desk.base import (
    AmountField,
    DeskAct,
    DeskDetail,
    DeskList,
    DeskPartyOutput,
    DeskView,
    OffsetPages,
    PersonField,
    SearchFilter,
)
from payouts.models import (
    Clawback,
    Dispute,
    DisputeAnswer,
    Movement,
    Payment,
    Payout,
    Refund,
    TransferReversal,
    WriteOff,
)
from payouts.selectors import (
    Debt,
    debts,
    disputes_found,
    payments_found,
    refunds_found,
    reversals_of,
    reversible_payouts_of,
    taken_back_of,
)
from payouts.services import clawbacks, recoveries
from payouts.services.disputes import EVIDENCE_FIELDS, MAX_EVIDENCE, answer_dispute
from payouts.services.outgoing import refunds_to_send
from payouts.services.refunds import request_refund

#: What staff may say; the others are said by the buyer's right, a corrected report, or Stripe's dashboard.
REASONS = [
    choice
    for choice in Refund.Reason.choices
    if choice[0] not in (Refund.Reason.OF_RIGHT, Refund.Reason.AT_STRIPE, Refund.Reason.CORRECTED)
]


# --- payments and refunds ---------------------------------------------------------------------------------------------
class DeskPaymentOutput(serializers.ModelSerializer):
    """What was asked for one order or one royalty invoice."""

    buyer = DeskPartyOutput(source="asked_of")
    order = serializers.UUIDField(source="order.public_id", default=None, allow_null=True)
    amount = MoneyField(help_text="Tax included.")
    tax = MoneyField()
    fee = AmountField("fee_micros", help_text="Stripe's; null while it is unpaid.", allow_null=True)

    class Meta:
        model = Payment
        fields = [
            "id",
            "buyer",
            "order",
            "invoice",
            "status",
            "method",
            "amount",
            "tax",
            "fee",
            "charge_id",
            "created_at",
            "due_on",
            "paid_at",
            "available_on",
            "settled_at",
        ]


class PaymentPartOutput(serializers.Serializer):
    """One line of what was paid, and what may still go back of it."""

    line = serializers.IntegerField(source="line.pk")
    version = serializers.CharField(source="line.version")
    price = MoneyField(help_text="Tax included.")
    given_back = MoneyField()
    left = MoneyField()


class DeskRefundOutput(serializers.ModelSerializer):
    """intended → pending → sent; or refused or failed, and booked back. `status` is of the work at Stripe.

    Of a surplus charge there is no payment, and no buyer whose it would be.
    """

    amount = MoneyField()
    requested_by = PersonField("requested_by", help_text="null: of right, or made in Stripe's dashboard.")
    buyer = DeskPartyOutput(source="payment.asked_of", default=None, allow_null=True)
    surplus_charge = serializers.CharField(source="surplus.charge_id", default=None, allow_null=True)
    method = serializers.ChoiceField(
        choices=Payment.Method.choices, help_text="To the card by Stripe; or by bank transfer, which a person sends."
    )
    sentence = serializers.CharField(help_text="How it stands and what it waits for, as the buyer reads it.")
    transfer = serializers.IntegerField(
        source="transfer.pk",
        default=None,
        allow_null=True,
        help_text="Of one by bank: what carries it, at `desk/outgoing-transfers/{id}/`.",
    )

    class Meta:
        model = Refund
        fields = [
            "id",
            "payment",
            "surplus_charge",
            "buyer",
            "line",
            "amount",
            "method",
            "reason",
            "note",
            "state",
            "status",
            "sentence",
            "transfer",
            "requested_by",
            "refund_id",
            "refusal_code",
            "refusal_message",
            "intended_at",
            "made_at",
        ]


class DeskPaymentDetail(DeskPaymentOutput):
    parts = serializers.SerializerMethodField(help_text="Nothing while it is unpaid.")
    left = serializers.SerializerMethodField(help_text="Of all of them.")

    class Meta(DeskPaymentOutput.Meta):
        fields = [*DeskPaymentOutput.Meta.fields, "left", "parts"]

    @extend_schema_field(PaymentPartOutput(many=True))
    def get_parts(self, payment: Payment) -> Any:
        return PaymentPartOutput(self._parts(payment), many=True).data

    @extend_schema_field(MoneyField)
    def get_left(self, payment: Payment) -> Any:
        left = Money(sum(part.left.micros for part in self._parts(payment)), payment.currency)
        return MoneyField().to_representation(left)

    @staticmethod
    def _parts(payment: Payment) -> list[clawbacks.Part]:
        return clawbacks.parts_left(payment) if payment.status == Payment.Status.PAID else []


class RefundInput(serializers.Serializer):
    amount = MoneyField(help_text="At most what is left.")
    line = serializers.IntegerField(
        required=False, allow_null=True, default=None, help_text="Of one line; all of them in proportion, without."
    )
    reason = serializers.ChoiceField(choices=REASONS)
    note = serializers.CharField(max_length=2_000, help_text="Why, in words, for the auditor.")


class RefundFilter(serializers.Serializer):
    state = serializers.ChoiceField(choices=Refund.State.choices, required=False)
    method = serializers.ChoiceField(choices=Payment.Method.choices, required=False)
    to_send = serializers.BooleanField(
        required=False, default=False, help_text="Only those by bank that no transfer carries yet."
    )
    payment = serializers.IntegerField(required=False, min_value=1, max_value=2**63 - 1)


@extend_schema_view(
    get=extend_schema(
        summary="Payments, to find one",
        description="By number, charge, order, checkout or the buyer's name.",
        operation_id="desk_payments_list",
    )
)
class PaymentList(DeskList):
    serializer_class = DeskPaymentOutput
    filter_class = SearchFilter

    def get_queryset(self) -> QuerySet[Payment]:
        return payments_found(self.asked()["q"].strip())


@extend_schema_view(
    get=extend_schema(summary="One payment, and what is left of each line", operation_id="desk_payments_retrieve")
)
class PaymentDetail(DeskDetail):
    serializer_class = DeskPaymentDetail

    def get_queryset(self) -> QuerySet[Payment]:
        return payments_found("")


@extend_schema_view(
    post=extend_schema(
        summary="Give back an amount of a payment",
        description="It is intended at once and made at Stripe by a worker; read how it stands at `desk/refunds/{id}/`. What was "
        "paid by bank transfer goes back by one, which a person sends.",
        operation_id="desk_payments_refund",
        request=RefundInput,
        responses={201: DeskRefundOutput},
    )
)
class PaymentRefunds(DeskAct):
    input_class = RefundInput
    serializer_class = DeskRefundOutput
    answers = 201

    def get_queryset(self) -> QuerySet[Payment]:
        return payments_found("")

    def act(self, **given: Any) -> Any:
        reason = Refund.Reason(given.pop("reason"))
        made = request_refund(payment=self.get_object(), user=self.person, key=self.once(), reason=reason, **given)
        return DeskRefundOutput(made).data


@extend_schema_view(get=extend_schema(summary="Refunds, newest first", operation_id="desk_refunds_list"))
class RefundList(DeskList):
    serializer_class = DeskRefundOutput
    filter_class = RefundFilter

    def get_queryset(self) -> QuerySet[Refund]:
        asked = self.asked()
        found = refunds_found()
        if asked.pop("to_send"):
            found = found.filter(pk__in=refunds_to_send().values("pk"))
        return found.filter(**asked)


@extend_schema_view(get=extend_schema(summary="One refund", operation_id="desk_refunds_retrieve"))
class RefundDetail(DeskDetail):
    serializer_class = DeskRefundOutput

    def get_queryset(self) -> QuerySet[Refund]:
        return refunds_found()


# --- disputes ---------------------------------------------------------------------------------------------------------
class DisputeAnswerOutput(serializers.ModelSerializer):
    """What the bank was told; `status` says whether Stripe has it."""

    given_by = PersonField("given_by")

    class Meta:
        model = DisputeAnswer
        fields = ["id", "gives_in", "evidence", "status", "error_message", "given_by", "given_at"]


class DeskDisputeOutput(serializers.ModelSerializer):
    """`status` is Stripe's word. `takes_answer`: the bank waits for ours, until `evidence_due_at`."""

    amount = MoneyField()
    buyer = DeskPartyOutput(source="payment.asked_of")
    takes_answer = serializers.SerializerMethodField()

    class Meta:
        model = Dispute
        fields = [
            "id",
            "dispute_id",
            "payment",
            "buyer",
            "amount",
            "reason",
            "status",
            "is_open",
            "is_inquiry",
            "takes_answer",
            "opened_at",
            "evidence_due_at",
            "closed_at",
        ]

    def get_takes_answer(self, dispute: Dispute) -> bool:
        answer = dispute.answer
        return dispute.takes_evidence and (answer is None or answer.was_refused)


class DisputeMovementOutput(serializers.ModelSerializer):
    amount = AmountField()
    fee = AmountField("fee_micros")

    class Meta:
        model = Movement
        fields = ["balance_transaction_id", "kind", "amount", "fee"]


class DisputeClawbackOutput(serializers.ModelSerializer):
    """What was frozen for it or taken back, and whether it was given back since."""

    amount = AmountField()
    loss = AmountField("loss_micros")
    is_undone = serializers.SerializerMethodField()

    class Meta:
        model = Clawback
        fields = ["key", "kind", "amount", "loss", "taken_at", "is_undone"]

    def get_is_undone(self, clawback: Clawback) -> bool:
        return hasattr(clawback, "undo")


class DeskDisputeDetail(DeskDisputeOutput):
    answers = DisputeAnswerOutput(many=True)
    movements = serializers.SerializerMethodField()
    clawbacks = serializers.SerializerMethodField()

    class Meta(DeskDisputeOutput.Meta):
        fields = [*DeskDisputeOutput.Meta.fields, "answers", "movements", "clawbacks"]

    @extend_schema_field(DisputeMovementOutput(many=True))
    def get_movements(self, dispute: Dispute) -> Any:
        return DisputeMovementOutput(dispute.movements.order_by("pk"), many=True).data

    @extend_schema_field(DisputeClawbackOutput(many=True))
    def get_clawbacks(self, dispute: Dispute) -> Any:
        return DisputeClawbackOutput(dispute.clawbacks.select_related("undo").order_by("pk"), many=True).data


class EvidenceInput(serializers.Serializer):
    """Texts for the bank, at least one. Files are attached in Stripe's dashboard."""

    def get_fields(self) -> dict[str, serializers.Field]:
        return {
            name: serializers.CharField(required=False, max_length=MAX_EVIDENCE, help_text=f"{label}.")
            for name, label in EVIDENCE_FIELDS.items()
        }


class DisputeAnswerInput(serializers.Serializer):
    evidence = EvidenceInput()


class DisputeFilter(serializers.Serializer):
    open = serializers.BooleanField(
        required=False, default=None, allow_null=True, help_text="Only open ones, or only closed ones."
    )
    payment = serializers.IntegerField(required=False, min_value=1, max_value=2**63 - 1)


@extend_schema_view(get=extend_schema(summary="Disputes, newest first", operation_id="desk_disputes_list"))
class DisputeList(DeskList):
    serializer_class = DeskDisputeOutput
    filter_class = DisputeFilter

    def get_queryset(self) -> QuerySet[Dispute]:
        asked = self.asked()
        found = disputes_found(is_open=asked.pop("open"))
        return found.filter(**asked)


@extend_schema_view(
    get=extend_schema(summary="One dispute: what was taken, frozen and answered", operation_id="desk_disputes_retrieve")
)
class DisputeDetail(DeskDetail):
    serializer_class = DeskDisputeDetail

    def get_queryset(self) -> QuerySet[Dispute]:
        return disputes_found()


class _DisputeAct(DeskAct):
    serializer_class = DeskDisputeDetail

    def get_queryset(self) -> QuerySet[Dispute]:
        return disputes_found()


@extend_schema_view(
    post=extend_schema(
        summary="Answer the bank with evidence",
        description="Once; again only if Stripe refused the answer.",
        operation_id="desk_disputes_answer",
        request=DisputeAnswerInput,
        responses=DeskDisputeDetail,
    )
)
class DisputeAnswerView(_DisputeAct):
    input_class = DisputeAnswerInput

    def act(self, **given: Any) -> Any:
        answer = answer_dispute(dispute=self.get_object(), user=self.person, evidence=given["evidence"])
        return self.told(answer.dispute_id)


@extend_schema_view(
    post=extend_schema(
        summary="Give in: the buyer is right",
        operation_id="desk_disputes_give_in",
        request=None,
        responses=DeskDisputeDetail,
    )
)
class DisputeGiveIn(_DisputeAct):
    def act(self, **given: Any) -> Any:
        answer = answer_dispute(dispute=self.get_object(), user=self.person, gives_in=True)
        return self.told(answer.dispute_id)


# --- debts ------------------------------------------------------------------------------------------------------------
class DebtOutput(serializers.Serializer):
    """What a payee was sent and went back to buyers since; their later earnings pay it first."""

    party = DeskPartyOutput()
    owed = MoneyField(source="amount")


class TakenBackOutput(serializers.Serializer):
    at = serializers.DateTimeField()
    dataset = serializers.CharField()
    version = serializers.IntegerField()
    reason = serializers.CharField()
    amount = MoneyField()
    is_frozen = serializers.BooleanField(help_text="It comes back if the dispute is won.")


class ReversalOutput(serializers.ModelSerializer):
    """A transfer asked back at Stripe: intended → sent, or refused, which changes nothing."""

    amount = MoneyField()
    requested_by = PersonField("requested_by")

    class Meta:
        model = TransferReversal
        fields = [
            "id",
            "payout",
            "amount",
            "note",
            "state",
            "reversal_id",
            "refusal_message",
            "requested_by",
            "intended_at",
            "made_at",
        ]


class ReversiblePayoutOutput(serializers.ModelSerializer):
    amount = MoneyField()

    class Meta:
        model = Payout
        fields = ["id", "amount", "status", "sent_at"]


class DebtDetailOutput(serializers.Serializer):
    """The latest two hundred of each list."""

    party = DeskPartyOutput()
    owed = MoneyField()
    taken_back = TakenBackOutput(many=True)
    reversals = ReversalOutput(many=True)
    reversible_payouts = ReversiblePayoutOutput(many=True, help_text="What Stripe may be asked to give back.")


class ReversalInput(serializers.Serializer):
    payout = serializers.PrimaryKeyRelatedField(
        queryset=Payout.objects.all(), help_text="One of the party's `reversible_payouts`."
    )
    amount = MoneyField()
    note = serializers.CharField(max_length=500, help_text="Why, in words; the payee reads it.")


class WriteOffInput(serializers.Serializer):
    amount = MoneyField()
    reason = serializers.CharField(max_length=500, help_text="Why, in words, for the auditor.")


class WriteOffOutput(serializers.ModelSerializer):
    amount = AmountField()
    decided_by = PersonField("decided_by")
    owed = serializers.SerializerMethodField(help_text="What is left.")

    class Meta:
        model = WriteOff
        fields = ["id", "party", "amount", "reason", "decided_by", "decided_at", "owed"]

    @extend_schema_field(SignedMoneyField)
    def get_owed(self, row: WriteOff) -> Any:
        return SignedMoneyField().to_representation(_owed(row.party_id, row.currency))


@extend_schema_view(
    get=extend_schema(
        summary="Who owes what, the most first",
        operation_id="desk_debts_list",
        responses=DebtOutput(many=True),
    )
)
class DebtList(DeskView):
    serializer_class = DebtOutput
    pagination_class = OffsetPages

    def get(self, request: Request) -> Response:
        page: list[Debt] = self.paginate_queryset(debts())  # type: ignore[assignment]
        return self.get_paginated_response(DebtOutput(page, many=True).data)


class _OfDebtor(DeskView):
    def debtor(self) -> tuple[Party, str]:
        currency = self.kwargs["currency"]
        if currency not in MINOR_DIGITS:
            raise Http404(f"No balance is held in {currency}")
        return get_object_or_404(Party, pk=self.kwargs["id"]), currency


class DebtDetail(_OfDebtor):
    serializer_class = DebtDetailOutput

    @extend_schema(
        summary="What one party owes in one currency, and why",
        operation_id="desk_debts_retrieve",
        responses=DebtDetailOutput,
    )
    def get(self, request: Request, id: int, currency: str) -> Response:
        party, currency = self.debtor()
        told = {
            "party": party,
            "owed": _owed(party.pk, currency),
            "taken_back": [one for one in taken_back_of(party) if one.amount.currency == currency][:200],
            "reversals": reversals_of(party, currency).select_related("requested_by")[:200],
            "reversible_payouts": reversible_payouts_of(party, currency)[:200],
        }
        return Response(DebtDetailOutput(told).data)


@extend_schema_view(
    post=extend_schema(
        summary="Ask Stripe for a transfer back",
        description="A courtesy, out of the payee's balance at Stripe: if that does not suffice, nothing happens.",
        operation_id="desk_debts_ask_back",
        request=ReversalInput,
        responses={201: ReversalOutput},
    )
)
class DebtReversals(DeskAct, _OfDebtor):
    input_class = ReversalInput
    serializer_class = ReversalOutput
    answers = 201

    def act(self, **given: Any) -> Any:
        party, currency = self.debtor()
        if not reversible_payouts_of(party, currency).filter(pk=given["payout"].pk).exists():
            raise serializers.ValidationError({"payout": "It is none of the party's that Stripe could give back."})
        return ReversalOutput(recoveries.request_reversal(user=self.person, **given)).data


@extend_schema_view(
    post=extend_schema(
        summary="Write a debt off",
        description="The platform bears it; what the party earns later is its own again.",
        operation_id="desk_debts_write_off",
        request=WriteOffInput,
        responses={201: WriteOffOutput},
    )
)
class DebtWriteOff(DeskAct, _OfDebtor):
    input_class = WriteOffInput
    serializer_class = WriteOffOutput
    answers = 201

    def act(self, **given: Any) -> Any:
        party, currency = self.debtor()
        if given["amount"].currency != currency:
            raise serializers.ValidationError({"amount": {"currency": f"The address says {currency}."}})
        return WriteOffOutput(recoveries.write_off(party=party, user=self.person, **given)).data


def _owed(party: int, currency: str) -> Money:
    return recoveries.owing([party]).get((party, currency), Money(0, currency))
