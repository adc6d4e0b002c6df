from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attribution.engine import EngineError, train
from attribution.engine.checkpoints import age, load_checkpoint, trained_states, trajectory, where_unread
from attribution.engine.estimators import ekfac, graddot, tracin, trak
from attribution.engine.training import Program


def saved(task, tmp_path, *steps):
    return train(task, checkpoint_steps=steps, checkpoint_dir=tmp_path).checkpoints


def rewritten(task, tmp_path, change):
    """The last checkpoint's tensors, changed, as the only checkpoint of a task without a recipe."""
    tensors = train(task).state.tensors()
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return replace(task, recipe=None, checkpoints=[(9, tmp_path / "changed.safetensors")])


@pytest.mark.parametrize("method", [graddot, tracin, trak, ekfac])
def test_a_checkpoint_without_a_recipe_is_enough(make_task, tmp_path, method):
    task = make_task()

    scores = method.score(replace(task, recipe=None, checkpoints=saved(task, tmp_path, 9)))

    assert (scores.shape, scores.dtype) == ((task.n_train, task.n_query), torch.float32)
    assert scores.isfinite().all() and scores.ne(0).all()


@pytest.mark.parametrize("method", [graddot, tracin, trak, ekfac])
def test_neither_recipe_nor_checkpoint_is_refused(make_task, method):
    with pytest.raises(EngineError) as refused:
        method.score(replace(make_task(), recipe=None))

    assert refused.value.pointer == "/checkpoints"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.0.bias"), "lacks 'model.0.bias'"),
        (lambda t: t.update({"model.0.bias": t["model.0.bias"][:3].clone()}), "is (3,)"),
        (lambda t: t.update({"model.0.bias": t["model.0.bias"].float()}), "torch.float32"),
        (lambda t: t["model.0.bias"].fill_(float("nan")), "holds NaN"),
        (lambda t: t.update({"model.more": torch.zeros(1)}), "'model.more', which the model does not"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_place(make_task, tmp_path, change, message):
    task = rewritten(make_task(), tmp_path, change)

    for method in (graddot, tracin, trak, ekfac):
        with pytest.raises(EngineError, match="/checkpoints/0: ") as refused:
            method.score(task)
        assert message in refused.value.reason


def test_a_file_that_is_no_checkpoint_or_is_missing_is_refused(make_task, tmp_path):
    (tmp_path / "pickle").write_bytes(b"\x80\x04broken")

    for path, message in ((tmp_path / "pickle", "not a safetensors file"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(EngineError, match=message) as refused:
            graddot.score(replace(make_task(), recipe=None, checkpoints=[(9, path)]))
        assert refused.value.pointer == "/checkpoints/0"


class Tied(nn.Module):
    """An output layer that is its embedding, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.outer.weight = self.inner.weight
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x) + self.scale * self.inner(x).tanh()


def test_a_tied_weight_is_read_under_either_name_and_must_agree_with_itself(make_task, tmp_path):
    task = make_task(build=Tied)
    final = train(task).state.tensors()
    assert set(final) == {"model.inner.weight", "model.scale", "optimizer.inner.weight.momentum_buffer"}
    weight = final["model.inner.weight"]

    for number, file in enumerate(
        [
            {"model.inner.weight": weight},
            {"model.outer.weight": weight},
            {"model.inner.weight": weight, "model.outer.weight": weight.clone()},
        ]
    ):
        save_file(file, tmp_path / f"{number}.safetensors")
        bare = replace(task, recipe=None, checkpoints=[(9, tmp_path / f"{number}.safetensors")])
        state = load_checkpoint(Program(bare), 0)
        assert torch.equal(state.parameters["inner.weight"][0], weight)
        assert state.buffers["scale"].tolist() == [[2.0]]

    save_file({"model.inner.weight": weight, "model.outer.weight": weight + 1}, tmp_path / "two.safetensors")
    with pytest.raises(EngineError, match="one tensor in the model and two in the file"):
        load_checkpoint(Program(replace(task, recipe=None, checkpoints=[(9, tmp_path / "two.safetensors")])), 0)


def test_states_kept_while_training_are_those_that_train_writes(make_task, tmp_path):
    task = make_task(optimizer="adam", options={}, learning_rate=0.02)
    bare = replace(task, checkpoints=saved(task, tmp_path, 4, 9))
    program = Program(bare)

    for number, state in enumerate(trained_states(program, [4, 9])):
        read = load_checkpoint(program, number)
        assert read.step == state.step
        assert all(torch.equal(t, read.tensors()[name]) for name, t in state.tensors().items())


def test_segments_add_up_the_learning_rates_and_visits_of_their_steps(make_task):
    rates = torch.linspace(0.2, 0.01, 9)
    task = make_task(
        learning_rate=rates,
        groups=[("^2", {"learning_rate": 0.02, "momentum": 0.0})],
        options={"momentum": 0.9, "weight_decay": 0.01},
    )
    path = trajectory(task, Program(task), n_segment=3)

    assert [segment.steps for segment in path.segments] == [(0, 3), (3, 6), (6, 9)]
    assert path.steps == [1, 4, 7] and path.final.step == 9
    order = task.recipe.order  # 10 records in rows of 4, 4 and 2
    for segment in path.segments:
        span = slice(*segment.steps)
        seen = (order[span] >= 0).sum(1) / 4
        assert float(segment.rate["0.weight"]) == pytest.approx(float((rates[span] * seen).sum()) * 10)
        assert float(segment.rate["2.weight"]) == pytest.approx(0.02 * float(seen.sum()))
        assert segment.decay["0.bias"] == pytest.approx(float(rates[span].sum()) * 10 * 0.01)
        weights = torch.zeros(10, dtype=torch.float64)
        for row, rate in zip(order[span], rates[span].double(), strict=True):
            weights[row[row >= 0]] += rate / 4
        torch.testing.assert_close(segment.visits, weights / weights.mean())


def test_the_age_is_the_time_that_gradient_flow_ran():
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-4, 1, 30, dtype=torch.float64)
    start = torch.randn(30, generator=generator, dtype=torch.float64)  # the minimum is at 0
    for tau in (0.3, 5.0, 80.0):
        end = start * torch.exp(-tau * curvature)
        remaining = float(-(curvature * end) @ (end - start))

        assert age(curvature, (end - start).square(), remaining) == pytest.approx(tau, rel=1e-6)

    assert age(curvature, start.square(), -1.0) != age(curvature, start.square(), -1.0)  # NaN: nothing to read off


@pytest.mark.parametrize("method", [tracin, trak, ekfac])
@pytest.mark.parametrize("recipe", [{}, {"optimizer": "adam", "options": {}}])
def test_training_that_moves_nothing_gives_scores_of_0(make_task, method, recipe):
    task = make_task(learning_rate=0.0, **recipe)

    scores = method.score(task)

    assert scores.shape == (10, 6) and not scores.any()


@pytest.mark.parametrize("method", [tracin, trak, ekfac])
def test_a_stretch_at_rate_0_moves_nothing_and_is_no_obstacle(make_task, method):
    n_step = make_task(epochs=8).recipe.n_step
    step = torch.arange(n_step)
    rate = torch.where((step >= n_step // 3) & (step < 2 * n_step // 3), 0.1, 0.0)
    task = make_task(epochs=8, learning_rate=rate)

    scores = method.score(task)

    assert scores.isfinite().all() and scores.any()


def test_an_age_that_cannot_be_read_off_is_had_from_the_others_pace():
    nan = float("nan")

    assert where_unread([nan, 6.0, 4.0], [5, 10, 10], [1.0, 2.0, 3.0]) == [2.5, 6.0, 4.0]
    assert where_unread([nan, nan], [5, 10], [1.0, 2.0]) == [1.0, 2.0]
