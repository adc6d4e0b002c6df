"""What a client may say about money, and what it gets back."""

from typing import Any

from drf_spectacular.utils import OpenApiExample, extend_schema_field, extend_schema_serializer
from rest_framework import serializers

from marketplace.api.fields import MoneyField, SignedMoneyField
from marketplace.models import Offer, TrainedModel
from payouts.models import (
    BillingProfile,
    Document,
    IssuedStatement,
    Payment,
    Payout,
    Refund,
    ReportDuty,
    RoyaltyInvoice,
    RoyaltyInvoiceLine,
    RoyaltyReport,
)
from payouts.selectors import Earnings
from payouts.standing import Code, standings_of


@extend_schema_serializer(
    examples=[
        OpenApiExample(
            "A month's revenue",
            value={
                "model": "digits-mlp",
                "period_start": "2026-10-01",
                "period_end": "2026-10-31",
                "revenue": {"amount": "12500.00", "currency": "USD"},
            },
            request_only=True,
        )
    ]
)
class RoyaltyReportInput(serializers.Serializer):
    model = serializers.SlugRelatedField(
        slug_field="slug", queryset=TrainedModel.objects.all(), help_text="The slug of a model of yours."
    )
    period_start = serializers.DateField()
    period_end = serializers.DateField(help_text="The last day of the period.")
    revenue = MoneyField(help_text="What the model earned in the period, in this currency.")
    purchase_order = serializers.CharField(
        required=False, allow_blank=True, max_length=60, help_text="Your own number, for the invoice."
    )


class RoyaltyReportCorrectionInput(serializers.Serializer):
    revenue = MoneyField(help_text="What the model earned in the period in truth.")
    note = serializers.CharField(max_length=500, help_text="What was wrong. Whoever gives something back reads it.")
    period_start = serializers.DateField(required=False, help_text="If the days were wrong too.")
    period_end = serializers.DateField(required=False)


class RoyaltyInvoiceLineOutput(serializers.ModelSerializer):
    """One dataset's part: revenue · share · rate, capped as its license says."""

    dataset = serializers.SlugField(source="version.dataset.slug")
    version = serializers.IntegerField(source="version.number")
    license = serializers.UUIDField(source="license.public_id")
    result = serializers.IntegerField(source="result.number")
    share_ppq = serializers.IntegerField(help_text="Parts per quadrillion of the model's value.")
    amount = serializers.SerializerMethodField()

    class Meta:
        model = RoyaltyInvoiceLine
        fields = ["dataset", "version", "license", "result", "share_ppq", "rate_bps", "amount", "is_capped"]

    def get_amount(self, line: RoyaltyInvoiceLine) -> str:
        return _text(line.amount_micros)


class RoyaltyInvoiceOutput(serializers.ModelSerializer):
    """One report's invoice. What is too small to charge is `carried`: asked for with your next one, `carried_into`."""

    total = MoneyField()
    carried_into = serializers.IntegerField(source="carried_into_id", allow_null=True)
    lines = RoyaltyInvoiceLineOutput(many=True)

    class Meta:
        model = RoyaltyInvoice
        fields = [
            "id",
            "status",
            "total",
            "platform_fee_bps",
            "issued_at",
            "due_on",
            "carried_into",
            "purchase_order",
            "paid_at",
            "lines",
        ]


class RoyaltyReportOutput(serializers.ModelSerializer):
    model = serializers.SlugField(source="model.slug")
    revenue = MoneyField()
    invoice = RoyaltyInvoiceOutput()

    class Meta:
        model = RoyaltyReport
        fields = [
            "id",
            "model",
            "period_start",
            "period_end",
            "revenue",
            "reported_at",
            "replaces",
            "note",
            "invoice",
        ]


class DocumentOutput(serializers.ModelSerializer):
    """An invoice (INV) or credit note (CN), as it was issued."""

    net = MoneyField()
    tax = MoneyField()
    total = MoneyField()
    cancels = serializers.CharField(source="cancels.reference", default=None, allow_null=True)
    content = serializers.JSONField(help_text="Every word and amount of it.")

    class Meta:
        model = Document
        fields = [
            "reference",
            "kind",
            "issued_on",
            "due_on",
            "net",
            "tax",
            "total",
            "purchase_order",
            "vat_id",
            "cancels",
            "content",
            "sha256",
        ]


