from dataclasses import replace

import pytest
import torch

from attribution.engine import train
from attribution.engine.checkpoints import age, load_checkpoint
from attribution.engine.curvature import curvature_gradients, labels_of
from attribution.engine.estimators import trak
from attribution.engine.estimators.trak import influence_scores, spectrum
from attribution.engine.gradients import record_gradients
from attribution.engine.training import Program


def test_influence_scores_match_the_textbook_inverse():
    torch.manual_seed(0)
    train, query = torch.randn(20, 8).double(), torch.randn(3, 8).double()
    F = sum(torch.outer(g, g) for g in train) / 20
    inverse = torch.linalg.inv(F + 0.1 * F.trace() / 8 * torch.eye(8).double())

    torch.testing.assert_close(influence_scores(train, query, damping=0.1), train @ inverse @ query.T)
    other = F + torch.eye(8)
    inverse = torch.linalg.inv(other + 0.1 * other.trace() / 8 * torch.eye(8).double())
    torch.testing.assert_close(influence_scores(train, query, damping=0.1, fisher=other), train @ inverse @ query.T)


def test_influence_scores_refuse_what_cannot_be_inverted():
    with pytest.raises(ValueError, match="damping"):
        influence_scores(torch.ones(2, 3), torch.ones(1, 3), damping=0.0)
    with pytest.raises(ValueError, match="4 against 3"):
        influence_scores(torch.ones(2, 3), torch.ones(1, 4), damping=0.1)


def textbook(task, state, ridge, part=1.0):
    program = Program(task)
    everything = torch.arange(task.n_train)
    rows = curvature_gradients(program, state, everything, labels_of(program, state))
    J = torch.cat([g.flatten(2) for g in rows.values()], 2).flatten(0, 1)
    F = J.T @ J / task.n_train
    g = record_gradients(program, state, task.train, everything, of_loss=True) / task.n_train
    q = record_gradients(program, state, task.queries, torch.arange(task.n_query), of_loss=False)
    return g @ torch.linalg.inv(part * F + ridge * torch.eye(len(F), dtype=torch.float64)) @ q.T


def rewound_by_hand(task, state, tau):
    """θ_1 − ½ (1 + τF/2)⁻¹ (θ_1 − θ₀), θ₀ the recipe's or 0."""
    program = Program(task)
    rows = curvature_gradients(program, state, torch.arange(task.n_train), labels_of(program, state))
    J = torch.cat([g.flatten(2) for g in rows.values()], 2).flatten(0, 1)
    start = program.initial(1).parameters if task.recipe else {n: 0 * p for n, p in state.parameters.items()}
    moved = torch.cat([(p - start[n]).flatten() for n, p in state.parameters.items()])
    back = torch.linalg.inv(torch.eye(len(moved)) + tau / 2 * J.T @ J / task.n_train) @ moved / 2
    sizes = [p[0].numel() for p in state.parameters.values()]
    pieces = zip(state.parameters.items(), back.split(sizes), strict=True)
    return replace(state, parameters={n: p - b.reshape(p.shape) for (n, p), b in pieces})


def test_the_chosen_damping_and_slope_give_the_textbook_scores(make_task):
    task = make_task(n_train=20)
    run = train(task)

    found = trak.estimate(task, state=run.state)

    ridge = found.settings["damping"][0]
    expected = textbook(task, run.state, ridge)
    if found.settings["parts"] == [0.5, 1.0]:
        half = textbook(task, rewound_by_hand(task, run.state, found.settings["ages"][0]["tau"]), ridge, 0.5)
        expected = (expected + half * expected.norm() / half.norm()) / 2
    torch.testing.assert_close(found.scores, (expected * found.settings["slope"]).float())
    assert {tuple(entry["parts"]) for entry in found.settings["tried"]} == {(1.0,), (0.5, 1.0)}
    assert found.is_calibrated
    assert found.settings["run_equivalents"] == 33
    tried = {entry["agreement"] for entry in found.settings["tried"]}
    assert found.settings["agreement"] == max(tried) and len(tried) > 1
    assert found.settings["parameters"] == dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), "exact")


def test_checkpoints_without_a_recipe_are_averaged_at_their_own_age(make_task, tmp_path):
    task = make_task()
    run = train(task, checkpoint_steps=[3, 6, 9], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)

    found = trak.estimate(bare)

    ages = found.settings["ages"]
    assert [age["step"] for age in ages] == found.settings["checkpoints"] == [3, 6, 9]
    program = Program(bare)
    parts = [textbook(bare, load_checkpoint(program, n), 1 / age["tau"]) for n, age in enumerate(ages)]
    torch.testing.assert_close(found.scores, (sum(parts) / 3).float())
    assert not found.is_calibrated


def test_one_checkpoint_without_a_recipe_is_joined_by_itself_rewound(make_task, tmp_path):
    task = make_task(n_train=20)
    run = train(task, checkpoint_steps=[15], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)

    found = trak.estimate(bare)

    tau = found.settings["ages"][0]["tau"]
    state = load_checkpoint(Program(bare), 0)
    whole = textbook(bare, state, 1 / tau)
    half = textbook(bare, rewound_by_hand(bare, state, tau), 1 / tau, 0.5)
    torch.testing.assert_close(found.scores, ((whole + half * whole.norm() / half.norm()) / 2).float())
    assert found.settings["parts"] == [0.5, 1.0]


def test_a_projection_says_so_repeats_and_comes_near_the_exact_scores(make_task, monkeypatch, tmp_path):
    task = make_task(n_train=20)
    run = train(task, checkpoint_steps=[15], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)
    exact = trak.score(bare)
    monkeypatch.setattr(trak, "EXACT", 10)
    monkeypatch.setattr(trak, "WIDTH", 512)

    found = trak.estimate(bare)

    assert "43 to 512" in found.settings["projection"]
    assert torch.equal(found.scores, trak.score(bare))
    assert torch.corrcoef(torch.stack([found.scores.flatten(), exact.flatten()]))[0, 1] > 0.9


def test_the_age_from_a_few_lanczos_steps_is_that_of_the_full_spectrum():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=generator).double())[0]
    values = torch.logspace(-6, 1, 300, dtype=torch.float64)
    values[:100] = 0
    F, x = basis @ values.diag() @ basis.T, torch.randn(300, generator=generator).double()

    nodes, weights = spectrum(F, x)

    moved = (basis.T @ x).square()
    for power in (0, 1, 2):
        torch.testing.assert_close((weights * nodes**power).sum(), (moved * values**power).sum())
    for remaining in (0.5, 5.0, 50.0):
        assert age(nodes, weights, remaining) == pytest.approx(age(values, moved, remaining), rel=0.01)
    assert spectrum(F, torch.zeros(300).double())[1].sum() == 0
    nodes, weights = spectrum(F, basis[:, -1])
    assert float(nodes[weights.argmax()]) == pytest.approx(10)
