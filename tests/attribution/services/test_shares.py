"""Where floats end."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.models import PPQ
from attribution.services.shares import to_ppq
from marketplace.money import Money
from payouts.allocation import allocate

weights = st.dictionaries(
    st.integers(0, 10**9), st.floats(0, 1e6, allow_nan=False, allow_subnormal=False), min_size=1, max_size=40
).filter(lambda shares: any(shares.values()))


@given(weights)
def test_to_ppq_sums_to_one_and_is_off_by_less_than_a_part_per_quadrillion(shares):
    parts = to_ppq(shares)

    assert sum(parts.values()) == PPQ
    total = sum(map(Fraction, shares.values()))
    for key, share in shares.items():
        assert abs(parts[key] - PPQ * Fraction(share) / total) < 1
        assert parts[key] >= 0


@given(weights)
def test_to_ppq_does_not_depend_on_the_order_of_the_parties(shares):
    assert to_ppq(dict(reversed(shares.items()))) == to_ppq(shares)


@given(
    shares=weights,
    cuts=st.lists(st.integers(1, 1_000), min_size=5, max_size=5),
    micros=st.integers(0, 10**13),
)
def test_splitting_an_account_in_five_moves_no_sum_by_more_than_a_micro_an_account(shares, cuts, micros):
    """Records' values stay as they are when an account is split; what may differ is rounding, twice."""
    victim = max(shares)
    split = {key: share for key, share in shares.items() if key != victim}
    pieces = [victim + 1 + n for n in range(5)]
    exact = [Fraction(shares[victim]) * cut / sum(cuts) for cut in cuts]
    split |= dict(zip(pieces, map(float, exact), strict=True))
    pool = Money(micros, "USD")

    whole, parts = allocate(pool, to_ppq(shares)), allocate(pool, to_ppq(split))

    allowance = 5 + micros / PPQ * 20
    assert abs(whole[victim].micros - sum(parts[piece].micros for piece in pieces)) <= allowance
    for key in shares.keys() - {victim}:
        assert abs(whole[key].micros - parts[key].micros) <= 1 + micros / PPQ * 20


@pytest.mark.parametrize("shares", [{}, {1: 0.0}, {1: -0.1, 2: 1.0}, {1: float("nan")}, {1: float("inf"), 2: 1.0}])
def test_what_are_no_weights_is_refused(shares):
    with pytest.raises(ValueError, match="Not weights"):
        to_ppq(shares)


def test_ties_go_to_the_lower_key():
    assert to_ppq({7: 1.0, 3: 1.0, 5: 1.0}) == {7: PPQ // 3, 3: PPQ // 3 + 1, 5: PPQ // 3}
    assert sum(Counter(to_ppq({7: 1.0, 3: 1.0, 5: 1.0})).values()) == PPQ
