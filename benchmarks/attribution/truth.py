"""The record game of a world, from plain retraining alone: every prefix of random permutations and of their reverses.

A record's increment is f(prefix with it) − f(prefix without it); its mean over permutations is its Shapley value, without bias
and with the right total for every single permutation (Castro, Gómez & Tejada 2009). The standard error is that of the mean over
pairs of a permutation and its reverse. A pair is 2 · (n − 1) runs,
so they are trained side by side by a loop written for the two models here, which must and does equal the engine's
`replay_values` (`python -m benchmarks.attribution.truth WORLD` checks it before it starts).

Results are kept in var/bench under
the task's digest, after every chunk, and an interrupted run goes on where it was.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution.engine import Task, replay_values
from attribution.engine.task import seed_of
from benchmarks.attribution.worlds import CACHE, WORLDS, make_task

Array = NDArray[np.float64]

TARGET = 0.003  # standard error of a share
MAX_PAIRS = 3000
RUNS = 64  # side by side: more leave the cache


@dataclass(frozen=True)
class Truth:
    shares: Array  # (n_owner,), of the total
    errors: Array  # (n_owner,), standard errors
    values: Array  # (n_train,): per record, far noisier
    total: float
    none: float
    n_pair: int
    seconds: float

    def noise_in_tv(self) -> float:
        """What the truth's own error adds, on average, to a perfect estimate's TV."""
        return float(np.sqrt(2 / np.pi) * self.errors.sum() / 2)


def measure(task: Task, *, target: float = TARGET, max_pairs: int = MAX_PAIRS, at_least: int = 32) -> Truth:
    """Retrain until the widest owner's standard error is `target`, or read what has been retrained."""
    path = CACHE / f"truth-{task.digest[:16]}.npz"
    f, seconds = np.zeros((0, 2, task.n_train - 1)), 0.0
    if path.exists():
        with np.load(path) as kept:
            f, seconds = kept["f"], float(kept["seconds"])
    ends = fast_replays(task, torch.tensor([[1.0], [0.0]]).expand(2, task.n_train)).tolist()
    truth = None
    while True:
        if len(f) >= at_least:
            truth = _truth(task, f, ends, seconds)
            if truth.errors.max() <= target or len(f) >= max_pairs:
                return truth
        started = time.process_time()
        more = [
            fast_replays(task, torch.from_numpy(_prefixes(task, pair))).double().numpy().reshape(2, -1)
            for pair in range(len(f), len(f) + 16)
        ]
        f, seconds = np.concatenate([f, np.stack(more)]), seconds + time.process_time() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, f=f, seconds=seconds)
        partial.replace(path)
        if sys.stderr.isatty():
            told = f", ± {100 * truth.errors.max():.2f} points at most" if truth else ""
            print(f"\r{len(f):,} pairs, {seconds:.0f} s{told}  ", end="", file=sys.stderr, flush=True)


def _permutation(task: Task, pair: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(seed_of(task.digest, pair))).permutation(task.n_train)


def _prefixes(task: Task, pair: int) -> NDArray[np.float32]:
    """(2 (n − 1), n): the masks of the sizes 1..n−1, of the permutation and of its reverse."""
    n, order = task.n_train, _permutation(task, pair)
    masks = []
    for way in (order, order[::-1]):
        rank = np.empty(n, np.int64)
        rank[way] = np.arange(n)
        masks.append(rank[None] < np.arange(1, n)[:, None])
    return np.concatenate(masks).astype(np.float32)


def _truth(task: Task, f: Array, ends: list[float], seconds: float) -> Truth:
    n, m = task.n_train, len(f)
    total = ends[0] - ends[1]
    values = np.zeros((m, n))  # one estimate for each pair
    for pair in range(m):
        order = _permutation(task, pair)
        for way, path in zip((order, order[::-1]), f[pair], strict=True):
            values[pair, way] += np.diff([ends[1], *path, ends[0]]) / 2
    shares = np.stack([np.bincount(task.owners.numpy(), v) for v in values]) / total  # (m, n_owner)
    return Truth(shares.mean(0), shares.std(0, ddof=1) / np.sqrt(m), values.mean(0), total, ends[1], m, seconds)


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


def check(task: Task) -> float:
    """The largest difference from the engine's replays over 32 random sets."""
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(32, 1, generator=generator)
    masks = (torch.rand(32, task.n_train, generator=generator) < chance).float()
    return float((replay_values(task, masks) - fast_replays(task, masks)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="*", default=list(WORLDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=100 * TARGET, help="standard error in points a share")
    parser.add_argument("--max-pairs", type=int, default=MAX_PAIRS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.world:
        task = make_task(WORLDS[name], seed=given.seed)
        print(
            f"{name}, seed {given.seed}: loop differs from the engine's replays by {check(task):.1e} at most",
            flush=True,
        )
        truth = measure(task, target=given.target / 100, max_pairs=given.max_pairs)
        count = np.bincount(task.owners.numpy()) / task.n_train
        print(
            f"  {truth.n_pair:,} pairs, {truth.n_pair * 2 * (task.n_train - 1):,} runs in {truth.seconds:.0f} s of CPU; total "
            f"{truth.total:.3f}; ± {100 * truth.errors.max():.2f} points at most; counting is off by TV "
            f"{np.abs(truth.shares - count).sum() / 2:.3f}\n  shares {' '.join(f'{100 * s:.1f}' for s in truth.shares)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
