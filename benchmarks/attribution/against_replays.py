"""How far are the measured shares from the truth, and from counting, on the digits task?

    python benchmarks/attribution/against_replays.py [--replays 12800] [--budgets 200 400 800]

The truth is equation (1) of attribution/engine/shares.py from plain replays alone, regressed on the members of a partition
(no metagradient, no prior), its standard error from redrawn pairs. TV is the total variation between two divisions: the part
of the pool that goes to the wrong owners.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "digits")]

from task import make_task  # noqa: E402

from attribution.engine.coalitions import POWER, Masks, Plan, Players  # noqa: E402
from attribution.engine.shares import merge_rounds, plan_shares, run_round  # noqa: E402
from attribution.engine.training import Program, replay_values  # noqa: E402

BUMPS = 8  # of the polynomial for the mean of f at each size
REDRAWS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=12_800)
    parser.add_argument("--budgets", type=float, nargs="+", default=[200, 400, 800])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    task = make_task()
    players, program = Players.of(task), Program(task)
    n = len(players.records)
    blank = Plan("", 12345, 0.0, 0.0, n, 1, tuple(range(n)), ())  # only its seed matters: no estimate uses these masks
    masks = Masks(blank)
    started = time.perf_counter()
    S = np.array([masks.mask("values", j) for j in range(given.replays)])
    f = np.concatenate(
        [
            replay_values(task, players.weights(torch.from_numpy(part).float()), program=program).double().numpy()
            for part in np.array_split(S, max(1, given.replays // 512))
        ]
    )
    f_all, f_none = replay_values(task, torch.tensor([[1.0], [0.0]]).expand(2, task.n_train)).tolist()
    print(
        f"{given.replays:,} replays in {time.perf_counter() - started:.0f} s; f(all) − f(none) = {f_all - f_none:.4f}"
    )

    partitions = {"rights holders": task.owners, "labellers": task.groups["labeller"]}
    truths = {}
    for name, ids in partitions.items():
        member = np.unique(ids.numpy(), return_inverse=True)[1][players.records.numpy()]
        truth, errors = divided(S, f, (f_all, f_none), member, masks, len(np.unique(ids.numpy())))
        count = np.bincount(member, minlength=len(truth)) / n
        truths[name] = truth, count
        print(f"{name}: truth {fmt(truth)} ± {fmt(errors)} (standard error); by count {fmt(count)}")
    for budget in given.budgets:
        started = time.perf_counter()
        plan = plan_shares(task, budget=budget)
        result = merge_rounds(task, plan, [run_round(task, plan, r) for r in range(len(plan.rounds))])
        seconds = time.perf_counter() - started
        print(
            f"\n{result.run_equivalents:.0f} run equivalents, {seconds:.0f} s, λ = {result.reliability:.2f}, {result.regime}"
        )
        for name, members in (("rights holders", result.owners), ("labellers", result.groups["labeller"])):
            truth, count = truths[name]
            share = np.array([m.share for m in members])
            inside = sum(m.low <= x <= m.high for m, x in zip(members, truth, strict=True))
            half = [100 * (m.high - m.low) / 2 for m in members]
            print(
                f"  {name}: TV {np.abs(share - truth).sum() / 2:.3f}, by count {np.abs(count - truth).sum() / 2:.3f}; "
                f"± {np.median(half):.1f} points in the middle, {max(half):.1f} at most; {inside} of {len(truth)} inside"
            )


def divided(S, f, ends, member, masks, n_member):  # type: ignore[no-untyped-def]
    """Shares of the members and their standard errors, (n_member,) each."""
    f_all, f_none = ends
    n, k = S.shape[1], S.sum(1)
    t = k / n
    u = t ** (1 / POWER)
    counts = np.bincount(member, minlength=n_member).astype(float)
    X = (S - t[:, None]) @ np.eye(n_member)[member]
    line = f_none + (f_all - f_none) * u
    bumps = np.stack([u * (1 - u) * u**power for power in range(BUMPS)], 1)
    spread = np.ones(len(f))
    for _ in range(2):  # the noise differs by size
        fitted = np.linalg.lstsq(bumps / spread[:, None], (f - line) / spread, rcond=None)[0]
        y = f - line - bumps @ fitted
        spread = np.exp(0.5 * np.polyval(np.polyfit(u, np.log(y**2 + 1e-12), 4), u))
    weight = 1 / (masks.size_probability(k) * t * (1 - t))

    def solve(rows):  # type: ignore[no-untyped-def]
        A = X[rows].T @ (weight[rows, None] * X[rows])
        d = np.linalg.lstsq(A, X[rows].T @ (weight[rows] * y[rows]), rcond=1e-10)[0]
        return counts / n + (counts * d - counts * (counts @ d) / n) / (f_all - f_none)

    rng = np.random.default_rng(0)
    pairs = [rng.integers(0, len(f) // 2, len(f) // 2) for _ in range(REDRAWS)]
    redrawn = [solve(np.concatenate([2 * p, 2 * p + 1])) for p in pairs]
    return solve(np.arange(len(f))), np.std(redrawn, 0)


def fmt(shares) -> str:  # type: ignore[no-untyped-def]
    return " ".join(f"{100 * share:.1f}" for share in shares)


if __name__ == "__main__":
    main()
