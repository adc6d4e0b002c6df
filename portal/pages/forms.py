from datetime import UTC, datetime, timedelta
from typing import Any

from django import forms
from django.db.models import QuerySet

from attribution.models import AttributionResult
from attribution.services.questions import MAX_TEXT
from marketplace import clock
from marketplace.models import StaffKey, TrainedModel
from marketplace.money import MINOR_DIGITS, InvalidMoney, Money
from marketplace.templatetags.residual import money
from marketplace.web.forms import CURRENCIES, Form, MoneyInput, country_field
from payouts import chart
from payouts.models import BankReceipt, Document, EventSettlement, Payout, Refund, TaxRate
from payouts.services.clawbacks import Part
from payouts.services.disputes import EVIDENCE_FIELDS, MAX_EVIDENCE
from payouts.services.manual_entries import BY_HAND
from payouts.services.plans import LEAST, MOST_TIMES
from payouts.services.settlements import MAX_REASON


class CountryForm(Form):
    country = country_field("Country of your bank account")


class BankDetailsForm(Form):
    """Where a payee whom Stripe does not reach is paid."""

    account_holder = forms.CharField(max_length=140, label="Account holder", help_text="As the bank names them.")
    account = forms.CharField(max_length=60, label="IBAN, or account number")
    bic = forms.CharField(
        max_length=14, required=False, label="BIC (SWIFT)", help_text="With an account number; an IBAN needs none."
    )
    bank = forms.CharField(
        max_length=140, required=False, label="Bank", help_text="Its name and place, where it has no BIC."
    )
    address = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}),
        max_length=500,
        label="Holder’s address",
        help_text="Street, postcode, town and country.",
    )


class DateInput(forms.DateInput):
    input_type = "date"

    def __init__(self) -> None:
        super().__init__(format="%Y-%m-%d")


class RevenueForm(Form):
    """One model's revenue in one period; the key makes a second click harmless."""

    key = forms.CharField(widget=forms.HiddenInput, max_length=255)
    model: forms.ModelChoiceField = forms.ModelChoiceField(TrainedModel.objects.none(), empty_label=None)
    period_start = forms.DateField(widget=DateInput, label="From")
    period_end = forms.DateField(widget=DateInput, label="To, inclusive")
    revenue = forms.CharField(
        max_length=40, widget=MoneyInput, help_text="What the model earned in that period; 0 is an answer too."
    )
    currency = forms.ChoiceField(choices=CURRENCIES)
    purchase_order = forms.CharField(
        max_length=60, required=False, label="Your purchase-order number", help_text="It is printed on the invoice."
    )

    def __init__(self, *args: Any, models: QuerySet[TrainedModel], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["model"].queryset = models  # type: ignore[attr-defined]
        last = clock.today().replace(day=1) - timedelta(days=1)
        self.fields["period_start"].initial = last.replace(day=1)
        self.fields["period_end"].initial = last

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        if data.get("revenue") and data.get("currency"):
            try:
                data["revenue"] = Money.parse(data["revenue"], data["currency"])
            except InvalidMoney as error:
                self.add_error("revenue", str(error))
        return data

    @property
    def report(self) -> dict[str, Any]:
        """As `report_revenue` takes it."""
        data = self.cleaned_data
        return {name: data[name] for name in ("model", "period_start", "period_end", "revenue", "purchase_order")} | {
            "key": f"web:{data['key']}"
        }


class QueryForm(Form):
    """One of the evaluation queries, by its number or out of those that are shown."""

    query = forms.IntegerField(min_value=0, label="Number of the query")

    def __init__(self, *args: Any, n_queries: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = self.fields["query"]
        field.help_text = f"0 to {n_queries - 1:,}"
        field.widget.attrs |= {"max": n_queries - 1, "inputmode": "numeric"}

    @property
    def question(self) -> dict[str, Any]:
        """As `ask` takes it."""
        return {"query": self.cleaned_data["query"]}


class TextQuestionForm(Form):
    """A text of the asker's own and, of a model of classes, the label that is asked about."""

    text = forms.CharField(
        max_length=MAX_TEXT,
        widget=forms.Textarea(attrs={"rows": 3}),
        label="Your text",
        help_text="It is kept with its answer, under an address that only you are given.",
    )
    label = forms.ChoiceField(
        label="The label to ask about", help_text="What moved the model towards it, or away from it."
    )

    def __init__(self, *args: Any, classes: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if classes:
            self.fields["label"].choices = [(name, name) for name in classes]  # type: ignore[attr-defined]
        else:
            del self.fields["label"]

    @property
    def question(self) -> dict[str, Any]:
        """As `ask` takes it."""
        return {name: self.cleaned_data.get(name, "") for name in ("text", "label")}


class AmountForm(Form):
    """A form with an amount in a currency that is known already."""

    amount = forms.CharField(max_length=40, widget=MoneyInput)

    def __init__(self, *args: Any, currency: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.currency = currency
        self.fields["amount"].label = f"Amount, {currency}"

    def clean_amount(self) -> Money:
        try:
            return Money.parse(self.cleaned_data["amount"], self.currency)
        except InvalidMoney as error:
            raise forms.ValidationError(str(error)) from None


class CorrectReportForm(AmountForm):
    """The right revenue of a report that was wrong; the key makes a second click harmless."""

    key = forms.CharField(widget=forms.HiddenInput, max_length=64)
    period_start = forms.DateField(widget=DateInput, label="From")
    period_end = forms.DateField(widget=DateInput, label="To, inclusive")
    note = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}),
        max_length=500,
        label="What was wrong",
        help_text="If money goes back, the people who give it back read this.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["amount"].label = f"Revenue in truth, {self.currency}"

    @property
    def correction(self) -> dict[str, Any]:
        """As `correct_report` takes it."""
        data = self.cleaned_data
        return {name: data[name] for name in ("period_start", "period_end", "note")} | {
            "revenue": data["amount"],
            "key": f"web:{data['key']}",
        }


class BillingForm(Form):
    legal_name = forms.CharField(max_length=200, label="Registered name")
    address = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}), max_length=500, label="Street, postcode and town"
    )
    country = country_field("Country")
    region = forms.CharField(
        max_length=6, required=False, help_text="Where taxes depend on it: the state’s code, such as CA."
    )
    vat_id = forms.CharField(
        max_length=30, required=False, label="VAT id", help_text="With its country’s letters; it is checked."
    )

    def clean_country(self) -> str:
        return str(self.cleaned_data["country"]).upper()


