from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution.engine import EngineError
from attribution.engine.unreplayed import divide

RECORD = 0.5


def parts_for(task, values, n_part=10, noise=0.05, seed=0):
    """Parts that add up to the values, a little different from each other."""
    rng = np.random.default_rng(seed)
    drawn = 1 + noise * rng.standard_normal((len(values), n_part))
    return values[:, None] * drawn / drawn.sum(1, keepdims=True)


def divided(task, values, **settings):
    given = {"record": RECORD, "seed": 0, "intervals": "x"} | settings
    return divide(task, parts_for(task, values, **given.pop("parts", {})), **given)


def test_paid_shares_are_drawn_to_the_count_by_record_times_coherence(make_task):
    task = make_task(n_train=6, task={"owner": torch.tensor([0, 0, 0, 1, 1, 1])})
    values = np.array([3.0, 2.0, -1.0, 1.0, 1.0, 0.0])

    result = divided(task, values)

    assert result.total == pytest.approx(6)
    assert result.coherence == pytest.approx(6 / 8)
    assert result.reliability == pytest.approx(RECORD * 6 / 8)
    first, second = result.owners
    assert (first.share, second.share) == (pytest.approx(4 / 6), pytest.approx(2 / 6))
    assert first.paid_share == pytest.approx(0.375 * 4 / 6 + 0.625 * 0.5)
    assert first.paid_share + second.paid_share == pytest.approx(1)
    assert first.low < first.share < first.high


def test_no_small_sum_can_blow_a_payment_up(make_task):
    """Over Σφ/Σ|φ|: what is paid beyond counting is bounded by record · Σ_o |φ_o| / Σ|φ|, however near to 0 the sum is."""
    task = make_task(n_train=6, task={"owner": torch.tensor([0, 0, 0, 1, 1, 1])})
    for total in (1.0, 1e-2, 1e-4):
        values = np.array([5.0, 3.0, 2.0, -4.0, -3.0, -3.0 + total])

        result = divided(task, values, parts={"noise": 1e-7})

        assert not result.counted
        assert abs(result.owners[0].share) > 9, "the raw share is absurd, and says so"
        assert abs(result.owners[0].paid_share - 0.5) <= RECORD


@pytest.mark.parametrize(
    ("values", "parts", "record", "why"),
    [
        ([1, 1, 1, -1, -1, -1.0], {}, RECORD, "touches or lies below 0"),
        ([-1, -1, -1, -1, -1, -1.0], {}, RECORD, "touches or lies below 0"),
        ([0, 0, 0, 0, 0, 0.0], {}, RECORD, "no record has any value"),
        ([1, 1, 1, 1, 1, 1.0], {"n_part": 1}, RECORD, "cannot be redrawn"),
        ([1, 2, 3, 1, 1, 1.0], {}, 0.0, "no record says"),
    ],
    ids=["sum near 0", "sum below 0", "nothing", "one part", "a method without a record"],
)
def test_the_count_pays_where_nothing_says_that_the_sum_is_above_0(make_task, values, parts, record, why):
    task = make_task(n_train=6, task={"owner": torch.tensor([0, 0, 1, 1, 1, 1])})

    result = divided(task, np.array(values, dtype=float), parts=parts, record=record)

    assert result.counted and why in result.why_counted
    assert result.reliability == 0
    assert [owner.paid_share for owner in result.owners] == pytest.approx([2 / 6, 4 / 6])


def test_splitting_and_merging_accounts_moves_no_value_and_no_payment(make_task):
    values = np.array([3.0, 2.0, 1.0, 1.0, 1.0, 0.5])
    whole = divided(make_task(n_train=6, task={"owner": torch.tensor([0, 0, 0, 1, 1, 1])}), values)
    split = divided(make_task(n_train=6, task={"owner": torch.tensor([0, 5, 6, 1, 2, 1])}), values)

    assert (whole.values == split.values).all()
    assert whole.reliability == split.reliability
    paid = {owner.owner: owner.paid_share for owner in split.owners}
    assert paid[0] + paid[5] + paid[6] == pytest.approx(whole.owners[0].paid_share)


def test_copies_are_one_player_at_their_representative(make_task):
    copy_of = torch.tensor([0, 1, 2, 0, 4, 5])
    task = make_task(n_train=6, task={"owner": torch.tensor([0, 0, 0, 1, 1, 1]), "copy_of": copy_of})
    values = np.array([1.0, 1, 1, 1, 1, 1])

    result = divided(task, values)

    assert result.values.tolist() == pytest.approx([2, 1, 1, 0, 1, 1])
    assert [(o.n_records, o.share) for o in result.owners] == [(3, pytest.approx(4 / 6)), (2, pytest.approx(2 / 6))]


def test_intervals_widen_with_what_differs_between_parts(make_task):
    task = make_task(n_train=6, task={"owner": torch.tensor([0, 0, 0, 1, 1, 1])})
    values = np.array([3.0, 2.0, 1.0, 1.0, 1.0, 0.5])

    widths = [
        divided(task, values, parts={"noise": noise}).owners[0].high
        - divided(task, values, parts={"noise": noise}).owners[0].low
        for noise in (0.01, 0.1)
    ]

    assert 5 < widths[1] / widths[0] < 20


def test_values_that_are_not_finite_or_of_another_length_are_refused(make_task):
    task = make_task(n_train=6)
    with pytest.raises(EngineError, match="record 2"):
        divided(task, np.array([1, 1, np.nan, 1, 1, 1]))
    with pytest.raises(EngineError, match="for 7 records"):
        divided(replace(task, train=make_task(n_train=7).train, recipe=None), np.ones(6))
