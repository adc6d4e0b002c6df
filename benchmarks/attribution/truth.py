"""The record game of a world, from plain retraining alone, by regression-adjusted Monte Carlo.

Written over sizes, with t = k/n, the Shapley value of record i is

    φ_i = (f(all) − f(none)) / n + 1/n Σ_k E_{|S|=k}[ f(S) (s_i − t) / (t (1 − t)) ]        k = 1 … n − 1

so a random set S of k records, drawn with probability q(k), says something of every record and owner at once. What a regression g
(of the size, of how many records of each owner and class are in S, of their products, and of single records) predicts for f(S) is
subtracted, and the value that g itself gives, known in closed form, added back. Each fold of the runs is adjusted by the g of the other
folds, so that the estimate has no bias whatever g is (Witter et al. 2025, arXiv:2506.11849, with cross-fitting). The standard
error is that of the mean over runs. q(k) ∝ σ(k) / √(t (1 − t)), σ being the spread of what g leaves of the first PILOT runs: no other q has
less variance. On the logistic regression 9,728 runs give 0.74 points of standard error, where prefixes of permutations gave 0.94 with 25,472.

The loop written for logistic regression and the MLP is checked against the engine's `replay_values` before it starts; all other
worlds use that. Runs are kept in var/bench under the task's digest, after every CHUNK, and an interrupted command goes on where it
was. What came of them is small and committed, benchmarks/attribution/truths/DIGEST.json, so that nobody has to repeat hours:

    python -m benchmarks.attribution.truth [WORLD ...] [--target 0.3] [--minutes 30]

adds a part to them: sets of its own, retrained until every owner's standard error, of all parts together, is at most the target in
points, or the minutes of processor time are over. Parts are independent measurements, each on one machine, and each number is their
mean, weighted by the inverse of its variance: what a machine cannot do in an hour, several hours or machines can.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

from attribution.engine import Task, replay_values
from attribution.engine.task import seed_of
from attribution.engine.training import Program
from benchmarks.attribution.worlds import CACHE, WORLDS, make_task

Array = NDArray[np.float64]

TARGET = 0.003  # standard error of a share
RUNS = 64  # side by side: more leave the cache
CHUNK = 512  # runs between two savings
PILOT = 2048  # runs from which the probabilities of sizes are learnt
FOLDS = 8
BLOCK = 4096  # runs whose features are held at once
RIDGE = 0.5  # of the mean square of the features, for each feature a run has
COMMITTED = Path(__file__).with_name("truths")


@dataclass(frozen=True)
class Truth:
    shares: Array  # (n_owner,), of the total
    errors: Array  # (n_owner,), standard errors
    values: Array  # (n_train,): per record
    value_errors: Array
    total: float
    none: float
    n_run: int
    seconds: float  # of one thread
    n_part: int = 1  # independent measurements that this is the mean of

    def noise_in_tv(self) -> float:
        """What the truth's own error adds, on average, to a perfect estimate's TV."""
        return float(np.sqrt(2 / np.pi) * self.errors.sum() / 2)

    def to_json(self) -> dict[str, Any]:
        def plain(x: Any) -> Any:
            return [float(f"{v:.6g}") for v in x] if isinstance(x, np.ndarray) else x

        return {name: plain(x) for name, x in asdict(self).items()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Truth":
        names = cls.__dataclass_fields__
        return cls(**{k: np.array(v) if isinstance(v, list) else v for k, v in found.items() if k in names})


def of(task: Task, *, target: float = TARGET, seconds: float = float("inf")) -> Truth:
    """The committed truth of this very task; where there is none (another seed, texts, digits), `measure`."""
    path = COMMITTED / f"{task.digest[:16]}.json"
    if path.exists():
        return Truth.from_json(json.loads(path.read_text()))
    return measure(task, target=target, seconds=seconds)


def measure(
    task: Task,
    *,
    target: float = TARGET,
    seconds: float = float("inf"),
    part: int = 0,
    told: Truth | None = None,
) -> Truth:
    """One part: retrain until the widest owner's standard error is `target`, or so many seconds of processor time are spent here.

    The target is of this part together with what earlier parts have `told`; what is returned is this part alone.
    """
    path = CACHE / f"game-{task.digest[:16]}{f'-{part}' if part else ''}.npz"
    f, spent = np.zeros(0), 0.0
    if path.exists():
        with np.load(path) as kept:
            f, spent = kept["f"], float(kept["seconds"])
    replays = replayer(task)
    ends = replays(torch.tensor([[1.0], [0.0]]).expand(2, task.n_train)).tolist()
    begun, truth, looked = time.process_time(), None, 0
    while True:
        over = time.process_time() - begun >= seconds
        if len(f) >= CHUNK and (over or len(f) >= 1.2 * looked + CHUNK):  # to look costs as much as some runs
            truth, looked = estimate(task, f, ends, spent, part=part), len(f)
            widest = (together(told, truth) if told else truth).errors.max()
            if sys.stderr.isatty():
                line = f"\r{len(f):,} runs, {spent:.0f} s, ± {100 * widest:.2f} points at most  "
                print(line, end="", file=sys.stderr, flush=True)
            if over or widest <= target:
                return truth
        started = time.process_time()
        more = replays(torch.from_numpy(masks(task, f, len(f), CHUNK, part=part)).float()).double().numpy()
        f, spent = np.concatenate([f, more]), spent + time.process_time() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, f=f, seconds=spent)
        partial.replace(path)


def masks(task: Task, f: Array, start: int, count: int, *, part: int = 0) -> NDArray[np.bool_]:
    """(count, n): the sets of a part's runs from `start` on, a multiple of CHUNK; `f` of the part's pilot decides their sizes."""
    n, of_part = task.n_train, (part,) if part else ()
    found = []
    for chunk in range(start // CHUNK, -(-(start + count) // CHUNK)):
        rng = np.random.Generator(np.random.PCG64(seed_of(task.digest, "game", *of_part, chunk)))
        learnt = probabilities(task, f if chunk * CHUNK >= PILOT else None, part=part)
        edges = np.concatenate([[0], np.cumsum(learnt)])
        u = (np.arange(CHUNK) + rng.random(CHUNK)) / CHUNK  # stratified
        k = np.clip(np.searchsorted(edges, u, side="right"), 1, n - 1)
        found.append(rng.permuted(np.tile(np.arange(n), (CHUNK, 1)), axis=1) < k[:, None])
    return np.concatenate(found)[:count]


_LEARNT: dict[tuple[str, int], Array] = {}


def probabilities(task: Task, f: Array | None, *, part: int = 0) -> Array:
    """(n − 1,): q(k) of the sizes 1 … n − 1; without runs σ is taken for constant."""
    n = task.n_train
    t = np.arange(1, n) / n
    q = 1 / np.sqrt(t * (1 - t))
    if f is not None:
        key = (task.digest, part)
        if key not in _LEARNT:
            S = masks(task, f, 0, PILOT, part=part)
            k = S.sum(1)
            left = _adjusted(task, S, f[:PILOT], (q / q.sum())[k - 1], np.arange(PILOT) % FOLDS)[0]
            at, of = (np.log(x) for x in (S.sum(1) / n, left**2 + 1e-12))
            _LEARNT[key] = np.exp(0.5 * np.polyval(np.polyfit(at, of, 3), np.log(t)))
        q = q * np.maximum(_LEARNT[key], 0.1 * _LEARNT[key].max())
    return q / q.sum()


def estimate(task: Task, f: Array, ends: list[float], seconds: float, *, part: int = 0) -> Truth:
    n, owners = task.n_train, task.owners.numpy()
    q = np.tile(probabilities(task, None), (len(f), 1))
    if len(f) > PILOT:
        q[PILOT:] = probabilities(task, f, part=part)
    S = masks(task, f, 0, len(f), part=part)
    k = S.sum(1)
    t, chance = k / n, q[np.arange(len(f)), k - 1]
    left, base = _adjusted(task, S, f, chance, np.arange(len(f)) % FOLDS)
    per_record = (left / (n * chance * t * (1 - t)))[:, None] * (S - t[:, None])  # (runs, n)
    per_owner = per_record @ np.eye(owners.max() + 1)[owners]
    total, root = ends[0] - ends[1], np.sqrt(len(f))
    values = total / n + base + per_record.mean(0)
    return Truth(
        np.bincount(owners, values) / total,
        per_owner.std(0, ddof=1) / root / abs(total),
        values,
        per_record.std(0, ddof=1) / root,
        total,
        ends[1],
        len(f),
        seconds,
    )


def together(a: Truth, b: Truth) -> Truth:
    """Two independent measurements of one task, each number weighted by the inverse of its variance."""

    def mean(x: Array, dx: Array, y: Array, dy: Array) -> tuple[Array, Array]:
        u, v = dx**-2, dy**-2
        return (u * x + v * y) / (u + v), (u + v) ** -0.5

    shares, errors = mean(a.shares, a.errors, b.shares, b.errors)
    values, value_errors = mean(a.values, a.value_errors, b.values, b.value_errors)
    return Truth(
        shares,
        errors,
        values,
        value_errors,
        a.total,
        a.none,
        a.n_run + b.n_run,
        a.seconds + b.seconds,
        a.n_part + b.n_part,
    )


def _adjusted(task: Task, S: NDArray[np.bool_], f: Array, q: Array, fold: NDArray[np.int64]) -> tuple[Array, Array]:
    """What the regressions leave of f, (runs,), and the deviation from counting that they themselves give, (n,)."""
    t = S.mean(1)
    weight = 1 / (q**2 * t * (1 - t))
    weight /= weight.mean()
    by_record = len(f) <= BLOCK * FOLDS  # with more runs, what single records do is averaged out at less expense
    scaling = np.sqrt((_features(task, S[::-1][:BLOCK], by_record) ** 2).mean(0)) + 1e-12
    blocks = [slice(start, start + BLOCK) for start in range(0, len(f), BLOCK)]
    A = np.zeros((FOLDS, len(scaling), len(scaling)))
    b = np.zeros((FOLDS, len(scaling)))
    for rows in blocks:
        X = _features(task, S[rows], by_record) / scaling
        for j in range(FOLDS):
            here = fold[rows] == j
            A[j] += (X[here].T * weight[rows][here]) @ X[here]
            b[j] += X[here].T @ (weight[rows][here] * f[rows][here])
    ridge = RIDGE * len(scaling) * np.eye(len(scaling))
    mean = np.arange(_curves(t)[0].shape[1])
    ridge[mean, mean] *= 1e-6  # the mean is no deviation
    fitted = [np.linalg.solve(A.sum(0) - A[j] + ridge, b.sum(0) - b[j]) / scaling for j in range(FOLDS)]
    left = np.empty(len(f))
    for rows in blocks:
        predicted = _features(task, S[rows], by_record) @ np.array(fitted).T  # (runs, folds)
        left[rows] = f[rows] - np.take_along_axis(predicted, fold[rows, None], 1)[:, 0]
    return left, sum(_values_of(task, c) * (fold == j).mean() for j, c in enumerate(fitted))


def _curves(t: Array) -> tuple[Array, Array, Array]:
    """How the mean, the effects of groups, and all other effects may depend on t: (…, number)."""
    v = np.sqrt(t)
    powers = np.stack([v**p for p in range(7)], -1)
    return np.concatenate([powers, (1 / t)[..., None]], -1), powers[..., :4], powers[..., :2]


def _partitions(task: Task) -> list[NDArray[np.int64]]:
    """By owner and, where records have labels, by label: a model without a class is worse at it than one with little of it."""
    batch = task.train[torch.arange(task.n_train)]
    labels = [batch[1].numpy()] if len(batch) == 2 and batch[1].ndim == 1 else []
    return [np.unique(ids, return_inverse=True)[1] for ids in (task.owners.numpy(), *labels)]


def _times(x: Array, curves: Array) -> Array:
    return (x[:, :, None] * curves[:, None]).reshape(len(x), -1)


def _features(task: Task, S: NDArray[np.bool_], by_record: bool = True) -> Array:
    t = S.mean(1)
    mean, own, others = _curves(t)
    deviation = S - t[:, None]  # (runs, n)
    parts = [mean]
    for ids in _partitions(task):
        member = np.eye(ids.max() + 1)[ids]
        of_group = deviation @ member
        a, b = np.triu_indices(member.shape[1])
        parts += [
            _times(of_group, own),
            _times(of_group[:, a] * of_group[:, b], others),
            _times(np.log1p(S @ member), others),
        ]
    if by_record:
        parts.append(_times(deviation, others))
    return np.concatenate(parts, 1)


def _values_of(task: Task, coefficients: Array) -> Array:
    """1/n Σ_k E_{|S|=k}[ g(S) (s_i − t) / (t (1 − t)) ] for each record, (n,), by the moments of drawing without replacement."""
    n = task.n_train
    t = np.arange(1, n) / n
    mean, own, others = _curves(t)
    rest = coefficients[mean.shape[1] :]

    def take(number: int, curves: Array) -> Array:
        nonlocal rest
        found, rest = np.split(rest, [number * curves.shape[1]])
        return curves @ found.reshape(number, -1).T  # (k, number): the coefficients at every size

    slope, values = np.zeros((n - 1, n)), np.zeros((n - 1, n))
    for ids in _partitions(task):
        size = np.bincount(ids)
        a, b = np.triu_indices(len(size))
        slope += take(len(size), own)[:, ids]
        values += (1 - 2 * t)[:, None] * (take(len(a), others) @ _third_moments(ids))
        of_count = take(len(size), others)
        for group, m in enumerate(size):
            within, outside = _effect_of_count(n, m)
            values += of_count[:, group, None] * np.where(ids == group, within[:, None], outside[:, None])
    if len(rest):
        slope += take(n, others)
    values += (slope * n - slope.sum(1, keepdims=True)) / (n - 1)  # E[e_i²] = t(1−t), E[e_i e_j] = −t(1−t)/(n−1)
    return values.sum(0) / n


def _third_moments(ids: NDArray[np.int64]) -> Array:
    """(pairs of groups, n): Σ_{j ∈ a, l ∈ b} E[e_j e_l e_i] / μ for every record i.

    With e_i = s_i − t, which add up to 0:  E[e_i³] = μ = t(1−t)(1−2t),  E[e_i² e_j] = −μ/(n−1),  E[e_i e_j e_l] = 2μ/((n−1)(n−2)).
    """
    n, size = len(ids), np.bincount(ids).astype(float)
    two, three = -1 / (n - 1), 2 / ((n - 1) * (n - 2))
    a, b = np.triu_indices(len(size))
    counted = np.zeros((len(a), n))
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        in_x, in_y = (ids == x).astype(float), (ids == y).astype(float)
        rx, ry = size[x] - in_x, size[y] - in_y  # the others of each group
        if x == y:
            counted[row] = in_x * (1 + 2 * rx * two) + rx * two + rx * (rx - 1) * three
        else:
            counted[row] = in_x * ry * two + in_y * rx * two + rx * ry * three
    return counted


def _effect_of_count(n: int, m: int) -> tuple[Array, Array]:
    """E[ h(c) (s_i − t) ] / (t (1 − t)) of h = log(1 + c), c being how many of m records are in S: for a record of them, and for another.

    Each (n − 1,), over the sizes 1 … n − 1; c is hypergeometric.
    """
    k = np.arange(1, n)[:, None]
    c = np.arange(m + 1)[None]
    chance = hypergeom.pmf(c, n, m, k)
    h = np.log1p(c)
    t = k[:, 0] / n
    mean, of_c = (chance * h).sum(1), (chance * h * c).sum(1)
    within = (of_c / m - t * mean) / (t * (1 - t))
    outside = ((k[:, 0] * mean - of_c) / max(n - m, 1) - t * mean) / (t * (1 - t))
    return within, outside


def replayer(task: Task) -> Callable[[Tensor], Tensor]:
    """The loop written out where it fits, else the engine's."""
    if _is_written_out(task):
        return lambda weights: fast_replays(task, weights)
    program = Program(task)
    return lambda weights: replay_values(task, weights, program=program)


