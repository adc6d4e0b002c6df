from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from attribution.engine import EngineError, TrainingDiverged, metagradients, replay_values, train
from attribution.engine.task import seed_of
from attribution.engine.training import Program, preserved_generator

RECIPES = {
    "plain": {"options": {}},
    "momentum": {"options": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2}},
    "nesterov": {"options": {"momentum": 0.8, "nesterov": True}},
    "adam": {"optimizer": "adam", "options": {"weight_decay": 1e-2}, "learning_rate": 0.02},
    "adamw": {"optimizer": "adamw", "options": {"betas": (0.8, 0.95)}, "learning_rate": 0.02},
    "schedule": {"learning_rate": torch.linspace(0.2, 0.01, 9)},
    "clip": {"clip_norm": 0.5},
    "weight normalizer": {"normalizer": "weight"},
    "groups": {"groups": [("^2", {"learning_rate": 0.02, "momentum": 0.0}), ("bias", {"weight_decay": 0.1})]},
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def torch_loop(task, weights):
    """The same training by torch.optim, one plain step after the other."""
    recipe = task.recipe
    model = task.model()
    model.load_state_dict(recipe.initial_state)
    model.train()
    groups = []
    for name, parameter in model.named_parameters():
        options, rates = recipe.options_for(name)
        groups.append({"params": [parameter], "lr": rates[0], "rates": rates, **options})
    optimizer = OPTIMIZERS[recipe.optimizer](groups)
    for step, row in enumerate(recipe.order):
        index = row[row >= 0]
        torch.manual_seed(seed_of(recipe.seed, step))
        w = weights[index]
        total = (w * task.loss(model, task.train[index])).sum()
        optimizer.zero_grad()
        (total / (recipe.batch if recipe.normalizer == "batch" else w.sum())).backward()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["rates"][step]
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_torch_optim(make_task, name):
    task = make_task(**RECIPES[name])
    weights = torch.rand(task.n_train, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5

    run = train(task, weights)

    expected, _ = torch_loop(task, weights)
    for parameter, value in expected.items():
        torch.testing.assert_close(run.model_state()[parameter], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_training_has_the_bits_of_a_plain_loop_with_torch_optim(make_task, name):
    """So weights that were trained elsewhere, in an ordinary loop on the same build, verify to the bit."""
    task = make_task(
        build=lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), n_train=12, **RECIPES[name]
    )

    run = train(task)

    expected, _ = torch_loop(task, torch.ones(task.n_train))
    assert all(torch.equal(run.model_state()[parameter], value) for parameter, value in expected.items())
    program, W = Program(task), torch.rand(3, task.n_train, generator=torch.Generator().manual_seed(1))
    kept, consumed = program.initial(3), program.initial(3)
    with preserved_generator():
        for _ in range(task.recipe.n_step):
            kept, _ = program.step(kept, W)
            consumed, _ = program.step(consumed, W, consume=True)
    assert all(torch.equal(consumed.tensors(1)[name], tensor) for name, tensor in kept.tensors(1).items())


@pytest.mark.parametrize("name", RECIPES)
def test_metagradient_agrees_with_finite_differences(make_task, name):
    task = make_task(**RECIPES[name])
    generator = torch.Generator().manual_seed(2)
    W = torch.rand(2, task.n_train, generator=generator, dtype=torch.float64) + 0.3

    f, gradient = metagradients(task, W)

    h = 1e-5
    steps = h * torch.eye(task.n_train, dtype=torch.float64)
    for run in range(2):
        slope = (replay_values(task, W[run] + steps) - replay_values(task, W[run] - steps)) / (2 * h)
        torch.testing.assert_close(gradient[0, run], slope, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(f.mean(1), replay_values(task, W))


def test_metagradient_per_query_is_the_same(make_task):
    task = make_task(options={"momentum": 0.9, "weight_decay": 0.01})
    W = (torch.rand(3, task.n_train, generator=torch.Generator().manual_seed(3)) < 0.7).double()
    Q = torch.eye(task.n_query, dtype=torch.float64)

    _, mean = metagradients(task, W)
    _, each = metagradients(task, W, query_weights=Q)

    assert each.shape == (task.n_query, 3, task.n_train)
    torch.testing.assert_close(each.mean(0), mean[0], rtol=1e-10, atol=1e-14)


def test_adam_metagradient_is_finite_where_the_first_batches_are_masked(make_task):
    task = make_task(optimizer="adam", options={}, learning_rate=0.02)
    W = torch.ones(1, task.n_train)
    W[0, task.recipe.order[0]] = 0

    _, gradient = metagradients(task, W)

    assert torch.isfinite(gradient).all()


def test_batched_runs_are_the_runs_one_by_one_dropout_included(make_task):
    def with_dropout():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)).double()

    task = make_task(build=with_dropout, seed=11)
    W = (torch.rand(5, task.n_train, generator=torch.Generator().manual_seed(3)) < 0.6).double()

    together = replay_values(task, W, per_query=True)

    apart = torch.cat([replay_values(task, w[None], per_query=True) for w in W])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)
    parameters, _ = torch_loop(task, W[0])
    model = task.model().eval()
    measured = task.measurement(
        lambda x: functional_call(model, parameters, (x,)), task.queries[torch.arange(task.n_query)]
    )
    torch.testing.assert_close(together[0], -measured.detach(), rtol=1e-10, atol=1e-12)


