from datetime import timedelta
from typing import Any

from django import forms
from django.db.models import QuerySet

from marketplace import clock
from marketplace.models import TrainedModel
from marketplace.money import InvalidMoney, Money
from marketplace.web.forms import CURRENCIES, Form, MoneyInput, country_field


class CountryForm(Form):
    country = country_field("Country of your bank account")


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
        return {name: data[name] for name in ("model", "period_start", "period_end", "revenue")} | {
            "key": f"web:{data['key']}"
        }
