import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution.engine import EngineError, train
from attribution.engine.estimated import (
    EstimatePlan,
    check_cost,
    chosen_checkpoints,
    estimate_shares,
    is_spread,
    merge_pieces,
    plan_estimate,
    run_piece,
)
from attribution.engine.estimators import trak
from attribution.engine.shares import RoundResult


@pytest.fixture
def task(make_task, tmp_path):
    """Four checkpoints of a training whose recipe is not told; two owners, one copy."""
    whole = make_task(
        n_train=24,
        n_query=10,
        epochs=4,
        task={"owner": torch.arange(24) % 2, "copy_of": torch.tensor([*range(23), 5])},
    )
    run = train(whole, checkpoint_steps=[3, 6, 12, 24], checkpoint_dir=tmp_path)
    return replace(whole, recipe=None, checkpoints=run.checkpoints)


def test_the_pieces_give_what_trak_gives_with_all_queries_averaged(task):
    expected = trak.estimate(task).scores.double().mean(1).numpy()

    found = estimate_shares(task)

    assert np.abs(found.values - expected).max() < 1e-6 * np.abs(expected).max()


def test_how_the_records_are_cut_changes_nothing_beyond_rounding(task):
    whole, cut = estimate_shares(task), estimate_shares(task, records_per_piece=7)

    assert np.abs(whole.values - cut.values).max() < 1e-10 * np.abs(whole.values).max()
    assert [o.owner for o in whole.owners] == [0, 1]
    assert whole.owners[0].n_records + whole.owners[1].n_records == 23


def test_a_piece_has_the_same_bytes_on_every_re_run_and_a_plan_survives_json(task, tmp_path):
    plan = EstimatePlan.from_json(json.loads(json.dumps(plan_estimate(task, records_per_piece=10).to_json())))
    assert plan == plan_estimate(task, records_per_piece=10)
    kept = []
    for attempt in range(2):
        results = {}
        for number in range(len(plan.pieces)):
            path = tmp_path / f"{attempt}-{number}.safetensors"
            run_piece(task, plan, number, results).save(path)
            results[number] = RoundResult.load(path)
        kept.append([(tmp_path / f"{attempt}-{n}.safetensors").read_bytes() for n in range(len(plan.pieces))])

    assert kept[0] == kept[1]
    assert merge_pieces(task, plan, results).to_json() == estimate_shares(task, records_per_piece=10).to_json()


def test_records_that_teach_wrong_answers_are_found_harmful(make_task, tmp_path):
    whole = make_task(n_train=60, n_query=20, epochs=4)
    inputs, labels = whole.train[torch.arange(60)]
    wrong = torch.arange(0, 60, 5)
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + 1) % 3
    owner = torch.zeros(60, dtype=torch.int64)
    owner[wrong] = 1
    whole = replace(whole, train=type(whole.train)(inputs, labels), owner=owner)
    run = train(whole, checkpoint_steps=[7, 15, 30, 60], checkpoint_dir=tmp_path)

    result = estimate_shares(replace(whole, recipe=None, checkpoints=run.checkpoints))

    honest, careless = result.owners
    assert careless.share < 0 < honest.share
    assert careless.paid_share < 0.8 * careless.count_share


@pytest.mark.parametrize(
    ("steps", "chosen", "spread"),
    [
        ([10, 20, 40, 80], [0, 1, 2, 3], True),
        ([8, 16, 24, 32, 40, 48, 56, 64, 72, 80], [0, 2, 4, 9], True),
        ([77, 78, 79, 80], [0, 3], False),
        ([80], [0], False),
        ([40, 80], [0, 1], False),
        ([1, 20, 40, 80], [1, 2, 3], False),
        ([0, 10, 20, 40, 80], [1, 2, 3, 4], True),
    ],
)
def test_checkpoints_are_looked_at_where_training_has_halved(steps, chosen, spread):
    assert chosen_checkpoints(steps) == chosen
    assert is_spread(steps) == spread


def test_what_cannot_be_estimated_is_refused_by_its_place(task, make_task, tmp_path):
    with pytest.raises(EngineError, match="give a checkpoint"):
        plan_estimate(replace(task, checkpoints=[]))
    plan = plan_estimate(task)
    with pytest.raises(EngineError, match="needs piece 0"):
        run_piece(task, plan, 4, {})
    with pytest.raises(EngineError, match="another task"):
        run_piece(replace(task, checkpoints=task.checkpoints[:2]), plan, 0, {})
    with pytest.raises(EngineError, match="is missing"):
        merge_pieces(task, plan, {})

    from safetensors.torch import load_file, save_file

    broken = load_file(task.checkpoints[1][1])
    broken["model.0.weight"][0, 0] = float("nan")
    save_file(broken, tmp_path / "broken.safetensors")
    checkpoints = [task.checkpoints[0], (6, tmp_path / "broken.safetensors"), *task.checkpoints[2:]]
    with pytest.raises(EngineError, match="NaN") as refused:
        plan_estimate(replace(task, checkpoints=checkpoints))
    assert refused.value.pointer == "/checkpoints/1"


def test_an_estimate_of_days_is_refused_before_it_starts(task, monkeypatch):
    check_cost(task, n_train=1_000_000)
    monkeypatch.setattr("attribution.engine.estimated.MAX_PIECES", 50)

    with pytest.raises(EngineError, match="takes 80 pieces of half a minute, and 50 are possible") as refused:
        check_cost(task, n_train=1_000_000)

    assert refused.value.pointer == "/checkpoints"
