"""What the exact metagradient of a long training takes in memory and compute.

    ./run bench attribution/replay [--steps 25 100 400] [--memory 64] [--width 256]
    ./run bench attribution/replay --big [--steps 12] [--memory 2048]
    ./run bench attribution/replay --goal [--steps 10000] [--optimizer sgd|adamw] [--same-sweeps]

Measured, each in a process of its own: the most bytes resident above those before the pass, and processor time over that of a
plain run of as many steps, on one thread. Computed from the same plan: the states kept, the plain steps done, run equivalents
in FLOPs. At the end, what the plan says of 10,000 steps of a model of 10 million parameters with Adam in 8 GB, whose step is
measured here (`--big` also runs a few such steps with so few states kept that they are recomputed).

`--goal` runs all of it: 10,000 steps of 10 million parameters, forwards and backwards in 8 GB, one record a step so that it ends within
the hour on a free core. With fewer `--steps` and `--same-sweeps` as few states are kept as recompute as many steps for each as the whole does. A plain run of as many steps comes first, and one with a record at weight 0 last, to compare with the derivative.
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
from attribution.engine.training import Program, cost, forward_steps, plan_reverse  # noqa: E402

BIG = 1768  # three layers of this width: 10 million parameters
GOAL_STEPS, GOAL_BYTES, GOAL_RUNS = 10_000, 8 * 10**9, 8
GOAL_BUDGET = (
    62 * 10**8
)  # of GOAL_BYTES: torch itself, what else a process holds, and the gaps that the allocator leaves take the rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--memory", type=int, help="MiB")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--goal", action="store_true")
    parser.add_argument("--same-sweeps", action="store_true", help="of --goal with fewer steps")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of --goal")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.goal:
        goal(given.steps[0] if given.steps else GOAL_STEPS, given.optimizer, same_sweeps=given.same_sweeps)
        return
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
    long = as_long(task, GOAL_STEPS)
    plan = plan_reverse(long, 1, 1, memory=GOAL_BYTES)
    print(
        f"computed for {GOAL_STEPS:,} steps in {GOAL_BYTES / 1e9:.0f} GB: {plan.snapshots} states of "
        f"{cost(long).state_bytes / 1e6:.1f} MB kept, {plan.forward_steps / GOAL_STEPS:.2f} forward sweeps, {plan.memory / 1e9:.2f} GB, "
        f"{plan.run_equivalents:.2f} plain runs (at most {GOAL_RUNS} wanted)"
    )


def as_long(task: Task, n_step: int) -> Task:
    recipe = task.require_recipe()
    order = recipe.order[torch.arange(n_step) % recipe.n_step]
    return replace(task, recipe=replace(recipe, order=order, learning_rate=1e-4))


def goal(n_step: int, optimizer: str, *, same_sweeps: bool) -> None:
    """Every step of it, on one thread; the plan and what it took."""
    width, n, n_query = 1826, 64, 32

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10),
        )  # fmt: skip

    def loss(model: nn.Module, records: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return cross_entropy(model(records[0]), records[1], reduction="none")

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, width, generator=generator)
    y = torch.arange(n + n_query) % 10
    x = centres[y] + 3 * torch.randn(n + n_query, width, generator=generator)
    rate = 1e-4 if optimizer == "sgd" else 1e-5
    recipe = Recipe(
        optimizer=optimizer,
        options={"momentum": 0.9} if optimizer == "sgd" else {},
        learning_rate=torch.linspace(rate, rate / 10, n_step, dtype=torch.float64),
        order=epoch_order(n, 1, -(-n_step // n), 0)[:n_step],
        initial_state=initial_state_from_seed(build, 0),
    )
    queries = TensorRecords(x[n:], y[n:])
    task = Task(
        model=build, loss=loss, measurement=loss, train=TensorRecords(x[:n], y[:n]), queries=queries, recipe=recipe
    )
    program, known = Program(task), cost(task)
    budget = GOAL_BUDGET
    if same_sweeps:
        whole = plan_reverse(as_long(task, GOAL_STEPS), 1, 1, memory=GOAL_BUDGET)
        wanted = whole.forward_steps / GOAL_STEPS
        kept = next(s for s in range(1, n_step + 1) if forward_steps(n_step, s) / n_step <= wanted)
        budget -= (whole.snapshots - kept) * known.state_bytes
    plan = plan_reverse(task, 1, 1, program=program, memory=budget)
    count = sum(t.numel() for t in recipe.initial_state.values())
    print(
        f"{count / 1e6:.1f} M parameters, {optimizer}, {n_step:,} steps: {plan.snapshots} states of {known.state_bytes / 1e6:.1f} MB, "
        f"{plan.forward_steps:,} plain steps ({plan.forward_steps / n_step:.2f} sweeps), {plan.memory / 1e9:.2f} GB planned, "
        f"{plan.run_equivalents:.2f} plain runs in FLOPs",
        flush=True,
    )
    ones = torch.ones(1, n)
    started = time.process_time()
    f = replay_values(task, ones, program=program, memory=budget)
    plain = time.process_time() - started
    print(f"plain run: f = {float(f):.6f}, {plain:,.0f} s of processor time", flush=True)

    told = [time.monotonic()]
    before, started = resident(), time.process_time()

    def tell(done: int, total: int) -> None:
        if time.monotonic() - told[0] > 60:
            told[0] = time.monotonic()
            took = time.process_time() - started
            print(f"  {done:,} of {total:,} steps, {took:,.0f} s, {took / plain:.2f} runs", flush=True)

    f_again, gradient = metagradients(task, ones, program=program, memory=budget, progress=tell)
    took = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"metagradient: {took:,.0f} s of processor time, {took / plain:.2f} plain runs; resident {peak / 1e9:.2f} GB at most, "
        f"{(peak - before) / 1e9:.2f} GB above those before it; f {'is' if torch.equal(f_again.mean(1), f) else 'is not'} the plain "
        "run's to the bit",
        flush=True,
    )
    strongest = int(gradient[0, 0].abs().argmax())
    without = ones.clone()
    without[0, strongest] = 0
    moved = float(f - replay_values(task, without, program=program, memory=budget))
    print(
        f"without record {strongest}: f falls by {moved:.6f}, the derivative says {float(gradient[0, 0, strongest]):.6f}"
    )


def resident() -> int:
    """Bytes resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
