"""Where floats end."""

from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.documents import Payee, TrainingRecords
from attribution.engine.division import Share as MeasuredShare
from attribution.models import PPQ
from attribution.services.shares import shares_by_influence, to_ppq
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


def _member(owner: int, n_records: int, paid: float, raw: float) -> MeasuredShare:
    return MeasuredShare(
        owner=owner,
        share=raw,
        low=raw - 0.1,
        high=raw + 0.1,
        paid_share=paid,
        count_share=n_records / 10,
        n_records=n_records,
        value=raw,
    )


def test_measured_shares_become_rows_and_whoever_only_repeats_others_has_none():
    everyone = np.arange(10)
    records = TrainingRecords(
        versions=(),
        citation=everyone * 0,
        row=everyone,
        copy_of=everyone,
        owner=everyone // 4,
        owners=(Payee(7, 1), Payee(7, 2), Payee(8, 1)),
        labeller=everyone * 0,
        labellers=(Payee(7, 5),),
    )
    owners = [_member(0, 8, 0.75, 1.1), _member(1, 2, 0.25, float("nan")), _member(2, 0, 0.0, 0.0)]
    measured = SimpleNamespace(owners=owners, groups={"labeller": [_member(0, 10, 1.0, 1.0)]})

    rows = shares_by_influence(measured, records)

    assert [(r.version_id, r.party_id, r.partition, r.n_records, r.count_ppq, r.paid_ppq, r.raw) for r in rows] == [
        (7, 1, "rights_holder", 8, 8 * PPQ // 10, 3 * PPQ // 4, 1.1),
        (7, 2, "rights_holder", 2, 2 * PPQ // 10, PPQ // 4, None),
        (7, 5, "labeller", 10, PPQ, PPQ, 1.0),
    ]