class PurchaseOrderForm(Form):
    purchase_order = forms.CharField(max_length=60, required=False, label="Your purchase-order number")


class EstimateForm(Form):
    """A planned selection, or one's own model, and a revenue."""

    model: forms.ModelChoiceField = forms.ModelChoiceField(
        TrainedModel.objects.none(), required=False, empty_label="a selection that you plan", label="For"
    )
    datasets = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}),
        required=False,
        max_length=10_000,
        label="Datasets of a planned selection",
        help_text="One per line: the last part of its address, and how many records if not all: fashion 500",
    )
    revenue = forms.CharField(max_length=40, widget=MoneyInput, initial="100000")
    currency = forms.ChoiceField(choices=CURRENCIES)

    def __init__(self, *args: Any, models: QuerySet[TrainedModel], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["model"].queryset = models  # type: ignore[attr-defined]
        if not models:
            del self.fields["model"]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        if data.get("revenue") and data.get("currency"):
            try:
                data["revenue"] = Money.parse(data["revenue"], data["currency"])
            except InvalidMoney as error:
                self.add_error("revenue", str(error))
        if not data.get("model") and not data.get("datasets") and "datasets" not in self.errors:
            self.add_error("datasets", "Name at least one dataset.")
        return data

    def clean_datasets(self) -> list[tuple[str, int | None]]:
        lines = [line.split() for line in self.cleaned_data["datasets"].splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if len(line) > 2 or (
                len(line) == 2 and not (line[1].isascii() and line[1].isdigit() and len(line[1]) < 12)
            ):
                raise forms.ValidationError(f"Line {number}: give a dataset, and a number of records if not all.")
        return [(line[0], int(line[1]) if len(line) == 2 else None) for line in lines]


class ReceiptForm(AmountForm):
    reference = forms.CharField(max_length=120, label="The statement’s number of the transfer")
    received_on = forms.DateField(widget=DateInput, label="Received on")

    @property
    def given(self) -> dict[str, Any]:
        """As `record_receipt` takes it."""
        return {name: self.cleaned_data[name] for name in ("amount", "reference", "received_on")}


class RecordTransferForm(Form):
    """A transfer out of our bank account, as its statement says it."""

    reference = forms.CharField(max_length=120, label="The statement’s number of the transfer")
    sent_on = forms.DateField(widget=DateInput, label="Sent on")


class ReturnForm(AmountForm):
    reference = forms.CharField(max_length=120, label="The statement’s number of the transfer")
    sent_on = forms.DateField(widget=DateInput, label="Sent on")

    @property
    def given(self) -> dict[str, Any]:
        """As `record_money_returned` takes it."""
        return {name: self.cleaned_data[name] for name in ("amount", "reference", "sent_on")}


class NotSentForm(Form):
    note = forms.CharField(max_length=500, label="Why, in words", help_text="The buyer reads it.")


class ReturnedForm(Form):
    reference = forms.CharField(max_length=120, label="The statement’s number of what came back")
    note = forms.CharField(max_length=500, label="Why, as the bank says it", help_text="The buyer reads it.")


class UnappliedForm(Form):
    """Money that arrived and fits no invoice."""

    payer = forms.CharField(max_length=200, label="Payer, as the statement names them")
    amount = forms.CharField(max_length=40, widget=MoneyInput)
    currency = forms.ChoiceField(choices=CURRENCIES)
    reference = forms.CharField(max_length=120, label="The statement’s number of the transfer")
    received_on = forms.DateField(widget=DateInput, label="Received on")
    note = forms.CharField(max_length=500, required=False, label="What it may be for")

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        if data.get("amount") and data.get("currency"):
            try:
                data["amount"] = Money.parse(data["amount"], data["currency"])
            except InvalidMoney as error:
                self.add_error("amount", str(error))
        return data

    @property
    def given(self) -> dict[str, Any]:
        """As `record_unapplied` takes it."""
        return {name: self.cleaned_data[name] for name in ("payer", "amount", "reference", "received_on", "note")}


class ApplyForm(Form):
    """An open invoice, and other money that fits none, where one sum alone does not pay it."""

    invoice: forms.ModelChoiceField = forms.ModelChoiceField(Document.objects.none(), empty_label=None)
    together = forms.TypedMultipleChoiceField(
        coerce=int, required=False, widget=forms.CheckboxSelectMultiple, label="Together with"
    )

    def __init__(self, *args: Any, invoices: QuerySet[Document], others: list[BankReceipt], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        chosen = self.fields["invoice"]
        chosen.queryset = invoices  # type: ignore[attr-defined]
        chosen.label_from_instance = lambda one: f"{one.reference}, {one.buyer.name}: {money(one.total)}"  # type: ignore[attr-defined]
        self.fields["together"].choices = [  # type: ignore[attr-defined]
            (one.pk, f"{one.payer}, {one.reference}: {money(one.left)}") for one in others
        ]
        if not others:
            del self.fields["together"]

    def clean(self) -> dict[str, Any]:
        return {"together": []} | (super().clean() or {})


class CorrectDivisionForm(Form):
    result: forms.ModelChoiceField = forms.ModelChoiceField(
        AttributionResult.objects.none(),
        required=False,
        empty_label="by count, as the counts are now",
        label="Divide anew by",
    )
    reason = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}),
        max_length=2_000,
        label="What went wrong",
        help_text="The payees read it.",
    )

    def __init__(self, *args: Any, results: QuerySet[AttributionResult], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["result"].queryset = results  # type: ignore[attr-defined]


class TaxRateForm(Form):
    jurisdiction = forms.CharField(max_length=6, help_text="ISO 3166: DE, or US-CA.")
    name = forms.CharField(max_length=40, initial="VAT", label="Name on the invoice")
    percent = forms.DecimalField(min_value=0, max_value=100, decimal_places=2, label="Rate, %")
    is_reversed = forms.BooleanField(required=False, label="None for buyers with a VAT id (reverse charge)")
    valid_from = forms.DateField(widget=DateInput)
    valid_until = forms.DateField(widget=DateInput, required=False, help_text="The last day; open-ended without.")

    @property
    def given(self) -> dict[str, Any]:
        """As `add_tax_rate` takes it."""
        data = self.cleaned_data
        named = ("jurisdiction", "name", "is_reversed", "valid_from", "valid_until")
        return {name: data[name] for name in named} | {"rate_bps": int(data["percent"] * 100)}


class RefundForm(AmountForm):
    """What goes back of one payment, and why; the key makes a second click harmless."""

    key = forms.CharField(widget=forms.HiddenInput, max_length=64)
    line = forms.TypedChoiceField(coerce=int, required=False, empty_value=None, label="Of")
    reason = forms.ChoiceField(
        choices=[choice for choice in Refund.Reason.choices if choice[0] not in ("of_right", "at_stripe", "corrected")]
    )
    note = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}), max_length=2_000, label="Why, in words", help_text="For the auditor."
    )

    def __init__(self, *args: Any, parts: list[Part], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["line"].choices = [  # type: ignore[attr-defined]
            ("", "every line, in proportion"),
            *((part.line.pk, f"{part.line.version}: {part.left} left") for part in parts if part.left),
        ]

    @property
    def refund(self) -> dict[str, Any]:
        """As `request_refund` takes it."""
        data = self.cleaned_data
        return {name: data[name] for name in ("amount", "line", "note", "key")} | {
            "reason": Refund.Reason(data["reason"])
        }


class DisputeAnswerForm(Form):
    """Evidence in words, or that we give in; files are attached in Stripe's dashboard."""

    gives_in = forms.BooleanField(required=False, label="Give in: the buyer is right")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, label in EVIDENCE_FIELDS.items():
            self.fields[name] = forms.CharField(
                label=label, required=False, max_length=MAX_EVIDENCE, widget=forms.Textarea(attrs={"rows": 3})
            )

    @property
    def answer(self) -> dict[str, Any]:
        """As `answer_dispute` takes it."""
        data = self.cleaned_data
        return {"gives_in": data["gives_in"], "evidence": {name: data[name] for name in EVIDENCE_FIELDS if data[name]}}


class ReversalForm(AmountForm):
    payout: forms.ModelChoiceField = forms.ModelChoiceField(Payout.objects.none(), empty_label=None)
    note = forms.CharField(max_length=500, label="Why, in words", help_text="The payee reads it.")

    def __init__(self, *args: Any, payouts: QuerySet[Payout], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["payout"].queryset = payouts  # type: ignore[attr-defined]

    @property
    def given(self) -> dict[str, Any]:
        """As `request_reversal` takes it."""
        return {name: self.cleaned_data[name] for name in ("payout", "amount", "note")}


class WriteOffForm(AmountForm):
    reason = forms.CharField(max_length=500, label="Why, in words", help_text="For the auditor.")

    @property
    def given(self) -> dict[str, Any]:
        """As `write_off` takes it, but the party."""
        return {name: self.cleaned_data[name] for name in ("amount", "reason")}


class MinimumForm(AmountForm):
    """The least a payee wants to be sent at once."""

    def __init__(self, *args: Any, currency: str, **kwargs: Any) -> None:
        super().__init__(*args, currency=currency, **kwargs)
        least = Money(LEAST[currency], currency)
        self.fields["amount"].label = f"Send me {currency} from"
        self.fields[
            "amount"
        ].help_text = f"{money(least)} to {money(Money(least.micros * MOST_TIMES, currency))}; less waits and adds up."


class StartRunForm(Form):
    currency = forms.ChoiceField(choices=[(currency, currency) for currency in MINOR_DIGITS])
    key = forms.CharField(widget=forms.HiddenInput, max_length=64)


class ReasonForm(Form):
    reason = forms.CharField(max_length=500, label="Why, in words", help_text="Whoever looks at the run reads it.")


class SettlementForm(Form):
    """How a failed event is settled: otherwise, or by giving back the surplus charge behind it."""

    how = forms.ChoiceField(
        choices=[
            (EventSettlement.Act.REFUND, "The charge is for nothing that we sell: book it, and refund it"),
            (EventSettlement.Act.EXPLAINED, "It was settled otherwise, or there is nothing to do"),
        ],
        widget=forms.RadioSelect,
        label="How it is settled",
    )
    reason = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}),
        max_length=MAX_REASON,
        label="Settled, because",
        help_text="An auditor reads it.",
    )

    def __init__(self, *args: Any, has_surplus: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        how = self.fields["how"]
        if not has_surplus:
            how.choices = how.choices[1:]  # type: ignore[attr-defined]
        how.initial = how.choices[0][0]  # type: ignore[attr-defined]

    @property
    def proposal(self) -> dict[str, Any]:
        return {"act": EventSettlement.Act(self.cleaned_data["how"]), "reason": self.cleaned_data["reason"]}


class CloseForm(Form):
    """Close a month for good."""

    month = forms.DateField(input_formats=["%Y-%m-%d"], widget=forms.HiddenInput)
    note = forms.CharField(
        required=False,
        max_length=2_000,
        widget=forms.Textarea(attrs={"rows": 2}),
        label="Why it is closed although something is open",
        help_text="For the auditor. Leave it empty where nothing is.",
    )


class ManualEntryForm(Form):
    """Up to six legs, debit or credit; the key makes a second click harmless."""

    N_LEGS = 6
    key = forms.CharField(widget=forms.HiddenInput, max_length=64)
    currency = forms.ChoiceField(choices=CURRENCIES)
    booked_on = forms.DateField(widget=DateInput, label="On", help_text="Its business day, in a month that is open.")
    reason = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 3}), max_length=2_000, label="Why, in words", help_text="For the auditor."
    )
    balance_transaction_id = forms.CharField(
        required=False,
        max_length=255,
        label="Stripe's balance transaction",
        help_text="txn_…, where the entry moves cash at Stripe; nowhere else.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Each tax rate has an account of its own.
        taxes = [(f"tax:{rate.pk}", f"tax: {rate}") for rate in TaxRate.objects.all()]
        named = [(name, f"{name}: {chart.PURPOSES[name].meaning}") for name in BY_HAND if name != "tax"]
        accounts = [("", "none"), *named, *taxes]
        for number in range(1, self.N_LEGS + 1):
            self.fields[f"account_{number}"] = forms.ChoiceField(
                choices=accounts, required=number <= 2, label=f"Account {number}"
            )
            self.fields[f"debit_{number}"] = forms.CharField(
                required=False, max_length=40, widget=MoneyInput, label=f"Debit {number}"
            )
            self.fields[f"credit_{number}"] = forms.CharField(
                required=False, max_length=40, widget=MoneyInput, label=f"Credit {number}"
            )

    def leg_fields(self) -> list[list[forms.BoundField]]:
        """The fields of each leg, for the page."""
        return [
            [self[f"{name}_{number}"] for name in ("account", "debit", "credit")]
            for number in range(1, self.N_LEGS + 1)
        ]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        currency = data.get("currency", "USD")
        legs: dict[str, int] = {}
        for number in range(1, self.N_LEGS + 1):
            account = data.get(f"account_{number}")
            given = {
                side: str(data[f"{side}_{number}"]) for side in ("debit", "credit") if data.get(f"{side}_{number}")
            }
            if not account:
                if given:
                    self.add_error(f"account_{number}", "Which account?")
                continue
            if len(given) != 1:
                self.add_error(f"debit_{number}", "Give a debit or a credit, one of the two.")
                continue
            side, text = next(iter(given.items()))
            try:
                amount = Money.parse(text, currency).micros
            except InvalidMoney as error:
                self.add_error(f"{side}_{number}", str(error))
                continue
            code = f"{account}:{currency}"
            if code in legs:
                self.add_error(f"account_{number}", "This account has a leg already; give one amount.")
            legs[code] = amount if side == "debit" else -amount
        data["legs"] = legs
        return data

    @property
    def proposal(self) -> dict[str, Any]:
        """As `propose` takes it: at noon of its day, or now if that is today."""
        data = self.cleaned_data
        day = data["booked_on"]
        now = clock.now()
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
        return {
            "key": f"web:{data['key']}",
            "legs": data["legs"],
            "reason": data["reason"],
            "booked_at": min(now, noon) if day == now.date() else noon,
            "balance_transaction_id": data["balance_transaction_id"],
        }


class ReferenceForm(Form):
    reference = forms.CharField(max_length=120, label="The bank's reference")


class AuditFilterForm(Form):
    who = forms.CharField(required=False, max_length=100, label="Who", help_text="E-mail or party.")
    action = forms.CharField(required=False, max_length=60, label="Did what", help_text="Such as refund.")
    target = forms.CharField(required=False, max_length=120, label="To what", help_text="Such as payout run 2.")
    since = forms.DateField(required=False, widget=DateInput, label="From")
    until = forms.DateField(required=False, widget=DateInput, label="To, inclusive")
    staff = forms.BooleanField(required=False, label="Staff only")


class StaffKeyForm(Form):
    """A key of one's own to the desk's API."""

    name = forms.CharField(max_length=80, help_text="Where it will live, such as “month-end script”.")
    scopes = forms.MultipleChoiceField(
        choices=[
            (StaffKey.Scope.READ, "desk:read: look at everything the desk shows"),
            (
                StaffKey.Scope.ACT,
                "desk:act: propose, stop and, with a code of your authenticator app for each act, decide and pay",
            ),
        ],
        widget=forms.CheckboxSelectMultiple,
        initial=[StaffKey.Scope.READ],
        label="What it may do",
        error_messages={"required": "Choose at least one."},
    )
    days = forms.IntegerField(
        min_value=1, max_value=StaffKey.LONGEST.days, initial=30, label="Works for, days", help_text="90 at most."
    )
