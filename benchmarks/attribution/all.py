"""Every method on every world against the same truth: share error, LDS, and what it cost. One command, resumable.

    ./run bench attribution/all [--quick] [--worlds ...] [--budgets 64 512] [--seeds 3] [--subsets 100] [--only scores divisions peers pydvl system]
                                [--markdown]

For each world of worlds.py, its committed truth, and:

    divisions   counting; permutation sampling, paired KernelSHAP and this engine's `shares` (raw and as paid) at each budget
    scores      graddot, tracin, trak, ekfac and replay, from the final checkpoint alone, or by the recipe
    peers       kronfluence and dattri in their own process on the same checkpoints (var/peers, peers-requirements.txt)
    pydvl       each of pyDVL's samplers, in its own environment (var/pydvl, pydvl-requirements.txt); the best is printed

and, once, `system`: what building an index costs over a forward and backward pass, against each peer; what the meter and batched
replay cost and gain (short runs of attribution/search, meter and batched).

Columns. TV: the part of the pool that goes to the wrong owners, scores being summed by owner and divided by their sum. mixed: the
same for the best blend with counting, its weight picked on the truth. LDS: Spearman over retrained subsets that drop 50 / 5 / 1 % of
the records (at least one), of the mean measurement; and, for methods that score queries, its mean over queries. runs: FLOPs
over those of one plain run, counted by torch in whichever process did the work (products and convolutions, no
eigendecompositions). s, CPU: seconds of wall and processor time on one thread, of one division or one score matrix; counting FLOPs is
part of it for scores, ours and theirs alike.

The peers are given whichever of their settings has the least TV, and for each LDS the best for that, on the truth; so is pyDVL its
sampler. Ours choose their own without seeing it. A row is kept in var/bench/all under its task, its settings and the source that made it, so that an
interrupted command goes on, and a change to the engine measures the engine's rows again. Writes var/bench/all.json.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attribution.engine import Task, replay_values
from attribution.engine.estimators import ekfac, graddot, replay, tracin, trak
from attribution.engine.held_out import linear_datamodeling_score
from attribution.engine.shares import merge_rounds, plan_shares, run_round
from attribution.engine.training import Program, cost, train
from benchmarks.attribution import share_error
from benchmarks.attribution import truth as games
from benchmarks.attribution.estimators import PEERS, ROOT, install_peers
from benchmarks.attribution.worlds import CACHE, WORLDS, digits, make_task

Array = NDArray[np.float64]
Row = dict[str, Any]

HERE = Path(__file__).parent
ROWS = CACHE / "all"
PYDVL = ROOT / "var" / "pydvl"
DROPPED = (0.5, 0.05, 0.01)
PARTS = ("divisions", "scores", "peers", "pydvl", "system")


@dataclass(frozen=True)
class Measured:
    """A world with what its methods are judged by."""

    name: str
    task: Task
    truth: games.Truth
    kept: list[Tensor]  # per fraction of DROPPED, (subsets, n_train)
    values: list[Tensor]  # (subsets, n_query)

    @property
    def owners(self) -> NDArray[np.int64]:
        return self.task.owners.numpy()

    def lds(self, scores: Tensor) -> list[float]:
        return [linear_datamodeling_score(scores, kept, f) for kept, f in zip(self.kept, self.values, strict=True)]

    def row(self, method: str, known: str, values: Array, scores: Tensor | None = None, **more: Any) -> Row:
        """What is kept of a method; the truth may become finer later, so `judged` compares.

        Args:
            values: (n_train,), known up to scale.
            scores: (n_train, n_query), if it has any.
        """
        given = torch.from_numpy(np.asarray(values, float))[:, None]
        mean = [
            linear_datamodeling_score(given, kept, f.mean(1, keepdim=True))
            for kept, f in zip(self.kept, self.values, strict=True)
        ]
        sums = np.bincount(self.owners, np.asarray(values, float))
        return {
            "method": method,
            "known": known,
            "divisions": [(sums / sums.sum()).tolist() if sums.sum() else None],  # one a seed
            "lds": mean,
            "lds_by_query": None if scores is None else self.lds(scores),
            **more,
        }

    def judged(self, row: Row) -> Row:
        """With its share error, the mean over seeds."""
        found = [np.array(d, float) for d in row["divisions"] if d is not None]
        tvs = [share_error.tv(d, self.truth.shares) for d in found] or [float("nan")]
        mixed = [self.mixed(d) for d in found] or [float("nan")]
        return row | {"tv": float(np.mean(tvs)), "tv_max": max(tvs), "mixed": float(np.mean(mixed))}

    def best(self, rows: list[Row]) -> Row:
        """The setting with the least share error, by the truth itself; and for each LDS, the best of all settings for that."""
        candidates = [self.judged(row) for row in rows]
        row = dict(min(candidates, key=lambda row: np.nan_to_num(row["tv"], nan=np.inf)))
        row["mixed"] = min(c["mixed"] for c in candidates)
        for which in ("lds", "lds_by_query"):
            if row[which] is not None:
                row[which] = np.max([c[which] for c in candidates], 0).tolist()
        return row | {"candidates": {c["setting"]: c["tv"] for c in candidates}}

    def mixed(self, division: Array) -> float:
        """TV of the best of 101 blends with counting, whose weight is picked on the truth."""
        count = np.bincount(self.owners) / len(self.owners)
        # A division that is absurd in size only is first brought to where a blend can use it.
        size = max(1.0, float(np.abs(division).max()))
        return min(
            share_error.tv(count + w / size * (division - count), self.truth.shares) for w in np.linspace(0, 1, 101)
        )


@cache
def source_of(*places: str) -> str:
    """A digest of source files: rows that they made are theirs alone."""
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept_row(key: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """What `make` gives, or what it gave to an earlier command of the same key."""
    path = ROWS / f"{hashlib.sha256(json.dumps([str(k) for k in key]).encode()).hexdigest()[:24]}.json"
    if not path.exists():
        found = make()
        ROWS.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(path)
    return json.loads(path.read_text())


def timed(work: Callable[[], Any], *, count: bool) -> tuple[Any, Row]:
    """What it gives, and seconds and FLOPs of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    with FlopCounterMode(display=False) if count else nullcontext() as counter:
        found = work()
    spent: Row = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    if counter is not None:
        spent["flops"] = float(counter.get_total_flops())
    return found, spent


