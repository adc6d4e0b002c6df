"""What a person may say, read and checked; a service's refusal becomes an error beside its field."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from django import forms
from django.conf import settings
from django.template.defaultfilters import filesizeformat

from marketplace.errors import DomainError
from marketplace.export.odrl import ALLOWED_USES
from marketplace.ingest.mapping import MAX_PREVIEW_ROWS
from marketplace.models import ApiKey, Dataset, Offer, Party
from marketplace.money import InvalidMoney, Money

CURRENCIES = [(code, code) for code in Offer.Currency.values]


class Form(forms.Form):
    """A form that can take a service's refusal, whose pointers name its fields."""

    #: pointer of the service → field of this form, where they differ
    pointer_fields: dict[str, str] = {}

    def add_refusal(self, error: DomainError) -> None:
        """Put each pointer beside its field; what belongs to no field goes on top."""
        placed = False
        for pointer, detail in error.pointers.items():
            name = pointer.strip("/").split("/")[0]
            name = self.pointer_fields.get(name, name)
            if name in self.fields:
                self.add_error(name, detail)
                placed = True
        if not placed or error.message not in error.pointers.values():
            self.add_error(None, error.message)


class MoneyInput(forms.TextInput):
    def __init__(self) -> None:
        super().__init__(attrs={"inputmode": "decimal", "autocomplete": "off"})


