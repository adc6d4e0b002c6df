"""A disclosed meter log: is it of this training, was it fixed while training ran, do its entries come out again, and what does it say?

    check_log       the whole log against the recipe: header, order, rates, which steps were measured; nothing is trained
    check_heads     the log against the heads that were posted meanwhile, and whether these were posted often enough
    meter_segment   a stretch between two states, trained again with the meter on: the entries that come out
    compare         those against the log's, within what rounding was measured to do there
    metered_shares  records' totals over the run, divided

An entry's influences are compared as one vector, ‖claimed − found‖ / ‖found‖. On one build and thread count it is 0. Elsewhere sums are
rounded in another order; how far that goes is measured on the stretch itself, by metering it once more from weights that are off by a
unit in the last place. Ten times that is allowed, but no more than a tenth: a stretch in which rounding alone moves influences by more is chaos.

`run_metered` is the loop that all of this speaks of: what a trainer runs, and what is run again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from attribution.engine.errors import EngineError, TrainingDiverged
from attribution.engine.files import written_whole
from attribution.engine.meter import EVERY, Meter, measured_steps
from attribution.engine.meter_log import Entry, Head, entries, gains_of, numbered_entries, read_header, verify_log
from attribution.engine.task import Recipe, Task, seed_of
from attribution.engine.training import Program, Progress, State, preserved_generator
from attribution.engine.unreplayed import RECORD, UnreplayedShares, divide, parts_of
from attribution.engine.verification import nudged

FACTOR = 10.0  # times what rounding does
MOST = 0.1  # of an entry's length, whatever rounding does
LEAST = 1e-5  # float32 sums in another order
MIN_HEADS = 8  # moments at which heads were posted, and so many parts of the log that no two of them are further apart
MIN_VISITS = 4.0  # measured times that a record was in a batch, on average, from which the record of the method holds
HELD = (0.5, 2.0)  # how far the measurement may have fallen, over what first order said
INTERVALS = "95 %, given these queries and this seed, measured steps redrawn"


@dataclass(frozen=True)
class Moment:
    """A head and when it was posted, in seconds of the poster's clock."""

    head: Head
    at: float


@dataclass(frozen=True)
class EntryCompared:
    """One measured step of a segment."""

    entry: int  # number in the log
    step: int
    distance: float  # ‖claimed − found‖ / ‖found‖, the measurement's relative error if that is larger


@dataclass(frozen=True)
class LogCompared:
    """A segment's entries against those that came out again."""

    n_measured: int
    tolerance: float
    worst: EntryCompared | None
    finding: str  # what is wrong, naming the entry; empty if nothing is

    @property
    def matches(self) -> bool:
        return not self.finding