def measured_world(name: str, subsets: int, minutes: float) -> Measured:
    task = make_task(WORLDS[name])
    generator = torch.Generator().manual_seed(1)
    kept = []
    for dropped in DROPPED:
        rows = torch.ones(subsets, task.n_train)
        for row in rows:
            row[torch.randperm(task.n_train, generator=generator)[: max(1, round(dropped * task.n_train))]] = 0
        kept.append(rows)
    engine = source_of("attribution/engine/training.py")
    path = ROWS / f"subsets-{task.digest[:16]}-{subsets}-{engine}.npy"
    if not path.exists():
        ROWS.mkdir(parents=True, exist_ok=True)
        f = replay_values(task, torch.cat(kept), per_query=True).numpy()
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, f)
        partial.replace(path)
    values = list(torch.from_numpy(np.load(path)).split(subsets))
    return Measured(name, task, games.of(task, seconds=60 * minutes), kept, values)


# --- what divides the value


def divisions(world: Measured, budgets: list[float], seeds: int) -> list[Row]:
    task = world.task
    rows = [world.row("counting", "", np.ones(task.n_train), runs=0.0, seconds=0.0, cpu=0.0)]
    for budget in budgets:
        for name in ("permutation", "kernelshap", "shares"):
            key = (task.digest, len(world.kept[0]), "division", name, budget, seeds, source_of("attribution/engine"))
            rows += kept_row(key, lambda n=name, b=budget: divided(world, n, b, seeds))
    return [world.judged(row) for row in rows]


