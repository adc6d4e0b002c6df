from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attribution.engine import replay_values, train
from attribution.engine.checkpoints import at_state
from attribution.engine.estimators import ekfac, trak
from attribution.engine.gradients import flat
from attribution.engine.held_out import linear_datamodeling_score
from attribution.engine.rewinding import joined, mean_loss, rewound, way
from attribution.engine.training import Program


def linear():
    return nn.Linear(4, 3).double()


def squared(model, batch):
    inputs, labels = batch
    return (model(inputs) - (labels[:, None] == torch.arange(3)).double()).square().sum(1)


def quadratic(task):
    """H (15, 15) and b of the mean squared loss θᵀHθ/2 − bᵀθ + c, in the model's order of parameters: weight, bias."""
    inputs, labels = task.train[torch.arange(task.n_train)]
    wanted = (labels[:, None] == torch.arange(3)).double()
    H, b = torch.zeros(15, 15, dtype=torch.float64), torch.zeros(15, dtype=torch.float64)
    for x, y in zip(inputs, wanted, strict=True):
        J = torch.zeros(3, 15, dtype=torch.float64)
        for o in range(3):
            J[o, 4 * o : 4 * o + 4] = x
            J[o, 12 + o] = 1
        H += 2 * J.T @ J / task.n_train
        b += 2 * J.T @ y / task.n_train
    return H, b


def with_parameters(program, theta):
    state = program.blank()
    sizes = [p[0].numel() for p in state.parameters.values()]
    pieces = theta.split(sizes)
    state.parameters = {n: t.reshape(p.shape) for (n, p), t in zip(state.parameters.items(), pieces, strict=True)}
    return state


@pytest.mark.parametrize("method", ["ridge", "flow"])
def test_of_a_quadratic_loss_the_checkpoint_is_rewound_to_what_half_of_the_data_gives(make_task, method):
    task = replace(make_task(build=linear, task={"loss": squared, "measurement": squared}), recipe=None)
    H, b = quadratic(task)
    eye, tau = torch.eye(15, dtype=torch.float64), 3.0

    def trained(t):  # from θ₀ = 0, which is what nn.Linear is built with in expectation
        if method == "ridge":
            return torch.linalg.solve(t * H + eye / tau, t * b)
        return (eye - torch.matrix_exp(-t * tau * H)) @ torch.linalg.solve(H, b)

    program = Program(task)
    state = with_parameters(program, trained(1.0))
    path = at_state(task, program, state)
    if method == "ridge":
        features = trak._Features(task, program, path.segments[0], None, None)
        half, why = trak._halfway(task, program, path, path.segments[0], features, tau, None)
        there = half.state
    else:
        fitted = ekfac._fitted(program, path, None)
        half, why = ekfac._halfway(program, path, fitted[0], [{"tau": tau}], None)
        there = half.path.final

    torch.testing.assert_close(flat(there.parameters)[0], trained(0.5))
    assert why.startswith("towards the values that the model is built with")
    assert mean_loss(program, there) > mean_loss(program, state)


def test_both_ends_count_the_same(make_task):
    generator = torch.Generator().manual_seed(0)
    whole, half = torch.randn(20, 5, generator=generator).double(), 9 * torch.randn(20, 5, generator=generator).double()

    found = joined(whole, half).flatten()

    cosine = nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(found, whole.flatten(), dim=0), cosine(found, half.flatten(), dim=0))
    assert torch.equal(joined(whole, 0 * half), whole)


@pytest.mark.parametrize("method", [trak, ekfac])
def test_half_of_the_records_predicts_better_with_the_rewound_state_than_without(
    make_task, method, tmp_path, monkeypatch
):
    task = make_task(n_train=30, batch=10, epochs=15, learning_rate=0.05)
    run = train(task, checkpoint_steps=[45], checkpoint_dir=tmp_path)
    bare = replace(task, recipe=None, checkpoints=run.checkpoints)
    generator = torch.Generator().manual_seed(0)
    kept = torch.ones(100, 30)
    for row in kept:
        row[torch.randperm(30, generator=generator)[:15]] = 0
    f = replay_values(task, kept, per_query=True)

    both = method.estimate(bare)
    monkeypatch.setattr(method, "rewound", lambda *_: (None, "not asked"))
    alone = method.estimate(bare)

    assert (both.settings["parts"], alone.settings["parts"]) == ([0.5, 1.0], [1.0])
    better, worse = (linear_datamodeling_score(found.scores, kept, f) for found in (both, alone))
    assert better > worse + 0.05


def test_a_known_start_is_gone_back_to(make_task):
    task = make_task()
    program, state = Program(task), train(task).state
    start = {name: p[0] for name, p in program.initial(1).parameters.items()}

    moved = way(program, state, start)
    found, why = rewound(program, state, moved, start)

    assert found is None and "can hardly have begun" in why  # all the way back is no half
    half, why = rewound(program, state, {name: m / 2 for name, m in moved.items()}, start)
    assert why.startswith("towards the recipe's start")
    for name, p in half.parameters.items():
        torch.testing.assert_close(p[0], (start[name] + state.parameters[name][0]) / 2)


class Wave(nn.Module):
    """(B, 4) → (B, 3); at w = 2π it is where another training has left it, and on the way there it is all wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(1).double() / 10), nn.Parameter(torch.zeros(3).double())

    def forward(self, inputs):
        return 5 * self.w.cos() * inputs[:, :3] + self.v


@pytest.mark.parametrize("method", [trak, ekfac])
def test_a_model_that_cannot_have_begun_there_is_left_as_it_is(make_task, method, tmp_path):
    def copied(model, batch):
        return (model(batch[0]) - 5 * batch[0][:, :3]).square().sum(1)

    path = tmp_path / "last.safetensors"
    v = torch.full((3,), 0.01, dtype=torch.float64)
    save_file({"model.w": torch.tensor([2 * torch.pi], dtype=torch.float64), "model.v": v}, path)
    task = replace(
        make_task(build=Wave, task={"loss": copied, "measurement": copied}), recipe=None, checkpoints=[(5, path)]
    )

    found = method.estimate(task)

    assert found.settings["parts"] == [1.0]
    assert "can hardly have begun" in found.settings["rewound"]
    assert found.scores.isfinite().all() and found.scores.ne(0).any()
