"""Does this recipe, on these records, from this initial state, give these weights?

The whole training is replayed and each checkpoint compared with the replay's state after the same number of steps. On one
build of torch and one thread count a replay is bit-equal. Elsewhere sums are rounded in another order, so a small drift

    drift = ‖claimed − replayed‖ / ‖replayed − initial‖        over all floating-point weights (and moments, over their norm)

is allowed, and how small is measured on the very task, not guessed: the drift between replays that differ in nothing but
the order of sums (`reordering`: a batched replay; initial weights off by a unit in the last place), and the drift that
leaving out one record makes (`left_out`: the least of several). The tolerance is 10 · reordering, and never more than
left_out / 10: where training is too chaotic to tell the two apart, only equal bits match.

Related work: Proof-of-Training-Data (Choi et al. 2023, arXiv:2307.00682); "Proof-of-Learning is currently more broken than you
think" (Fang et al. 2023, arXiv:2208.03567) on why a tolerance without a measurement behind it is worth nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.engine.architectures import load_state
from attribution.engine.errors import EngineError
from attribution.engine.task import Task, seed_of
from attribution.engine.training import Program, Progress, State, Tensors, environment, preserved_generator

REORDERING_FACTOR = 10.0
LEFT_OUT_FRACTION = 0.1
N_LEFT_OUT = 4


@dataclass(frozen=True)
class Difference:
    """One tensor of one checkpoint that is not the replay's to the bit."""

    step: int
    tensor: str
    n_different: int
    n_total: int
    largest: float  # absolute


@dataclass(frozen=True)
class Compared:
    """One checkpoint against the replay."""

    step: int
    is_bit_equal: bool
    weights_drift: float
    moments_drift: float


@dataclass(frozen=True)
class Tolerance:
    """The drift allowed, and the measurement behind it."""

    drift: float
    reordering: float  # the largest of the replays that differ in the order of sums
    left_out: float  # the least of `n_left_out` replays without one record


@dataclass(frozen=True)
class VerificationReport:
    """`matches` if every checkpoint is the replay's: to the bit, or within the measured tolerance."""

    matches: bool
    is_bit_equal: bool
    n_step: int
    checkpoints: list[Compared]
    differences: list[Difference]  # the first ten
    tolerance: Tolerance
    environment: dict[str, Any]
    task_digest: str
    summary: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null."""
        return json.loads(json.dumps(asdict(self), default=str), parse_constant=lambda _: None)


def verify(
    task: Task, *, checkpoints: Sequence[tuple[int, Path]] | None = None, progress: Progress | None = None
) -> VerificationReport:
    """Replay the recipe and compare it with the checkpoints, which are (completed steps, path to safetensors).

    Args:
        task: with a recipe; its own checkpoints are used where none are given.
        checkpoints: at least one; a file without `optimizer.` tensors is compared on the model alone.
        progress: told (steps done, steps in all), the tolerance's replays included.

    Raises:
        EngineError: a checkpoint that cannot be read or is of another shape, a step out of range, no checkpoint.
    """
    given = list(checkpoints if checkpoints is not None else [(step, Path(path)) for step, path in task.checkpoints])
    program = Program(task)
    n_step = program.recipe.n_step
    _check_steps(given, n_step)
    initial = program.initial(1).tensors()
    claims = [(step, _claim(path, initial, index)) for index, (step, path) in enumerate(given)]
    total = n_step * 4
    replayed = _replay(task, [step for step, _ in claims], progress, 0, total)

    compared, differences = [], []
    for step, claim in claims:
        truth = {name: tensor for name, tensor in replayed[step].items() if name in claim}
        found = [d for name in sorted(truth) if (d := _difference(step, name, claim[name], truth[name]))]
        differences += found
        weights, moments = drifts(claim, truth, initial)
        compared.append(Compared(step, not found, weights, moments))

    tolerance = measure_tolerance(task, final=replayed[n_step], initial=initial, progress=progress)
    is_bit_equal = not differences
    matches = is_bit_equal or all(
        c.is_bit_equal or max(c.weights_drift, c.moments_drift) <= tolerance.drift for c in compared
    )
    return VerificationReport(
        matches=matches,
        is_bit_equal=is_bit_equal,
        n_step=n_step,
        checkpoints=compared,
        differences=differences[:10],
        tolerance=tolerance,
        environment=environment(),
        task_digest=task.digest,
        summary=_summary(compared, differences, tolerance, matches=matches),
    )


def measure_tolerance(task: Task, *, final: Tensors, initial: Tensors, progress: Progress | None = None) -> Tolerance:
    """How far rounding alone takes this training, and how far one record does; see the module."""
    n_step = task.require_recipe().n_step
    total = n_step * 4
    reordered = [
        max(drifts(_batched(task, progress, n_step, total), final, initial)),
        max(drifts(_nudged(task, progress, 2 * n_step, total), final, initial)),
    ]
    used = torch.unique(task.require_recipe().order)
    used = used[used >= 0]
    chosen = used[torch.linspace(0, len(used) - 1, min(N_LEFT_OUT, len(used))).long()]
    # Without one record each, as one batch: its own rounding is far below what a record does.
    weights = torch.ones(len(chosen), task.n_train)
    weights[torch.arange(len(chosen)), chosen] = 0
    run = _run(task, weights, progress, 3 * n_step, total)
    without = [drifts(run.tensors(number), final, initial)[0] for number in range(len(chosen))]
    reordering, left_out = max(reordered), min(without)
    drift = min(REORDERING_FACTOR * reordering, LEFT_OUT_FRACTION * left_out)
    return Tolerance(drift=drift if math.isfinite(drift) else 0.0, reordering=reordering, left_out=left_out)


def drifts(
    claim: Mapping[str, Tensor], truth: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(drift of the model's weights, drift of the optimizer's moments); dimensionless, infinite where a number is not finite."""
    return _drift(claim, truth, initial, "model."), _drift(claim, truth, {}, "optimizer.")


