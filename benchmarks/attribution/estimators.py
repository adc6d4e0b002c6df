"""Do the fast estimates predict retraining, and better than the peers' at their best damping?

    ./run bench attribution/estimators [--worlds logistic mlp mlp-adam cnn worlds:cnn ...] [--seeds 0] [--subsets 200] [--no-peers]

Worlds of 240 of scikit-learn's digits, a tenth of them with a random label; 100 other digits are the queries. worlds:NAME is one of
worlds.py, whose records and queries are its own. The truth is
counterfactual training on the same order, every subset trained. LDS: Spearman's ρ per query over subsets, mean over queries.
The peers (kronfluence, dattri) run in this same command on the same checkpoints, from a folder of their own that torch is not in; each
is given the damping that is best on the truth, for each column by itself. Ours choose theirs without seeing it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attribution.engine import Batch, Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed, replay_values
from attribution.engine.estimators import ekfac, graddot, replay, tracin, trak
from attribution.engine.held_out import linear_datamodeling_score
from attribution.engine.training import train
from benchmarks.attribution import worlds

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "var" / "peers"
DROPPED = (0.5, 0.05, 0.01)
N_TRAIN, N_QUERY = 240, 100


def logistic() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 10))  # kronfluence cannot wrap a layer that is the whole model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


MOMENTUM = {"optimizer": "sgd", "options": {"momentum": 0.9}}
WORLDS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "logistic": (logistic, MOMENTUM | {"learning_rate": 0.1}),
    "mlp": (mlp, MOMENTUM | {"learning_rate": 0.02}),
    "mlp-adam": (mlp, {"optimizer": "adam", "learning_rate": 0.003}),
    "cnn": (cnn, MOMENTUM | {"learning_rate": 0.01}),
}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels, reduction="none")


def make_world(name: str, seed: int) -> Task:
    if name.startswith("worlds:"):
        return worlds.make_task(worlds.WORLDS[name.removeprefix("worlds:")], seed=seed)
    build, recipe = WORLDS[name]
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    chosen = torch.randperm(len(images), generator=generator)[: N_TRAIN + N_QUERY]
    images, labels = images[chosen], labels[chosen]
    given = labels[:N_TRAIN].clone()
    wrong = torch.rand(N_TRAIN, generator=generator) < 0.1
    given[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(images[:N_TRAIN], given),
        queries=TensorRecords(images[N_TRAIN:], labels[N_TRAIN:]),
        recipe=Recipe(
            **recipe,  # type: ignore[arg-type]
            order=epoch_order(N_TRAIN, 24, 20, seed),
            initial_state=initial_state_from_seed(build, seed),
            seed=seed,
        ),
    )


def retrained(task: Task, subsets: int) -> list[tuple[Tensor, Tensor]]:
    """For each of DROPPED, masks (R, n_train) and f per query (R, n_query)."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for dropped in DROPPED:
        n = task.n_train
        kept = torch.ones(subsets, n)
        for row in kept:
            row[torch.randperm(n, generator=generator)[: max(1, round(dropped * n))]] = 0
        found.append((kept, replay_values(task, kept, per_query=True)))
    return found


def install_peers() -> None:
    """Into PEERS, nothing that they need being taken from a resolver: torch must stay what it is."""
    wanted = (Path(__file__).parent / "peers-requirements.txt").read_text()
    mark = PEERS / "installed.txt"
    if mark.exists() and mark.read_text() == wanted:
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    requirements = str(Path(__file__).parent / "peers-requirements.txt")
    subprocess.run([*command, "--target", str(PEERS), "-r", requirements], check=True)
    mark.write_text(wanted)


def peers_scores(world: str, seed: int, checkpoints: list[tuple[int, Path]]) -> list[tuple[str, float, list[Tensor]]]:
    """(method, seconds for one damping, a score matrix per damping), from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        name = world if world.startswith("worlds:") else f"estimators:{world}"
        command = [sys.executable, "-m", "benchmarks.attribution.peers", f"{name}:{seed}", folder]
        environment = os.environ | {"PYTHONPATH": str(PEERS), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        paths = [str(path) for _, path in checkpoints]
        done = subprocess.run(
            [*command, *paths], env=environment, cwd=ROOT, check=False, capture_output=True, text=True
        )
        if done.returncode:
            print(f"peers failed: {done.stderr.strip().splitlines()[-1:]}")
            return []
        report = json.loads((Path(folder) / "report.json").read_text())
        scores = load_file(Path(folder) / "scores.safetensors")
        return [(name, entry["seconds"], [scores[key] for key in entry["scores"]]) for name, entry in report.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", nargs="+", default=list(WORLDS), choices=[*WORLDS, *(f"worlds:{w}" for w in worlds.WORLDS)]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.no_peers:
        install_peers()
    for world in given.worlds:
        for seed in given.seeds:
            run(world, seed, given)


def run(world: str, seed: int, given: argparse.Namespace) -> None:
    task = make_world(world, seed)
    started = time.perf_counter()
    truth = retrained(task, given.subsets)
    n_step = task.require_recipe().n_step
    print(
        f"\n{world}, seed {seed}: {len(DROPPED) * given.subsets} retrains in {time.perf_counter() - started:.0f} s; LDS with "
        + " / ".join(f"{100 * d:g} %" for d in DROPPED)
        + " of the records dropped"
    )
    with tempfile.TemporaryDirectory() as folder:
        steps = sorted({max(1, n_step * k // 10) for k in range(1, 11)})
        done = train(task, checkpoint_steps=steps, checkpoint_dir=Path(folder))
        ten, last = done.checkpoints, done.checkpoints[-1:]
        four = [ten[k] for k in sorted({len(ten) * k // 4 - 1 for k in (1, 2, 3, 4)})]
        final, bare = replace(task, checkpoints=last), replace(task, recipe=None, checkpoints=last)
        rows: list[tuple[str, str, Callable[[], Tensor]]] = [
            ("graddot", "1 checkpoint", lambda: graddot.score(bare)),
            ("tracin", "10 checkpoints", lambda: tracin.score(replace(task, recipe=None, checkpoints=ten))),
            ("tracin", "recipe", lambda: tracin.score(task)),
            ("trak", "1 checkpoint", lambda: trak.score(bare)),
            ("trak", "1 checkpoint, 33 replays", lambda: trak.score(final)),
            ("trak", "4 checkpoints", lambda: trak.score(replace(task, recipe=None, checkpoints=four))),
            ("trak", "recipe, 33 replays", lambda: trak.score(task)),
            ("ekfac", "1 checkpoint", lambda: ekfac.score(bare)),
            ("ekfac", "1 checkpoint, 33 replays", lambda: ekfac.score(final)),
            ("ekfac", "4 checkpoints", lambda: ekfac.score(replace(task, recipe=None, checkpoints=four))),
            ("ekfac", "recipe, 33 replays", lambda: ekfac.score(task)),
            ("replay", "recipe", lambda: replay.score(task)),
        ]
        for method, known, estimate in rows:
            started = time.perf_counter()
            scores = estimate()
            _row(method, known, [scores], truth, time.perf_counter() - started)
        if not given.no_peers:
            for method, seconds, found in peers_scores(world, seed, ten):
                _row(method, f"best of {len(found)} dampings" if len(found) > 1 else "", found, truth, seconds)


def _row(method: str, known: str, scores: list[Tensor], truth: list[tuple[Tensor, Tensor]], seconds: float) -> None:
    best = [max(linear_datamodeling_score(s, kept, f) for s in scores) for kept, f in truth]
    print(f"{method:32s} {known:26s} " + "  ".join(f"{b:5.3f}" for b in best) + f"  {seconds:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
