from hypothesis import given
from hypothesis import strategies as st

from marketplace.money import Money
from marketplace.web.terms import example_sale


@given(price=st.integers(5_000_000, 10**15), upfront=st.integers(0, 9_000), labellers=st.integers(0, 10_000))
def test_example_sale_hands_out_the_whole_price(price, upfront, labellers):
    example = example_sale(
        price=Money(price, "USD"),
        platform_fee_bps=1_000,
        upfront_bps=upfront,
        pool_bps=9_000 - upfront,
        labellers_bps=labellers,
        royalty_bps=0,
        royalty_cap=None,
    )

    assert example.fee + example.upfront + example.pool == example.price
    assert example.upfront_to_labellers <= example.upfront


def test_example_royalty_stops_at_the_cap():
    terms = {
        "price": Money.parse("100", "USD"),
        "platform_fee_bps": 1_000,
        "upfront_bps": 3_000,
        "pool_bps": 6_000,
        "labellers_bps": 0,
        "royalty_bps": 500,
    }

    free = example_sale(**terms, royalty_cap=None)
    capped = example_sale(**terms, royalty_cap=Money.parse("40", "USD"))

    assert (free.royalty, free.royalty_is_capped) == (Money.parse("250", "USD"), False)
    assert (capped.royalty, capped.royalty_is_capped) == (Money.parse("40", "USD"), True)