def _drift(claim: Mapping[str, Tensor], truth: Mapping[str, Tensor], initial: Mapping[str, Tensor], part: str) -> float:
    off = moved = 0.0
    for name, tensor in truth.items():
        if not name.startswith(part) or name not in claim or not tensor.is_floating_point():
            continue
        start = initial[name].double() if name in initial else torch.zeros_like(tensor, dtype=torch.float64)
        off += (claim[name].double() - tensor.double()).square().sum().item()
        moved += (tensor.double() - start).square().sum().item()
    if not math.isfinite(off):
        return math.inf
    if off == 0:
        return 0.0
    return math.sqrt(off / moved) if moved else math.inf


def _check_steps(checkpoints: Sequence[tuple[int, Path]], n_step: int) -> None:
    if not checkpoints:
        raise EngineError("give at least one checkpoint to compare the replay with", pointer="/checkpoints")
    for index, (step, _) in enumerate(checkpoints):
        if not 0 <= step <= n_step:
            raise EngineError(f"{step} is not in 0..{n_step}", pointer=f"/checkpoints/{index}/step")


def _claim(path: Path, expected: Tensors, index: int) -> Tensors:
    """A checkpoint's tensors, with the optimizer's all there or all absent."""
    pointer = f"/checkpoints/{index}"
    found = load_state(Path(path), pointer=pointer)
    if not any(name.startswith("optimizer.") for name in found):
        expected = {name: tensor for name, tensor in expected.items() if name.startswith("model.")}
    return load_state(Path(path), expected=expected, pointer=pointer)


def _difference(step: int, name: str, claim: Tensor, truth: Tensor) -> Difference | None:
    same = claim == truth
    if claim.is_floating_point():
        same |= claim.isnan() & truth.isnan()
    if bool(same.all()):
        return None
    largest = (claim.double() - truth.double()).abs().nan_to_num(nan=math.inf).max().item()
    return Difference(step, name, int((~same).sum()), same.numel(), largest)


def _replay(task: Task, steps: Sequence[int], progress: Progress | None, before: int, total: int) -> dict[int, Tensors]:
    """The states after the given numbers of steps, and the last."""
    program = Program(task)
    weights = torch.ones(1, task.n_train)
    state, kept = program.initial(1), {}
    n_step = program.recipe.n_step
    with preserved_generator():
        for step in range(n_step + 1):
            if step in steps or step == n_step:
                kept[step] = state.tensors()
            if step < n_step:
                state, _ = program.step(state, weights)
                if progress:
                    progress(before + step + 1, total)
    return kept


def _run(task: Task, weights: Tensor, progress: Progress | None, before: int, total: int) -> State:
    """The last state of runs with the given weights, shape (R, n_train)."""
    program = Program(task)
    state = program.initial(len(weights))
    with preserved_generator():
        for step in range(program.recipe.n_step):
            state, _ = program.step(state, weights)
            if progress:
                progress(before + step + 1, total)
    return state


def _batched(task: Task, progress: Progress | None, before: int, total: int) -> Tensors:
    """The same training as one of three runs at once, whose products are summed in another order."""
    return _run(task, torch.ones(3, task.n_train), progress, before, total).tensors(1)


def _nudged(task: Task, progress: Progress | None, before: int, total: int) -> Tensors:
    """The same training from weights that are off by a unit in the last place, some of them, by a fixed seed."""
    recipe = task.require_recipe()
    generator = torch.Generator().manual_seed(seed_of("nudge", recipe.seed))
    nudged = {}
    for name, tensor in recipe.initial_state.items():
        if tensor.is_floating_point():
            sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
            tensor = torch.where(sign > 0, torch.nextafter(tensor, tensor + 1), tensor)
        nudged[name] = tensor
    moved = replace(task, recipe=replace(recipe, initial_state=nudged), checkpoints=[])
    return _run(moved, torch.ones(1, task.n_train), progress, before, total).tensors()


def _summary(
    compared: Sequence[Compared], differences: Sequence[Difference], tolerance: Tolerance, *, matches: bool
) -> str:
    n = len(compared)
    checkpoints = "the checkpoint is" if n == 1 else f"all {n} checkpoints are"
    if not differences:
        return f"Replayed, and {checkpoints} equal to the bit."
    worst = max(max(c.weights_drift, c.moments_drift) for c in compared)
    behind = (
        f"rounding alone moves this training by {tolerance.reordering:.1e} of the way it went, "
        f"leaving out one record by {tolerance.left_out:.1e} or more"
    )
    if matches:
        return f"Replayed, and {checkpoints} within {worst:.1e}, of {tolerance.drift:.1e} allowed: {behind}."
    first = differences[0]
    return (
        f"Replayed, and not reproduced: after step {first.step}, {first.tensor} differs in {first.n_different:,} of "
        f"{first.n_total:,} numbers by up to {first.largest:.1e}. The weights are {worst:.1e} of the way off, {tolerance.drift:.1e} "
        f"is allowed: {behind}."
    )
