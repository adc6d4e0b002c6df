from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.money import Money
from payouts.allocation import allocate

share_maps = st.dictionaries(st.integers(1, 10**6), st.integers(0, 10**15), min_size=1, max_size=40).filter(
    lambda weights: sum(weights.values()) > 0
)


@given(micros=st.integers(0, 10**15), weights=share_maps)
def test_allocate_hands_out_the_whole_pool_and_cheats_nobody(micros: int, weights: dict[int, int]) -> None:
    split = allocate(Money(micros, "USD"), weights)

    assert sum(due.micros for due in split.values()) == micros
    for who, weight in weights.items():
        assert abs(split[who].micros - Fraction(micros * weight, sum(weights.values()))) < 1


@given(micros=st.integers(0, 10**15), weights=share_maps, seed=st.randoms())
def test_allocate_does_not_depend_on_the_order_of_the_weights(
    micros: int, weights: dict[int, int], seed: object
) -> None:
    shuffled = list(weights.items())
    seed.shuffle(shuffled)  # type: ignore[attr-defined]

    assert allocate(Money(micros, "USD"), dict(shuffled)) == allocate(Money(micros, "USD"), weights)


@given(
    micros=st.integers(0, 10**15),
    weights=share_maps,
    parts=st.lists(st.integers(0, 10**14), min_size=5, max_size=5).filter(any),
)
def test_splitting_one_account_into_five_changes_no_sum_by_more_than_a_micro_per_account(
    micros: int, weights: dict[int, int], parts: list[int]
) -> None:
    whole = weights | {0: sum(parts)}
    split = weights | {-number: part for number, part in enumerate(parts, start=1)}

    before = allocate(Money(micros, "USD"), whole)
    after = allocate(Money(micros, "USD"), split)

    halves = sum(after[-number].micros for number in range(1, 6))
    assert abs(halves - before[0].micros) < 6
    for who in weights:
        assert abs(after[who].micros - before[who].micros) <= 1


def test_allocate_gives_what_is_left_to_the_largest_remainder_then_to_the_lower_key() -> None:
    assert allocate(Money(10, "USD"), {3: 1, 1: 1, 2: 1}) == {
        1: Money(4, "USD"),
        2: Money(3, "USD"),
        3: Money(3, "USD"),
    }
    assert allocate(Money(10, "USD"), {1: 55, 2: 28, 3: 17}) == {
        1: Money(5, "USD"),
        2: Money(3, "USD"),
        3: Money(2, "USD"),
    }


@pytest.mark.parametrize(("micros", "weights"), [(-1, {1: 1}), (1, {}), (1, {1: 0}), (1, {1: 2, 2: -1})], ids=str)
def test_allocate_refuses_what_cannot_be_split(micros: int, weights: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="Cannot split"):
        allocate(Money(micros, "USD"), weights)
