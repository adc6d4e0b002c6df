"""Does the labeller whose labels are wrong 40 % of the time earn less per record than every other, beyond the intervals?

    python benchmarks/attribution/labellers.py [--seeds 5] [--budget 200]

Each seed draws owners, labellers, wrong labels, queries, initial weights and the order anew, on scikit-learn's digits (1,437
distinct images, 60 copies, 360 queries, a 64-32-10 MLP). A table per seed: value per record in units of the average
record's, with its 95 % interval. Exits with 1 if a seed fails.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "digits")]

from task import make_task  # noqa: E402

from attribution.engine.division import Share  # noqa: E402
from attribution.engine.shares import merge_rounds, plan_shares, run_round  # noqa: E402

CARELESS = 4


def per_record(share: Share, n: int) -> tuple[float, float, float]:
    """(low, estimate, high) of a record's value over the average record's."""
    scale = n / share.n_records
    return share.low * scale, share.share * scale, share.high * scale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=200)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    passed = 0
    print("value per record, average record = 1 (95 % interval)")
    print("seed " + "".join(f"{f'labeller {j}':>22}" for j in range(5)) + "      λ  widest owner  runs  seconds  ok")
    for seed in range(given.seeds):
        started = time.perf_counter()
        task = make_task(seed)
        plan = plan_shares(task, budget=given.budget, seed=seed)
        result = merge_rounds(task, plan, [run_round(task, plan, r) for r in range(len(plan.rounds))])
        members = result.groups["labeller"]
        n = sum(member.n_records for member in members)
        found = {member.owner: per_record(member, n) for member in members}
        is_below = all(found[CARELESS][2] < low for owner, (low, _, _) in found.items() if owner != CARELESS)
        passed += is_below
        cells = "".join(f"{f'{mid:.2f} ({low:.2f}, {high:.2f})':>22}" for low, mid, high in found.values())
        print(
            f"{seed:4d} {cells} {result.reliability:6.2f} {100 * result.width / 2:8.1f} pts {result.run_equivalents:6.0f} "
            f"{time.perf_counter() - started:8.1f}  {'yes' if is_below else 'NO'}",
            flush=True,
        )
    print(f"{passed} of {given.seeds} seeds: less per record than every other labeller, beyond the intervals")
    return 0 if passed == given.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
