"""What the exact metagradient of a long training takes in memory and compute.

    ./run bench attribution/replay [--steps 25 100 400] [--memory 64] [--width 256]
    ./run bench attribution/replay --big [--steps 12] [--memory 2048]

Measured, each in a process of its own: the most bytes resident above those before the pass, and processor time over that of a
plain run of as many steps, on one thread. Computed from the same plan: the states kept, the plain steps done, run equivalents
in FLOPs. At the end, what the plan says of 10,000 steps of a model of 10 million parameters with Adam in 8 GB, whose step is
measured here (`--big` also runs a few such steps with so few states kept that they are recomputed).
"""

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from attribution.engine import (  # noqa: E402
    Recipe,
    Task,
    TensorRecords,
    epoch_order,
    initial_state_from_seed,
    metagradients,
    replay_values,
)
from attribution.engine.training import Program, cost, plan_reverse  # noqa: E402

BIG = 1768  # three layers of this width: 10 million parameters
GOAL_STEPS, GOAL_BYTES, GOAL_RUNS = 10_000, 8 * 10**9, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--memory", type=int, help="MiB")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    width = BIG if given.big else given.width
    memory = (given.memory or (2048 if given.big else 64)) * 2**20
    if given.one is not None:
        measure(make_task(width, given.one), memory)
        return
    for n_step in given.steps or ([12] if given.big else [25, 100, 400]):
        command = [
            sys.executable,
            __file__,
            "--one",
            str(n_step),
            "--width",
            str(width),
            "--memory",
            str(memory // 2**20),
        ]
        subprocess.run(command, check=True)
    if given.big:
        promise(make_task(BIG, 2))


def make_task(width: int, n_step: int) -> Task:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 100),
        )  # fmt: skip

    def loss(model: nn.Module, records: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return cross_entropy(model(records[0]), records[1], reduction="none")

    n, batch = 256, 64
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n + 64, width, generator=generator), torch.arange(n + 64) % 100
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(x[:n], y[:n]),
        queries=TensorRecords(x[n:], y[n:]),
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=torch.linspace(1e-4, 1e-5, n_step, dtype=torch.float64),
            order=epoch_order(n, batch, -(-n_step * batch // n), 0)[:n_step],
            initial_state=initial_state_from_seed(build, 0),
            clip_norm=1.0,
        ),
    )


def measure(task: Task, memory: int) -> None:
    program, known = Program(task), cost(task)
    plan = plan_reverse(task, 1, 1, program=program, memory=memory)
    weights = torch.ones(1, task.n_train)
    started = time.process_time()
    replay_values(task, weights, program=program, memory=memory)
    plain = time.process_time() - started
    before = resident()
    started = time.process_time()
    metagradients(task, weights, program=program, memory=memory)
    seconds = time.process_time() - started
    held = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    count = sum(t.numel() for t in task.require_recipe().initial_state.values())
    print(
        f"{count / 1e6:.1f} M parameters, {program.recipe.n_step:,} steps, budget {memory / 2**20:,.0f} MiB: planned "
        f"{plan.memory / 2**20:,.0f}, held {held / 2**20:,.0f}; {plan.snapshots} states of {known.state_bytes / 1e6:.1f} MB kept, "
        f"{plan.forward_steps:,} plain steps; {plan.run_equivalents:.2f} runs in FLOPs, {seconds / plain:.2f} in "
        f"processor time ({plain:.1f} s and {seconds:.1f} s)",
        flush=True,
    )


def promise(task: Task) -> None:
    """The plan for the goal, from this model's own step; nothing of 10,000 steps is run."""
    recipe = task.require_recipe()
    order = recipe.order[torch.arange(GOAL_STEPS) % recipe.n_step]
    long = replace(task, recipe=replace(recipe, order=order, learning_rate=1e-4))
    plan = plan_reverse(long, 1, 1, memory=GOAL_BYTES)
    print(
        f"computed for {GOAL_STEPS:,} steps in {GOAL_BYTES / 1e9:.0f} GB: {plan.snapshots} states of "
        f"{cost(long).state_bytes / 1e6:.1f} MB kept, {plan.forward_steps / GOAL_STEPS:.2f} forward sweeps, {plan.memory / 1e9:.2f} GB, "
        f"{plan.run_equivalents:.2f} plain runs (at most {GOAL_RUNS} wanted)"
    )


def resident() -> int:
    """Bytes resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
