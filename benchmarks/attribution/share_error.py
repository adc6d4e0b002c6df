"""How far is each method's division from the record game's, at equal cost?

    ./run bench attribution/share_error [--worlds logistic mlp] [--budgets 64 512] [--seeds 5] [--coverage 40]

For every world of benchmarks/attribution/worlds.py: the truth (plain retraining alone, benchmarks/attribution/truth.py), and

    counting      by number of records; costs nothing
    graddot       gradient dot products at the final weights, negatives kept; a run and one pass
    metagradient  the exact metagradient at the full data, scaled to sum to 1; one metagradient
    permutation   every prefix of random permutations, in antithetic pairs (Castro et al. 2009); cut off where the budget ends
    kernelshap    weighted least squares over random sets of Shapley's sizes, in complementary pairs (Lundberg & Lee 2017;
                  paired: Covert & Lee 2021), the two ends exact; the least solution where sets are fewer than records
    shares        this engine's, raw and as paid

Cost is FLOPs over those of one unbatched run, seconds are CPU seconds. TV is total variation, the part of the pool that goes to
the wrong owners; the truth's own error adds about its `noise` to a small TV. `--coverage N` also asks in how many of N seeds an
owner's true share lies inside its 95 % interval: with the queries given, and with 300 queries drawn anew in each seed from
the 300 that define the truth, which is what the intervals promise. Writes var/bench/share_error.json, and
share_error.png beside it where matplotlib is installed.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attribution.engine import Task, TensorRecords, replay_values
from attribution.engine.gradients import record_gradients
from attribution.engine.shares import merge_rounds, plan_shares, run_round
from attribution.engine.training import Program, cost, metagradients, train
from benchmarks.attribution import truth as games
from benchmarks.attribution.worlds import CACHE, WORLDS, digits, make_task

Array = NDArray[np.float64]


def owners_sums(task: Task, values: Array) -> Array:
    return np.bincount(task.owners.numpy(), values)


def counting(task: Task, budget: float, seed: int) -> tuple[Array, float]:
    return owners_sums(task, np.ones(task.n_train)) / task.n_train, 0.0


def graddot(task: Task, budget: float, seed: int) -> tuple[Array, float]:
    program, state = Program(task), train(task).state
    grads = [
        record_gradients(program, state, records, torch.arange(len(records)), of_loss=of_loss).double()
        for records, of_loss in ((task.train, True), (task.queries, False))
    ]
    values = owners_sums(task, (grads[0] @ grads[1].mean(0)).numpy())
    return values / values.sum(), 1 + 2 * task.n_train / task.require_recipe().order.numel()


def metagradient(task: Task, budget: float, seed: int) -> tuple[Array, float]:
    _, gradients = metagradients(task, torch.ones(1, task.n_train))
    values = owners_sums(task, gradients[0, 0].double().numpy())
    return values / values.sum(), cost(task).metagradient_ratio


def ends(task: Task) -> tuple[float, float]:
    f_all, f_none = replay_values(task, torch.tensor([[1.0], [0.0]]).expand(2, task.n_train)).tolist()
    return f_all, f_none


def permutation(task: Task, budget: float, seed: int) -> tuple[Array, float]:
    """A permutation that the budget cuts off still values the records it reached; the rest share what is left."""
    rng, n, (f_all, f_none) = np.random.default_rng(seed), task.n_train, ends(task)
    runs = int(budget) - 2
    sums, seen = np.zeros(n), np.zeros(n)
    while runs > 0:
        order = rng.permutation(n)
        for way in (order, order[::-1]):
            k = min(runs, n - 1)
            if k == 0:
                break
            runs -= k
            rank = np.empty(n, np.int64)
            rank[way] = np.arange(n)
            masks = torch.from_numpy((rank[None] < np.arange(1, k + 1)[:, None]).astype(np.float32))
            path = np.concatenate([[f_none], replay_values(task, masks).double().numpy()])
            sums[way[:k]] += np.diff(path)
            seen[way[:k]] += 1
            if k == n - 1:
                sums[way[k]] += f_all - path[-1]
                seen[way[k]] += 1
    values = np.where(seen > 0, sums / np.maximum(seen, 1), 0)
    missing = seen == 0
    values[missing] = (f_all - f_none - values.sum()) / max(missing.sum(), 1)
    values += (f_all - f_none - values.sum()) / n
    return owners_sums(task, values) / (f_all - f_none), float(int(budget))


def kernelshap(task: Task, budget: float, seed: int) -> tuple[Array, float]:
    rng, n, (f_all, f_none) = np.random.default_rng(seed), task.n_train, ends(task)
    sizes = np.arange(1, n)
    chance = 1 / (sizes * (n - sizes))
    masks = []
    for k in rng.choice(sizes, (int(budget) - 2) // 2, p=chance / chance.sum()):
        mask = np.zeros(n)
        mask[rng.permutation(n)[:k]] = 1
        masks += [mask, 1 - mask]
    S = np.array(masks)
    f = replay_values(task, torch.from_numpy(S).float()).double().numpy()
    # Σ φ is known: the last record's column is taken out. Sizes were drawn by the kernel, so every row weighs the same.
    y = f - f_none - S[:, -1] * (f_all - f_none)
    X = S[:, :-1] - S[:, -1:]
    equal = (f_all - f_none) / n
    phi = np.full(n - 1, equal) + np.linalg.lstsq(X, y - X.sum(1) * equal, rcond=1e-8)[0]
    values = np.append(phi, f_all - f_none - phi.sum())
    return owners_sums(task, values) / (f_all - f_none), float(len(S) + 2)


Method = Callable[[Task, float, int], tuple[Array, float]]
FIXED: dict[str, Method] = {"counting": counting, "graddot": graddot, "metagradient": metagradient}
SAMPLED: dict[str, Method] = {"permutation": permutation, "kernelshap": kernelshap}


def measured(task: Task, budget: float, seed: int):  # type: ignore[no-untyped-def]
    plan = plan_shares(task, budget=budget, seed=seed)
    return merge_rounds(task, plan, [run_round(task, plan, r) for r in range(len(plan.rounds))])


def tv(shares: Array, truth: Array) -> float:
    return float(np.abs(shares - truth).sum() / 2)


def errors(task: Task, truth: games.Truth, budgets: list[float], seeds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(method: str, spent: list[float], tvs: list[float], started: float, n: int) -> None:
        rows.append(
            {
                "method": method,
                "run_equivalents": float(np.mean(spent)),
                "tv": float(np.mean(tvs)),
                "tv_max": float(np.max(tvs)),
                "seconds": (time.process_time() - started) / n,
                "seeds": n,
            }
        )
        row = rows[-1]
        print(
            f"  {method:<14}{row['run_equivalents']:>8.0f}{row['tv']:>9.3f}{row['tv_max']:>9.3f}{row['seconds']:>9.2f}",
            flush=True,
        )

    print(f"  {'method':<14}{'cost':>8}{'TV':>9}{'worst':>9}{'seconds':>9}")
    for name, method in FIXED.items():
        started = time.process_time()
        shares, spent = method(task, 0, 0)
        add(name, [spent], [tv(shares, truth.shares)], started, 1)
    for budget in budgets:
        for name, method in SAMPLED.items():
            started = time.process_time()
            found = [method(task, budget, seed) for seed in range(seeds)]
            add(name, [c for _, c in found], [tv(s, truth.shares) for s, _ in found], started, seeds)
        started = time.process_time()
        results = [measured(task, budget, seed) for seed in range(seeds)]
        spent = [r.run_equivalents for r in results]
        for name, field in (("shares", "share"), ("shares, paid", "paid_share")):
            tvs = [tv(np.array([getattr(o, field) for o in r.owners]), truth.shares) for r in results]
            add(name, spent, tvs, started, seeds)
        rows[-1]["reliability"] = [r.reliability for r in results]
        rows[-1]["regime"] = [r.regime for r in results]
    return rows


def coverage(task: Task, truth: games.Truth, budget: float, seeds: int, *, redraw: bool) -> dict[str, Any]:
    """How often an owner's true share is inside its interval."""
    inside, half = [], []
    inputs, labels = task.queries[torch.arange(task.n_query)]
    for seed in range(seeds):
        here = task
        if redraw:
            drawn = torch.from_numpy(np.random.default_rng(1000 + seed).integers(0, task.n_query, task.n_query))
            here = replace(task, queries=TensorRecords(inputs[drawn], labels[drawn]))
        owners = measured(here, budget, 100 + seed).owners
        inside.append([o.low <= share <= o.high for o, share in zip(owners, truth.shares, strict=True)])
        half.append(np.mean([(o.high - o.low) / 2 for o in owners]))
    row = {
        "budget": budget,
        "seeds": seeds,
        "queries": "redrawn" if redraw else "given",
        "coverage": float(np.mean(inside)),
        "by_owner": np.mean(inside, 0).tolist(),
        "half_width": float(np.mean(half)),
    }
    print(
        f"  coverage at {budget:.0f} over {seeds} seeds, queries {row['queries']}: {100 * row['coverage']:.1f} %, "
        f"least covered owner {100 * min(row['by_owner']):.0f} %, ± {100 * row['half_width']:.1f} points",
        flush=True,
    )
    return row


