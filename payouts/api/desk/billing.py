"""What is invoiced and how it is taxed, and buyers' transfers to our bank account: recorded by one, confirmed by another."""

from typing import Any

from django.db.models import QuerySet
from django.http import Http404
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from marketplace.api.fields import MoneyField
from payouts.api.desk.base import DeskAct, DeskDetail, DeskList, DeskPartyOutput, DeskView, PersonField
from payouts.api.serializers import DocumentOutput
from payouts.models import BankReceipt, Document, TaxRate
from payouts.selectors import find_document, receipts_found, unpaid_invoices
from payouts.services import billing, receipts


# --- what is said, and what is asked ----------------------------------------------------------------------------------
class DeskInvoiceOutput(serializers.ModelSerializer):
    """An invoice (INV) or credit note (CN). `payment_status`: open until its money has come."""

    buyer = DeskPartyOutput()
    net = MoneyField()
    tax = MoneyField()
    total = MoneyField()
    payment_status = serializers.CharField(source="payment.status")

    class Meta:
        model = Document
        fields = [
            "reference",
            "kind",
            "buyer",
            "payment",
            "payment_status",
            "issued_on",
            "due_on",
            "net",
            "tax",
            "total",
            "purchase_order",
            "vat_id",
            "sha256",
        ]


class ReceiptOutput(serializers.ModelSerializer):
    """recorded → booked or rejected (withdrawn, where `decided_by` recorded it). Without a payment it fits no invoice: `payer` is whom the statement names."""

    buyer = DeskPartyOutput(source="payment.asked_of", default=None, allow_null=True)
    amount = MoneyField()
    recorded_by = PersonField("recorded_by")
    decided_by = PersonField("decided_by")

    class Meta:
        model = BankReceipt
        fields = [
            "id",
            "payment",
            "buyer",
            "payer",
            "note",
            "amount",
            "reference",
            "received_on",
            "status",
            "recorded_by",
            "recorded_at",
            "decided_by",
            "decided_at",
        ]


class ReceiptInput(serializers.Serializer):
    invoice = serializers.CharField(max_length=20, help_text="INV-2026-000017")
    amount = MoneyField(help_text="What arrived; it must be what the invoice asks for.")
    reference = serializers.CharField(max_length=120, help_text="The bank statement's own number of the transfer.")
    received_on = serializers.DateField()

    def validate_invoice(self, reference: str) -> Document:
        return invoice_named(reference)


def invoice_named(reference: str) -> Document:
    found = find_document(Document.objects.filter(kind="INV").select_related("payment"), reference)
    if found is None:
        raise serializers.ValidationError("There is no such invoice.")
    return found


class TaxRateOutput(serializers.ModelSerializer):
    created_by = PersonField("created_by")

    class Meta:
        model = TaxRate
        fields = [
            "id",
            "jurisdiction",
            "name",
            "rate_bps",
            "is_reversed",
            "valid_from",
            "valid_until",
            "created_by",
            "created_at",
        ]


class TaxRateInput(serializers.Serializer):
    jurisdiction = serializers.CharField(max_length=6, help_text="ISO 3166: DE, or US-CA.")
    name = serializers.CharField(max_length=40, help_text="As the invoice calls it: VAT.")
    rate_bps = serializers.IntegerField(min_value=1, max_value=10_000, help_text="1900 is 19 %.")
    is_reversed = serializers.BooleanField(default=False, help_text="None for buyers with a VAT id.")
    valid_from = serializers.DateField(help_text="Today or later.")
    valid_until = serializers.DateField(
        required=False, allow_null=True, default=None, help_text="The last day; open-ended without."
    )


class TaxRateEndInput(serializers.Serializer):
    last_day = serializers.DateField()


class InvoiceFilter(serializers.Serializer):
    unpaid = serializers.BooleanField(required=False, default=False, help_text="Only what waits for its money.")


class ReceiptFilter(serializers.Serializer):
    status = serializers.ChoiceField(choices=BankReceipt.Status.choices, required=False)
    fits_invoice = serializers.BooleanField(
        required=False, default=None, allow_null=True, help_text="Only what pays an invoice, or only what fits none."
    )


class TaxRateFilter(serializers.Serializer):
    jurisdiction = serializers.CharField(max_length=6, required=False)


# --- views ------------------------------------------------------------------------------------------------------------
@extend_schema_view(
    get=extend_schema(summary="Invoices and credit notes, newest first", operation_id="desk_invoices_list")
)
class InvoiceList(DeskList):
    serializer_class = DeskInvoiceOutput
    filter_class = InvoiceFilter

    def get_queryset(self) -> QuerySet[Document]:
        found = unpaid_invoices() if self.asked()["unpaid"] else Document.objects.select_related("buyer", "payment")
        return found.order_by("-pk")


