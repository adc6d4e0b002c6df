"""Influence through the curvature of the training loss, eigenvalue-corrected Kronecker-factored (EK-FAC).

    score[i, q] = (1/n) Σ_l m_l,i · g_i(θ_l)ᵀ F_l S_l+1 ⋯ S_L g_q(θ_L)

Positive: record i lowers the measurement of query q; g_q = ∂measurement_q/∂θ at the weights that are explained. Training is
cut in segments l = 1 … L, each seen from one state θ_l; m_l,i is how often the segment saw record i. Training on it moves
the weights along g_i, what follows in the segment shrinks that along eigendirections with curvature σ, and so do later
segments, all of them by gradient flow (SOURCE: Bae et al. 2024, arXiv:2405.12186):

    F = τ (1 − e^{−x}) / x        S = e^{−x}        x = τ σ + κ        τ: Σ learning rates,  κ: Σ learning rate · decay

With half of the data each τσ is half of that, and the last state is rewound to where that would have ended; scores are from both
(`rewinding.py`).

With one state this is an influence function (Koh & Liang 2017, arXiv:1703.04730; Grosse et al. 2023, arXiv:2308.03296) whose damping is
1/τ: F = τ / (1 + x) = (σ + (1 + κ)/τ)⁻¹ is offered beside it. For H and its eigenvalues σ see `curvature.py`.

Settings are not the user's. With a recipe τ is known but for what gradient flow leaves out (clipping, noise, Adam's
changing scale), so c · τ is tried for several c, with one segment and several, and the best by replays taken (`held_out.py`).
Without one, τ is the `age` that the checkpoint shows by how much gradient it has left (`checkpoints.py`).

Assumes that training is smooth and H is nearly block-diagonal. Adam's scale is averaged over a block.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attribution.engine import curvature as curvatures
from attribution.engine.checkpoints import (
    UNREAD,
    Segment,
    Trajectory,
    age,
    at_state,
    expected_start,
    mean_gradient,
    trajectory,
    where_unread,
)
from attribution.engine.curvature import Curvature
from attribution.engine.estimators import Estimate, by_class
from attribution.engine.gradients import BLOCK_BYTES, block_rows, named_gradients, parameter_count
from attribution.engine.held_out import best, held_out
from attribution.engine.rewinding import HALF, PARTS, joined, rewound, way
from attribution.engine.task import Task
from attribution.engine.training import Program, Progress, State, Tensors

CALIBRATED = True  # with a recipe; without one the report says false
SEGMENTS = 4
MULTIPLES = (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0)  # c: what is tried around τ
DEFAULT_DAMPING = 0.1  # of the mean eigenvalue, where the age cannot be read off


@dataclass(frozen=True)
class Filter:
    """What a segment does to a direction of curvature σ."""

    kind: str  # "flow": gradient flow; "ridge": a damped inverse
    multiple: float  # of τ

    def gain(self, tau: Tensor, x: Tensor) -> Tensor:
        """F; tau and x = τσ + κ are (d,)."""
        c, x = self.multiple, self.multiple * x
        if self.kind == "ridge":
            return c * tau / (1 + x)
        return c * tau * torch.where(x > 1e-6, -torch.expm1(-x) / x.clamp_min(1e-6), 1 - x / 2)

    def kept(self, x: Tensor) -> Tensor:
        """S"""
        x = self.multiple * x
        return 1 / (1 + x) if self.kind == "ridge" else torch.exp(-x)


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
    """Scores and how each setting was chosen.

    Args:
        state: the weights to explain; by default the task's checkpoints, or training by the recipe.
        rows: records at a time; as many as fit by default. It changes no score beyond rounding.
    """
    task = replace(task, precision="float32")  # an age is read off small differences, which bfloat16 loses
    program = Program(task)
    if state is not None:
        paths = [at_state(task, program, state)]
    else:
        # One segment and several, where there is a choice: neither is the better one on every task.
        paths = [trajectory(task, program, n_segment=1)]
        several = trajectory(task, program, n_segment=SEGMENTS)
        if len(several.segments) > 1:
            paths = [several, *paths] if task.recipe is None else [*paths, several]
    if task.recipe is None:
        return _by_age(task, program, paths[0], rows, progress)

    held = held_out(task, program)
    tried: list[tuple[Trajectory, list[Curvature], str, list[float], Filter]] = []
    first = _fitted(program, paths[0], rows)  # of one segment, whose state is where training ends
    half, why = _halfway(program, paths[0], first[-1], _aged(program, paths[0], first)[1], rows)

    def candidates() -> Iterator[Tensor]:
        for number, path in enumerate(paths):
            fitted = _fitted(program, path, rows) if number else first
            kinds = ("ridge", "flow") if len(path.segments) == 1 else ("flow",)
            recorded = [_rates(segment, found) for segment, found in zip(path.segments, fitted, strict=True)]
            aged, _ = _aged(program, path, fitted)
            for (clock, steps), kind in itertools.product((("recipe", recorded), ("age", aged)), kinds):
                filters = [Filter(kind, c) for c in MULTIPLES]
                tried.extend((path, fitted, clock, [1.0], f) for f in filters)
                whole = scores_of(task, program, path, fitted, steps, filters, rows=rows)
                yield from whole
                if half is not None:
                    tried.extend((path, fitted, clock, list(PARTS), f) for f in filters)
                    there = [_rates(half.path.segments[0], half.found, HALF)] if clock == "recipe" else half.aged
                    halves = scores_of(task, program, half.path, [half.found], there, filters, rows=rows)
                    yield from (joined(a, b) for a, b in zip(whole, halves, strict=True))
            if progress:
                progress(number + 1, len(paths))

    chosen, scores, agreements = best(candidates(), held)
    path, fitted, clock, parts, filter_ = tried[chosen]
    slope = held.slope(scores)
    if held.is_still:
        scores = torch.zeros_like(scores)
    settings = _settings(path, fitted) | {
        "tau_from": clock,
        "parts": parts,
        "rewound": why,
        "filter": filter_.kind,
        "multiple_of_tau": filter_.multiple,
        "chosen_by": f"agreement with {held.run_equivalents} replays, each of which costs a plain run",
        "run_equivalents": held.run_equivalents,
        "agreement": round(agreements[chosen], 4),
        "tried": [
            {
                "segments": len(p.segments),
                "tau_from": t,
                "parts": used,
                "filter": f.kind,
                "multiple_of_tau": f.multiple,
                "agreement": round(a, 4),
            }
            for (p, _, t, used, f), a in zip(tried, agreements, strict=True)
        ],
        "slope": slope,
    }
    scores = by_class(task, scores * slope if slope > 0 else scores)
    return Estimate(scores.float(), slope > 0, settings)


def _by_age(task: Task, program: Program, path: Trajectory, rows: int | None, progress: Progress | None) -> Estimate:
    fitted = _fitted(program, path, rows, progress)
    steps, ages = _aged(program, path, fitted)
    filters = [Filter("flow", 1.0)]
    (scores,) = scores_of(task, program, path, fitted, steps, filters, rows=rows)
    half, why = _halfway(program, path, fitted[-1], ages, rows)
    if half is not None:
        (there,) = scores_of(task, program, half.path, [half.found], half.aged, filters, rows=rows)
        scores = joined(scores, there)
    settings = _settings(path, fitted) | {"filter": "flow", "chosen_by": "age", "ages": ages, "run_equivalents": 0}
    settings |= {"parts": list(PARTS) if half is not None else [1.0], "rewound": why}
    return Estimate(by_class(task, scores).float(), False, settings)


def _fitted(program: Program, path: Trajectory, rows: int | None, progress: Progress | None = None) -> list[Curvature]:
    """The curvature at each segment's state."""
    found = []
    for number, segment in enumerate(path.segments):
        found.append(curvatures.fit(program, segment.state, visits=segment.visits, rows=rows))
        if progress:
            progress(number + 1, len(path.segments) + 1)
    return found