def divided(world: Measured, name: str, budget: float, seeds: int) -> list[Row]:
    """One row; two for `shares`."""
    found: dict[str, list[Row]] = {}
    for seed in range(seeds):
        if name == "shares":
            (result, spent) = timed(lambda s=seed: shares(world.task, budget, s), count=False)
            spent["runs"] = result.run_equivalents
            for what in ("share", "paid_share"):
                division = np.array([getattr(o, what) for o in result.owners])
                row = world.row(
                    "shares" + (", as paid" if what == "paid_share" else ""), "recipe", result.values, **spent
                )
                row |= {"divisions": [division.tolist()], "reliability": result.reliability, "regime": result.regime}
                found.setdefault(row["method"], []).append(row)
        else:
            method = share_error.SAMPLED[name]
            (division, runs), spent = timed(lambda s=seed, m=method: m(world.task, budget, s), count=False)
            # They return owners' shares: within an owner, records count the same.
            values = (division / np.bincount(world.owners))[world.owners]
            label = {"permutation": "permutation sampling", "kernelshap": "KernelSHAP, paired"}[name]
            row = world.row(label, "recipe", values, runs=runs, **spent)
            row["lds"] = None
            found.setdefault(label, []).append(row)
    return [averaged(rows) | {"budget": budget} for rows in found.values()]


def shares(task: Task, budget: float, seed: int):
    plan = plan_shares(task, budget=budget, seed=seed)
    return merge_rounds(task, plan, [run_round(task, plan, r) for r in range(len(plan.rounds))])


def averaged(rows: list[Row]) -> Row:
    """Of several seeds."""
    mean = dict(rows[0])
    for name in ("runs", "seconds", "cpu", "reliability"):
        if name in mean:
            mean[name] = float(np.mean([row[name] for row in rows]))
    if mean["lds"] is not None:
        mean["lds"] = np.mean([row["lds"] for row in rows], 0).tolist()
    return mean | {"divisions": [row["divisions"][0] for row in rows], "seeds": len(rows)}


# --- what scores records