def fast_replays(task: Task, weights: Tensor) -> Tensor:
    """`replay_values` (R,) for a linear model, or one with a hidden GELU layer, under SGD with momentum.

    All runs see the same batch, so their first layers are one matrix product; derivatives are written out.
    """
    recipe = task.require_recipe()
    X, y = task.train[torch.arange(task.n_train)]
    Q, answers = task.queries[torch.arange(task.n_query)]
    onehot = torch.nn.functional.one_hot(y, 10).to(X.dtype)
    state, momentum = dict(recipe.initial_state), recipe.options["momentum"]
    rates = torch.as_tensor(recipe.learning_rate).expand(recipe.n_step).tolist()
    deep = "2.weight" in state
    values = []
    for part in weights.split(RUNS):
        runs = len(part)
        w = part.T.contiguous() / recipe.batch  # (n, R)
        P = [
            state["0.weight"].T[:, None].expand(-1, runs, -1).reshape(X.shape[1], -1).clone(),
            state["0.bias"].repeat(runs),
        ]
        hidden = len(state["0.bias"])
        if deep:
            P += [state["2.weight"].T.expand(runs, -1, -1).clone(), state["2.bias"].expand(runs, 1, -1).clone()]
        V = [torch.zeros_like(p) for p in P]
        for row, rate in zip(recipe.order, rates, strict=True):
            seen = row[row >= 0]
            x, n = X[seen], len(seen)
            z = torch.addmm(P[1], x, P[0])  # (n, R · hidden)
            if deep:
                h = z.view(n, runs, hidden).transpose(0, 1)  # (R, n, hidden)
                cdf = 0.5 * (1 + torch.erf(h * 0.5**0.5))
                a = h * cdf
                d = (torch.baddbmm(P[3], a, P[2]).softmax(-1) - onehot[seen]) * w[seen].T[:, :, None]
                slope = cdf + h * torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5
                g = ((d @ P[2].transpose(1, 2)) * slope).transpose(0, 1).reshape(n, -1)
                gradients = [g.sum(0), a.transpose(1, 2) @ d, d.sum(1, keepdim=True)]
            else:
                d = (z.view(n, runs, 10).softmax(-1) - onehot[seen][:, None]) * w[seen][:, :, None]
                g = d.view(n, -1)
                gradients = [g.sum(0)]
            torch.addmm(V[0], x.T, g, beta=momentum, out=V[0])
            for v, gradient in zip(V[1:], gradients, strict=True):
                v.mul_(momentum).add_(gradient)
            for p, v in zip(P, V, strict=True):
                p.add_(v, alpha=-rate)
        z = torch.addmm(P[1], Q, P[0])
        if deep:
            a = torch.nn.functional.gelu(z.view(len(Q), runs, hidden).transpose(0, 1))
            logits = torch.baddbmm(P[3], a, P[2]).transpose(0, 1)
        else:
            logits = z.view(len(Q), runs, 10)
        values.append(logits.log_softmax(-1).gather(2, answers[:, None, None].expand(-1, runs, 1))[:, :, 0].mean(0))
    return torch.cat(values)


