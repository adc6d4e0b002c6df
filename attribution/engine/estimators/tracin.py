"""Influence as what each step along a record's gradient did to a query, summed over checkpoints (TracIn).

    score[i, q] = (1/n) Σ_l m_l,i · g_i(θ_l) · P_l τ_l · g_q(θ_l)

Positive: record i lowers the measurement of query q. τ_l is the sum of learning rates that checkpoint l stands for, m_l,i how
often that stretch used record i, P_l the optimizer's own scaling of each coordinate (1 for SGD, 1/(√v̂ + ε) for Adam, as in
LESS: arXiv:2402.04333). Pruthi et al. 2020, arXiv:2002.08484.

Without a recipe τ_l is read off the checkpoints themselves: θ_l − θ_l−1 ≈ −τ_l ḡ, so τ_l = −⟨θ_l − θ_l−1, ḡ⟩ / ‖ḡ‖² with ḡ the mean of both ends'
mean gradients. The first stands for its own number of steps at the second's rate. Where that is not above 0, or there is only one
checkpoint, τ_l is the number of steps: scores are then known up to scale. Blind to curvature: what later steps do to an
effect is left out, so large and old effects are overrated (compare `ekfac`).
"""

import torch
from torch import Tensor

from attribution.engine.checkpoints import Trajectory, at_state, mean_gradient, trajectory
from attribution.engine.estimators import Estimate
from attribution.engine.gradients import block_rows, flat, named_gradients
from attribution.engine.task import Task
from attribution.engine.training import Program, Progress, State

CALIBRATED = False  # first-order in every step, and blind to what later steps do
CHECKPOINTS = 10


def score(
    task: Task, *, state: State | None = None, rows: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Score every record against every query; see `estimate`.

    Returns:
        (n_train, n_query) float32; a class of copies has the sum of its members at the representative, 0 elsewhere.
    """
    return estimate(task, state=state, rows=rows, progress=progress).scores


def estimate(
    task: Task, *, state: State | None = None, rows: int | None = None, progress: Progress | None = None
) -> Estimate:
    """Scores and the step size of each checkpoint.

    Args:
        state: one state instead of the task's checkpoints, or of CHECKPOINTS states of training by the recipe.
        rows: records at a time; as many as fit by default. It changes no score beyond rounding.
    """
    program = Program(task)
    path = at_state(task, program, state) if state is not None else trajectory(task, program, n_segment=CHECKPOINTS)
    rates, how = _rates(program, path)
    scores = torch.zeros(task.n_train, task.n_query, dtype=torch.float64)
    for number, (segment, rate) in enumerate(zip(path.segments, rates, strict=True)):
        here = segment.state
        size = rows or block_rows(program, here)
        scale = flat(
            {name: r.expand(p[0].shape)[None] for (name, p), r in zip(here.parameters.items(), rate, strict=True)}
        )
        for q in torch.arange(task.n_query).split(size):
            queries = flat(named_gradients(program, here, task.queries, q, of_loss=False))
            queries = queries * scale.to(queries)
            for i in segment.visits.nonzero()[:, 0].split(size):
                records = flat(named_gradients(program, here, task.train, i, of_loss=True)).to(queries)
                found = (records @ queries.T).double().cpu() * (segment.visits[i] / task.n_train).double()[:, None]
                scores[:, q] = scores[:, q].index_add(0, task.representative[i], found)
        if progress:
            progress(number + 1, len(path.segments))
    settings = {
        "checkpoints": path.steps,
        "step_sizes": [float(torch.stack([r.mean() for r in rate]).mean()) for rate in rates],
        "step_sizes_from": how,
        "parameters": dict.fromkeys(path.final.parameters, "exact"),
        "run_equivalents": 0,
    }
    return Estimate(scores.float(), CALIBRATED, settings)


def _rates(program: Program, path: Trajectory) -> tuple[list[list[Tensor]], str]:
    """P τ of every parameter at every checkpoint, and where it is from."""
    segments = path.segments
    if segments[0].rate is not None:
        return [[s.rate[name] for name in s.state.parameters] for s in segments if s.rate is not None], "recipe"
    taus = [float("nan")]
    means = [mean_gradient(program, segment.state) for segment in segments] if len(segments) > 1 else []
    for before, after, g0, g1 in zip(segments, segments[1:], means, means[1:], strict=False):
        along = squares = 0.0
        for name, p in after.state.parameters.items():
            g = (g0[name].double() + g1[name].double()) / 2
            along -= float(((p[0] - before.state.parameters[name][0]).double() * g).sum())
            squares += float(g.square().sum())
        taus.append(along / squares if squares > 0 else float("nan"))
    counts = [max(1, s.steps[1] - s.steps[0]) for s in segments]
    if len(taus) > 1:
        taus[0] = taus[1] * counts[0] / counts[1]
    how = "how far the weights moved along the mean gradient"
    if not all(0 < tau < float("inf") for tau in taus):
        taus, how = [float(count) for count in counts], "the number of steps"
    one = [torch.tensor(tau, dtype=torch.float64) for tau in taus]
    return [[tau] * len(path.final.parameters) for tau in one], how