@dataclass(frozen=True)
class _Half:
    """Where half of the data would have led."""

    path: Trajectory  # of one segment
    found: Curvature
    aged: list[tuple[Tensor, Tensor]]  # its (τ, x) by age


def _halfway(
    program: Program,
    path: Trajectory,
    found: Curvature,
    ages: Sequence[dict[str, Any]],
    rows: int | None,
) -> tuple[_Half | None, str]:
    """The last state rewound to half of the data, unless it cannot have come from where it would go; and why.

    Args:
        found: the curvature there.
        ages: of all segments; together that of the state.
    """
    tau = sum(entry["tau"] for entry in ages)
    x = tau * found.eigenvalues
    rotated = found.rotate(way(program, path.final, path.start))
    # (e^{−tx} − e^{−x}) / (1 − e^{−x}) for t = ½
    back = found.restore(rotated * torch.sigmoid(-HALF * x).to(rotated))
    state, why = rewound(program, path.final, back, path.start)
    if state is None:
        return None, why
    visits = torch.stack([segment.visits for segment in path.segments]).mean(0)
    segment = replace(path.segments[-1], state=state, visits=visits)
    there = curvatures.fit(program, state, visits=visits, rows=rows)
    aged = (torch.full_like(there.eigenvalues, tau), HALF * tau * there.eigenvalues)
    return _Half(Trajectory([segment], state, path.start), there, [aged]), why