class InvoiceDetail(DeskView):
    serializer_class = DocumentOutput

    @extend_schema(
        summary="One invoice or credit note, every word of it",
        operation_id="desk_invoices_retrieve",
        responses=DocumentOutput,
    )
    def get(self, request: Request, reference: str) -> Response:
        found = find_document(Document.objects.select_related("cancels"), reference)
        if found is None:
            raise Http404("There is no such document")
        return Response(DocumentOutput(found).data)


@extend_schema_view(
    get=extend_schema(summary="Transfers to our bank account", operation_id="desk_receipts_list"),
    post=extend_schema(
        summary="Record a transfer that pays an invoice",
        description="Nothing is booked until somebody else confirms it. What fits no invoice is recorded at `desk/unapplied/`. Needs "
        "no one-time code.",
        operation_id="desk_receipts_record",
        request=ReceiptInput,
        responses={201: ReceiptOutput},
    ),
)
class ReceiptList(DeskList, DeskAct):
    needs_code = False
    serializer_class = ReceiptOutput
    filter_class = ReceiptFilter
    input_class = ReceiptInput
    answers = 201

    def get_queryset(self) -> QuerySet[BankReceipt]:
        asked = self.asked()
        fits_invoice = asked.pop("fits_invoice")
        found = receipts_found().filter(**asked)
        return found if fits_invoice is None else found.filter(payment__isnull=not fits_invoice)

    def act(self, **given: Any) -> Any:
        payment = given.pop("invoice").payment
        return ReceiptOutput(receipts.record_receipt(payment=payment, by=self.person, **given)).data


@extend_schema_view(get=extend_schema(summary="One transfer", operation_id="desk_receipts_retrieve"))
class ReceiptDetail(DeskDetail):
    serializer_class = ReceiptOutput

    def get_queryset(self) -> QuerySet[BankReceipt]:
        return receipts_found()


class _Decide(DeskAct):
    serializer_class = ReceiptOutput
    approved: bool

    def get_queryset(self) -> QuerySet[BankReceipt]:
        return receipts_found()

    def act(self, **given: Any) -> Any:
        decided = receipts.decide_receipt(receipt=self.get_object(), approved=self.approved, by=self.person)
        return self.told(decided.pk)


@extend_schema_view(
    post=extend_schema(
        summary="Confirm and book a transfer",
        description="Another person than the one who recorded it. What fits no invoice is held for its payer.",
        operation_id="desk_receipts_approve",
        request=None,
        responses=ReceiptOutput,
    )
)
class ReceiptApprove(_Decide):
    approved = True


@extend_schema_view(
    post=extend_schema(
        summary="Reject a transfer, or withdraw one's own record",
        description="Nothing is booked. Needs no one-time code.",
        operation_id="desk_receipts_reject",
        request=None,
        responses=ReceiptOutput,
    )
)
class ReceiptReject(_Decide):
    needs_code = False
    approved = False


@extend_schema_view(
    get=extend_schema(summary="Tax rates, newest first", operation_id="desk_tax_rates_list"),
    post=extend_schema(
        summary="Add a tax rate",
        description="It is added to whatever is asked for from its first day on.",
        operation_id="desk_tax_rates_add",
        request=TaxRateInput,
        responses={201: TaxRateOutput},
    ),
)
class TaxRateList(DeskList, DeskAct):
    serializer_class = TaxRateOutput
    filter_class = TaxRateFilter
    input_class = TaxRateInput
    answers = 201

    def get_queryset(self) -> QuerySet[TaxRate]:
        return TaxRate.objects.select_related("created_by").filter(**self.asked()).order_by("-pk")

    def act(self, **given: Any) -> Any:
        return TaxRateOutput(billing.add_tax_rate(user=self.person, **given)).data


@extend_schema_view(
    post=extend_schema(
        summary="End a tax rate",
        description="Gives an open-ended rate its last day, today or later.",
        operation_id="desk_tax_rates_end",
        request=TaxRateEndInput,
        responses=TaxRateOutput,
    )
)
class TaxRateEnd(DeskAct):
    input_class = TaxRateEndInput
    serializer_class = TaxRateOutput
    queryset = TaxRate.objects.all()

    def act(self, **given: Any) -> Any:
        return TaxRateOutput(billing.end_tax_rate(rate=self.get_object(), user=self.person, **given)).data
