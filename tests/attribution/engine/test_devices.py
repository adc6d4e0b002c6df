"""Nothing in the engine minds where it computes: on a card that refuses CPU tensors it finds what it finds on the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attribution.engine import EngineError, TensorRecords, devices, metagradients, replay_values, train
from attribution.engine.estimators import ekfac, graddot, replay, tracin, trak
from attribution.engine.evaluation import GroundTruth, random_subsets
from attribution.engine.search import exact_search
from attribution.engine.shares import merge_rounds, plan_shares, run_round
from attribution.engine.store import build_store
from attribution.engine.verification import verify
from tests.attribution.engine import card

ADAMW = {"optimizer": "adamw", "learning_rate": torch.linspace(0.02, 0.002, 3), "options": {}, "clip_norm": 0.5}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Dropout(0.3), nn.Linear(6, 3))


@pytest.fixture(params=[{}, ADAMW], ids=["sgd", "adamw"])
def recipe(request):
    return request.param


@pytest.fixture
def tasks(recipe, make_task):
    """One task twice: on the CPU and on a card."""
    here = make_task(n_query=4, epochs=1, build=network, **recipe)
    with card.inserted() as device:
        yield here, replace(here, device=device)


def test_the_card_refuses_to_mix_devices():
    with card.inserted() as device:
        x = torch.ones(3, device=device)
        assert (x + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(card.MixedDevices):
            x + torch.ones(3)
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()


def test_training_has_the_same_masks_and_leaves_cpu_checkpoints(tasks, tmp_path: Path):
    here, there = tasks

    ours = train(here, checkpoint_steps=[1, 3], checkpoint_dir=tmp_path / "cpu")
    theirs = train(there, checkpoint_steps=[1, 3], checkpoint_dir=tmp_path / "card")

    assert next(iter(theirs.state.parameters.values())).device.type == "card"
    assert theirs.losses == ours.losses
    for (_, a), (_, b) in zip(ours.checkpoints, theirs.checkpoints, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert {t.device.type for t in load_file(b).values()} == {"cpu"}
    assert verify(replace(there, checkpoints=theirs.checkpoints)).is_bit_equal
    assert verify(replace(there, checkpoints=ours.checkpoints), segments=1, seed=0).is_bit_equal


def test_replays_and_metagradients_are_those_of_the_cpu(tasks):
    here, there = tasks
    W = (torch.rand(3, here.n_train, generator=torch.Generator().manual_seed(3)) < 0.7).float()
    Q = torch.rand(2, here.n_query, generator=torch.Generator().manual_seed(4)).double()

    for runs in (W, W[:1]):
        assert torch.equal(replay_values(there, runs, per_query=True), replay_values(here, runs, per_query=True))
        for ours, theirs in zip(
            metagradients(here, runs, query_weights=Q), metagradients(there, runs, query_weights=Q), strict=True
        ):
            assert theirs.device.type == "cpu"
            torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("method", [graddot, tracin, trak, ekfac, replay], ids=lambda m: m.__name__.split(".")[-1])
def test_scores_are_those_of_the_cpu(tasks, method):
    here, there = tasks

    ours, theirs = method.estimate(here), method.estimate(there)

    assert theirs.scores.device.type == "cpu"
    torch.testing.assert_close(theirs.scores, ours.scores, rtol=1e-4, atol=1e-6)


def test_scores_from_checkpoints_alone_are_those_of_the_cpu(tasks, tmp_path):
    here, there = tasks
    checkpoints = train(here, checkpoint_steps=[1, 2, 3], checkpoint_dir=tmp_path).checkpoints
    bare = [replace(task, recipe=None, checkpoints=checkpoints) for task in (here, there)]

    for method in (tracin, trak, ekfac):
        ours, theirs = (method.score(task) for task in bare)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", [{}], ids=["sgd"])
def test_shares_are_those_of_the_cpu(tasks):
    here, there = tasks
    plan = plan_shares(here, budget=60, seed=1)

    assert plan_shares(there, budget=60, seed=1) == plan
    ours = merge_rounds(here, plan, [run_round(here, plan, n) for n in range(len(plan.rounds))])
    theirs = merge_rounds(there, plan, [run_round(there, plan, n) for n in range(len(plan.rounds))])
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-4, atol=1e-6)


def test_the_store_and_its_queries_are_those_of_the_cpu(tasks, tmp_path):
    here, there = tasks
    stores = [build_store(task, tmp_path / name, width=32) for name, task in (("cpu", here), ("card", there))]

    assert stores[0].settings == stores[1].settings
    for ours, theirs in zip(stores[0].blocks(), stores[1].blocks(), strict=True):
        np.testing.assert_allclose(theirs[1], ours[1], atol=2e-2 * np.abs(ours[1]).max())
    query = stores[1].query_vectors(there, torch.arange(2))
    assert exact_search(stores[1], query, k=3).records.tolist() == exact_search(stores[0], query, k=3).records.tolist()


@pytest.mark.parametrize("recipe", [{}], ids=["sgd"])
def test_evaluation_retrains_on_the_card(tasks):
    masks = random_subsets(GroundTruth(tasks[0]).n, 0.5, 10, 0)

    assert np.array_equal(GroundTruth(tasks[1]).values(masks), GroundTruth(tasks[0]).values(masks))


def test_a_model_that_keeps_a_plain_tensor_is_told_to_register_it(make_task):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), torch.ones(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.scale

    task = make_task(build=Plain)
    with card.inserted() as device, pytest.raises(card.MixedDevices):
        train(replace(task, device=device))


def test_what_cannot_be_used_is_refused_by_name(make_task):
    assert devices.resolve("cpu") == [torch.device("cpu")]
    assert devices.resolve("auto") in ([torch.device("cpu")], [torch.device("cuda", 0)])
    for text in ("gpu", "meta", "cuda:99", "cpu,cpu"):
        with pytest.raises(EngineError, match="/device"):
            devices.resolve(text)
    for change in ({"device": "nonsense"}, {"precision": "float8"}):
        with pytest.raises(EngineError, match=f"/{next(iter(change))}"):
            replace(make_task(), **change)


def test_records_and_order_may_lie_on_the_card_too(make_task):
    task = make_task()
    with card.inserted() as device:
        moved = replace(task, device=device, train=TensorRecords(*(t.to(device) for t in task.train.tensors)))
        W = torch.ones(1, task.n_train)
        assert torch.equal(replay_values(moved, W), replay_values(task, W))


def test_bfloat16_moves_gradients_a_little_and_neither_replays_nor_curvature(make_task, tmp_path):
    task = make_task(build=lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)))
    checkpoints = train(task, checkpoint_steps=[9], checkpoint_dir=tmp_path).checkpoints
    bare = replace(task, recipe=None, checkpoints=checkpoints)

    for score in (graddot.score, lambda t: stored(t, tmp_path / t.precision)):
        full, half = (score(replace(bare, precision=name)).flatten() for name in devices.PRECISIONS)
        assert not torch.equal(half, full)
        assert float(torch.corrcoef(torch.stack([half, full]))[0, 1]) > 0.999
    short, W = replace(task, precision="bf16"), torch.ones(2, task.n_train)
    assert torch.equal(replay_values(short, W), replay_values(task, W))
    assert torch.equal(metagradients(short, W)[1], metagradients(task, W)[1])
    assert torch.equal(ekfac.score(replace(bare, precision="bf16")), ekfac.score(bare))


def stored(task, folder: Path) -> torch.Tensor:
    return torch.from_numpy(next(build_store(task, folder, width=128).blocks())[1])