def _aged(
    program: Program, path: Trajectory, fitted: Sequence[Curvature]
) -> tuple[list[tuple[Tensor, Tensor]], list[dict[str, Any]]]:
    """(τ, x) of every coordinate for each segment by its age, and how each was come by."""
    taus, hows, before = [], [], path.start
    for segment, found in zip(path.segments, fitted, strict=True):
        tau, how = _age(program, segment.state, before, found)
        taus.append(tau)
        hows.append(how)
        before = {name: p[0] for name, p in segment.state.parameters.items()}
    lengths = [segment.steps[1] - segment.steps[0] for segment in path.segments]
    defaults = [1 / max(DEFAULT_DAMPING * float(found.eigenvalues.mean()), 1e-12) for found in fitted]
    steps, ages = [], []
    for segment, found, tau, read, how in zip(
        path.segments, fitted, where_unread(taus, lengths, defaults), taus, hows, strict=True
    ):
        steps.append((torch.full_like(found.eigenvalues, tau), tau * found.eigenvalues))
        why = how if read == tau else UNREAD
        ages.append({"step": segment.state.step, "tau": tau, "from": why})
    return steps, ages


def _age(program: Program, state: State, before: Tensors | None, found: Curvature) -> tuple[float, str]:
    """τ of the segment that ends at `state`, NaN where it cannot be read off, and from what it was read."""
    g = mean_gradient(program, state)
    if before is None:
        start, variance, _ = expected_start(program)
        how = "the values that the model is built with"
    else:
        start, variance, how = before, dict.fromkeys(before, 0.0), "the state before"
    delta = {name: p - start[name][None] for name, p in state.parameters.items()}
    remaining = -sum(float((g[name].double() * delta[name][0].double()).sum()) for name in g)
    moved = found.rotate(delta)[0].double().square() - found.spread(variance)
    return age(found.eigenvalues, moved, remaining), how


def _rates(segment: Segment, found: Curvature, part: float = 1.0) -> tuple[Tensor, Tensor]:
    """(τ, x) of every coordinate, (d,) each, with every record at the weight `part`."""
    assert segment.rate is not None
    tau = found.spread(segment.rate)
    return tau, part * tau * found.eigenvalues + found.spread(segment.decay)


def scores_of(
    task: Task,
    program: Program,
    path: Trajectory,
    fitted: Sequence[Curvature],
    steps: Sequence[tuple[Tensor, Tensor]],
    filters: Sequence[Filter],
    *,
    rows: int | None = None,
) -> list[Tensor]:
    """The equation on top, for several filters at once: a (n_train, n_query) float64 for each, copies apart.

    Args:
        fitted: the curvature at each segment's state.
        steps: (τ, x) of each segment, (d,) each.
    """
    d = parameter_count(program, path.final)
    chunk = max(1, min(task.n_query, 4 * BLOCK_BYTES // (8 * d * len(filters))))
    size = rows or block_rows(program, path.final)
    scores = [torch.zeros(task.n_train, task.n_query, dtype=torch.float64) for _ in filters]
    for q in torch.arange(task.n_query).split(chunk):
        query = [named_gradients(program, path.final, task.queries, part, of_loss=False) for part in q.split(size)]
        adjoint = {name: torch.cat([part[name] for part in query]) for name in query[0]}
        adjoints = [adjoint for _ in filters]
        for number in reversed(range(len(path.segments))):
            segment, found, (tau, x) = path.segments[number], fitted[number], steps[number]
            rotated = [found.rotate(a) for a in adjoints]
            pulled = [(a * f.gain(tau, x).to(a)).T.contiguous() for a, f in zip(rotated, filters, strict=True)]
            for i in segment.visits.nonzero()[:, 0].split(size):
                G = found.rotate(named_gradients(program, segment.state, task.train, i, of_loss=True))
                G = G * (segment.visits[i] / task.n_train).to(G)[:, None]
                for s, w in zip(scores, pulled, strict=True):
                    s[i[:, None], q] += (G @ w).double().cpu()
            if number:
                adjoints = [found.restore(a * f.kept(x).to(a)) for a, f in zip(rotated, filters, strict=True)]
    return scores


def _settings(path: Trajectory, fitted: Sequence[Curvature]) -> dict[str, Any]:
    return {
        "checkpoints": path.steps,
        "segments": len(path.segments),
        "curvature": fitted[-1].labels.why,
        "parameters": fitted[-1].treatments,
    }
