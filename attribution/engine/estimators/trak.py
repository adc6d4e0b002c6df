"""Influence of training examples on queries, from per-sample gradients at one or several checkpoints.

    score[t, q] = g_t · (F + λI)⁻¹ · g_q      F = (1/n) Σ g_t g_tᵀ      λ = damping · tr(F) / d

Positive: more weight on example t lowers the loss on query q.
Koh & Liang 2017, arXiv:1703.04730; with projected gradients, Park et al. 2023, arXiv:2303.14186.

Up to EXACT parameters the gradients stay as they are, beyond they are projected to WIDTH numbers (`projection.py`). The scores
of several checkpoints are averaged (TRAK's ensemble, here along one training). Two things differ from the paper: F is made
from gradients for the labels that the model itself would draw, not from those of the labels as given (see `curvature.py` for why;
where the loss cannot be split at the output it is as above), and a query's gradient is the measurement's own. So below EXACT
parameters this is the Gauss–Newton influence function, exact but for λ.

One checkpoint alone is joined by itself, rewound to half of the data (`rewinding.py`), where F counts half.

λ is not the user's: it is 1/τ with τ the age that each checkpoint shows (`checkpoints.py`), or with a recipe the best multiple of it by
replays (`held_out.py`), which also say whether the last checkpoint, it and its rewound self, or the mean over several predicts
best. (The recipe's own Σ learning rates is the same for SGD; under Adam it means little, since each coordinate has its own.)
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attribution.engine import curvature as curvatures
from attribution.engine.checkpoints import Segment, Trajectory, age, at_state, expected_start, mean_gradient, trajectory
from attribution.engine.curvature import Labels, curvature_gradients, curvature_rows, labels_of
from attribution.engine.estimators import Estimate, by_class
from attribution.engine.gradients import block_rows, flat, named_gradients, parameter_count
from attribution.engine.held_out import best, held_out
from attribution.engine.projection import project
from attribution.engine.rewinding import HALF, PARTS, joined, rewound, way
from attribution.engine.task import Records, Task
from attribution.engine.training import Program, Progress, State, Tensors

EXACT = 3072  # parameters; F with more would take minutes to factor
WIDTH = 2048
CHECKPOINTS = 4
MULTIPLES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0)  # of 1/τ
DEFAULT_DAMPING = 0.1  # of F's mean eigenvalue, where the age cannot be read off
LANCZOS = 64  # steps: enough for the age to agree with a full eigendecomposition to 1 %
SEED = 0


def influence_scores(
    train_grads: Tensor, query_grads: Tensor, *, damping: float, fisher: Tensor | None = None
) -> Tensor:
    """Score every training example against every query.

    Args:
        train_grads: gradients of the training loss, shape (n_train, d).
        query_grads: gradients of the query loss, shape (n_query, d), same parameter order.
        damping: ridge as a fraction of F's mean eigenvalue; dimensionless, > 0.
        fisher: F, shape (d, d), if it comes from other gradients than `train_grads`.

    Returns:
        Scores of shape (n_train, n_query), in the dtype of `train_grads`.
    """
    n_train, d = train_grads.shape
    if query_grads.shape[1] != d or damping <= 0:
        raise ValueError(f"d: {query_grads.shape[1]} against {d}; damping: {damping}")

    G = train_grads.double()  # the eigenvalues of F span many orders of magnitude
    F = G.T @ G / n_train if fisher is None else fisher.double().clone()  # (d, d)
    F.diagonal().add_(damping * F.trace() / d)
    solved = torch.cholesky_solve(query_grads.double().T, torch.linalg.cholesky(F))  # (d, n_query)
    return (G @ solved).to(train_grads.dtype)


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
    path = at_state(task, program, state) if state is not None else trajectory(task, program, n_segment=CHECKPOINTS)
    states = _seen(path)
    d = parameter_count(program, path.final)
    width = width_of(d)
    features = [_Features(task, program, segment, width, rows) for segment in states]
    steps = [segment.state.step for segment in states]
    settings: dict[str, Any] = {
        "checkpoints": steps,
        "projection": "none" if width is None else f"sparse Johnson–Lindenstrauss, {d:,} to {width:,}, seed {SEED}",
        "curvature": features[-1].labels.why,
        "parameters": dict.fromkeys(path.final.parameters, "exact" if width is None else "projected with all others"),
    }
    ages = [found.age_of(path.start) for found in features]
    settings["ages"] = [{"step": step, "tau": tau, "from": how} for step, (tau, how) in zip(steps, ages, strict=True)]
    half: _Features | None = None
    if task.recipe is not None or len(states) == 1:
        half, settings["rewound"] = _halfway(task, program, path, states[-1], features[-1], ages[-1][0], rows)
    if task.recipe is None:
        scores = _mean([found.scores(1 / tau) for found, (tau, _) in zip(features, ages, strict=True)])
        if half is not None:
            scores = joined(scores, half.scores(1 / ages[-1][0], HALF))
        settings |= {"damping": [1 / tau for tau, _ in ages], "chosen_by": "age", "run_equivalents": 0}
        settings["parts"] = list(PARTS) if half is not None else [1.0]
        return Estimate(by_class(task, scores).float(), False, settings)

    held = held_out(task, program)
    tried: list[tuple[list[int], list[float], list[float]]] = []  # checkpoints, dampings, parts

    def candidates() -> Iterator[Tensor]:
        for number, multiple in enumerate(MULTIPLES):
            ridges = [multiple / tau for tau, _ in ages]
            each = [found.scores(ridge) for found, ridge in zip(features, ridges, strict=True)]
            tried.append((steps[-1:], ridges[-1:], [1.0]))
            yield each[-1]
            if half is not None:
                tried.append((steps[-1:], ridges[-1:], list(PARTS)))
                yield joined(each[-1], half.scores(ridges[-1], HALF))
            if len(each) > 1:
                tried.append((steps, ridges, [1.0]))
                yield _mean(each)
            if progress:
                progress(number + 1, len(MULTIPLES))

    chosen, scores, agreements = best(candidates(), held)
    slope = held.slope(scores)
    if held.is_still:
        scores = torch.zeros_like(scores)
    settings |= {
        "checkpoints": tried[chosen][0],
        "damping": tried[chosen][1],
        "parts": tried[chosen][2],
        "chosen_by": f"agreement with {held.run_equivalents} replays, each of which costs a plain run",
        "run_equivalents": held.run_equivalents,
        "agreement": round(agreements[chosen], 4),
        "tried": [
            {"checkpoints": used, "damping": ridges, "parts": parts, "agreement": round(a, 4)}
            for (used, ridges, parts), a in zip(tried, agreements, strict=True)
        ],
        "slope": slope,
    }
    scores = by_class(task, scores * slope if slope > 0 else scores)
    return Estimate(scores.float(), slope > 0, settings)


class _Features:
    """Gradients of records and queries, and F, at one state; all of width k."""

    def __init__(self, task: Task, program: Program, segment: Segment, width: int | None, rows: int | None) -> None:
        self.program, self.state, self.width = program, segment.state, width
        self.labels: Labels = labels_of(program, segment.state)
        n, m = task.n_train, segment.visits
        size = rows or block_rows(program, segment.state)
        train = self._rows(task.train, size, of_loss=True)
        self.train = train * (m.double()[:, None] / n).to(train)
        self.queries = self._rows(task.queries, size, of_loss=False)
        self.fisher = train.new_zeros(train.shape[1], train.shape[1])
        for index in m.nonzero()[:, 0].split(rows or curvature_rows(program, segment.state, self.labels)):
            self.fisher += fisher_of(program, segment.state, index, self.labels, width=width, visits=m[index])

    def scores(self, ridge: float, part: float = 1.0) -> Tensor:
        """(n_train, n_query) float64 for part · F + ridge · I, copies apart."""
        mean = part * float(self.fisher.trace()) / len(self.fisher)
        if mean <= 0:  # no record's gradient has any length
            return (self.train @ self.queries.T / ridge).cpu()
        return influence_scores(self.train, self.queries, damping=ridge / mean, fisher=part * self.fisher).cpu()

    def age_of(self, before: Tensors | None) -> tuple[float, str]:
        """τ whose inverse is the ridge, and how it was come by."""
        g = mean_gradient(self.program, self.state)
        return age_of(self.program, self.state, self.fisher, g, before, width=self.width)

    def _rows(self, records: Records, size: int, *, of_loss: bool) -> Tensor:
        parts = [
            gradient_rows(self.program, self.state, records, index, of_loss=of_loss, width=self.width)
            for index in torch.arange(len(records)).split(size)
        ]
        return torch.cat(parts)


def _halfway(
    task: Task,
    program: Program,
    path: Trajectory,
    last: Segment,
    features: _Features,
    tau: float,
    rows: int | None,
) -> tuple[_Features | None, str]:
    """The last state rewound to half of the data, unless it cannot have come from where it would go; and why."""
    moved = way(program, last.state, path.start)
    if features.width is None:
        F, x = features.fisher, flat(moved)[0].double()
        solved = torch.linalg.solve(torch.eye(len(F)).to(F) + HALF * tau * F, (1 - HALF) * x)
        parts = solved.split([m.numel() for m in moved.values()])
        back = {name: part.reshape(m.shape) for (name, m), part in zip(moved.items(), parts, strict=True)}
    else:
        # A projected F has no way back to the weights: the same in the eigenbasis of EK-FAC.
        found = curvatures.fit(program, last.state, visits=last.visits, rows=rows)
        rotated = found.rotate(moved)
        back = found.restore(rotated * ((1 - HALF) / (1 + HALF * tau * found.eigenvalues)).to(rotated))
    state, why = rewound(program, last.state, back, path.start)
    return (None if state is None else _Features(task, program, replace(last, state=state), features.width, rows)), why


def width_of(d: int) -> int | None:
    """To how many numbers gradients of d parameters are projected; None: they stay as they are."""
    return None if d <= EXACT else WIDTH


def gradient_rows(
    program: Program, state: State, records: Records, index: Tensor, *, of_loss: bool, width: int | None
) -> Tensor:
    """(B, k) float64: what each record's gradient is made of here."""
    return _projected(flat(named_gradients(program, state, records, index, of_loss=of_loss)), width)