class InvoiceOrderInput(serializers.Serializer):
    purchase_order = serializers.CharField(
        required=False, allow_blank=True, max_length=60, default="", help_text="Your own number, for the invoice."
    )


class BillingProfileInput(serializers.Serializer):
    legal_name = serializers.CharField(max_length=200)
    address = serializers.CharField(max_length=500, help_text="Street, postcode and town, in lines.")
    country = serializers.RegexField(r"^[A-Z]{2}$", help_text="ISO 3166-1, two letters.")
    region = serializers.CharField(
        required=False, allow_blank=True, max_length=6, default="", help_text="ISO 3166-2: CA."
    )
    vat_id = serializers.CharField(required=False, allow_blank=True, max_length=30, default="")


class BillingProfileOutput(serializers.ModelSerializer):
    class Meta:
        model = BillingProfile
        fields = ["legal_name", "address", "country", "region", "vat_id"]


class RoyaltyQuoteInput(serializers.Serializer):
    """Either a model of yours, by the result that holds today, or a selection that you plan."""

    revenue = MoneyField()
    model = serializers.SlugRelatedField(slug_field="slug", queryset=TrainedModel.objects.all(), required=False)
    offers = serializers.PrimaryKeyRelatedField(
        queryset=Offer.objects.select_related("dataset", "version"), many=True, required=False
    )
    records = serializers.ListField(
        child=serializers.IntegerField(min_value=1),
        required=False,
        help_text="How many records of each offer; all, without.",
    )

    def validate(self, data: dict[str, Any]) -> dict[str, Any]:
        if ("model" in data) == ("offers" in data):
            raise serializers.ValidationError({"offers": "Give a model, or the offers of a selection."})
        if "records" in data and len(data["records"]) != len(data.get("offers", [])):
            raise serializers.ValidationError({"records": "Give one number per offer."})
        return data


class RoyaltyQuoteLineOutput(serializers.Serializer):
    dataset = serializers.CharField()
    share_ppq = serializers.IntegerField(help_text="Parts per quadrillion: measured, or by records for a plan.")
    rate_bps = serializers.IntegerField()
    amount = MoneyField()
    is_capped = serializers.BooleanField()


class RoyaltyQuoteOutput(serializers.Serializer):
    """`total` is by the result that holds today, or by records for a plan, which no result can take below `least` or above `most`."""

    revenue = MoneyField()
    total = MoneyField()
    least = MoneyField()
    most = MoneyField()
    lines = RoyaltyQuoteLineOutput(many=True)


class ReportDutyOutput(serializers.ModelSerializer):
    """A report that a license of yours asks for."""

    model = serializers.SlugField(source="model.slug")
    license = serializers.UUIDField(source="license.public_id")

    class Meta:
        model = ReportDuty
        fields = ["model", "license", "period_start", "period_end", "due_on"]


class CheckoutOutput(serializers.Serializer):
    url = serializers.URLField(help_text="Where a person pays, at Stripe.")


class GrossOutput(serializers.Serializer):
    """What the buyer paid, and what of it the platform kept: `amount · fee_bps` is `fee`, `amount · pool_bps` is `pool`."""

    of = serializers.CharField(help_text="What `amount` is: a license's price, or revenue × share × rate.")
    amount = MoneyField()
    fee_bps = serializers.IntegerField()
    fee = MoneyField()
    pool_bps = serializers.IntegerField()
    pool = MoneyField()
    revenue = MoneyField(allow_null=True)
    share_ppq = serializers.IntegerField(allow_null=True, help_text="The dataset's part of the model.")
    rate_bps = serializers.IntegerField(allow_null=True)


