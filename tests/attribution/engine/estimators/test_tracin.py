from dataclasses import replace

import pytest
import torch

from attribution.engine import train
from attribution.engine.checkpoints import trained_states
from attribution.engine.estimators import tracin
from attribution.engine.gradients import record_gradients
from attribution.engine.training import Program


def gradients(task, state):
    program = Program(task)
    g = record_gradients(program, state, task.train, torch.arange(task.n_train), of_loss=True)
    return g, record_gradients(program, state, task.queries, torch.arange(task.n_query), of_loss=False)


def test_with_a_state_for_every_step_it_is_the_sum_over_steps_and_slots(make_task, monkeypatch):
    rates = torch.linspace(0.2, 0.05, 9)
    task = make_task(options={}, learning_rate=rates)
    monkeypatch.setattr(tracin, "CHECKPOINTS", 9)
    states = trained_states(Program(task), list(range(9)))
    expected = torch.zeros(task.n_train, task.n_query, dtype=torch.float64)
    for state, row, rate in zip(states, task.recipe.order, rates, strict=True):
        g, q = gradients(task, state)
        for i in row[row >= 0]:
            expected[i] += float(rate) / task.recipe.batch * (q @ g[i])

    found = tracin.estimate(task)

    torch.testing.assert_close(found.scores, expected.float())
    assert found.settings["checkpoints"] == list(range(9))
    assert found.settings["step_sizes_from"] == "recipe"


def test_adam_scales_each_coordinate_as_it_does_in_training(make_task):
    task = make_task(optimizer="adam", options={}, learning_rate=0.02)
    state = trained_states(Program(task), [9])[0]
    g, q = gradients(task, state)
    v = torch.cat([t[0].flatten() for t in state.moments["exp_avg_sq"].values()]) / (1 - 0.999**9)

    scores = tracin.score(task, state=state)

    seen = (task.recipe.order >= 0).sum() / task.recipe.batch / task.n_train  # per record, of 0.02 each
    expected = 0.02 * float(seen) * g @ (q / (v.sqrt() + 1e-8)).T
    torch.testing.assert_close(scores, expected.float())


def test_without_a_recipe_the_step_sizes_are_read_off_the_checkpoints(make_task, tmp_path):
    n = 8
    order = torch.arange(n).repeat(40, 1)  # every record in every step
    task = make_task(n_train=n, options={}, learning_rate=0.02, order=order)
    run = train(task, checkpoint_steps=[10, 20, 40], checkpoint_dir=tmp_path)

    found = tracin.estimate(replace(task, recipe=None, checkpoints=run.checkpoints))

    assert found.settings["step_sizes"] == pytest.approx([0.2, 0.2, 0.4], rel=0.03)
    assert not found.is_calibrated


def test_one_checkpoint_alone_gives_the_ranking_of_graddot(make_task, tmp_path):
    task = make_task()
    run = train(task, checkpoint_steps=[9], checkpoint_dir=tmp_path)
    g, q = gradients(task, run.state)

    found = tracin.estimate(replace(task, recipe=None, checkpoints=run.checkpoints))

    torch.testing.assert_close(found.scores, (9 / task.n_train * g @ q.T).float())
    assert found.settings["step_sizes_from"] == "the number of steps"