def fisher_of(
    program: Program, state: State, index: Tensor, labels: Labels, *, width: int | None, visits: Tensor
) -> Tensor:
    """(k, k) float64: these records' part of F; the parts add up."""
    found = curvature_gradients(program, state, index, labels)
    G = torch.cat([g.reshape(*g.shape[:2], -1) for g in found.values()], 2)  # (B, r, d)
    G = _projected((G * (visits / program.task.n_train).sqrt().to(G)[:, None, None]).flatten(0, 1), width)
    return G.T @ G


def age_of(
    program: Program, state: State, fisher: Tensor, mean: Tensors, before: Tensors | None, *, width: int | None
) -> tuple[float, str]:
    """τ whose inverse is the ridge at a state, and how it was come by.

    Args:
        mean: the mean gradient of the training loss there, per parameter.
        before: where training came from; None: from what the model is built with.
    """
    if before is None:
        start, _, deviation = expected_start(program)
    else:
        start, deviation = before, {name: torch.zeros_like(p) for name, p in before.items()}
    delta = {name: p - start[name][None] for name, p in state.parameters.items()}
    remaining = -sum(float((mean[name].double() * delta[name][0].double()).sum()) for name in mean)
    # What the start's own spread puts into each direction is taken off again, by one draw of it.
    seen, moved = spectrum(fisher, _projected(flat(delta), width)[0])
    drawn, spread = spectrum(fisher, _projected(flat({n: d[None] for n, d in deviation.items()}), width)[0])
    tau = age(torch.cat([seen, drawn]), torch.cat([moved, -spread]), remaining)
    if tau == tau:
        return tau, "the age that the checkpoint shows"
    damping = DEFAULT_DAMPING * float(fisher.trace()) / len(fisher)
    return 1 / max(damping, 1e-12), f"{DEFAULT_DAMPING} of the mean eigenvalue: no age can be read off"