class PercentField(forms.DecimalField):
    """Per cent with at most two decimals, as people write a rate; cleaned to basis points."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_digits=5, decimal_places=2, **{"min_value": 0, "max_value": 100} | options)
        self.widget.attrs["inputmode"] = "decimal"

    def clean(self, value: Any) -> Any:
        percent: Decimal | None = super().clean(value)
        return None if percent is None else int(percent * 100)


class DatasetForm(Form):
    title = forms.CharField(max_length=120, help_text="What it is, as you would say it to a colleague.")
    summary = forms.CharField(max_length=280, required=False, help_text="One or two sentences for the catalogue.")
    modality = forms.ChoiceField(choices=[(m.value, m.label) for m in Dataset.Modality], label="Kind of data")
    description = forms.CharField(
        required=False,
        widget=forms.Textarea,
        help_text="How it was made, what is in it, what it is good for and what it is not.",
    )
    source = forms.CharField(
        required=False,
        widget=forms.Textarea(attrs={"rows": 3}),
        label="Source and rights",
        help_text="Where it comes from, and under which license it came to you.",
    )


class FileForm(Form):
    file = forms.FileField(
        label="File",
        widget=forms.ClearableFileInput(attrs={"accept": ".csv,.parquet,text/csv"}),
        error_messages={
            "required": "Choose a CSV or Parquet file.",
            "empty": "This file is empty. Choose one with a header and at least one record.",
        },
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        limit = filesizeformat(settings.MAX_UPLOAD_BYTES)
        self.fields["file"].help_text = f"CSV (UTF-8, with a header) or Parquet, one record a row, up to {limit}."

    def clean_file(self) -> Any:
        file = self.cleaned_data["file"]
        if file.size > settings.MAX_UPLOAD_BYTES:
            raise forms.ValidationError(
                f"This file has {filesizeformat(file.size)}; the limit is {filesizeformat(settings.MAX_UPLOAD_BYTES)}. "
                "Split it, or send it as Parquet."
            )
        return file


#: Names by which columns are recognised; the person sees the guess and can change it.
LIKELY = {
    "label": ("label", "target", "class", "y", "category"),
    "rights_holder": ("rights_holder", "holder", "owner", "contributor", "author"),
    "labeller": ("labeller", "labeler", "annotator", "completed_by", "rater"),
    "content": ("content", "text", "pixels", "image", "features", "vector"),
}


class MappingForm(Form):
    """Which column is what. A run of numbered columns (`pixel_0` … `pixel_63`) is offered as one choice."""

    content = forms.ChoiceField(
        label="Content", help_text="What a model learns from: a text, a list of numbers, or a run of numbered columns."
    )
    label = forms.ChoiceField(label="Label", required=False, help_text="What a model learns to say.")
    rights_holder = forms.ChoiceField(
        label="Rights holder",
        required=False,
        help_text="The column that names whose record it is. Each name becomes a contributor who can claim their share.",
    )
    labeller = forms.ChoiceField(label="Labeller", required=False, help_text="The column that names who labelled it.")
    preview_rows = forms.IntegerField(
        min_value=0,
        max_value=MAX_PREVIEW_ROWS,
        initial=20,
        label="Rows that anyone may see",
        help_text="The first rows of the file, shown on the dataset’s page; 0 for none.",
    )

    def __init__(self, *args: Any, columns: Sequence[str], party: Party, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        runs = column_runs(columns)
        numbered = {name for members in runs.values() for name in members}
        single = [(name, name) for name in columns]
        self.runs = runs
        self.fields["content"].choices = [  # type: ignore[attr-defined]
            *((pattern, f"{names[0]} … {names[-1]} ({len(names)} columns)") for pattern, names in runs.items()),
            *single,
        ]
        rest = [(name, name) for name in columns if name not in numbered] or single
        self.fields["label"].choices = [("", "None"), *rest]  # type: ignore[attr-defined]
        self.fields["rights_holder"].choices = [("", f"None: all are {party.name}’s"), *rest]  # type: ignore[attr-defined]
        self.fields["labeller"].choices = [("", "None"), *rest]  # type: ignore[attr-defined]
        for field, names in LIKELY.items():
            found = next((column for name in names for column in columns if column.lower() == name), None)
            if field == "content":
                found = next(iter(runs), None) or found
            if found:
                self.fields[field].initial = found

    @property
    def mapping(self) -> dict[str, Any]:
        """As `start_upload` takes it: the content as the list of its columns."""
        data = self.cleaned_data
        return {
            "content": self.runs.get(data["content"], [data["content"]]),
            "label": data["label"],
            "rights_holder": data["rights_holder"],
            "labeller": data["labeller"],
            "preview_rows": data["preview_rows"],
        }


def column_runs(columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns that differ only in a number at the end, in the order of that number: {"pixel_*": ["pixel_0", …]}."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in columns:
        if match := re.fullmatch(r"(.*?)(\d+)", name):
            found.setdefault(f"{match[1]}*", []).append((int(match[2]), name))
    return {pattern: [name for _, name in sorted(members)] for pattern, members in found.items() if len(members) > 1}


class PublishForm(Form):
    signed_name = forms.CharField(
        max_length=120, label="Your full name", widget=forms.TextInput(attrs={"autocomplete": "name"})
    )
    confirmed = forms.BooleanField(
        label="I make this statement, and I may make it for the party named above.",
        error_messages={"required": "Tick the box to make the statement."},
    )


class OfferForm(Form):
    price = forms.CharField(
        max_length=40, initial="100.00", widget=MoneyInput, help_text="Of one license; 5.00 or more."
    )
    currency = forms.ChoiceField(choices=CURRENCIES)
    upfront = PercentField(
        initial=30, label="Paid at once, %", help_text="Divided by number of records as soon as someone buys."
    )
    pool = PercentField(
        initial=60, label="Royalty pool, %", help_text="Waits until it is measured what each record did for the model."
    )
    royalty = PercentField(
        initial=5, label="Royalty rate, %", help_text="Of a model’s revenue, times this dataset’s share in the model."
    )
    royalty_cap = forms.CharField(
        max_length=40, required=False, widget=MoneyInput, label="Royalty cap", help_text="Per license, over its life."
    )
    labellers = PercentField(
        initial=0, label="Labellers’ part, %", help_text="Of all of the above that contributors get."
    )
    term_days = forms.IntegerField(min_value=1, max_value=36_500, initial=365, label="Term, days")
    seats = forms.IntegerField(min_value=1, max_value=1_000_000, initial=5, help_text="People who may work with it.")
    disclosure_due_days = forms.IntegerField(
        min_value=1, max_value=3_650, initial=90, label="Disclose within, days", help_text="Of use in training."
    )
    allowed_uses = forms.MultipleChoiceField(
        widget=forms.CheckboxSelectMultiple,
        label="Allowed uses",
        error_messages={"required": "Allow at least one use."},
    )

    pointer_fields = {
        "upfront_bps": "upfront",
        "pool_bps": "pool",
        "royalty_bps": "royalty",
        "labellers_bps": "labellers",
        "price_micros": "price",
        "royalty_cap_micros": "royalty_cap",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["allowed_uses"].choices = list(ALLOWED_USES.items())  # type: ignore[attr-defined]
        self.fields["allowed_uses"].initial = list(ALLOWED_USES)[:1]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        currency = data.get("currency", Offer.Currency.USD)
        for name in ("price", "royalty_cap"):
            if data.get(name):
                try:
                    data[name] = Money.parse(data[name], currency)
                except InvalidMoney as error:
                    self.add_error(name, str(error))
        data["royalty_cap"] = data.get("royalty_cap") or None
        rest = 10_000 - settings.PLATFORM_FEE_BPS
        if "upfront" in data and "pool" in data and data["upfront"] + data["pool"] != rest:
            self.add_error(
                "pool",
                f"Paid at once and royalty pool must add up to {rest / 100:g} %: with the platform’s fee of "
                f"{settings.PLATFORM_FEE_BPS / 100:g} % that makes the whole price. They add up to "
                f"{(data['upfront'] + data['pool']) / 100:g} %.",
            )
        return data

    @property
    def terms(self) -> dict[str, Any]:
        """As `publish_offer` takes them."""
        data = self.cleaned_data
        return {
            "price": data["price"],
            "upfront_bps": data["upfront"],
            "pool_bps": data["pool"],
            "royalty_bps": data["royalty"],
            "royalty_cap": data["royalty_cap"],
            "labellers_bps": data["labellers"],
            "term_days": data["term_days"],
            "seats": data["seats"],
            "allowed_uses": data["allowed_uses"],
            "disclosure_due_days": data["disclosure_due_days"],
        }


class OrderForm(Form):
    key = forms.CharField(widget=forms.HiddenInput, max_length=255)
    offer = forms.IntegerField(widget=forms.HiddenInput)
    accepted_name = forms.CharField(
        max_length=120,
        label="Your full name",
        help_text="Typing it accepts the contract for the party you act for.",
        widget=forms.TextInput(attrs={"autocomplete": "name"}),
    )


def country_field(label: str) -> forms.RegexField:
    return forms.RegexField(
        r"^[A-Za-z]{2}$",
        label=label,
        help_text="Its two-letter code, such as DE or US.",
        error_messages={"invalid": "Give the two letters of the country’s ISO code, such as DE."},
        widget=forms.TextInput(attrs={"autocomplete": "country", "maxlength": 2}),
    )


class OrganisationForm(Form):
    name = forms.CharField(max_length=120, label="Name of the organisation")
    country = country_field("Country")


class InvitationForm(Form):
    email = forms.EmailField(
        label="E-mail address",
        help_text="Only who can read mail at this address can claim the contributor.",
        widget=forms.EmailInput(attrs={"autocomplete": "off"}),
    )


SCOPES = {
    ApiKey.Scope.READ: "Read: see your orders, licenses and statements, and download what is licensed",
    ApiKey.Scope.BUY: "Buy: place orders and open checkouts",
    ApiKey.Scope.UPLOAD: "Upload: add dataset versions",
    ApiKey.Scope.DISCLOSE: "Disclose: hand in checkpoints and publish what a model was trained on",
    ApiKey.Scope.REPORT: "Report: state a model’s revenue and pay its royalties",
}


class ApiKeyForm(Form):
    name = forms.CharField(max_length=80, help_text="Where it will live, such as “training cluster”.")
    scopes = forms.MultipleChoiceField(
        choices=list(SCOPES.items()),
        widget=forms.CheckboxSelectMultiple,
        initial=[ApiKey.Scope.READ],
        label="What it may do",
        error_messages={"required": "Choose at least one."},
    )
    spending_limit = forms.CharField(
        max_length=40,
        required=False,
        widget=MoneyInput,
        help_text="The most it may ever order, in any one currency. Leave it empty for no limit.",
    )

    def clean_spending_limit(self) -> int | None:
        text = self.cleaned_data["spending_limit"]
        if not text:
            return None
        try:
            return Money.parse(text, "USD").micros
        except InvalidMoney as error:
            raise forms.ValidationError(str(error)) from None