def run_metered(
    task: Task,
    *,
    log: Path,
    every: int = EVERY,
    queries_per_step: int | None = None,
    seed: int = 0,
    start: State | None = None,
    last: int | None = None,
    heads: Path | str | Callable[[Head], None] | None = None,
    heads_every: int = 64,
    checkpoint_steps: Sequence[int] = (),
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[tuple[int, Path]]:
    """Train by the recipe in a plain loop of torch's own, the meter on; the weights have the bits of `train`.

    An empty slot is a row of weight 0 (record 0 stands there), as in the engine's replays, so that random masks fall on the same slots.

    Args:
        log: written; an existing one goes on.
        every, queries_per_step, seed: the meter's.
        start: where to begin; the recipe's initial state by default.
        last: the step to stop before; the recipe's end by default.
        checkpoint_steps: states are written after so many steps, optimizer included.

    Returns:
        (completed steps, path) of the checkpoints.
    """
    recipe, program = task.require_recipe(), Program(task)
    begin = start or program.initial(1)
    n_step = recipe.n_step if last is None else last
    model = task.model()
    _load(model, begin)
    optimizer, rates = _optimizer(recipe, model, begin)
    written = []
    with (
        preserved_generator(),
        Meter(
            model,
            optimizer,
            measurement=task.measurement,
            queries=task.queries,
            n_train=task.n_train,
            log=log,
            every=every,
            queries_per_step=queries_per_step,
            seed=seed,
            first_step=begin.step,
            heads=heads,
            heads_every=heads_every,
        ) as meter,
    ):
        for step in range(begin.step, n_step):
            index = recipe.order[step]
            shown, weight = index.clamp_min(0), (index >= 0).float()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate[step]
            model.train()
            torch.manual_seed(seed_of(recipe.seed, step))
            with meter.batch(shown):
                losses = task.loss(model, task.train[shown])
                divisor = weight.sum().clamp_min(1) if recipe.normalizer == "weight" else len(index)
                objective = (weight.to(losses) * losses).sum() / divisor
                if not bool(torch.isfinite(objective.detach())):
                    raise TrainingDiverged(f"the loss of step {step} is not finite", step=step)
                objective.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in checkpoint_steps:
                assert checkpoint_dir is not None, "checkpoints need a folder"
                meter.flush()
                path = checkpoint_dir / f"step-{step + 1:07d}.safetensors"
                with written_whole(path) as partial:
                    save_file(_tensors(program, model, optimizer), partial)
                written.append((step + 1, path))
            if progress:
                progress(step + 1 - begin.step, n_step - begin.step)
    return written


def expected_header(task: Task, given: Mapping[str, Any], *, n_train: int) -> dict[str, Any]:
    """The header that a log of this training has: the trainer chose `every`, `queries_per_step` and `seed`, the rest follows.

    Raises:
        EngineError: one of the three is out of range, or the model or the optimizer cannot be metered.
    """
    for name in ("every", "queries_per_step", "seed"):
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or (name != "seed" and value < 1):
            raise EngineError(f"the log's header has {name} {value!r}", pointer=f"/header/{name}")
    program = Program(task)
    model = task.model()
    start = program.initial(1)
    _load(model, start)
    optimizer, _ = _optimizer(task.require_recipe(), model, start)
    with TemporaryDirectory(prefix="meter-") as folder:
        path = Path(folder) / "expected.meter"
        Meter(
            model,
            optimizer,
            measurement=task.measurement,
            queries=task.queries,
            n_train=n_train,
            log=path,
            every=given["every"],
            queries_per_step=given["queries_per_step"],
            seed=given["seed"],
        ).close()
        return read_header(path)


def check_log(
    path: Path, *, header: Mapping[str, Any], order: Tensor, rates: Sequence[float], max_entries: int
) -> None:
    """Whether a log tells of this very training, from its first step to its last; reads it once, trains nothing.

    Args:
        header: see `expected_header`.
        order: (n_step, batch) as disclosed; the entries' records are its rows, empty slots left out or shown as record 0.
        rates: the first parameter group's learning rate at each step.

    Raises:
        EngineError: the pointer names the entry: /log/NUMBER, 0 is the header.
    """
    report = verify_log(path)
    if report.bad_entry is not None:
        raise EngineError(f"entry {report.bad_entry} {report.reason}", pointer=f"/log/{report.bad_entry}")
    for name in sorted({*report.header, *header}):
        if report.header.get(name) != header.get(name):
            raise EngineError(
                f"the header says {name} {report.header.get(name)!r}; this training's meter has {header.get(name)!r}",
                pointer=f"/log/0/{name}",
            )
    if not report.is_closed:
        raise EngineError("is not closed; close the meter when training ends", pointer=f"/log/{report.n_entry}")
    if report.n_entry > max_entries:
        raise EngineError(f"has {report.n_entry:,} entries; at most {max_entries:,} are read", pointer="/log")
    n_step, step = len(order), 0
    plain = header["optimizer"]["name"] == "sgd" and not header["optimizer"]["momentum"]
    drawn = measured_steps(header["every"], header["seed"])
    measured, probability, end = next(drawn)
    for number, entry in numbered_entries(path):
        pointer = f"/log/{number}"
        if entry.step != step or step >= n_step:
            raise EngineError(f"is of step {entry.step}; step {step} of {n_step} is due", pointer=pointer)
        while step >= end:
            measured, probability, end = next(drawn)
        row = order[step].numpy()
        if not (np.array_equal(entry.records, row[row >= 0]) or np.array_equal(entry.records, row.clip(0))):
            raise EngineError(
                f"is of records {_few(entry.records)}; the disclosed order has {_few(row[row >= 0])} in step {step}",
                pointer=pointer,
            )
        is_measured = entry.influence is not None
        if is_measured != (step == measured) or entry.probability != probability:
            raise EngineError(
                f"step {step} is {'measured' if is_measured else 'not measured'} with probability {entry.probability:g}; by the "
                f"header's every and seed step {measured} is, with {probability:g}",
                pointer=pointer,
            )
        if entry.learning_rate != rates[step] or (not plain and entry.update != step + 1):
            raise EngineError(
                f"has learning rate {entry.learning_rate:g} and update {entry.update}; the recipe has {rates[step]:g} and {step + 1}",
                pointer=pointer,
            )
        if entry.influence is not None and not (
            np.isfinite(entry.influence).all() and math.isfinite(entry.measurement) and math.isfinite(entry.carried)
        ):
            raise EngineError("holds a number that is not finite", pointer=pointer)
        step += 1
    if step != n_step:
        raise EngineError(f"ends after {step} steps; the recipe has {n_step}", pointer=f"/log/{report.n_entry - 1}")


def check_heads(path: Path, posted: Sequence[Moment], *, handed_in_at: float) -> None:
    """Whether the log was fixed piece by piece while it grew.

    Of heads that were posted at one moment only the last one counts. No more than a MIN_HEADS-th of the log may lie between
    two moments, and the last head must have been posted before the log was handed in.

    Raises:
        EngineError: names the entry.
    """
    if not posted:
        raise EngineError("no head was posted while training ran", pointer="/heads")
    report = verify_log(path, heads=[moment.head for moment in posted])
    if report.bad_entry is not None:
        raise EngineError(f"entry {report.bad_entry} {report.reason}", pointer=f"/log/{report.bad_entry}")
    end = report.n_entry - 1
    last = max(posted, key=lambda moment: moment.head.entry)
    if last.head.entry != end:
        raise EngineError(
            f"the head of the last entry, {end}, was not posted; the last one is of entry {last.head.entry}",
            pointer=f"/log/{end}",
        )
    at: dict[float, int] = {}
    for moment in posted:
        at[moment.at] = max(at.get(moment.at, -1), moment.head.entry)
    in_time = [entry for when, entry in sorted(at.items()) if when <= handed_in_at]
    if not in_time or in_time[-1] != end:
        raise EngineError(
            f"the head of entry {end} was posted after the log was handed in: heads are posted while training runs",
            pointer=f"/log/{end}",
        )
    most, before = math.ceil(report.n_entry / MIN_HEADS), -1
    for entry in sorted(in_time):
        if entry - before > most:
            raise EngineError(
                f"no head was posted between entries {max(before, 0)} and {entry} of {end}; at most {most} entries may lie between "
                f"two moments of posting (heads_every={max(1, most // 2)} would do), heads sent at one moment counting as one",
                pointer=f"/log/{entry}",
            )
        before = entry


def meter_segment(
    task: Task, start: State, last: int, *, header: Mapping[str, Any], progress: Progress | None = None
) -> dict[int, Entry]:
    """Train from a state to the step before `last` with the meter on: what it measures, by step.

    Raises:
        TrainingDiverged: the loss is not finite on the way.
    """
    with TemporaryDirectory(prefix="meter-") as folder:
        path = Path(folder) / "segment.meter"
        run_metered(
            task,
            log=path,
            every=header["every"],
            queries_per_step=header["queries_per_step"],
            seed=header["seed"],
            start=start,
            last=last,
            progress=progress,
        )
        return {entry.step: entry for entry in entries(path) if entry.influence is not None}


def compare_segment(task: Task, start: State, last: int, log: Path, *, progress: Progress | None = None) -> LogCompared:
    """Meter a segment again, and once more from weights off by rounding, and hold the log's entries against it."""
    header = read_header(log)
    tell = _halves(progress)
    found = meter_segment(task, start, last, header=header, progress=tell[0])
    again = meter_segment(task, nudged(start, task.require_recipe().seed), last, header=header, progress=tell[1])
    used = (task.require_recipe().order >= 0).numpy()
    rounding = max((_distance(again[step], entry, used[step]) for step, entry in found.items()), default=0.0)
    tolerance = min(MOST, max(LEAST, FACTOR * rounding))
    worst: EntryCompared | None = None
    claimed = {}
    for number, entry in numbered_entries(log):
        if start.step <= entry.step < last and entry.influence is not None:
            claimed[entry.step] = (number, entry)
    for step in sorted({*found, *claimed}):
        if step not in found or step not in claimed:
            where = f"entry {claimed[step][0]}" if step in claimed else f"step {step}"
            return LogCompared(
                len(found), tolerance, worst, f"{where} is {'not ' * (step in claimed)}due to be measured"
            )
        number, entry = claimed[step]
        compared = EntryCompared(number, step, _distance(entry, found[step], used[step]))
        if worst is None or not compared.distance <= worst.distance:
            worst = compared
    finding = ""
    if worst is not None and not worst.distance <= tolerance:
        finding = (
            f"entry {worst.entry}, of step {worst.step}, does not come out again: its influences are {worst.distance:.1e} of their length off, "
            f"{tolerance:.1e} is allowed"
        )
    return LogCompared(len(found), tolerance, worst, finding)


def metered_shares(task: Task, log: Path, *, seed: int = 0) -> UnreplayedShares:
    """Divide by what the log says, which must have been checked.

    The parts that are redrawn are measured steps, dealt in turn, so that neighbours fall into different parts (random groups;
    Wolter 2007, ch. 2). The queries are not redrawn: the log holds their mean.

    First order holds for small steps only. Whether it did, the log itself shows: by how much the measurement fell, over what the
    measured steps said it would, `Σ (Σ_i influence_i + carried) / probability`. Out of HELD, values are worth nothing for sure.
    """
    n_measured = sum(entry.influence is not None for entry in entries(log))
    parts = np.zeros((task.n_train, max(1, parts_of(n_measured))))
    gain, visits, said = gains_of(log), 0, 0.0
    seen: list[float] = []  # the measurement before each measured step
    for entry, factor in zip(entries(log), gain, strict=True):
        if entry.influence is None:
            continue
        weight = factor / entry.probability
        np.add.at(parts[:, len(seen) % parts.shape[1]], entry.records, entry.influence.astype(np.float64) * weight)
        seen.append(entry.measurement)
        visits += len(entry.records)
        said += (float(entry.influence.sum(dtype=np.float64)) + entry.carried) / entry.probability
    per_record = visits / task.n_train
    held = (seen[0] - seen[-1]) / said if said else 0.0
    why = ""
    if per_record < MIN_VISITS:
        why = f"a record was measured {per_record:.1f} times on average, and {MIN_VISITS:g} are needed: measure more steps"
    elif not HELD[0] <= held <= HELD[1]:
        why = (
            f"the steps were too large for what a meter measures: the measurement fell by {held:.2f} of what they said, and "
            f"{HELD[0]:g} to {HELD[1]:g} is needed"
        )
    return divide(
        task,
        parts,
        record=0.0 if why else RECORD["metered"],
        why_no_record=why,
        seed=seed,
        intervals=INTERVALS,
        details={
            "method": "meter",
            "measured_steps": len(seen),
            "steps": len(gain),
            "measured_visits": per_record,
            "held": held,
        },
    )


def _optimizer(recipe: Recipe, model: nn.Module, state: State) -> tuple[torch.optim.Optimizer, list[list[float]]]:
    """torch's optimizer as the recipe has it, its moments as the state has them; and each group's rate at every step."""
    groups: list[tuple[dict[str, Any], list[float], list[nn.Parameter]]] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        options, rates = recipe.options_for(name)
        known = next((g for g in groups if g[0] == options and g[1] == rates), None)
        if known is None:
            groups.append((options, rates, [p]))
        else:
            known[2].append(p)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    given = [{"params": ps, "lr": rates[0], **options} for options, rates, ps in groups]
    optimizer: torch.optim.Optimizer = kinds[recipe.optimizer](given, lr=given[0]["lr"])
    if state.step:
        for name, p in model.named_parameters():
            if not p.requires_grad or not state.moments:
                continue
            kept: dict[str, Any] = {field: t[name][0].clone() for field, t in state.moments.items()}
            if recipe.optimizer != "sgd":
                kept["step"] = torch.tensor(float(state.step))
            optimizer.state[p] = kept
    return optimizer, [rates for _, rates, _ in groups]


def first_rates(recipe: Recipe, model: nn.Module) -> list[float]:
    """The learning rate that a log states for each step: that of the first trained parameter's group."""
    name = next(name for name, p in model.named_parameters() if p.requires_grad)
    return recipe.options_for(name)[1]


def _load(model: nn.Module, state: State) -> None:
    found = {name.removeprefix("model."): t for name, t in state.tensors().items() if name.startswith("model.")}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(found[name])


def _tensors(program: Program, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """As `State.tensors` has them."""
    found = {f"model.{name}": t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, p in model.named_parameters():
        for field in program.fields if p.requires_grad else ():
            kept = optimizer.state.get(p, {}).get(field)
            found[f"optimizer.{name}.{field}"] = torch.zeros_like(p) if kept is None else kept.detach().clone()
    return {name: t.contiguous() for name, t in found.items()}


def _distance(claimed: Entry, found: Entry, used: NDArray[np.bool_]) -> float:
    """Of the claim's influences from those found, relative to their length; `used`: the slots that are not empty."""
    assert claimed.influence is not None and found.influence is not None
    there = found.influence.astype(np.float64)
    if len(claimed.influence) != len(there):
        there = there[used]
    if len(claimed.influence) != len(there):
        return math.inf
    off, length = float(np.linalg.norm(claimed.influence - there)), float(np.linalg.norm(there))
    scale = abs(found.measurement)
    distances = [
        off / length if length else (0.0 if not off else math.inf),
        abs(claimed.measurement - found.measurement) / scale if scale else abs(claimed.measurement),
    ]
    return max(d if math.isfinite(d) else math.inf for d in distances)


def _few(records: Any) -> str:
    listed = ", ".join(str(int(record)) for record in records[:6])
    return f"{listed}{', …' if len(records) > 6 else ''}"


def _halves(progress: Progress | None) -> list[Progress | None]:
    if progress is None:
        return [None, None]
    return [lambda done, total: progress(done, 2 * total), lambda done, total: progress(total + done, 2 * total)]
