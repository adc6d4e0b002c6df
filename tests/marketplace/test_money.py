from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.money import MAX_MICROS, MICROS, MINOR_DIGITS, InvalidMoney, Money

currencies = st.sampled_from(sorted(MINOR_DIGITS))
amounts = st.builds(Money, st.integers(-MAX_MICROS, MAX_MICROS), currencies)


@given(currency=currencies, minor=st.integers(0, MAX_MICROS // MICROS))
def test_what_is_written_is_read_back(currency, minor):
    money = Money.from_minor(minor, currency)

    assert Money.parse(money.amount_text(), currency) == Money.parse(money.amount_text(exact=True), currency) == money
    assert money.to_minor() == minor


@given(amounts)
def test_the_exact_text_is_the_amount(money):
    assert Fraction(Decimal(money.amount_text(exact=True))) == Fraction(money.micros, MICROS)
    assert str(money) == f"{money.amount_text(exact=True)} {money.currency}"


@given(amounts)
def test_what_can_be_paid_is_whole_and_never_more(money):
    payable = money.floor_to_minor()

    assert payable.to_minor() * Money.micros_per_minor(money.currency) == payable.micros
    assert abs(payable.micros) <= abs(money.micros)
    assert abs(money.micros - payable.micros) < Money.micros_per_minor(money.currency)


@given(money=amounts.filter(lambda money: money.micros >= 0), bps=st.integers(0, 10_000))
def test_a_share_and_its_rest_lose_at_most_a_micro(money, bps):
    parts = money.share(bps) + money.share(10_000 - bps)

    assert 0 <= money.micros - parts.micros <= 1
    assert Fraction(money.micros * bps, 10_000) - money.share(bps).micros < 1


@given(amounts, amounts)
def test_currencies_never_mix(one, other):
    if one.currency == other.currency:
        assert (one + other) - other == one
        assert (one < other) == (one.micros < other.micros)
        assert (one <= other) == (one.micros <= other.micros)
        assert one + -one == Money(0, one.currency) and bool(one) == (one.micros != 0)
        return
    for operation in ("__add__", "__sub__", "__lt__", "__le__"):
        with pytest.raises(ValueError, match="two currencies"):
            getattr(one, operation)(other)


@pytest.mark.parametrize(
    ("text", "currency", "what"),
    [
        ("-1", "USD", "negative"),
        ("-0.01", "USD", "negative"),
        ("0.0000001", "USD", "finer than the smallest unit"),
        ("100.001", "USD", "finer than the smallest unit"),
        ("100.5", "JPY", "finer than the smallest unit"),
        ("1e30", "USD", "more than the largest"),
        ("1e999999999", "USD", "more than the largest"),
        ("1000000000.01", "USD", "more than the largest"),
        ("NaN", "USD", "not a finite number"),
        ("-Infinity", "USD", "not a finite number"),
        ("", "USD", "not a number"),
        ("12,50", "USD", "not a number"),
        ("0x10", "USD", "not a number"),
        ("1", "BTC", "not a currency"),
        ("1", "usd", "not a currency"),
    ],
)
def test_what_is_no_amount_is_refused_with_the_reason(text, currency, what):
    with pytest.raises(InvalidMoney, match=what):
        Money.parse(text, currency)


@given(st.text(max_size=30), currencies)
def test_any_text_is_an_amount_in_range_or_refused(text, currency):
    try:
        money = Money.parse(text, currency)
    except InvalidMoney:
        return
    assert 0 <= money.micros <= MAX_MICROS
    assert money.micros % Money.micros_per_minor(currency) == 0


@pytest.mark.parametrize("micros", [1.0, True, "1", None])
def test_micros_are_integers(micros):
    with pytest.raises(TypeError):
        Money(micros, "USD")


def test_a_part_of_a_cent_cannot_be_charged():
    with pytest.raises(ValueError, match="whole number of minor units"):
        Money(10_001, "USD").to_minor()


def test_text_has_the_currencys_decimals():
    assert Money(1_234_500_000, "USD").amount_text() == "1234.50"
    assert Money(1_234_567_891, "USD").amount_text() == "1234.56"
    assert Money(1_234_567_891, "USD").amount_text(exact=True) == "1234.567891"
    assert Money(750_000_000, "JPY").amount_text() == "750"
    assert Money(-500_000, "EUR").amount_text() == "-0.50"
