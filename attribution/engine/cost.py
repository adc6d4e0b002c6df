"""What a command will take, said before it starts: seconds, memory, disk.

    seconds = fixed + factor · Σ_units count · pace

The counts (steps, reverse steps, records) follow from the recipe and the options, as the plans of `training` have them. The pace of each unit is measured
on the task at hand, a few tenths of a second each, so that it knows the model, the batch and the machine with whatever else runs
on it. What that leaves out (starting up, hashing, choosing settings, writing, the arithmetic between replays) is `fixed` and `factor`, fitted by least squares of relative
errors to commands at three sizes; `./run bench attribution/cost` fits them and compares at sizes that they were not fitted to.

Bytes are not fitted: the tensors of a step are counted by doing one (`training.plan_reverse`), files by their formats, and the process by what it has resident.
"""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from attribution.engine.evaluation import N_RANDOM
from attribution.engine.gradients import block_rows, named_gradients, parameter_count
from attribution.engine.held_out import DROPPED, MASKS
from attribution.engine.projection import WIDTH, Projector
from attribution.engine.store import SHARD_RECORDS
from attribution.engine.task import Task
from attribution.engine.training import (
    Adjoint,
    Program,
    Tensors,
    chunk_size,
    cost,
    forward_steps,
    plan_reverse,
    preserved_generator,
)

#: (fixed seconds, factor) of each command, fitted on the machine of benchmarks/attribution/cost.py.
FITTED: dict[str, tuple[float, float]] = {
    "train": (0.0025, 1.01),
    "index": (0.043, 0.971),
    "evaluate": (0.54, 1.35),
}  # `score`, `shares` and `verify` have not been fitted: they are as counted
MEASURED_SECONDS = 0.3  # of each unit
QUERY_BLOCK = 64  # of estimators.replay
CHECKPOINTS = {
    "graddot": 1,
    "tracin": 10,
    "trak": 4,
    "ekfac": 5,
}  # states that a method looks at, where it may train for them
PASSES = {"graddot": 1.0, "tracin": 1.0, "trak": 3.0, "ekfac": 4.0}  # over the records at each, curvature included


@dataclass(frozen=True)
class Estimate:
    """Of one command. Memory is the process's resident peak; disk what lies in DIR afterwards."""

    seconds: float
    memory: int
    disk: int
    units: dict[str, float]  # counts, for whoever wants to see what it consists of

    def in_words(self) -> str:
        return f"about {in_time(self.seconds)}, {in_bytes(self.memory)} of memory, {in_bytes(self.disk)} on disk"


class Pace:
    """Seconds of one unit of a task's work, each measured when it is first asked for."""

    def __init__(self, task: Task, clock: Callable[[], float] = time.perf_counter) -> None:
        self.task, self.clock = task, clock
        self._found: dict[tuple[Any, ...], float] = {}

    @cached_property
    def program(self) -> Program:
        return Program(self.task)

    def step(self, runs: int = 1) -> float:
        """One step of `runs` runs at once."""
        state, weights = self.program.initial(runs), torch.ones(runs, self.task.n_train)

        def one() -> None:
            nonlocal state
            if state.step == self.program.recipe.n_step:
                state = self.program.initial(runs)
            state, _ = self.program.step(state, weights, consume=runs > 1)

        return self._measured(("step", runs), one)

    def adjoint(self, runs: int, questions: int) -> float:
        """One step backwards."""
        state, weights = self.program.initial(runs), torch.ones(runs, self.task.n_train)

        def asked(tensors: Tensors) -> Tensors:
            return {name: t.expand(questions, *t.shape).clone() for name, t in tensors.items()}

        outer = Adjoint(asked(state.parameters), {field: asked(ts) for field, ts in state.moments.items()})
        alone = cost(self.task).is_solo
        return self._measured(
            ("adjoint", runs, questions), lambda: self.program.adjoint(state, weights, outer, one_by_one=alone)
        )

    def measurement(self, runs: int) -> float:
        state = self.program.initial(runs)
        return self._measured(("measurement", runs), lambda: self.program.measure(state))

    def gradient(self) -> float:
        """Of one record, among as many as fit."""
        state = self.program.blank()
        rows = min(block_rows(self.program, state), self.task.n_train)
        index = torch.arange(rows)
        records = self.task.train
        return (
            self._measured(("gradient",), lambda: named_gradients(self.program, state, records, index, of_loss=True))
            / rows
        )

    def projection(self, width: int) -> float:
        """Of one record into the store."""
        state = {
            n.removeprefix("model."): t for n, t in self.program.blank().tensors().items() if n.startswith("model.")
        }
        projector = Projector(self.task, state, width=width)
        index = torch.arange(min(projector.rows(of_loss=True), self.task.n_train))
        return self._measured(
            ("projection", width), lambda: projector.gradients(self.task.train, index, of_loss=True)
        ) / len(index)

    def _measured(self, key: tuple[Any, ...], work: Callable[[], object]) -> float:
        """The median of as many as fit MEASURED_SECONDS, after one that warms up."""
        if key not in self._found:
            with preserved_generator():
                work()
                took: list[float] = []
                until = time.monotonic() + MEASURED_SECONDS
                while len(took) < 3 or time.monotonic() < until:
                    started = self.clock()
                    work()
                    took.append(self.clock() - started)
            self._found[key] = median(took)
        return self._found[key]


