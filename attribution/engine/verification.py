"""Does this recipe, on these records, give these weights?

The run is replayed, whole or from one checkpoint to the next, and every tensor compared. On the build, thread count and
CPU that wrote the checkpoints the bits are equal. Elsewhere floating-point sums are ordered differently and training
carries the difference on; how far is measured on the task itself, not guessed: the same run in double precision and, for
what remains of the same arithmetic in another order, the same run as one of two stacked ones. A tensor may differ by
`MARGIN` times the larger of the two drifts, and the report carries the drifts beside the verdict.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from attribution.engine.errors import EngineError
from attribution.engine.task import Batch, Records, Task, epoch_order, initial_state_from_seed
from attribution.engine.training import (
    Program,
    Progress,
    State,
    Tensors,
    environment,
    preserved_generator,
)

MARGIN = 4.0  # two builds may each be a drift away from the exact run, in opposite directions; and as much again


@dataclass(frozen=True)
class Comparison:
    """One checkpoint against the replay. `deviation` is relative: ‖replayed − given‖ / ‖replayed − where it started‖."""

    step: int
    bit_equal: bool
    deviation: float
    worst: str  # the tensor that deviates most
    within: bool


@dataclass(frozen=True)
class Tolerance:
    """What was allowed, and the measurements on this task that it rests on (relative, as `deviation`)."""

    allowed: float
    drift_float64: float
    drift_stacked: float
    margin: float = MARGIN


@dataclass(frozen=True)
class VerificationReport:
    matches: bool
    bit_equal: bool
    comparisons: list[Comparison]
    findings: list[str]  # in words, each a reason for a mismatch
    tolerance: Tolerance | None  # None where only equal bits were accepted
    environment: dict[str, Any]
    records: str  # digest of recipe, records and queries

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OrderRule:
    """A disclosed order: `epoch_order(n_records, batch, epochs, seed)`."""

    batch: int
    epochs: int
    seed: int


def verify(
    task: Task,
    *,
    segments: bool = False,
    exact: bool = False,
    order_rule: OrderRule | None = None,
    initial_seed: int | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Replay the recipe and compare it with the task's checkpoints.

    Args:
        segments: start each stretch from the checkpoint before it, which must then hold the optimizer's state;
            otherwise the whole run is replayed from the initial state.
        exact: accept equal bits only, as between machines of one build.
        order_rule: the order must be this rule's.
        initial_seed: the initial state must be `initial_state_from_seed(build, initial_seed)`.

    Raises:
        EngineError: a checkpoint cannot be read, or its tensors are not this model's.
    """
    recipe = task.require_recipe()
    if not task.checkpoints:
        raise EngineError("there is nothing to compare with; give [(completed steps, path)]", pointer="/checkpoints")
    program = Program(task)
    findings = _rules(task, order_rule, initial_seed)
    given = [
        (step, load_checkpoint(path, program, pointer=f"/checkpoints/{number}"))
        for number, (step, path) in enumerate(task.checkpoints)
    ]
    starts: list[tuple[int, Tensors | None]] = [(0, None)]
    if segments:
        starts += [(step, tensors) for step, tensors in given[:-1]]
        for number, (_, tensors) in enumerate(given[:-1]):
            if not _has_moments(program, tensors):
                raise EngineError("has no optimizer state; replay the whole run", pointer=f"/checkpoints/{number}")
    else:
        starts += [(step, None) for step, _ in given[:-1]]

    comparisons: list[tuple[int, bool, float, str]] = []
    ones = torch.ones(1, task.n_train)
    state = program.initial(1)
    with preserved_generator():
        for (start, tensors), (step, expected) in zip(starts, given, strict=True):
            if tensors is not None:
                state = _state(program, start, tensors)
            origin = state.tensors() if segments else program.initial(1).tensors()
            while state.step < step:
                state, _ = program.step(state, ones.to(_dtype(state)))
                if progress:
                    progress(state.step, recipe.n_step)
            comparisons.append((step, *_compare(state.tensors(), expected, origin)))

    bit_equal = all(equal for _, equal, _, _ in comparisons)
    tolerance = None if bit_equal or exact else measure_tolerance(task, max(step for step, _ in given))
    allowed = tolerance.allowed if tolerance else 0.0
    checked = [
        Comparison(step, equal, deviation, worst, equal or (not exact and deviation <= allowed))
        for step, equal, deviation, worst in comparisons
    ]
    findings += [
        f"after step {c.step} {c.worst} is off by {c.deviation:.2g} of its change, {allowed:.2g} is allowed: another "
        "record, label, order, recipe or start, or an altered checkpoint"
        for c in checked
        if not c.within
    ]
    return VerificationReport(
        matches=not findings,
        bit_equal=bit_equal,
        comparisons=checked,
        findings=findings,
        tolerance=tolerance,
        environment=environment(),
        records=task.digest,
    )


def measure_tolerance(task: Task, n_step: int | None = None) -> Tolerance:
    """How far the same training drifts when only the arithmetic changes: its precision, and the order of its sums."""
    recipe = task.require_recipe()
    n_step = recipe.n_step if n_step is None else n_step
    once = _run(task, n_step, runs=1)
    stacked = _run(task, n_step, runs=2)
    double = _run(_in_double(task), n_step, runs=1)
    origin = Program(task).initial(1).tensors()
    drift_stacked = _compare(once, stacked, origin)[1]
    drift_double = _compare(once, {n: t.to(once[n].dtype) for n, t in double.items()}, origin)[1]
    # No two builds agree closer than the spacing of the numbers themselves.
    spacing = torch.finfo(next(t.dtype for t in once.values() if t.is_floating_point())).eps
    return Tolerance(MARGIN * max(drift_double, drift_stacked, spacing), drift_double, drift_stacked)


