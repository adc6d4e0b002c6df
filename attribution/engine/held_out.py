"""Choosing an estimator's settings by a few counterfactual replays that it never sees otherwise.

Half of the masks drop half of the records, half drop a twentieth: an estimate should predict both. What agrees best with what
happened (the linear datamodeling score: Spearman's ρ over masks, mean over queries; Park et al. 2023, arXiv:2303.14186) is
chosen, and the slope of what happened on what it predicts, at a twentieth, gives the scores their unit.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.engine.ranks import Ranked, spearman
from attribution.engine.task import Task, seed_of
from attribution.engine.training import Program, Progress, replay_values

DROPPED = (0.5, 0.05)
MASKS = 16  # of each


@dataclass(frozen=True)
class HeldOut:
    """Counterfactual replays: which records each dropped, and f per query afterwards."""

    kept: list[Tensor]  # for each of DROPPED (MASKS, n_train)
    values: list[Tensor]  # for each (MASKS, n_query), f = −measurement
    full: Tensor  # (n_query,), nothing dropped

    @property
    def run_equivalents(self) -> int:
        return sum(len(kept) for kept in self.kept) + 1

    @property
    def is_still(self) -> bool:
        """Whether no record that was dropped moved any query at all: then every effect is 0."""
        rounding = 8 * torch.finfo(self.full.dtype).eps
        return all(torch.allclose(f, self.full, rtol=rounding, atol=0) for f in self.values)

    def agreement(self, scores: Tensor) -> float:
        """Linear datamodeling score of (n_train, n_query), mean over both sizes."""
        found = [linear_datamodeling_score(scores, k, f) for k, f in zip(self.kept, self.values, strict=True)]
        return sum(found) / len(found)

    def slope(self, scores: Tensor) -> float:
        """By what the scores must be multiplied to predict, in the least squares, the changes of the last of DROPPED."""
        predicted = (1 - self.kept[-1].double()) @ scores.double()
        happened = self.full.double() - self.values[-1].double()
        return float((predicted * happened).sum() / predicted.square().sum().clamp_min(1e-300))


def held_out(task: Task, program: Program, *, progress: Progress | None = None) -> HeldOut:
    """Replay the recipe MASKS times for each of DROPPED, and once in full; copies are dropped together."""
    players = task.representative.unique()
    generator = torch.Generator().manual_seed(seed_of("held out", task.require_recipe().seed))
    kept = []
    for dropped in DROPPED:
        count = max(1, round(dropped * len(players)))
        keeps = torch.ones(MASKS, task.n_train)
        for row in keeps:
            row[players[torch.randperm(len(players), generator=generator)[:count]]] = 0
        kept.append(keeps[:, task.representative])
    everything = torch.ones(1, task.n_train)
    f = replay_values(task, torch.cat([everything, *kept]), per_query=True, program=program, progress=progress)
    return HeldOut(kept, list(f[1:].split(MASKS)), f[0])


def linear_datamodeling_score(scores: Tensor, kept: Tensor, values: Tensor) -> float:
    """Mean over queries of Spearman's ρ between Σ of kept records' scores and f, over masks; ties take their mean rank.

    Args:
        scores: (n_train, n_query).
        kept: (R, n_train).
        values: (R, n_query). A query whose f or prediction never changes counts 0.
    """
    said, happened = (Ranked(x.double().numpy()) for x in (kept.double() @ scores.double(), values))
    return float(spearman(said, happened, np.ones(len(kept))).mean())


def best(candidates: Iterable[Tensor], held: HeldOut) -> tuple[int, Tensor, list[float]]:
    """Which of the score matrices agrees best with the replays, that matrix, and how well each does; ties go to the first.

    No other is kept, so that candidates can be made one by one.
    """
    chosen, kept, found = 0, torch.empty(0), []
    for number, scores in enumerate(candidates):
        found.append(held.agreement(scores))
        if number == 0 or found[number] > found[chosen]:
            chosen, kept = number, scores
    return chosen, kept, found