def scores(world: Measured) -> list[Row]:
    task = world.task
    run_flops = cost(task).run_flops
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ten = checkpoints(task, Path(folder))
        last = ten[-1:]
        bare = replace(task, recipe=None, checkpoints=last)
        final = replace(task, checkpoints=last)
        four = replace(
            task, recipe=None, checkpoints=[ten[k] for k in sorted({len(ten) * k // 4 - 1 for k in (1, 2, 3, 4)})]
        )
        methods: list[tuple[str, str, Callable[[], Tensor]]] = [
            ("graddot", "1 checkpoint", lambda: graddot.score(bare)),
            ("tracin", "10 checkpoints", lambda: tracin.score(replace(task, recipe=None, checkpoints=ten))),
            ("trak", "1 checkpoint", lambda: trak.score(bare)),
            ("trak", "4 checkpoints", lambda: trak.score(four)),
            ("ekfac", "1 checkpoint", lambda: ekfac.score(bare)),
            ("ekfac", "1 checkpoint, 33 replays", lambda: ekfac.score(final)),
            ("ekfac", "recipe, 33 replays", lambda: ekfac.score(task)),
            ("replay", "recipe", lambda: replay.score(task)),
        ]
        for method, known, score in methods:

            def make(method: str = method, known: str = known, score: Callable[[], Tensor] = score) -> Row:
                found, spent = timed(score, count=True)
                runs = spent["flops"] / run_flops
                return world.row(method, known, found.double().mean(1).numpy(), found, runs=runs, **spent)

            key = (task.digest, len(world.kept[0]), method, known, source_of("attribution/engine"))
            rows.append(world.judged(kept_row(key, make)))
            tell(rows[-1])
    return rows


def checkpoints(task: Task, folder: Path) -> list[tuple[int, Path]]:
    n_step = task.require_recipe().n_step
    steps = sorted({max(1, n_step * k // 10) for k in range(1, 11)})
    return train(task, checkpoint_steps=steps, checkpoint_dir=folder).checkpoints


# --- peers


def peers(world: Measured) -> list[Row]:
    key = (
        *(world.task.digest, len(world.kept[0]), "peers"),
        source_of("benchmarks/attribution/peers.py", "benchmarks/attribution/peers-requirements.txt"),
    )
    rows = []
    for method, candidates in kept_row(key, lambda: scored_by_peers(world)).items():
        if "error" in candidates[0]:
            rows += candidates
        else:
            known = f"best of {len(candidates)} settings" if len(candidates) > 1 else "its only setting"
            rows.append(world.best(candidates) | {"method": method, "known": known})
    return rows


def scored_by_peers(world: Measured) -> dict[str, list[Row]]:
    """For each method, a row a setting."""
    install_peers()
    run_flops = cost(world.task).run_flops
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for _, path in checkpoints(world.task, Path(folder))]
        command = [sys.executable, "-m", "benchmarks.attribution.peers", f"worlds:{world.name}", folder, *paths]
        environment = os.environ | {"PYTHONPATH": str(PEERS), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the peers failed on {world.name}:\n{done.stderr[-2000:]}")
        report = json.loads((Path(folder) / "report.json").read_text())
        found = load_file(Path(folder) / "scores.safetensors")
    rows: dict[str, list[Row]] = {}
    for method, entry in report.items():
        spent = {k: entry[k] for k in ("seconds", "cpu", "flops")} | {"runs": entry["flops"] / run_flops}
        rows[method] = [
            world.row(method, "", found[name].double().mean(1).numpy(), found[name], **spent)
            | {"setting": name.rpartition(":")[2]}
            for name in entry["scores"]
        ]
    for method, error in json.loads(done.stdout.splitlines()[-1]).items():
        rows[method] = [{"method": method, "known": "failed", "error": error}]
    return rows


# --- pyDVL


def pydvl_python() -> Path:
    """The interpreter of var/pydvl, made on first use."""
    wanted, mark = (HERE / "pydvl-requirements.txt").read_text(), PYDVL / "installed.txt"
    python = PYDVL / "bin" / "python"
    if not (mark.exists() and mark.read_text() == wanted):
        venv.create(PYDVL, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "-r", str(HERE / "pydvl-requirements.txt")], check=True)
        mark.write_text(wanted)
    return python


def pydvl(world: Measured, budgets: list[float], seeds: int) -> list[Row]:
    rows = []
    for budget in budgets:
        key = (
            *(world.task.digest, len(world.kept[0]), "pydvl", budget, seeds),
            source_of("benchmarks/attribution/pydvl_values.py", "benchmarks/attribution/pydvl-requirements.txt"),
        )
        candidates = kept_row(key, lambda b=budget: sampled_by_pydvl(world, b, seeds))
        best = world.best(candidates)
        rows.append(best | {"method": "pyDVL's best", "known": best["setting"]})
    return rows


def sampled_by_pydvl(world: Measured, budget: float, seeds: int) -> list[Row]:
    python = pydvl_python()
    program = Program(world.task)
    found: dict[str, list[Row]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            f_all, f_none = world.truth.none + world.truth.total, world.truth.none
            game = {"n": world.task.n_train, "budget": int(budget) - 2, "seed": seed, "none": f_none, "all": f_all}
            (folder / "game.json").write_text(json.dumps(game))
            spent: dict[str, Row] = {}
            _pydvl_step(python, "ask", folder)
            for path in sorted(folder.glob("*.npy")):
                sets = torch.from_numpy(np.load(path)).float()
                values, spent[path.stem] = timed(
                    lambda s=sets: replay_values(world.task, s, program=program).numpy() if len(s) else np.zeros(0),
                    count=False,
                )
                np.save(folder / f"{path.stem}.values.npy", values)
                spent[path.stem]["runs"] = float(len(sets) + 2)
            _pydvl_step(python, "divide", folder)
            for sampler, used in spent.items():
                values = np.load(folder / f"{sampler}.shares.npy")
                if not values.any():  # too few runs to value anybody: what is left is the count
                    values = np.ones(world.task.n_train)
                found.setdefault(sampler, []).append(world.row("pyDVL", "", values, setting=sampler, **used))
    return [averaged(rows) | {"budget": budget} for rows in found.values()]


def _pydvl_step(python: Path, step: str, folder: Path) -> None:
    command = [str(python), str(HERE / "pydvl_values.py"), step, str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"pyDVL failed:\n{done.stderr[-2000:]}")


# --- the rest of the machine


def system(*, quick: bool) -> dict[str, list[str]]:
    """What the benchmarks of the index, the meter and batched replay print."""
    commands = {
        "index": ["benchmarks.attribution.indexing", *(["--quick"] if quick else [])],
        "meter": ["benchmarks.attribution.meter", "--only", "cost", "--repetitions", "1" if quick else "3"],
        "batched replay": ["benchmarks.attribution.batched", "--seconds", "0.6" if quick else "3"],
    }
    engine = source_of("attribution/engine", "benchmarks/attribution/indexing.py")
    return {
        name: kept_row(("system", name, quick, engine), lambda c=command: printed(c))
        for name, command in commands.items()
    }


def printed(command: list[str]) -> list[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PEERS)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.splitlines()


# --- the table


def tell(row: Row) -> None:
    if "error" in row:
        print(f"  {row['method']:26s} failed: {row['error'][:100]}", flush=True)
        return
    print("  " + "  ".join(cells(row)), flush=True)


def cells(row: Row) -> list[str]:
    def lds(found: list[float] | None) -> str:
        return "/".join(f"{v:.2f}" for v in found) if found else "–"

    return [
        f"{row['method']:24s}",
        f"{row.get('known', ''):24s}",
        f"{row['tv']:6.3f}",
        f"{row['mixed']:6.3f}",
        f"{lds(row['lds']):>17s}",
        f"{lds(row['lds_by_query']):>17s}",
        f"{row['runs']:8.1f}",
        f"{row['seconds']:7.2f}",
        f"{row['cpu']:7.2f}",
    ]


HEAD = ["method", "knows", "TV", "mixed", "LDS 50/5/1 %", "by query", "runs", "s", "CPU s"]


def markdown(report: dict[str, Any]) -> str:
    """TV with what it cost for all worlds side by side, and one table a world."""
    lines = []
    for name, world in report["worlds"].items():
        noise = f"± {100 * world['truth_error']:.2f} points at most, {world['noise']:.3f} in TV"
        lines += ["", f"**{name}** ({world['n_run']:,} runs: {noise})", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += [
            "| " + " | ".join(c.strip() for c in cells(row)) + " |" for row in world["rows"] if "error" not in row
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two worlds, one seed, one budget: minutes")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS))
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--subsets", type=int)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=10, help="of processor time, for a truth that is not committed"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables for the README at the end")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.worlds or (["logistic", "mlp"] if given.quick else list(WORLDS))
    budgets = given.budgets or ([64] if given.quick else [64, 512])
    seeds, subsets = given.seeds or (1 if given.quick else 3), given.subsets or (32 if given.quick else 100)
    report: dict[str, Any] = {"digits": digits().source, "worlds": {}, "system": {}}
    print(f"{digits().source}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}")
    for name in names:
        world = measured_world(name, subsets, given.minutes)
        truth = world.truth
        print(
            f"\n{name}: truth from {truth.n_run:,} runs, ± {100 * truth.errors.max():.2f} points at most, {truth.noise_in_tv():.3f} in TV"
        )
        tell_head()
        rows: list[Row] = []
        for part, work in (
            ("divisions", lambda w=world: divisions(w, budgets, seeds)),
            ("pydvl", lambda w=world: pydvl(w, budgets, seeds)),
            ("scores", lambda w=world: scores(w)),
            ("peers", lambda w=world: peers(w)),
        ):
            if part in given.only:
                found = work()
                rows += found
                for row in found if part != "scores" else []:
                    tell(row)
        report["worlds"][name] = {
            "n_run": truth.n_run,
            "truth": truth.shares.tolist(),
            "truth_error": float(truth.errors.max()),
            "noise": truth.noise_in_tv(),
            "rows": rows,
        }
        save(report)
    if "system" in given.only:
        report["system"] = system(quick=given.quick)
        for name, lines in report["system"].items():
            print(f"\n{name}")
            print("\n".join(f"  {line}" for line in lines))
        save(report)
    if given.markdown:
        print(markdown(report))
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB; {CACHE / 'all.json'}")


def tell_head() -> None:
    widths = (24, 24, 6, 6, 17, 17, 8, 7, 7)
    print(
        "  " + "  ".join(f"{h:{'<' if i < 2 else '>'}{w}s}" for i, (h, w) in enumerate(zip(HEAD, widths, strict=True))),
        flush=True,
    )


def save(report: dict[str, Any]) -> None:
    partial = CACHE / "all.json.partial"
    partial.write_text(json.dumps(report, indent=1))
    partial.replace(CACHE / "all.json")


if __name__ == "__main__":
    main()
