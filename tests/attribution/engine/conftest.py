"""Small smooth worlds in double precision, where a slow formula is affordable."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def per_record_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(inputs), labels, reduction="none")


def smooth_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()


@pytest.fixture(scope="session")
def make_task() -> Callable[..., Task]:
    """A task of a few Gaussian records in three classes; keyword arguments change the recipe or the task."""

    def make(
        n_train: int = 10,
        n_query: int = 6,
        *,
        batch: int = 4,
        epochs: int = 3,
        build: Callable[[], nn.Module] = smooth_model,
        task: dict[str, Any] | None = None,
        **recipe: Any,
    ) -> Task:
        generator = torch.Generator().manual_seed(7)
        dtype = next(build().parameters()).dtype
        centres = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        labels = torch.arange(n_train + n_query) % 3
        inputs = centres[labels] + 0.8 * torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
        inputs = inputs.to(dtype)
        settings: dict[str, Any] = {
            "optimizer": "sgd",
            "options": {"momentum": 0.9},
            "learning_rate": 0.1,
            "order": epoch_order(n_train, batch, epochs, 0),
            "initial_state": initial_state_from_seed(build, 0),
        }
        return Task(
            **{
                "model": build,
                "loss": per_record_loss,
                "measurement": per_record_loss,
                "train": TensorRecords(inputs[:n_train], labels[:n_train]),
                "queries": TensorRecords(inputs[n_train:], labels[n_train:]),
                "recipe": Recipe(**(settings | recipe)),
                **(task or {}),
            }
        )

    return make
