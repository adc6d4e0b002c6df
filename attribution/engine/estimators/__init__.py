"""One file per method, one signature: `score(task, ...) -> (n_train, n_query)`, positive = helpful.

`estimate(task, ...)` gives the same scores with the settings that were chosen for them.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Scores (n_train, n_query) float32, and how they came about."""

    scores: Tensor
    is_calibrated: bool  # False: known only up to scale
    settings: dict[str, Any] = field(default_factory=dict)  # plain data, for report.json