def _is_written_out(task: Task) -> bool:
    recipe = task.require_recipe()
    return recipe.optimizer == "sgd" and set(recipe.initial_state) <= {"0.weight", "0.bias", "2.weight", "2.bias"}


def check(task: Task) -> float:
    """The largest difference of the loop from the engine's replays over 32 random sets."""
    if not _is_written_out(task):
        return 0.0
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(32, 1, generator=generator)
    masks = (torch.rand(32, task.n_train, generator=generator) < chance).float()
    return float((replay_values(task, masks) - replayer(task)(masks)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="*", default=list(WORLDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=100 * TARGET, help="standard error in points a share")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of processor time for each world")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.world:
        task = make_task(WORLDS[name], seed=given.seed)
        if (difference := check(task)) > 1e-3 * WORLDS[name].is_smooth + 0.1:
            raise SystemExit(f"{name}: the loop differs from the engine's replays by {difference:.1e}")
        path = COMMITTED / f"{task.digest[:16]}.json"
        truth = Truth.from_json(json.loads(path.read_text())) if path.exists() else None
        if truth is None or truth.errors.max() > given.target / 100:
            part = truth.n_part if truth else 0
            found = measure(task, target=given.target / 100, seconds=60 * given.minutes, part=part, told=truth)
            truth = together(truth, found) if truth else found
            COMMITTED.mkdir(exist_ok=True)
            command = f"python -m benchmarks.attribution.truth {name} --seed {given.seed} --target {given.target:g}"
            entry = {"world": name, "seed": given.seed, "digest": task.digest, "command": command, **truth.to_json()}
            path.write_text(json.dumps(entry, indent=1) + "\n")
        count = np.bincount(task.owners.numpy()) / task.n_train
        print(
            f"{name}, seed {given.seed} (loop differs from the engine's replays by {difference:.1e} at most): {truth.n_run:,} runs in "
            f"{truth.seconds:.0f} s of CPU; total {truth.total:.3f}; ± {100 * truth.errors.max():.2f} points at most; counting is "
            f"off by TV {np.abs(truth.shares - count).sum() / 2:.3f}\n  shares {' '.join(f'{100 * s:.1f}' for s in truth.shares)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