def test_a_step_without_weight_still_decays_and_keeps_its_momentum(make_task):
    task = make_task(options={"momentum": 0.9, "weight_decay": 0.1})
    zeros = torch.zeros(task.n_train, dtype=torch.float64)

    run = train(task, zeros)

    expected, _ = torch_loop(task, zeros)
    for parameter, value in expected.items():
        assert not torch.equal(run.model_state()[parameter], task.recipe.initial_state[parameter])
        torch.testing.assert_close(run.model_state()[parameter], value)


def test_frozen_parameters_and_the_callers_generator_stay_as_they_were(make_task):
    def half_frozen():
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        model[0].requires_grad_(False)
        return model

    task = make_task(build=half_frozen, options={"momentum": 0.9, "weight_decay": 0.1})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    run = train(task)

    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(run.model_state()["0.weight"], task.recipe.initial_state["0.weight"])
    assert not torch.equal(run.model_state()["2.weight"], task.recipe.initial_state["2.weight"])


def test_checkpoints_hold_model_and_optimizer_and_repeat_to_the_bit(make_task, tmp_path: Path):
    task = make_task()

    first = train(task, checkpoint_steps=[0, 4, 9], checkpoint_dir=tmp_path / "a")
    second = train(task, checkpoint_steps=[0, 4, 9], checkpoint_dir=tmp_path / "b")

    assert [step for step, _ in first.checkpoints] == [0, 4, 9]
    for (_, one), (_, other) in zip(first.checkpoints, second.checkpoints, strict=True):
        assert one.read_bytes() == other.read_bytes()
    state = load_file(first.checkpoints[-1][1])
    assert set(state) == {
        f"{kind}.{name}{field}"
        for kind, field in (("model", ""), ("optimizer", ".momentum_buffer"))
        for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert torch.equal(state["model.0.weight"], first.model_state()["0.weight"])


def test_an_exploding_run_is_named_by_its_step(make_task):
    task = make_task(learning_rate=1e200)

    with pytest.raises(TrainingDiverged) as refused:
        train(task)

    assert 1 <= refused.value.step <= task.recipe.n_step
    assert "not finite" in str(refused.value)


def test_a_loss_that_averages_is_found_before_training(make_task):
    task = make_task(task={"loss": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])})

    with pytest.raises(EngineError, match="not a mean") as refused:
        train(task)

    assert refused.value.pointer == "/loss"


def test_negative_and_misshapen_weights_are_refused(make_task):
    task = make_task()

    for weights, pointer in ((torch.ones(3), "/weights"), (-torch.ones(1, task.n_train), "/weights/0/0")):
        with pytest.raises(EngineError) as refused:
            replay_values(task, weights)
        assert refused.value.pointer == pointer
