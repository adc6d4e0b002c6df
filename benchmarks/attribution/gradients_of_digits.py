"""A task of as many records as wanted: scikit-learn's digits, each turned, scaled, sheared, shifted and made noisy.

Record i is digit i mod 1,437 with a distortion drawn from i, so that nothing is kept in memory and any range can be read.
One label in ten is wrong. The model, a 64-256-128-10 MLP of 50,826 weights, is trained on the first 60,000.
"""

import math
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from attribution.engine import Batch, Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed

N_ORIGINAL, N_TRAINED, N_QUERY = 1437, 60_000, 360
WRONG = 0.1


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 10))


def per_record_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Distorted:
    """Records made when they are asked for, the same ones each time."""

    def __init__(self, images: Tensor, labels: Tensor, n: int) -> None:
        self.images, self.labels, self.n = images, labels, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Tensor, /) -> Batch:
        original = index % len(self.images)
        u = _uniform(index, 72)
        angle, shear = math.radians(20) * (2 * u[:, 0] - 1), 0.4 * u[:, 1] - 0.2
        zoom_x, zoom_y = 0.8 + 0.4 * u[:, 2], 0.8 + 0.4 * u[:, 3]
        cos, sin = angle.cos(), angle.sin()
        rows = [
            zoom_x * cos,
            zoom_x * (shear - sin),
            0.4 * u[:, 4] - 0.2,
            zoom_y * sin,
            zoom_y * cos,
            0.4 * u[:, 5] - 0.2,
        ]
        grid = affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), [len(index), 1, 8, 8], align_corners=False)
        images = grid_sample(self.images[original].reshape(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
        images = (images + 0.2 * (u[:, 8:] - 0.5)).clamp(0, 1)
        wrong = (self.labels[original] + 1 + (9 * u[:, 7]).long()) % 10
        return images, torch.where(u[:, 6] < WRONG, wrong, self.labels[original])


def _uniform(index: Tensor, columns: int) -> Tensor:
    """(n, columns) numbers in [0, 1) that depend on a record's number alone (a hash: splitmix64)."""
    x = index.numpy().astype(np.uint64)[:, None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2**24)


def make_task(n_train: int = N_TRAINED, *, checkpoint: Path | None = None) -> Task:
    """With a recipe of two passes over the first records, or, with a checkpoint, without one and of any size."""
    data, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(data / 16, dtype=torch.float32), torch.tensor(target)
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, made = drawn[:N_QUERY], drawn[N_QUERY:]
    recipe = Recipe(
        optimizer="sgd",
        options={"momentum": 0.9},
        learning_rate=0.05,
        order=epoch_order(min(n_train, N_TRAINED), 64, 2, 0),
        initial_state=initial_state_from_seed(build, 0),
    )
    return Task(
        model=build,
        loss=per_record_loss,
        measurement=per_record_loss,
        train=Distorted(images[made], labels[made], n_train),
        queries=TensorRecords(images[held], labels[held]),
        recipe=None if checkpoint else recipe,
        checkpoints=[(recipe.n_step, checkpoint)] if checkpoint else [],
    )