def save_report(report: VerificationReport, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


def load_checkpoint(path: Path | str, program: Program, *, pointer: str = "") -> Tensors:
    """Read a checkpoint; its model tensors must be this model's, its optimizer tensors known ones."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EngineError(
            f"{Path(path).name} is not a safetensors file ({error}); no other format is read", pointer=pointer
        ) from error
    expected = program.initial(1).tensors()
    required = [name for name in expected if name.startswith("model.")]
    for name in [*required, *tensors]:
        here = f"{pointer}/{name}"
        if name not in tensors:
            raise EngineError("is missing", pointer=here)
        if name not in expected:
            raise EngineError(f"is none of the model's and optimizer's: {sorted(expected)[:8]} ...", pointer=here)
        if tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype:
            raise EngineError(
                f"is {tensors[name].dtype} {tuple(tensors[name].shape)}, the model has "
                f"{expected[name].dtype} {tuple(expected[name].shape)}",
                pointer=here,
            )
        if tensors[name].is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            raise EngineError("holds NaN or infinity", pointer=here)
    return tensors


def state_from_checkpoint(program: Program, step: int, path: Path | str) -> State:
    """A checkpoint as a state; moments it does not hold are zero."""
    return _state(program, step, load_checkpoint(path, program))


def _rules(task: Task, rule: OrderRule | None, initial_seed: int | None) -> list[str]:
    recipe, findings = task.require_recipe(), []
    if rule is not None:
        expected = epoch_order(task.n_train, rule.batch, rule.epochs, rule.seed)
        if expected.shape != recipe.order.shape:
            findings.append(f"the order has shape {tuple(recipe.order.shape)}, its rule gives {tuple(expected.shape)}")
        elif not torch.equal(expected, recipe.order):
            step = int((expected != recipe.order).any(1).nonzero()[0])
            findings.append(f"the order is not its rule's from step {step} on")
    if initial_seed is not None:
        drawn = initial_state_from_seed(task.model, initial_seed)
        other = [name for name in drawn if not torch.equal(drawn[name], recipe.initial_state[name])]
        if other:
            findings.append(f"the initial state is not drawn from seed {initial_seed}: {other[0]} differs")
    return findings


def _compare(replayed: Tensors, given: Mapping[str, Tensor], origin: Tensors) -> tuple[bool, float, str]:
    """Equal bits; the largest relative deviation; the tensor it is in.

    Scaled per tensor by how far training moved it, so that one altered bias is not lost beside a large matrix.
    """
    equal = all(torch.equal(replayed[name], tensor) for name, tensor in given.items())
    worst, deviation = next(iter(given)), 0.0
    for name, tensor in given.items():
        there = replayed[name]
        if not tensor.is_floating_point():
            off = 0.0 if torch.equal(there, tensor) else math.inf
        else:
            moved = float((there.double() - origin[name].double()).norm())
            apart = float((there.double() - tensor.double()).norm())
            off = 0.0 if apart == 0 else (apart / moved if moved else math.inf)
        if off > deviation:
            worst, deviation = name, off
    return equal, deviation, worst


def _has_moments(program: Program, tensors: Mapping[str, Tensor]) -> bool:
    return all(f"optimizer.{n}.{f}" in tensors for f in program.fields for n in program.initial(1).parameters)


def _state(program: Program, step: int, tensors: Mapping[str, Tensor]) -> State:
    blank = program.initial(1)
    return State(
        step,
        {n: tensors[f"model.{n}"][None].clone() for n in blank.parameters},
        {n: tensors[f"model.{n}"][None].clone() for n in blank.buffers},
        {
            f: {
                n: tensors[f"optimizer.{n}.{f}"][None].clone() if f"optimizer.{n}.{f}" in tensors else t
                for n, t in ts.items()
            }
            for f, ts in blank.moments.items()
        },
        blank.frozen,
    )


def _dtype(state: State) -> torch.dtype:
    return next(iter(state.parameters.values())).dtype


def _run(task: Task, n_step: int, *, runs: int) -> Tensors:
    program = Program(task)
    state = program.initial(runs)
    ones = torch.ones(runs, task.n_train, dtype=_dtype(state))
    with preserved_generator():
        for _ in range(n_step):
            state, _ = program.step(state, ones)
    return state.tensors()


class _DoubleRecords:
    def __init__(self, records: Records) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Tensor, /) -> Batch:
        return tuple(part.double() if part.is_floating_point() else part for part in self.records[index])


def _in_double(task: Task) -> Task:
    recipe = task.require_recipe()
    initial = {n: t.double() if t.is_floating_point() else t for n, t in recipe.initial_state.items()}
    return replace(
        task,
        model=lambda: task.model().double(),
        train=_DoubleRecords(task.train),
        queries=_DoubleRecords(task.queries),
        recipe=replace(recipe, initial_state=initial),
        checkpoints=(),
    )
