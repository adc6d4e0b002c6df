"""What training many counterfactual runs as one model gains, and how near it comes to the machine's own rate.

    ./run bench attribution/batched [--runs 64] [--seconds 3] [--keep-memory]

Per model: steps a second of runs one by one and of all runs at once, on one thread; and the FLOPs a second of the latter against
those of the batched products that it consists of, done bare (torch.bmm, same shapes, forward and both backward ones). All by
processor time, which other processes do not take; each figure is the best of three rounds. `overhead` is the part of a lone
run's step in which no product is computed. A run too big to gain from company is trained by itself, and said to be solo.
With --keep-memory glibc does not hand freed tensors back to the kernel, which would have to fill them with zeros at every step.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed  # noqa: E402
from attribution.engine.training import Program, cost  # noqa: E402

MODELS = {  # widths, batch, optimizer
    "digits 64-32-10, batch 64, momentum": ((64, 32, 10), 64, "sgd"),
    "MLP 64-128-128-10, batch 64, AdamW": ((64, 128, 128, 10), 64, "adamw"),
    "MLP 256-256-256-10, batch 128, momentum": ((256, 256, 256, 10), 128, "sgd"),
    "MLP 512-512-512-10, batch 256, momentum": ((512, 512, 512, 10), 256, "sgd"),
}


KEPT = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "268435456"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--keep-memory", action="store_true")
    given = parser.parse_args()
    if given.keep_memory and not KEPT.items() <= os.environ.items():
        again = [sys.executable, __file__, *sys.argv[1:]]  # glibc reads them at the start only
        sys.exit(subprocess.run(again, env=os.environ | KEPT, check=False).returncode)
    torch.set_num_threads(1)
    for name, (widths, batch, optimizer) in MODELS.items():
        task = make_task(widths, batch, optimizer)
        program, known = Program(task), cost(task)
        alone = steps(program, 1, given.seconds)
        runs = given.runs if not known.is_solo else 1
        together = runs * steps(program, runs, given.seconds)
        bare, flops = products(widths, batch, runs, given.seconds)
        bare_alone, _ = products(widths, batch, 1, given.seconds)
        rate = together * known.step_flops
        print(
            f"{name}: one by one {alone:,.0f} steps/s, {runs} at once {together:,.0f}: {together / alone:.1f} times; "
            f"{rate / 1e9:.1f} GFLOP/s of {bare * flops / 1e9:.1f} bare: {100 * rate / (bare * flops):.0f} %; "
            f"overhead {100 * (1 - alone / bare_alone):.0f} % of a lone step" + ("; solo" if known.is_solo else ""),
            flush=True,
        )


def make_task(widths: tuple[int, ...], batch: int, optimizer: str) -> Task:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def loss(model: nn.Module, records: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return cross_entropy(model(records[0]), records[1], reduction="none")

    n = 4 * batch
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, widths[0], generator=generator), torch.arange(n) % 10
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(x, y),
        queries=TensorRecords(x[:64], y[:64]),
        recipe=Recipe(
            optimizer=optimizer,
            options={"momentum": 0.9} if optimizer == "sgd" else {},
            learning_rate=1e-3,
            order=epoch_order(n, batch, 1000, 0),
            initial_state=initial_state_from_seed(build, 0),
        ),
    )


def steps(program: Program, runs: int, seconds: float) -> float:
    """Steps a second of so many runs, together."""
    weights = torch.ones(runs, program.task.n_train)
    state = program.initial(runs)

    def one() -> None:
        nonlocal state
        state, _ = program.step(state, weights, consume=True)

    return rate_of(one, seconds)


def products(widths: tuple[int, ...], batch: int, runs: int, seconds: float) -> tuple[float, float]:
    """How often a second the bare products of a step of all runs can be done, and their FLOPs for all runs."""
    shapes = []
    for number, (before, after) in enumerate(pairwise(widths)):
        shapes += [((batch, before), (before, after)), ((after, batch), (batch, before))]
        if number:
            shapes.append(((batch, after), (after, before)))
    pairs = [(torch.randn(runs, *left), torch.randn(runs, *right)) for left, right in shapes]

    def one() -> None:
        for left, right in pairs:
            torch.bmm(left, right)

    with FlopCounterMode(display=False) as counter:
        one()
    return rate_of(one, seconds), counter.get_total_flops()


def rate_of(work: Callable[[], None], seconds: float) -> float:
    """How often a second of processor time, the best of three rounds."""
    work()
    best = 0.0
    for _ in range(3):
        started, done = time.process_time(), 0
        while time.process_time() - started < seconds / 3:
            work()
            done += 1
        best = max(best, done / (time.process_time() - started))
    return best


if __name__ == "__main__":
    main()