def plot(report: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(report["worlds"]), figsize=(5 * len(report["worlds"]), 4), squeeze=False)
    for axis, (name, world) in zip(axes[0], report["worlds"].items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in world["rows"]):
            rows = [row for row in world["rows"] if row["method"] == method]
            axis.plot([max(r["run_equivalents"], 1) for r in rows], [r["tv"] for r in rows], "o-", label=method)
        axis.set(xscale="log", yscale="log", xlabel="run equivalents", ylabel="TV", title=name)
    axes[0][0].legend()
    figure.savefig(CACHE / "share_error.png", dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[64, 512])
    parser.add_argument("--seeds", type=int, default=5, help="of each sampled method; the world's own is --world-seed")
    parser.add_argument("--world-seed", type=int, default=0)
    parser.add_argument("--coverage", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--coverage-budget", type=float, default=64)
    parser.add_argument("--minutes", type=float, default=60, help="at most, for a truth that is not committed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"digits": digits().source, "worlds": {}}
    print(digits().source)
    for name in given.worlds:
        task = make_task(WORLDS[name], seed=given.world_seed)
        truth = games.of(task, seconds=60 * given.minutes)
        print(
            f"\n{name}: truth from {truth.n_run:,} runs in {truth.seconds:.0f} s, ± {100 * truth.errors.max():.2f} points at most "
            f"(noise in TV {truth.noise_in_tv():.3f})",
            flush=True,
        )
        world: dict[str, Any] = {
            "truth": truth.shares.tolist(),
            "truth_errors": truth.errors.tolist(),
            "noise": truth.noise_in_tv(),
            "rows": errors(task, truth, given.budgets, given.seeds) if given.seeds else [],
        }
        if given.coverage:
            world["coverage"] = [
                coverage(task, truth, given.coverage_budget, given.coverage, redraw=redraw) for redraw in (False, True)
            ]
        report["worlds"][name] = world
        partial = CACHE / "share_error.json.partial"
        partial.write_text(json.dumps(report, indent=1))
        partial.replace(CACHE / "share_error.json")
    if importlib.util.find_spec("matplotlib"):
        plot(report)


if __name__ == "__main__":
    main()