class StatementLineOutput(serializers.Serializer):
    """`amount` is `pot · weight / weight_total`, to the micro; `divided` is `gross.pool` less what had gone back before."""

    divided_at = serializers.DateTimeField()
    source = serializers.CharField()  # type: ignore[assignment]
    dataset = serializers.CharField()
    version = serializers.IntegerField()
    model = serializers.CharField(help_text="Empty when divided by count.")
    result = serializers.CharField()
    role = serializers.CharField()
    n_records = serializers.IntegerField()
    weight = serializers.IntegerField()
    weight_total = serializers.IntegerField()
    measured = serializers.FloatField(
        allow_null=True,
        help_text="What the records did for the whole model, signed; another thing than the share of the pot.",
    )
    measured_low = serializers.FloatField(allow_null=True, help_text="95 % interval of `measured`.")
    measured_high = serializers.FloatField(allow_null=True)
    gross = GrossOutput()
    divided = MoneyField()
    pot = MoneyField()
    amount = MoneyField()
    due_at = serializers.DateTimeField()


class StatementPayoutOutput(serializers.Serializer):
    payout_id = serializers.IntegerField()
    booked_at = serializers.DateTimeField()
    what = serializers.CharField()
    amount = serializers.SerializerMethodField(help_text="Negative where a payout was booked back.")

    def get_amount(self, payout: object) -> str:
        return str(payout.amount.amount_text(exact=True))  # type: ignore[attr-defined]


class StatementAdjustmentOutput(serializers.Serializer):
    """What a refund, a dispute or a debt did to the balance."""

    booked_at = serializers.DateTimeField()
    what = serializers.CharField()
    amount = serializers.SerializerMethodField(help_text="Negative where it was taken back.")

    def get_amount(self, adjustment: object) -> str:
        return str(adjustment.amount.amount_text(exact=True))  # type: ignore[attr-defined]


class CurrencyStatementOutput(serializers.Serializer):
    """opening + earned + adjusted − paid_out = closing; balances and adjustments may be below zero."""

    currency = serializers.CharField()
    opening = SignedMoneyField()
    earned = MoneyField()
    adjusted = SignedMoneyField()
    paid_out = SignedMoneyField()
    closing = SignedMoneyField()
    lines = StatementLineOutput(many=True)
    adjustments = StatementAdjustmentOutput(many=True)
    payouts = StatementPayoutOutput(many=True)


class StatementOutput(serializers.Serializer):
    party = serializers.CharField(source="party.name")
    year = serializers.IntegerField()
    month = serializers.IntegerField()
    currencies = CurrencyStatementOutput(many=True)


class StatementBalanceOutput(serializers.Serializer):
    """opening + earned + adjusted − paid_out = closing."""

    currency = serializers.CharField()
    opening = SignedMoneyField()
    earned = MoneyField()
    adjusted = SignedMoneyField()
    paid_out = SignedMoneyField()
    closing = SignedMoneyField()


class StatementTotalOutput(serializers.Serializer):
    currency = serializers.CharField()
    source = serializers.CharField()  # type: ignore[assignment]
    dataset = serializers.CharField()
    version = serializers.IntegerField()
    model = serializers.CharField(help_text="Empty when divided by count.")
    role = serializers.CharField()
    n_lines = serializers.IntegerField()
    amount = MoneyField()


class IssuedStatementOutput(serializers.ModelSerializer):
    """A closed month's statement; it never changes. Its CSV has every line."""

    month = serializers.CharField(help_text="2026-03")
    balances = StatementBalanceOutput(many=True)

    class Meta:
        model = IssuedStatement
        fields = ["number", "month", "party_name", "issued_at", "n_lines", "csv_sha256", "balances"]


class IssuedStatementDetail(IssuedStatementOutput):
    totals = StatementTotalOutput(many=True)

    class Meta(IssuedStatementOutput.Meta):
        fields = [*IssuedStatementOutput.Meta.fields, "totals"]


class WaitOutput(serializers.Serializer):
    due_at = serializers.DateTimeField()
    amount = MoneyField()
    n_lines = serializers.IntegerField()


class StandingOutput(serializers.Serializer):
    """One thing that part of the money waits for."""

    code = serializers.ChoiceField(choices=[code.value for code in Code])
    amount = MoneyField()
    sentence = serializers.CharField(help_text="For a person.")
    until = serializers.DateTimeField(allow_null=True)


