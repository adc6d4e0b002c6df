"""What are values worth that no replay has measured? The record behind λ of the grades *estimated* and *metered*.

    ./run bench attribution/estimated [--worlds logistic mlp] [--seeds 0 1 2] [--pairs 64]

For every world of benchmarks/attribution/worlds.py and seed: the truth (every prefix of random permutations retrained, in var/bench, to one point
of standard error a share or `--pairs`), and the division by

    estimated         checkpoints after an eighth, a quarter, a half and all of the training, no recipe (engine/estimated.py)
    at the end        the last checkpoint alone
    metered, V visits the log of a run in which a record was measured V times on average (engine/metered.py); "not held" where the
                      measurement did not fall as first order said

each with κ, the values' coherence; the slope λ of truth − count on values − count over owners; c = λ / κ with the standard error that the truth's
own error puts into it; and the TV of counting, of the raw shares and of what is paid with λ = record · κ. `unreplayed.RECORD` is
set below the least c of each method. Writes var/bench/estimated.json.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attribution.engine import Task
from attribution.engine.estimated import estimate_shares
from attribution.engine.metered import HELD, metered_shares, run_metered
from attribution.engine.training import train
from attribution.engine.unreplayed import RECORD, UnreplayedShares
from benchmarks.attribution import truth as games
from benchmarks.attribution.worlds import CACHE, WORLDS, digits, make_task

Array = NDArray[np.float64]
EVERY = (1, 2, 4)
TARGET = 0.01  # standard error of a share


def divisions(task: Task) -> Iterator[tuple[str, str, UnreplayedShares]]:
    """(name, its record's name, the division)"""
    n_step = task.require_recipe().n_step
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = [n_step // 8, n_step // 4, n_step // 2, n_step]
        run = train(task, checkpoint_steps=steps, checkpoint_dir=folder)
        for label, record, kept in (
            ("estimated", "estimated", run.checkpoints),
            ("at the end", "estimated at the end", run.checkpoints[-1:]),
        ):
            yield label, record, estimate_shares(replace(task, recipe=None, checkpoints=kept))
        for every in EVERY:
            log = folder / f"{every}.meter"
            run_metered(task, log=log, every=every)
            found = metered_shares(task, log)
            held = HELD[0] <= found.details["held"] <= HELD[1]
            kind = "metered" if held else "metered, not held"
            yield f"{kind}, {found.details['measured_visits']:.0f} visits", "metered", found


def row_of(label: str, record: str, found: UnreplayedShares, truth: games.Truth) -> dict[str, Any]:
    raw, count, paid = (np.array([getattr(o, f) for o in found.owners]) for f in ("share", "count_share", "paid_share"))
    happened, said = truth.shares - count, raw - count
    slope = float(happened @ said / (said @ said))
    error = float(np.sqrt((said**2 * truth.errors**2).sum()) / (said @ said))
    return {
        "method": label,
        "record": record,
        "coherence": found.coherence,
        "slope": slope,
        "c": slope / found.coherence,
        "c_error": error / abs(found.coherence),
        "tv_count": _tv(count, truth.shares),
        "tv_raw": _tv(raw, truth.shares),
        "tv_paid": _tv(paid, truth.shares),
        "counted": found.counted,
        "inside": float(np.mean([o.low <= t <= o.high for o, t in zip(found.owners, truth.shares, strict=True)])),
    }


def _tv(shares: Array, truth: Array) -> float:
    return float(np.abs(shares - truth).sum() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=64, help="of permutations for the truth, at most")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{digits().source}; records in use: {RECORD}")
    for name in given.worlds:
        for seed in given.seeds:
            task = make_task(WORLDS[name], seed=seed)
            truth = games.measure(task, target=TARGET, max_pairs=given.pairs)
            print(
                f"\n{name}, seed {seed}: truth ± {100 * truth.errors.max():.2f} points (noise in TV {truth.noise_in_tv():.3f})"
            )
            print(f"  {'':<28}{'κ':>7}{'λ':>7}{'c':>7}{'±':>6}{'count':>8}{'raw':>7}{'paid':>7}", flush=True)
            for label, record, found in divisions(task):
                row = row_of(label, record, found, truth) | {"world": name, "seed": seed}
                rows.append(row)
                print(
                    f"  {label:<28}{row['coherence']:>7.2f}{row['slope']:>7.2f}{row['c']:>7.2f}{row['c_error']:>6.2f}"
                    f"{row['tv_count']:>8.3f}{row['tv_raw']:>7.3f}{row['tv_paid']:>7.3f}",
                    flush=True,
                )
            partial = CACHE / "estimated.json.partial"
            partial.write_text(json.dumps({"digits": digits().source, "rows": rows}, indent=1))
            partial.replace(CACHE / "estimated.json")
    print(f"\n{'':<28}{'least c':>9}{'median':>8}{'count':>8}{'raw':>7}{'paid':>7}   (TV: means over worlds and seeds)")
    for label in dict.fromkeys(row["method"] for row in rows):
        those = [row for row in rows if row["method"] == label]
        c = [row["c"] for row in those]
        means = [float(np.mean([row[f] for row in those])) for f in ("tv_count", "tv_raw", "tv_paid")]
        print(f"{label:<28}{min(c):>9.2f}{float(np.median(c)):>8.2f}{means[0]:>8.3f}{means[1]:>7.3f}{means[2]:>7.3f}")


if __name__ == "__main__":
    main()
