"""The digits task: a small MLP on real digits whose owners and labellers are assigned (see assignment.py)."""

import numpy as np
import torch
from assignment import assign
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attribution.engine import Batch, Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed

SEED = 0


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def per_record_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels, reduction="none")


def make_task(seed: int = SEED, *, n_train: int | None = None, epochs: int = 10, batch: int = 64) -> Task:
    """Trained on the labels as given, asked about held-out images with their true labels."""
    data = assign(seed)
    images = torch.from_numpy(data.images.astype(np.float32) / 16)
    train = np.flatnonzero(~data.is_query)[:n_train]
    queries = np.flatnonzero(data.is_query)
    keys: dict[bytes, int] = {}
    copy_of = [keys.setdefault(data.images[i].tobytes(), n) for n, i in enumerate(train)]
    return Task(
        model=build,
        loss=per_record_loss,
        measurement=per_record_loss,
        train=TensorRecords(images[train], torch.from_numpy(data.given_label[train])),
        queries=TensorRecords(images[queries], torch.from_numpy(data.true_label[queries])),
        owner=torch.from_numpy(data.rights_holder[train]),
        groups={"labeller": torch.from_numpy(data.labeller[train])},
        copy_of=torch.tensor(copy_of),
        recipe=Recipe(
            optimizer="sgd",
            options={"momentum": 0.9},
            learning_rate=0.05,
            order=epoch_order(len(train), batch, epochs, seed),
            initial_state=initial_state_from_seed(build, seed),
            seed=seed,
            order_seed=seed,
            initial_seed=seed,
        ),
    )
