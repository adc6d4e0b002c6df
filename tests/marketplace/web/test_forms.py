import pytest

from marketplace.errors import InvalidInput
from marketplace.models import Party
from marketplace.money import Money
from marketplace.web.forms import MappingForm, OfferForm, column_runs

TERMS = {
    "price": "129.00",
    "currency": "USD",
    "upfront": "30",
    "pool": "60",
    "royalty": "2.5",
    "royalty_cap": "",
    "labellers": "25",
    "term_days": "365",
    "seats": "5",
    "disclosure_due_days": "90",
    "allowed_uses": ["train"],
}


def test_column_runs_follow_their_numbers_and_leave_single_columns_alone():
    columns = ["label", "pixel_10", "pixel_2", "x1"]

    assert column_runs(columns) == {"pixel_*": ["pixel_2", "pixel_10"]}


def test_mapping_form_guesses_the_columns_and_names_every_one_of_a_run():
    columns = ["pixel_0", "pixel_1", "Label", "holder", "annotator"]
    guessed = MappingForm(columns=columns, party=Party(name="Alice"))
    initial = {name: guessed[name].initial for name in ("content", "label", "rights_holder", "labeller")}

    sent = MappingForm(initial | {"preview_rows": "3"}, columns=columns, party=Party(name="Alice"))

    assert sent.is_valid(), sent.errors
    assert sent.mapping == {
        "content": ["pixel_0", "pixel_1"],
        "label": "Label",
        "rights_holder": "holder",
        "labeller": "annotator",
        "preview_rows": 3,
    }


def test_offer_form_reads_money_and_rates():
    form = OfferForm(TERMS | {"royalty_cap": "20000"})

    assert form.is_valid(), form.errors
    assert form.terms == {
        "price": Money(129_000_000, "USD"),
        "upfront_bps": 3_000,
        "pool_bps": 6_000,
        "royalty_bps": 250,
        "royalty_cap": Money(20_000_000_000, "USD"),
        "labellers_bps": 2_500,
        "term_days": 365,
        "seats": 5,
        "allowed_uses": ["train"],
        "disclosure_due_days": 90,
    }


@pytest.mark.parametrize("price", ["-1", "0.0000001", "1e30", "NaN", "a lot"])
def test_offer_form_refuses_what_is_no_price_beside_its_field(price):
    form = OfferForm(TERMS | {"price": price})

    assert not form.is_valid()
    assert list(form.errors) == ["price"]


def test_offer_form_says_what_the_parts_add_up_to():
    form = OfferForm(TERMS | {"pool": "70"})

    assert not form.is_valid()
    assert "must add up to 90 %" in form.errors["pool"][0]
    assert "They add up to 100 %" in form.errors["pool"][0]


def test_a_refusal_goes_beside_its_field_and_the_rest_on_top():
    form = OfferForm(TERMS)
    assert form.is_valid()

    form.add_refusal(InvalidInput("The price is below the least.", pointers={"/price_micros": "At least 5.00."}))

    assert form.errors == {"price": ["At least 5.00."], "__all__": ["The price is below the least."]}