@dataclass
class _Work:
    """Units with their pace, and bytes, as they add up."""

    pace: Pace
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0

    def __post_init__(self) -> None:
        self.units: dict[str, float] = {}

    def add(self, unit: str, count: float, pace: float) -> None:
        self.units[unit] = self.units.get(unit, 0.0) + count
        self.seconds += count * pace

    def replays(self, count: float) -> None:
        """Plain counterfactual runs, batched as the memory has it."""
        if count < 1:
            return
        task = self.pace.task
        known, n_step, size = cost(task), task.require_recipe().n_step, chunk_size(task, math.ceil(count))
        self.add("plain runs", count, (n_step * self.pace.step(size) + self.pace.measurement(size)) / size)
        self.memory = max(self.memory, size * known.run_bytes)

    def metagradients(self, count: int, questions: int) -> None:
        if count < 1:
            return
        task = self.pace.task
        n_step = task.require_recipe().n_step
        plan = plan_reverse(task, count, questions, program=self.pace.program)
        passes = math.ceil(questions / plan.questions)
        chunks = math.ceil(count / plan.runs)
        forward = forward_steps(n_step, plan.snapshots) * self.pace.step(plan.runs)
        backward = n_step * self.pace.adjoint(plan.runs, min(questions, plan.questions))
        self.add("metagradient passes", chunks * passes, forward + backward)
        self.memory = max(self.memory, plan.memory)

    def training(self) -> None:
        n_step = self.pace.task.require_recipe().n_step
        self.add("training steps", n_step, self.pace.step(1))
        self.memory = max(self.memory, cost(self.pace.task).run_bytes)

    def scores(self, method: str) -> None:
        task = self.pace.task
        n, q = task.n_train, task.n_query
        if method == "replay":
            for start in range(0, q, QUERY_BLOCK):
                self.metagradients(1, min(QUERY_BLOCK, q - start))
            return
        state = self.pace.program.blank()
        d, rows = parameter_count(self.pace.program, state), block_rows(self.pace.program, state)
        states = min(CHECKPOINTS[method], len(task.checkpoints)) if task.checkpoints else CHECKPOINTS[method]
        if method == "ekfac" or (method == "trak" and (states == 1 or task.recipe is not None)):
            states += 1  # the last one rewound to half of the data
        if not task.checkpoints:
            self.training()
        if task.recipe is not None and method in ("trak", "ekfac"):
            self.replays(len(DROPPED) * MASKS + 1)
        sweeps = PASSES[method] * states + (math.ceil(q / rows) - 1) * states
        self.add("records' gradients", n * sweeps + q * states, self.pace.gradient())
        self.memory = max(self.memory, 2 * min(rows, max(n, q)) * d * 4 + n * q * 8)


