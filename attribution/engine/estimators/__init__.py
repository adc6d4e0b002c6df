"""One file per method, one signature: `score(task, ...) -> (n_train, n_query)`, positive = helpful.

`estimate(task, ...)` gives the same scores with the settings that were chosen for them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attribution.engine.task import Task


@dataclass(frozen=True)
class Estimate:
    """Scores (n_train, n_query) float32, and how they came about."""

    scores: Tensor
    is_calibrated: bool  # False: known only up to scale
    settings: dict[str, Any] = field(default_factory=dict)  # plain data, for report.json


def by_class(task: Task, scores: Tensor) -> Tensor:
    """(n_train, n_query): a class of copies has the sum of its members at the representative, 0 elsewhere."""
    return torch.zeros_like(scores).index_add_(0, task.representative, scores)