def _projected(G: Tensor, width: int | None) -> Tensor:
    return G.double() if width is None else project(G, width, SEED).double()


def spectrum(matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues as x sees them: xᵀ f(matrix) x ≈ Σ weight · f(node) for smooth f, at the cost of LANCZOS products.

    Gauss quadrature by Lanczos steps, orthogonalised in full (Golub & Meurant 2010, ch. 6); matrix is positive semidefinite.
    """
    norm = x.norm()
    if norm == 0:
        return x.new_zeros(1), x.new_zeros(1)
    basis, diagonal, beside = [x / norm], [], []
    for _ in range(min(LANCZOS, len(x))):
        w = matrix @ basis[-1]
        diagonal.append(w @ basis[-1])
        Q = torch.stack(basis)
        for _ in range(2):  # once leaves rounding behind
            w = w - Q.T @ (Q @ w)
        if w.norm() <= 1e-12 * norm or w.norm() <= 1e-10 * max(diagonal).abs():
            break
        beside.append(w.norm())
        basis.append(w / w.norm())
    T = torch.stack(diagonal).diag()
    for k, value in enumerate(beside[: len(diagonal) - 1]):
        T[k, k + 1] = T[k + 1, k] = value
    nodes, vectors = torch.linalg.eigh(T)
    return nodes.clamp_min(0), norm**2 * vectors[0].square()


def _seen(path: Trajectory) -> list[Segment]:
    """The states to work from, the explained one last, each for the whole of training: all of its visits."""
    last = path.segments[-1]
    visits = last.visits
    if last.rate is not None:
        rates = torch.tensor([segment.mean_rate() for segment in path.segments], dtype=torch.float64)
        rates = rates if rates.any() else torch.ones_like(rates)
        visits = torch.stack([segment.visits for segment in path.segments], 1) @ rates / rates.sum().clamp_min(1e-300)
    states = [*(segment.state for segment in path.segments[:-1]), path.final]
    return [Segment(state, last.steps, visits, last.rate, last.decay) for state in states]


def _mean(scores: list[Tensor]) -> Tensor:
    return torch.stack(scores).mean(0)