def estimate(
    task: Task, command: str, options: dict[str, Any] | None = None, *, clock: Callable[[], float] = time.perf_counter
) -> Estimate:
    """What `python -m attribution.engine COMMAND` with these options takes; measures for about a second.

    Args:
        options: as the command line has them, by name: budget, method, width, subsets, kept, leave_out, exact, checkpoint, segments, workers.
        clock: `time.process_time` for processor seconds.

    Raises:
        EngineError: as the command would.
    """
    given, work = options or {}, _Work(Pace(task, clock))
    n, q = task.n_train, task.n_query
    match command:
        case "train":
            work.training()
            steps = {*(given.get("checkpoint") or ()), task.require_recipe().n_step}
            work.disk = len(steps) * cost(task).state_bytes
        case "score":
            work.scores(given["method"])
            work.disk = n * q * 4
        case "shares":
            _shares(work, given.get("budget") or 400.0)
        case "index":
            if not task.checkpoints:
                work.training()
            width = given.get("width") or WIDTH
            work.add("records projected", n, work.pace.projection(width))
            shard = min(n, given.get("shard_records") or SHARD_RECORDS)
            work.memory = max(work.memory, 2 * shard * (width + 4)) + 2**28
            work.disk = n * (width + 4) + cost_of_state(work.pace.program)
        case "search":
            store = n * (given.get("width") or WIDTH)
            work.add("bytes read", store, 1 / 500e6)
            work.memory = min(store, 2**28)
        case "verify":
            n_step = task.require_recipe().n_step
            m = max(1, len(task.checkpoints))
            part = min(1.0, (given.get("segments") or m) / m)
            for runs, times in ((1, 2), (3, 1), (4, 1)):
                work.add("replayed steps", part * n_step * times, work.pace.step(runs))
            work.memory = 4 * cost(task).run_bytes
        case "evaluate":
            methods: Sequence[str] = given.get("method") or sorted([*CHECKPOINTS, "replay"])
            for method in methods:
                work.scores(method)
            removed = len(given.get("leave_out") or ()) * (N_RANDOM + len(methods))
            retrains = len(given.get("kept") or (0.5,)) * (given.get("subsets") or 100) + removed + 2
            retrains += 2**n if given.get("exact") else 0
            work.replays(retrains)
            work.disk = len(methods) * n * q * 4 + retrains * q * 4
        case _:
            raise ValueError(command)
    fixed, factor = FITTED.get(command, (0.0, 1.0))
    workers = max(1, given.get("workers") or 1)
    return Estimate(
        seconds=fixed + factor * work.seconds / workers,
        memory=workers * (work.memory + resident()),
        disk=work.disk,
        units=work.units,
    )


def _shares(work: _Work, budget: float) -> None:
    """The split of a budget as `plan_shares` has it, without the training that finds the clusters of the real plan."""
    task = work.pace.task
    recipe, known = task.require_recipe(), cost(task)
    is_diagonal = recipe.optimizer == "sgd" and recipe.normalizer == "batch"
    ratio, folds = known.metagradient_ratio, min(task.n_query, 4 if budget < 160 else 10)
    fold_ratio = 2 + max(0.0, ratio - 2) * folds
    by_fold = max(3, min(6 if is_diagonal else 24, round(0.15 * budget / fold_ratio)))
    single = max(0, (8 if budget < 160 else 13) - by_fold) if is_diagonal else max(4, round(0.36 * budget / ratio))
    work.training()
    work.metagradients(by_fold, folds)
    work.metagradients(single, 1)
    work.replays(max(24, budget - 1 - by_fold * fold_ratio - single * ratio))
    work.add("records' gradients", 2 * task.n_train, work.pace.gradient())
    work.disk = int(budget * task.n_query * 4 + (by_fold * folds + single) * task.n_train * 4 + task.n_train * 8)


def cost_of_state(program: Program) -> int:
    """Bytes of a checkpoint without the optimizer's part."""
    tensors = program.blank().tensors()
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if name.startswith("model."))


def resident() -> int:
    """Bytes of this process now: torch itself, and the task."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fit(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(fixed, factor), neither below 0, with the least squares of (fixed + factor · predicted) / measured − 1."""
    p, m = (torch.tensor(list(x), dtype=torch.float64) for x in (predicted, measured))
    A = torch.stack([1 / m, p / m], 1)
    fixed, factor = torch.linalg.lstsq(A, torch.ones(len(m), 1, dtype=torch.float64)).solution[:, 0].tolist()
    if fixed < 0:
        return 0.0, float((p / m).sum() / (p / m).square().sum())
    if factor < 0:
        return float((1 / m).sum() / (1 / m).square().sum()), 0.0
    return fixed, factor


def in_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def in_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
