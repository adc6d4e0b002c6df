from dataclasses import replace

import pytest
import torch
from torch import nn

from attribution.engine import TensorRecords, replay_values, train
from attribution.engine import curvature as curvatures
from attribution.engine.checkpoints import trajectory
from attribution.engine.estimators import ekfac, graddot, tracin, trak
from attribution.engine.estimators.ekfac import Filter, scores_of
from attribution.engine.gradients import record_gradients
from attribution.engine.held_out import linear_datamodeling_score
from attribution.engine.training import Program


def squared(model, batch):
    inputs, labels = batch
    return (model(inputs) - (labels[:, None] == torch.arange(3)).double()).square().sum(1)


def linear():
    return nn.Linear(4, 3).double()


def test_one_linear_layer_with_a_squared_loss_gets_the_exact_inverse(make_task, monkeypatch, tmp_path):
    monkeypatch.setattr(curvatures, "FULL", 0)
    task = make_task(build=linear, task={"loss": squared, "measurement": squared}, learning_rate=0.01)
    run = train(task)
    program = Program(task)
    path = trajectory(task, program, n_segment=1)
    found = curvatures.fit(program, path.final)
    tau = 7.0
    steps = (torch.full_like(found.eigenvalues, tau), tau * found.eigenvalues)

    (scores,) = scores_of(task, program, path, [found], [steps], [Filter("ridge", 1.0)])

    inputs = torch.cat([task.train[torch.arange(10)][0], torch.ones(10, 1, dtype=torch.float64)], 1)
    H = 2 * torch.kron(torch.eye(3, dtype=torch.float64), inputs.T @ inputs / 10) + torch.eye(15) / tau
    order = [5 * o + i for o in range(3) for i in range(4)] + [5 * o + 4 for o in range(3)]
    g = record_gradients(program, run.state, task.train, torch.arange(10), of_loss=True) / 10
    q = record_gradients(program, run.state, task.queries, torch.arange(6), of_loss=False)
    torch.testing.assert_close(scores, g @ torch.linalg.inv(H[order][:, order]) @ q.T)


def test_segments_are_the_slow_product_of_matrix_exponentials(make_task):
    task = make_task(options={"momentum": 0.9, "weight_decay": 0.01}, learning_rate=0.02)
    program = Program(task)
    path = trajectory(task, program, n_segment=3)
    fitted = [curvatures.fit(program, s.state, visits=s.visits) for s in path.segments]
    steps = [ekfac._rates(s, f) for s, f in zip(path.segments, fitted, strict=True)]

    (scores,) = scores_of(task, program, path, fitted, steps, [Filter("flow", 1.0)])

    q = record_gradients(program, path.final, task.queries, torch.arange(6), of_loss=False)
    expected, adjoint = torch.zeros(10, 6, dtype=torch.float64), q.T
    eye = torch.eye(43, dtype=torch.float64)
    for segment, found in reversed(list(zip(path.segments, fitted, strict=True))):
        basis = torch.cat([t.flatten(1) for t in found.restore(eye).values()], 1)
        H = basis.T @ found.eigenvalues.diag() @ basis
        n_step = segment.steps[1] - segment.steps[0]
        tau = 0.02 * 10 * float((task.recipe.order[slice(*segment.steps)] >= 0).sum()) / 4
        X = tau * H + n_step * 0.02 * 10 * 0.01 * eye
        g = record_gradients(program, segment.state, task.train, torch.arange(10), of_loss=True)
        inverse = torch.linalg.inv(X)
        expected += segment.visits[:, None] / 10 * (g @ (tau * inverse @ (eye - torch.matrix_exp(-X)) @ adjoint))
        adjoint = torch.matrix_exp(-X) @ adjoint
    torch.testing.assert_close(scores, expected)


def test_settings_are_chosen_by_replays_and_reported(make_task):
    found = ekfac.estimate(make_task(n_train=20))

    tried = found.settings["tried"]
    assert found.settings["agreement"] == max(entry["agreement"] for entry in tried)
    assert {entry["segments"] for entry in tried} == {1, 4}
    assert {entry["tau_from"] for entry in tried} == {"recipe", "age"}
    assert {tuple(entry["parts"]) for entry in tried} == {(1.0,), (0.5, 1.0)}
    assert found.settings["run_equivalents"] == 33
    assert set(found.settings["parameters"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert found.is_calibrated


@pytest.mark.parametrize("method", [trak, ekfac])
def test_scores_predict_what_leaving_records_out_does_better_than_the_gradients_alone(make_task, tmp_path, method):
    task = make_task(n_train=30, batch=10, epochs=15, learning_rate=0.05)
    run = train(task, checkpoint_steps=[45], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)
    kept = 1 - torch.eye(30)
    generator = torch.Generator().manual_seed(0)
    several = torch.ones(100, 30)
    for number, row in enumerate(several):
        row[torch.randperm(30, generator=generator)[: 2 if number % 2 else 15]] = 0
    one_out, many_out = (replay_values(task, masks, per_query=True) for masks in (kept, several))

    def agreements(scores):
        return [linear_datamodeling_score(scores, m, f) for m, f in ((kept, one_out), (several, many_out))]

    from_gradients = agreements(graddot.score(bare))
    for given in (bare, replace(bare, recipe=task.recipe)):
        assert all(a > b + 0.05 for a, b in zip(agreements(method.score(given)), from_gradients, strict=True))


def test_with_a_recipe_the_scores_are_in_units_of_the_measurement(make_task):
    task = make_task(n_train=30, batch=10, epochs=15, learning_rate=0.05)
    effect = replay_values(task, torch.ones(1, 30), per_query=True) - replay_values(
        task, 1 - torch.eye(30), per_query=True
    )

    scores = ekfac.score(task).double()

    assert float((scores * effect).sum() / scores.square().sum()) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("method", [tracin, trak, ekfac])
def test_scores_ignore_block_sizes_and_the_order_of_records_and_repeat(make_task, method, monkeypatch, tmp_path):
    monkeypatch.setattr(curvatures, "FULL", 20)  # both kinds of blocks
    task = make_task()
    run = train(task, checkpoint_steps=[4, 9], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)
    scores = method.score(bare)

    assert torch.equal(method.score(bare), scores)
    torch.testing.assert_close(method.score(bare, rows=3), scores)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    moved = replace(bare, train=TensorRecords(*task.train[order]))
    torch.testing.assert_close(method.score(moved), scores[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [graddot, tracin, trak, ekfac])
def test_a_class_of_copies_has_the_sum_at_its_representative(make_task, method, tmp_path):
    task = make_task()
    run = train(task, checkpoint_steps=[4, 9], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)
    one_by_one = method.score(bare)

    scores = method.score(replace(bare, copy_of=torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9])))

    torch.testing.assert_close(scores[1], one_by_one[1] + one_by_one[3])
    assert scores[3].eq(0).all()
    rest = [0, 2, 4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(scores[rest], one_by_one[rest])


def test_a_record_that_the_recipe_never_uses_scores_0(make_task):
    order = make_task().recipe.order.clone()
    order[order == 7] = -1

    for method in (tracin, trak, ekfac):
        scores = method.score(make_task(order=order))
        assert scores[7].eq(0).all() and scores[6].ne(0).any()
