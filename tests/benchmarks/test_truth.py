from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed, replay_values
from benchmarks.attribution import truth

N, OWNERS = 8, [0, 0, 0, 1, 1, 2, 2, 3]


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N + 20, 5, generator=generator), torch.randint(3, (N + 20,), generator=generator)

    def build():
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(x[:N], y[:N]),
        queries=TensorRecords(x[N:], y[N:]),
        owner=torch.tensor(OWNERS),
        recipe=Recipe("adam", 0.05, epoch_order(N, 4, 4, 0), initial_state_from_seed(build, 0)),
    )


@pytest.fixture(scope="module")
def every_set():
    return np.array(list(product([False, True], repeat=N)))


def shapley(f, every_set):
    """Σ_S (f(S∪i) − f(S)) / (n · C(n−1, |S|)), set by set."""
    value = {tuple(s): v for s, v in zip(every_set, f, strict=True)}
    phi = np.zeros(N)
    for s in every_set:
        for i in np.flatnonzero(~s):
            with_i = s.copy()
            with_i[i] = True
            phi[i] += (value[tuple(with_i)] - value[tuple(s)]) / (N * comb(N - 1, int(s.sum())))
    return phi


def test_the_values_of_a_regression_are_those_of_enumeration(task, every_set):
    """Its closed form against the sum over all sets, for coefficients at random."""
    inner = every_set[(every_set.sum(1) > 0) & (every_set.sum(1) < N)]
    features = truth._features(task, inner)
    coefficients = np.random.default_rng(0).standard_normal(features.shape[1])
    g = features @ coefficients
    k = inner.sum(1)
    t = k / N
    chance = 1 / np.array([comb(N, int(size)) for size in k])
    slow = (chance * g / (t * (1 - t)) / N) @ (inner - t[:, None])

    np.testing.assert_allclose(truth._values_of(task, coefficients), slow, rtol=1e-9, atol=1e-9)


def test_the_estimate_agrees_with_all_subsets_retrained(task, every_set, tmp_path, monkeypatch):
    monkeypatch.setattr(truth, "CACHE", tmp_path)
    f = replay_values(task, torch.from_numpy(every_set).float()).double().numpy()
    place = {tuple(s): v for s, v in zip(every_set, f, strict=True)}
    monkeypatch.setattr(
        truth, "replayer", lambda task: lambda w: torch.tensor([place[tuple(row)] for row in (w > 0).numpy()])
    )
    exact = shapley(f, every_set)

    found = truth.measure(task, target=0.004)

    assert found.errors.max() <= 0.004
    assert found.shares.sum() == pytest.approx(1, abs=0.02)
    wanted = np.bincount(OWNERS, exact) / found.total
    assert np.abs((found.shares - wanted) / found.errors).max() < 4
    assert np.abs((found.values - exact) / found.value_errors).max() < 4.5


def test_an_interrupted_measurement_goes_on_with_the_same_runs(task, tmp_path, monkeypatch):
    monkeypatch.setattr(truth, "PILOT", 512)
    asked = []

    def replayer(task):
        def value(w):
            if len(w) > 2:
                asked.append(w)
            return w.double() @ torch.arange(1.0, N + 1).double() / N

        return value

    monkeypatch.setattr(truth, "replayer", replayer)
    monkeypatch.setattr(truth, "CACHE", tmp_path / "at once")
    whole = truth.measure(task, target=0, seconds=0.0)
    for _ in range(2):  # two more chunks in one go
        truth.masks(task, np.zeros(512), 512, 512)
    monkeypatch.setattr(truth, "CACHE", tmp_path / "in parts")
    parts = truth.measure(task, target=0, seconds=0.0)

    assert torch.equal(asked[0], asked[1])
    assert whole.n_run == parts.n_run == 512
    np.testing.assert_array_equal(whole.shares, parts.shares)
    again = truth.measure(task, target=0, seconds=0.0)
    assert again.n_run == 512 and len(asked) == 2  # nothing is run twice


def test_a_further_part_has_sets_of_its_own_and_ends_when_both_together_are_fine(
    task, every_set, tmp_path, monkeypatch
):
    monkeypatch.setattr(truth, "CACHE", tmp_path)
    f = replay_values(task, torch.from_numpy(every_set).float()).double().numpy()
    place = {tuple(s): v for s, v in zip(every_set, f, strict=True)}
    monkeypatch.setattr(
        truth, "replayer", lambda task: lambda w: torch.tensor([place[tuple(row)] for row in (w > 0).numpy()])
    )
    first = truth.measure(task, target=0.006)

    second = truth.measure(task, target=0.0045, part=1, told=first)

    both = truth.together(first, second)
    assert both.errors.max() <= 0.0045 < second.errors.max()
    assert (both.n_part, both.n_run) == (2, first.n_run + second.n_run)
    wanted = np.bincount(OWNERS, shapley(f, every_set)) / both.total
    assert np.abs((both.shares - wanted) / both.errors).max() < 4
    assert not np.array_equal(truth.masks(task, f, 0, 512), truth.masks(task, f, 0, 512, part=1))
