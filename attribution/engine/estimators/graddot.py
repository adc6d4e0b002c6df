"""Influence as the inner product of gradients at the final weights.

    score[i, q] = ∂loss_i/∂θ · ∂measurement_q/∂θ

Positive: a step along record i's gradient lowers the measurement of query q. Known up to scale only (the step sizes and
how often i was seen are left out), and blind to curvature and to everything before the last step. It is what most tools
call a baseline. Charpiat et al. 2019, arXiv:2102.13262; the last term of TracIn, Pruthi et al. 2020, arXiv:2002.08484.
"""

import torch
from torch import Tensor

from attribution.engine.checkpoints import last_state
from attribution.engine.estimators import Estimate
from attribution.engine.gradients import block_rows, record_gradients
from attribution.engine.task import Task
from attribution.engine.training import Program, Progress, State

CALIBRATED = False


def score(task: Task, *, state: State | None = None, progress: Progress | None = None) -> Tensor:
    """Score every record against every query at `state`: by default the last checkpoint, or the end of training by the recipe.

    Returns:
        (n_train, n_query) float32; a class of copies has the sum of its members at the representative, 0 elsewhere.
    """
    program = Program(task)
    state = state or last_state(task, program)
    rows = block_rows(program, state)
    scores = torch.zeros(task.n_train, task.n_query)
    for q in torch.arange(task.n_query).split(rows):
        queries = record_gradients(program, state, task.queries, q, of_loss=False)  # (n_chunk, d)
        for i in torch.arange(task.n_train).split(rows):
            records = record_gradients(program, state, task.train, i, of_loss=True)
            scores[:, q] = scores[:, q].index_add(0, task.representative[i], (records @ queries.T).float().cpu())
        if progress:
            progress(int(q[-1]) + 1, task.n_query)
    return scores


def estimate(task: Task, *, state: State | None = None, progress: Progress | None = None) -> Estimate:
    """The same; there is nothing to choose."""
    state = state or last_state(task, Program(task))
    scores = score(task, state=state, progress=progress)
    return Estimate(scores, CALIBRATED, {"checkpoints": [state.step], "run_equivalents": 0})