class PayoutOutput(serializers.Serializer):
    """One payment to your bank: intended, sent (at Stripe), paid (in the bank); or refused, and kept for you.

    Where Stripe does not reach, `rail` is `bank`: intended, sent by our bank under `reference`, or returned and kept for you.
    """

    id = serializers.IntegerField(help_text="One per rail.")
    rail = serializers.ChoiceField(choices=Payment.Method.choices)
    amount = MoneyField()
    status = serializers.ChoiceField(choices=[*Payout.Status.choices, ("returned", "Returned")])
    refusal = serializers.CharField(help_text="Why Stripe refused it.")
    bank_failure = serializers.CharField(help_text="Stripe's code of a bank that sent it back: the money is at Stripe.")
    reference = serializers.CharField(help_text="Our bank's, of a transfer.")
    intended_at = serializers.DateTimeField()
    sent_at = serializers.DateTimeField(allow_null=True)
    paid_at = serializers.DateTimeField(allow_null=True)


class OnboardingInput(serializers.Serializer):
    country = serializers.RegexField(
        r"^[A-Z]{2}$",
        required=False,
        help_text="ISO 3166-1, two letters: where your bank account is. Until your account at Stripe is made you may change it.",
    )


class OnboardingOutput(serializers.Serializer):
    """How far you are at Stripe, which pays you: not_started, unfinished, checking, paused or ready."""

    state = serializers.ChoiceField(choices=["not_started", "unfinished", "checking", "paused", "ready"])
    title = serializers.CharField(help_text="For a person.")
    needs = serializers.ListField(child=serializers.CharField(), help_text="What Stripe asks for next.")
    country = serializers.CharField(help_text="Empty: say it when you begin.")


class OnboardingLinkOutput(serializers.Serializer):
    url = serializers.URLField(help_text="Stripe's page for a person; good for minutes, and once.")


class MinimumInput(serializers.Serializer):
    minimum = MoneyField(help_text="Less than this waits and adds up.")


class MinimumOutput(serializers.Serializer):
    minimum = MoneyField(source="*")


class EarningsOutput(serializers.Serializer):
    """earned − taken_back = pending + due + in_transit + sent + paid."""

    currency = serializers.CharField()
    earned = MoneyField()
    taken_back = MoneyField(help_text="Refunded to buyers, or frozen by a dispute; less what was forgiven.")
    frozen = MoneyField(help_text="Of what was taken back: held while a dispute is open.")
    pending = SignedMoneyField(help_text="Held, or not available at Stripe yet.")
    due = SignedMoneyField(help_text="Below zero: more went back than was still owed; the next earnings pay it first.")
    owed_back = MoneyField(help_text="What was sent, went back to buyers since, and no earning has paid yet.")
    in_transit = MoneyField()
    sent = MoneyField()
    paid = MoneyField(help_text="In the bank.")
    reason = serializers.CharField(help_text="What the due money waits for.")
    waits = WaitOutput(many=True)
    standings = serializers.SerializerMethodField(help_text="What the money waits for, what you must do first.")

    @extend_schema_field(StandingOutput(many=True))
    def get_standings(self, of: Earnings) -> list[dict[str, object]]:
        party = self.context["party"]
        return StandingOutput(standings_of(party, [of]), many=True).data  # type: ignore[return-value]


class RefundOutput(serializers.ModelSerializer):
    """One refund of an order: intended, then pending at the card's bank or sent; or refused or failed, and booked back.

    What was paid by bank transfer goes back by transfer, which a person sends.
    """

    amount = MoneyField()
    reason = serializers.CharField(
        help_text="of_right, faulty_data, duplicate, fraud, goodwill, corrected or at_stripe."
    )
    state = serializers.ChoiceField(choices=Refund.State.choices)
    message = serializers.CharField(source="refusal_message", help_text="Why it was refused or failed.")
    method = serializers.ChoiceField(choices=Payment.Method.choices, help_text="To the card, or by bank transfer.")
    sentence = serializers.CharField(help_text="How it stands and what it waits for, for a person.")

    class Meta:
        model = Refund
        fields = ["id", "amount", "reason", "state", "method", "message", "sentence", "intended_at", "made_at"]


def _text(micros: int) -> str:
    whole, fraction = divmod(micros, 1_000_000)
    return f"{whole}.{fraction:06}"
