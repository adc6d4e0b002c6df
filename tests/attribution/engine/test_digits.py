"""The task of examples/digits, on a part of its records."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution.engine import train
from attribution.engine.shares import merge_rounds, plan_shares, run_round

DIGITS = Path(__file__).parents[3] / "examples" / "digits"


@pytest.fixture(scope="module")
def digits():
    """The modules `assignment` and `task`, imported as the command line does."""
    sys.path.insert(0, str(DIGITS))
    try:
        spec = importlib.util.spec_from_file_location("digits_task", DIGITS / "task.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DIGITS))
        sys.modules.pop("assignment", None)


def test_the_assignment_is_as_described_and_repeats_by_seed(digits):
    data = digits.assign(0)

    assert data.images.shape == (1797 + 60, 64) and data.images.max() == 16
    assert data.is_query.sum() == 360
    train_part = ~data.is_query
    assert set(data.rights_holder[train_part]) == set(range(10))
    assert set(data.labeller[train_part]) == set(range(5))
    wrong = data.given_label != data.true_label
    rates = [wrong[data.labeller == labeller].mean() for labeller in range(5)]
    assert rates[:4] == [0, 0, 0, 0] and 0.3 < rates[4] < 0.5
    assert not wrong[data.is_query].any()
    copies = data.images[data.rights_holder == 9]
    originals = {image.tobytes() for image in data.images[data.rights_holder == 0]}
    assert len(copies) == 60 and all(copy.tobytes() in originals for copy in copies)
    assert all(np.array_equal(a, b) for a, b in zip(vars(data).values(), vars(digits.assign(0)).values(), strict=True))
    assert not np.array_equal(data.rights_holder, digits.assign(1).rights_holder)


def test_the_careless_labeller_earns_less_per_record_than_every_other_beyond_the_intervals(digits):
    torch.set_num_threads(1)
    task = digits.make_task(0, n_train=400, epochs=8, batch=32)
    assert train(task).losses[-1] < 1

    plan = plan_shares(task, budget=150)
    result = merge_rounds(task, plan, [run_round(task, plan, r) for r in range(len(plan.rounds))])

    *others, careless = result.groups["labeller"]
    for other in others:
        assert careless.high / careless.n_records < other.low / other.n_records
        assert careless.paid_share / careless.n_records < other.paid_share / other.n_records
    assert result.regime == "smooth"
