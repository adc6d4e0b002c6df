"""Influence as the exact derivative of the recorded training: the metagradient.

    score[i, q] = −∂ measurement_q(θ_T(w)) / ∂w_i   at w = `weights`, all ones by default

Positive: more weight on record i lowers the measurement of query q. To first order it is the measurement without the
record minus with it. Reverse mode through the unrolled optimizer: see `training.py`. Maclaurin et al. 2015,
arXiv:1502.03492; Engstrom et al. 2025, arXiv:2503.13751.

Assumes a recipe and a loss that is differentiable twice almost everywhere. Where training is chaotic the derivative
explodes and predicts nothing (arXiv:2111.05803); `shares` measures whether it does.
"""

import torch
from torch import Tensor

from attribution.engine.errors import EngineError
from attribution.engine.estimators import Estimate
from attribution.engine.task import Task
from attribution.engine.training import Program, Progress, metagradients

CALIBRATED = True
QUERY_BLOCK = 64  # queries per reverse pass; more gain no speed, and each holds an adjoint of the whole state


def score(
    task: Task, *, weights: Tensor | None = None, memory: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Score every record against every query by one forward pass and a batched reverse pass per block of queries.

    Args:
        weights: (n_train,), where the derivative is taken; a mask is allowed.
        memory: bytes that may be held beyond the task and the scores, by default 1 GiB or what one step needs; the scores are the
            same to the bit whatever it is.

    Returns:
        (n_train, n_query) float32; a class of copies has the sum of its slots at the representative, 0 elsewhere.
    """
    W = torch.ones(1, task.n_train) if weights is None else weights[None]
    program = Program(task)  # what its steps hold is measured once
    scores = torch.zeros(task.n_train, task.n_query)
    for q in torch.arange(task.n_query).split(QUERY_BLOCK):
        one_hot = torch.zeros(len(q), task.n_query).scatter_(1, q[:, None], 1.0)
        _, gradients = metagradients(task, W, query_weights=one_hot, program=program, memory=memory)  # (G, 1, n_train)
        scores[:, q] = torch.zeros(task.n_train, len(q)).index_add_(0, task.representative, gradients[:, 0].T.float())
        if progress:
            progress(int(q[-1]) + 1, task.n_query)
    if not bool(torch.isfinite(scores).all()):
        raise EngineError(
            "the derivative of this training has exploded; `shares` uses replays instead", pointer="/recipe"
        )
    return scores


def estimate(task: Task, *, progress: Progress | None = None) -> Estimate:
    """The same; there is nothing to choose."""
    return Estimate(score(task, progress=progress), CALIBRATED, {"weights": "all 1", "query_block": QUERY_BLOCK})
