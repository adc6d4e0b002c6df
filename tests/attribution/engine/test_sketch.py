"""A validation set as one vector: against plain autograd, and against training on the datasets it ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution.engine import EngineError, Task, TensorRecords, train
from attribution.engine.sketch import (
    DatasetGradient,
    Reference,
    Sketch,
    dataset_gradient,
    dataset_gradient_from_store,
    gradient_sketch,
    rank_datasets,
)
from attribution.engine.store import build_store, final_state
from benchmarks.attribution import sketch as world


@pytest.fixture(scope="module")
def reference(make_task):
    """At a width that holds all parameters, so that nothing is lost."""
    return make_task(80, 70)


def mean_gradient(task: Task, records: TensorRecords) -> torch.Tensor:
    model = task.model()
    model.load_state_dict(final_state(task))
    loss = task.loss(model, tuple(records.tensors)).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).float()


def test_a_sketch_is_the_mean_gradient_of_its_records(reference):
    sketch = gradient_sketch(reference, reference.queries, width=64)

    truth = mean_gradient(reference, reference.queries)
    np.testing.assert_allclose(sketch.vector[: len(truth)], truth, rtol=1e-4, atol=1e-6)
    assert not sketch.vector[len(truth) :].any()
    assert sketch.n_records == 70


def test_fewer_than_64_records_are_refused(reference):
    few = TensorRecords(*(tensor[:63] for tensor in reference.queries.tensors))

    with pytest.raises(EngineError, match=r"^/validation: 63 records: a mean over fewer than 64 would give them away"):
        gradient_sketch(reference, few)
    assert gradient_sketch(reference, TensorRecords(*(t[:64] for t in reference.queries.tensors))).n_records == 64


def test_a_dataset_s_gradient_is_the_same_from_its_records_and_from_its_store(reference, tmp_path):
    direct = dataset_gradient(reference, reference.train, width=64)
    stored = dataset_gradient_from_store(build_store(reference, tmp_path, width=64, shard_records=30))

    truth = mean_gradient(reference, reference.train)
    np.testing.assert_allclose(direct.mean[: len(truth)], truth, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stored.mean, direct.mean, atol=0.01 * np.abs(direct.mean).max())
    np.testing.assert_allclose(stored.second, direct.second, atol=0.01 * np.abs(direct.second).max())
    assert (stored.reference, stored.n_records) == (direct.reference, direct.n_records)


def made(rng: np.random.Generator, at: Reference, n: int) -> DatasetGradient:
    z = rng.normal(size=(n, at.width)) + rng.normal(size=at.width)
    return DatasetGradient(z.mean(0), z.T @ z / n, n, at)


@pytest.mark.parametrize("is_alone", [False, True])
def test_the_ranking_is_that_of_gradient_descent_on_the_quadratic(is_alone):
    rng, at = np.random.default_rng(0), Reference("s", 8, 0)
    datasets = {name: made(rng, at, n) for name, n in (("a", 20), ("b", 40), ("c", 5))}
    sketch = Sketch(rng.normal(size=8).astype(np.float32), 64, at)

    ranked = rank_datasets(sketch, datasets, horizon=0.7, is_alone=is_alone)

    F = sum(d.second * d.n_records for d in datasets.values()) / 65
    rate, v = 1e-4, sketch.vector.astype(float)
    for found in ranked:
        moved = np.zeros(8)
        for _ in range(7000):  # slowly: many small steps down the quadratic that starts with slope −mean
            moved += rate * (datasets[found.dataset].mean - F @ moved)
        truth = v @ moved - (moved @ F @ moved / 2 if is_alone else 0)
        assert found.score == pytest.approx(truth, rel=2e-3, abs=1e-4)
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)


def test_a_short_horizon_ranks_by_the_inner_product():
    rng, at = np.random.default_rng(1), Reference("s", 8, 0)
    datasets = {str(i): made(rng, at, 10 + i) for i in range(6)}
    sketch = Sketch(rng.normal(size=8).astype(np.float32), 64, at)

    inner = rank_datasets(sketch, datasets)
    short = rank_datasets(sketch, datasets, horizon=1e-7)

    assert [r.dataset for r in inner] == [r.dataset for r in short]
    for r in inner:
        assert r.score == pytest.approx(datasets[r.dataset].mean @ sketch.vector)
    assert rank_datasets(sketch, {}) == []


def test_what_cannot_be_compared_is_refused():
    rng, at = np.random.default_rng(1), Reference("s", 8, 0)
    sketch = Sketch(rng.normal(size=8).astype(np.float32), 64, at)

    with pytest.raises(EngineError, match=r"^/datasets/b: made at .*seed=1"):
        rank_datasets(sketch, {"a": made(rng, at, 5), "b": made(rng, replace(at, seed=1), 5)})
    with pytest.raises(EngineError, match=r"^/horizon: -1 is not"):
        rank_datasets(sketch, {}, horizon=-1)
    with pytest.raises(EngineError, match=r"^/horizon: forgetting"):
        rank_datasets(sketch, {}, is_alone=True)


def test_the_ranking_agrees_with_training_on_the_datasets(tmp_path):
    """Thirty datasets of digits that differ in classes, size, copies and wrong labels; each is trained on, and ranked."""
    public, validation, datasets, *_ = world.draw(0, 30)
    reference = world.reference_of(public, 0)
    done = train(reference, checkpoint_steps=[world.N_STEP], checkpoint_dir=tmp_path)
    reference = replace(reference, recipe=None, checkpoints=done.checkpoints)
    steps, rate = 30, 0.02
    model, after = world.trained_on(done.model_state(), datasets, public, True, steps, rate)
    loss = world.measured(model, after, validation)

    ranked = rank_datasets(
        gradient_sketch(reference, TensorRecords(*validation)),
        {str(i): dataset_gradient(reference, TensorRecords(*dataset)) for i, dataset in enumerate(datasets)},
        horizon=steps * rate / (1 - world.MOMENTUM),
    )

    predicted = np.empty(30)
    for r in ranked:
        predicted[int(r.dataset)] = r.score
    assert world.spearman(predicted, -loss) >= 0.8
