"""Does this recipe, on these records, from this initial state, give these weights?

The training is replayed, whole or in segments between checkpoints, and each checkpoint compared with the replay's state
after the same number of steps. On one build of torch and one thread count a replay is bit-equal. Elsewhere sums are rounded
in another order, so a small drift

    drift = ‖claimed − replayed‖ / ‖replayed − start‖        over all floating-point weights (and moments, over their norm)

is allowed in these, while integers and booleans are not rounded: any difference there is a mismatch. How small is measured on
the very stretch of training, not guessed: the drift between replays that differ in nothing but the order of sums (`reordering`:
a batched replay; weights at the start off by a unit in the last place), and the drift that leaving out one record makes
(`left_out`: the least of four records, evenly spaced among those of the stretch, and so no bound for the others). The tolerance
is 10 · reordering, and never more than left_out / 10: where training is too chaotic to tell the two apart, only equal bits match.

Segments. Checkpoints with optimizer state cut the training into m segments, each of which must lead from its own start to
its own end: the first starts at the recipe's initial state, the last ends at the disclosed weights. k of them are drawn by the
verifier's seed and a digest of the checkpoints, so after these are fixed. If c segments are false, none of them is drawn with

    P(miss) = C(m − c, k) / C(m, k)        (hypergeometric)

What a trainer may hide inside the tolerance adds up over the segments to Σ tolerance · ‖end − start‖. Segments that were not drawn
are counted with the widest tolerance that was measured on the drawn ones, which is a guess where they differ. Each tolerance is at
most a tenth of what the least of four sampled records does in its segment. A record that was not sampled and does less than the
tolerance can be left out unseen there, so the sum bounds no single record's effect.

Related work: Proof-of-Training-Data (Choi et al. 2023, arXiv:2307.00682) on seeds fixed in advance; "Proof-of-Learning is
currently more broken than you think" (Fang et al. 2023, arXiv:2208.03567) on what a tolerance that nobody measured lets
through; forging (Thudi et al. 2022, arXiv:2110.11891) on other batches with the same gradient, which an order by a public seed
rules out; rounding logs (Srivastava et al. 2024, arXiv:2403.09603), which would make bits equal across hardware and are not here.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.engine.architectures import load_state
from attribution.engine.errors import EngineError, TrainingDiverged
from attribution.engine.task import Recipe, Task, epoch_order, initial_state_from_seed, seed_of, without_copies
from attribution.engine.training import Program, Progress, State, Tensors, environment, preserved_generator

REORDERING_FACTOR = 10.0
LEFT_OUT_FRACTION = 0.1
N_LEFT_OUT = 4
INITIAL_ROUNDING = 1e-6  # of a tensor's largest number: what another build may make of the same random bits
RUNS_PER_TOLERANCE = 3  # stretches replayed to measure one tolerance: batched, nudged, with records left out


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

    @property
    def worst(self) -> float:
        return max(self.weights_drift, self.moments_drift)


@dataclass(frozen=True)
class Tolerance:
    """The drift allowed over one stretch of training, and the measurement behind it."""

    drift: float
    reordering: float  # the largest of the replays that differ in the order of sums
    left_out: float  # the least of four replays, each without one of four sampled records; others may do less


@dataclass(frozen=True)
class Segment:
    """One drawn segment: from the checkpoint after `first` steps to the one after `last`."""

    first: int
    last: int
    matches: bool
    end: Compared
    tolerance: Tolerance | None  # None: equal to the bit, and not the one that was measured anyway; or cut short
    finding: str = ""  # what cut the replay short, if anything did; then nothing was compared


@dataclass(frozen=True)
class Miss:
    """A cheat in `false_segments` of all segments: none of them is drawn with this probability."""

    false_segments: int
    more_than_steps: int  # a false stretch longer than this touches so many segments, wherever it lies
    probability: float


@dataclass(frozen=True)
class Draw:
    """Which segments were replayed, why these, and what that leaves unseen."""

    seed: int  # the verifier's
    commitment: str  # SHA-256 over the task's digest and every checkpoint, which the draw depends on
    n_segment: int
    segments: list[Segment]
    miss: list[Miss]
    rarest_record: int  # the used record that is in the fewest segments,
    record_segments: int  # in so many,
    record_probability: float  # and the probability that none of them is drawn
    hidden_drift: float  # the widest measured tolerance, in every segment, as a fraction of ‖final − initial‖
    hidden_of_left_out: float  # a tolerance at most, as a fraction of what the least of four sampled records moves


@dataclass(frozen=True)
class Origin:
    """Whether a public seed gives the recipe's order and initial state; None where no seed is stated."""

    order: bool | None
    initial_state: bool | None
    finding: str = ""  # what contradicts a stated seed, and where
    rule: str = ""  # that gives the order: "epoch_order", or "without_copies" of it; empty where none does


@dataclass(frozen=True)
class VerificationReport:
    """`matches` if every compared checkpoint is the replay's, to the bit or within the measured tolerance, and no seed is contradicted."""

    matches: bool
    is_bit_equal: bool
    n_step: int
    checkpoints: list[Compared]
    differences: list[Difference]  # the first ten
    tolerance: Tolerance  # the widest, where several were measured
    environment: dict[str, Any]
    task_digest: str
    origin: Origin
    draw: Draw | None  # None: the whole training was replayed
    caveats: list[str]
    summary: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null."""
        return json.loads(json.dumps(asdict(self), default=str), parse_constant=lambda _: None)


def verify(
    task: Task,
    *,
    checkpoints: Sequence[tuple[int, Path]] | None = None,
    segments: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Replay the recipe and compare it with the checkpoints, which are (completed steps, path to safetensors).

    Args:
        task: with a recipe; its own checkpoints are used where none are given.
        checkpoints: at least one; a file without `optimizer.` tensors is compared on the model alone.
        segments: how many segments to replay instead of everything, at least 1; all of them where there are fewer.
        seed: of the draw of segments, chosen by whoever verifies once the checkpoints are fixed.
        progress: told (steps done, steps in all), the tolerance's replays included.

    Raises:
        EngineError: a checkpoint that cannot be read or is of another shape, a step out of range, no checkpoint; with
            `segments`, a checkpoint that no segment can start from, or none of the last step.
    """
    given = list(checkpoints if checkpoints is not None else [(step, Path(path)) for step, path in task.checkpoints])
    program = Program(task)
    _check_steps(given, program.recipe.n_step)
    initial = program.initial(1).tensors()
    for index, (_, path) in enumerate(given):
        _claim(path, initial, index)  # what cannot be read is found before the first step
    origin = _origin(task)
    if segments is None:
        return _verify_whole(program, given, initial, origin, progress)
    if segments < 1:
        raise EngineError(f"{segments}: replay at least one segment", pointer="/segments")
    if seed is None:
        raise EngineError("choose one now that the checkpoints are fixed: it decides the draw", pointer="/seed")
    return _verify_segments(program, given, initial, origin, segments, seed, progress)


def measure_tolerance(program: Program, start: State, truth: Tensors, tell: "Tell") -> Tolerance:
    """How far rounding alone takes the training from `start` to `truth`, and how far one record does; see the module.

    Args:
        start: one run's state.
        truth: the replayed tensors at the end of the stretch.
    """
    try:
        return _measured_tolerance(program, start, truth, tell)
    except TrainingDiverged:  # one rounding more, or one record less, and this training explodes: only equal bits match
        return Tolerance(drift=0.0, reordering=math.inf, left_out=math.inf)


def _measured_tolerance(program: Program, start: State, truth: Tensors, tell: "Tell") -> Tolerance:
    begin, last = start.tensors(), start.step + tell.length
    ones = torch.ones(1, program.task.n_train)
    # As one of three runs at once, products are summed in another order.
    batched = _run(program, start.stacked(3), ones.expand(3, -1), last, tell).tensors(1)
    rounded = _run(program, nudged(start, program.recipe.seed), ones, last, tell).tensors()
    used = torch.unique(program.recipe.order[start.step : last])
    used = used[used >= 0]
    if not len(used):
        return Tolerance(0.0, 0.0, 0.0)
    chosen = used[torch.linspace(0, len(used) - 1, min(N_LEFT_OUT, len(used))).long()]
    # Without one record each, as one batch: its own rounding is far below what a record does.
    weights = torch.ones(len(chosen), program.task.n_train)
    weights[torch.arange(len(chosen)), chosen] = 0
    run = _run(program, start.stacked(len(chosen)), weights, last, tell)
    reordering = max(max(drifts(batched, truth, begin)), max(drifts(rounded, truth, begin)))
    left_out = min(drifts(run.tensors(number), truth, begin)[0] for number in range(len(chosen)))
    drift = min(REORDERING_FACTOR * reordering, LEFT_OUT_FRACTION * left_out)
    return Tolerance(drift=drift if math.isfinite(drift) else 0.0, reordering=reordering, left_out=left_out)


def drifts(
    claim: Mapping[str, Tensor], truth: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(drift of the model's weights, drift of the optimizer's moments); dimensionless, infinite where a number is not finite.

    Of floating-point tensors alone; what is not rounded must be equal (`_compare`) and measures no tolerance.
    """
    return _drift(claim, truth, start, "model."), _drift(claim, truth, {}, "optimizer.")


def miss_probability(n_segment: int, false_segments: int, drawn: int) -> float:
    """P(no false segment is drawn), for `drawn` of `n_segment` without replacement: C(m − c, k) / C(m, k)."""
    return float(Fraction(math.comb(n_segment - false_segments, drawn), math.comb(n_segment, drawn)))


def draw_segments(n_segment: int, drawn: int, seed: int, commitment: str) -> list[int]:
    """The numbers of the drawn segments, ascending: a uniform sample that is fixed by the seed and the checkpoints."""
    generator = torch.Generator().manual_seed(seed_of("segments", seed, commitment))
    return sorted(torch.randperm(n_segment, generator=generator)[:drawn].tolist())


class Tell:
    """Tells one bar of all replays, each `length` steps long in the stretch at hand."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.length = 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._total), self._total)


def _verify_whole(
    program: Program, given: list[tuple[int, Path]], initial: Tensors, origin: Origin, progress: Progress | None
) -> VerificationReport:
    n_step = program.recipe.n_step
    tell = Tell(progress, n_step * (1 + RUNS_PER_TOLERANCE))
    tell.length = n_step
    start = program.initial(1)
    state, found = start, {}
    differences: list[Difference] = []
    for step in sorted({*(step for step, _ in given), n_step}):
        state = _run(program, state, torch.ones(1, program.task.n_train), step, tell)
        truth = state.tensors()
        for index, (claimed, path) in enumerate(given):
            if claimed == step:
                found[index], more = _compare(step, _claim(path, initial, index), truth, initial)
                differences += more
    compared = [found[index] for index in range(len(given))]
    tolerance = measure_tolerance(program, start, truth, tell)
    false = {c.step for c in compared if not (c.is_bit_equal or c.worst <= tolerance.drift)}
    differences.sort(key=lambda d: d.step not in false)  # those behind the verdict are named first
    matches = origin.finding == "" and not false
    return _report(program, compared, differences, tolerance, origin, None, matches=matches, replayed="Replayed")


def _verify_segments(
    program: Program,
    given: list[tuple[int, Path]],
    initial: Tensors,
    origin: Origin,
    wanted: int,
    seed: int,
    progress: Progress | None,
) -> VerificationReport:
    chain = _chain(program, given, initial)
    commitment = _commitment(program.task, given)
    cuts = list(pairwise(sorted(chain)))
    drawn = draw_segments(len(cuts), min(wanted, len(cuts)), seed, commitment)
    lengths = [last - first for first, last in cuts]
    tell = Tell(progress, sum(lengths[number] for number in drawn) * (1 + RUNS_PER_TOLERANCE))

    differences = _outside_the_draw(program, given, initial)
    within: list[Difference] = []  # the tolerance; what is behind the verdict is named first
    segments: list[Segment] = []
    tolerances: list[Tolerance] = []
    is_honest = not differences and origin.finding == ""
    for number in drawn:
        first, last = cuts[number]
        # One tolerance is measured whatever happens: it says what could hide.
        segment, more = _replayed(program, chain, initial, first, last, tell, always_measured=not tolerances)
        if segment.tolerance is not None:
            tolerances.append(segment.tolerance)
        (within if segment.matches else differences).extend(more)
        segments.append(segment)

    widest = max(tolerances, key=lambda t: t.drift, default=Tolerance(0.0, 0.0, 0.0))
    moved = [_distance(chain[first].load(initial), chain[last].load(initial)) for first, last in cuts]
    whole = _distance(initial, chain[program.recipe.n_step].load(initial))
    record, appearances = _rarest_record(program.recipe, cuts)
    draw = Draw(
        seed=seed,
        commitment=commitment,
        n_segment=len(cuts),
        segments=segments,
        miss=_misses(lengths, len(drawn)),
        rarest_record=record,
        record_segments=appearances,
        record_probability=miss_probability(len(cuts), appearances, len(drawn)),
        hidden_drift=widest.drift * sum(moved) / whole if whole and widest.drift else 0.0,
        hidden_of_left_out=max((t.drift / t.left_out for t in tolerances if t.left_out), default=0.0),
    )
    n_replayed = sum(lengths[number] for number in drawn)
    replayed = (
        f"Replayed {len(drawn)} of {len(cuts)} segments ({n_replayed:,} of {program.recipe.n_step:,} steps), drawn by "
        f"seed {seed} for the checkpoints {commitment[:12]}"
    )
    return _report(
        program,
        [segment.end for segment in segments],
        differences + within,
        widest,
        origin,
        draw,
        matches=is_honest and all(segment.matches for segment in segments),
        replayed=replayed,
    )


def _replayed(
    program: Program,
    chain: Mapping[int, "_Link"],
    initial: Tensors,
    first: int,
    last: int,
    tell: Tell,
    *,
    always_measured: bool,
) -> tuple[Segment, list[Difference]]:
    """Replay one segment and compare its end."""
    tell.length = last - first
    begin, end = chain[first].load(initial), chain[last].load(initial)
    start = program.restored(first, begin)
    try:
        truth = _run(program, start, torch.ones(1, program.task.n_train), last, tell).tensors()
    except (TrainingDiverged, IndexError) as error:  # no honest training has gone on from there
        if not first and isinstance(error, IndexError):
            raise  # the model's own, whatever was disclosed
        cut = Compared(last, False, math.inf, math.inf)
        return Segment(first, last, False, cut, None, _cut_short(first, begin, error)), []
    compared, differences = _compare(last, end, truth, begin)
    tolerance = None
    if not compared.is_bit_equal or always_measured:
        tolerance = measure_tolerance(program, start, truth, tell)
    matches = compared.is_bit_equal or (tolerance is not None and compared.worst <= tolerance.drift)
    return Segment(first, last, matches, compared, tolerance), differences


def segment_cuts(n_step: int, checkpoints: Iterable[int]) -> list[tuple[int, int]]:
    """The segments that checkpoints cut a training into, as (first, last) completed steps."""
    return list(pairwise(sorted({0, n_step, *checkpoints})))


def commitment_of(task: Task, checkpoints: Sequence[tuple[int, Path]]) -> str:
    """SHA-256 over the task's digest and every checkpoint: what a draw of segments depends on, beside its seed."""
    return _commitment(task, list(checkpoints))


def verify_segment(
    task: Task,
    *,
    checkpoints: Sequence[tuple[int, Path]],
    first: int,
    last: int,
    progress: Progress | None = None,
) -> tuple[Segment, list[Difference], State]:
    """Replay one segment by itself, as `verify(segments=…)` does each that it draws.

    Returns:
        What came out, the first differences (none that is allowed), and the state that the segment starts from.

    Raises:
        EngineError: see `verify`; or there is no such segment.
    """
    given, program = list(checkpoints), Program(task)
    _check_steps(given, program.recipe.n_step)
    initial = program.initial(1).tensors()
    chain = _chain(program, given, initial)
    if (first, last) not in segment_cuts(program.recipe.n_step, chain):
        raise EngineError(f"no segment goes from step {first} to {last}", pointer="/segments")
    tell = Tell(progress, (last - first) * (1 + RUNS_PER_TOLERANCE))
    segment, differences = _replayed(program, chain, initial, first, last, tell, always_measured=True)
    outside = _outside_the_draw(program, given, initial)
    if outside:
        segment = replace(segment, matches=False)
    return segment, [*outside, *differences][:10], program.restored(first, chain[first].load(initial))


def segments_needed(n_segment: int, *, part: float, chance: float) -> int:
    """The fewest segments to draw for a cheat in `part` of them to be missed with probability `chance` at most."""
    false = max(1, math.ceil(part * n_segment))
    drawn = range(1, n_segment + 1)
    return next((k for k in drawn if miss_probability(n_segment, false, k) <= chance), n_segment)


def _cut_short(first: int, begin: Tensors, error: TrainingDiverged | IndexError) -> str:
    """Why a segment's replay was cut short, and which of its first numbers may be the cause."""
    off = {
        name: int((~torch.isfinite(t)).sum())
        for name, t in sorted(begin.items())
        if t.is_floating_point() and not bool(torch.isfinite(t).all())
    }
    where = f"the checkpoint after step {first}" if first else "the initial state"
    cause = next(
        (f": {name} has {n:,} of {begin[name].numel():,} numbers that are not finite" for name, n in off.items()), ""
    )
    if isinstance(error, IndexError):  # an integer was altered that the model uses as an index
        return f"the replay from {where} breaks off: {error}"
    return f"the replay from {where} diverges at step {error.step}{cause}"


@dataclass(frozen=True)
class _Link:
    """One end of a segment: a checkpoint, or the recipe's initial state where there is none of step 0."""

    index: int
    path: Path | None

    def load(self, initial: Tensors) -> Tensors:
        return initial if self.path is None else _claim(self.path, initial, self.index)


def _chain(program: Program, given: list[tuple[int, Path]], initial: Tensors) -> dict[int, _Link]:
    """Completed steps -> the state there, from the initial state to the disclosed weights."""
    n_step, needed = program.recipe.n_step, [name for name in initial if name.startswith("optimizer.")]
    chain = {0: _Link(-1, None)}
    for index, (step, path) in enumerate(given):
        if step in chain and step:
            raise EngineError(
                f"there are two checkpoints of step {step}; a chain has one", pointer=f"/checkpoints/{index}"
            )
        if step:
            chain[step] = _Link(index, path)
        if (
            0 < step < n_step
            and needed
            and not any(name.startswith("optimizer.") for name in _claim(path, initial, index))
        ):
            raise EngineError(
                f"holds no optimizer state, and {program.recipe.optimizer} has {', '.join(program.fields)} here: no segment "
                "can start from it. Save `optimizer.NAME.FIELD` too (the engine's `train --checkpoint` does), leave this "
                "checkpoint out, or verify without segments",
                pointer=f"/checkpoints/{index}",
            )
    if n_step not in chain:
        raise EngineError(
            f"the chain ends after {max(chain)} of {n_step} steps; add the disclosed weights, ({n_step}, path)",
            pointer="/checkpoints",
        )
    return chain


def _outside_the_draw(program: Program, given: list[tuple[int, Path]], initial: Tensors) -> list[Difference]:
    """What costs no replay and so is checked in every checkpoint: the initial state, and what training never changes."""
    frozen = {f"model.{name}" for name in program.initial(1).frozen}
    found = []
    for index, (step, path) in enumerate(given):
        claim = _claim(path, initial, index)
        fixed = [name for name in sorted(claim) if step == 0 or name in frozen]
        found += [d for name in fixed if (d := _difference(step, name, claim[name], initial[name]))]
    return found


def _commitment(task: Task, given: list[tuple[int, Path]]) -> str:
    digest = hashlib.sha256(task.digest.encode())
    for step, path in sorted(given):
        with Path(path).open("rb") as file:
            digest.update(f":{step}:{hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def _misses(lengths: Sequence[int], drawn: int) -> list[Miss]:
    """The probability of missing cheats of a few sizes, from one false segment to half of them."""
    m = len(lengths)
    sizes = sorted({min(m, size) for size in (1, 2, 3, 5, *(math.ceil(m * part) for part in (0.1, 0.25, 0.5)))})
    longest = sorted(lengths, reverse=True)
    return [Miss(c, sum(longest[: c - 1]), miss_probability(m, c, drawn)) for c in sizes]


def _rarest_record(recipe: Recipe, cuts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The used record that is in the fewest segments, and in how many."""
    within = torch.zeros(int(recipe.order.max()) + 1, dtype=torch.int64)
    for first, last in cuts:
        used = torch.unique(recipe.order[first:last])
        within[used[used >= 0]] += 1
    if not bool(within.any()):
        return -1, 0
    rarest = int(torch.where(within > 0, within, len(cuts) + 1).argmin())
    return rarest, int(within[rarest])


def _origin(task: Task) -> Origin:
    """Recompute what a stated public seed must give; of an order, by either of two rules."""
    recipe = task.require_recipe()
    order = initial = None
    finding = rule = ""
    if recipe.order_seed is not None:
        epochs = math.ceil(recipe.n_step / math.ceil(task.n_train / recipe.batch))
        drawn = epoch_order(task.n_train, recipe.batch, epochs, recipe.order_seed)[: recipe.n_step]
        rules = {"epoch_order": drawn, "without_copies": without_copies(drawn, task.representative)}
        rule = next((name for name, expected in rules.items() if torch.equal(expected, recipe.order)), "")
        order = rule != ""
        if not order:
            nearest = min(rules, key=lambda name: int((rules[name] != recipe.order).sum()))
            expected = rules[nearest]
            step, slot = (expected != recipe.order).nonzero()[0].tolist()
            with_or_without = ", with or without copies" if nearest == "without_copies" else ""
            finding = (
                f"The order is not epoch_order's by seed {recipe.order_seed}{with_or_without}: step {step}, slot {slot} has record "
                f"{int(recipe.order[step, slot])}, not {int(expected[step, slot])}."
            )
    if recipe.initial_seed is not None:
        state = initial_state_from_seed(task.model, recipe.initial_seed)
        off = [name for name, tensor in recipe.initial_state.items() if not _is_same_draw(tensor, state[name])]
        initial = not off
        if off and not finding:
            finding = f"The initial state is not the one of seed {recipe.initial_seed}: {off[0]} differs."
    return Origin(order, initial, finding, rule)


def _is_same_draw(given: Tensor, drawn: Tensor) -> bool:
    if torch.equal(given, drawn) or not given.is_floating_point() or not given.numel():
        return torch.equal(given, drawn)
    return bool((given - drawn).abs().max() <= INITIAL_ROUNDING * drawn.abs().max())


def _compare(step: int, claim: Tensors, replayed: Tensors, start: Tensors) -> tuple[Compared, list[Difference]]:
    """Where tensors differ, those that training does not round (integers, booleans) first: there no difference is allowed."""
    truth = {name: tensor for name, tensor in replayed.items() if name in claim}
    names = sorted(truth, key=lambda name: (truth[name].is_floating_point(), name))
    found = [d for name in names if (d := _difference(step, name, claim[name], truth[name]))]
    weights, moments = drifts(claim, truth, start)
    exact = [d.tensor for d in found if not truth[d.tensor].is_floating_point()]
    if any(name.startswith("model.") for name in exact):
        weights = math.inf
    if any(name.startswith("optimizer.") for name in exact):
        moments = math.inf
    return Compared(step, not found, weights, moments), found


def _drift(claim: Mapping[str, Tensor], truth: Mapping[str, Tensor], start: Mapping[str, Tensor], part: str) -> float:
    off = moved = 0.0
    for name, tensor in truth.items():
        if not name.startswith(part) or name not in claim or not tensor.is_floating_point():
            continue
        before = start[name].double() if name in start else torch.zeros_like(tensor, dtype=torch.float64)
        off += (claim[name].double() - tensor.double()).square().sum().item()
        moved += (tensor.double() - before).square().sum().item()
    if not math.isfinite(off + moved):
        return math.inf
    if off == 0:
        return 0.0
    return math.sqrt(off / moved) if moved else math.inf


def _distance(one: Tensors, other: Tensors) -> float:
    """‖other − one‖ over the model's floating-point tensors."""
    names = [name for name, t in one.items() if name.startswith("model.") and t.is_floating_point()]
    return math.sqrt(sum((other[name].double() - one[name].double()).square().sum().item() for name in names))


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


def _run(program: Program, state: State, weights: Tensor, last: int, tell: Tell) -> State:
    """Go on from a state to the one after `last` steps, with weights (R, n_train)."""
    with preserved_generator():
        while state.step < last:
            state, _ = program.step(state, weights)
            tell()
    return state


def nudged(start: State, seed: int) -> State:
    """The same state with weights that are off by a unit in the last place, some of them, by a fixed seed."""
    generator = torch.Generator().manual_seed(seed_of("nudge", seed))

    def moved_by_a_unit(tensors: Tensors) -> Tensors:
        moved = {}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
                tensor = torch.where(sign > 0, torch.nextafter(tensor, tensor + 1), tensor)
            moved[name] = tensor
        return moved

    return replace(start, parameters=moved_by_a_unit(start.parameters), buffers=moved_by_a_unit(start.buffers))


def _report(
    program: Program,
    compared: list[Compared],
    differences: list[Difference],
    tolerance: Tolerance,
    origin: Origin,
    draw: Draw | None,
    *,
    matches: bool,
    replayed: str,
) -> VerificationReport:
    return VerificationReport(
        matches=matches,
        is_bit_equal=not differences and all(c.is_bit_equal for c in compared),
        n_step=program.recipe.n_step,
        checkpoints=compared,
        differences=differences[:10],
        tolerance=tolerance,
        environment=environment(),
        task_digest=program.task.digest,
        origin=origin,
        draw=draw,
        caveats=_caveats(origin, draw),
        summary=_summary(compared, differences, tolerance, origin, draw, matches=matches, replayed=replayed),
    )


def _summary(
    compared: Sequence[Compared],
    differences: Sequence[Difference],
    tolerance: Tolerance,
    origin: Origin,
    draw: Draw | None,
    *,
    matches: bool,
    replayed: str,
) -> str:
    if origin.finding:
        return f"Not reproduced. {origin.finding}"
    n = len(compared)
    what = "the checkpoint" if draw is None else "the segment's end"
    many = f"all {n} checkpoints" if draw is None else f"all {n} ends"
    those = f"{what} is" if n == 1 else f"{many} are"
    unseen = "" if draw is None else f" {_unseen(draw)}"
    cut = next((s for s in draw.segments if s.finding), None) if draw else None
    if cut:
        return f"{replayed}, and not reproduced: between steps {cut.first} and {cut.last}, {cut.finding}."
    if not differences:
        return f"{replayed}, and {those} equal to the bit.{unseen}"
    worst = max(c.worst for c in compared)
    behind = (
        f"rounding alone moves this training by {tolerance.reordering:.1e} of the way it went, "
        f"leaving out one of four sampled records by {tolerance.left_out:.1e} or more"
    )
    if matches:
        return f"{replayed}, and {those} within {worst:.1e}, of {tolerance.drift:.1e} allowed: {behind}.{unseen}"
    bad = next((s for s in draw.segments if not s.matches), None) if draw else None
    first = next((d for d in differences if bad is None or d.step == bad.last), differences[0])
    where = f"between steps {bad.first} and {bad.last}" if bad else f"after step {first.step}"
    allowed = bad.tolerance.drift if bad and bad.tolerance else tolerance.drift
    return (
        f"{replayed}, and not reproduced: {where}, {first.tensor} differs in {first.n_different:,} of "
        f"{first.n_total:,} numbers by up to {first.largest:.1e}. The weights are {worst:.1e} of the way off, {allowed:.1e} "
        f"is allowed: {behind}."
    )


def _unseen(draw: Draw) -> str:
    """The probabilities in words."""
    m = draw.n_segment
    if all(miss.probability == 0 for miss in draw.miss):
        return "No segment is left unseen."
    parts = [f"in {miss.false_segments} of {m} with probability {miss.probability:.3g}" for miss in draw.miss]
    return (
        f"A cheat is missed {'; '.join(parts)}. Record {draw.rarest_record} is in {draw.record_segments} of {m} segments, any other "
        f"in as many or more: leaving it out everywhere is missed with probability {draw.record_probability:.3g}."
    )


def _caveats(origin: Origin, draw: Draw | None) -> list[str]:
    """What the verdict does not say, in words."""
    said = []
    if origin.order is None:
        said.append("No seed is stated for the order: whoever trained may have chosen it, record by record.")
    if origin.rule == "without_copies":
        said.append(
            "The order is epoch_order's with the slots of copies left empty (without_copies). Which records are copies is the "
            "task's word: one that is wrongly called a copy was not trained on."
        )
    if origin.initial_state is None:
        said.append("No public seed is stated for the initial state: training on other records could hide in it.")
    if draw:
        said.append(
            f"With the widest tolerance that was measured on a drawn segment counted for each of the {draw.n_segment}, "
            f"{draw.hidden_drift:.1e} of the way the weights went is left to whoever would hide something. A tolerance is "
            f"{draw.hidden_of_left_out:.1e} or less of what the least of four sampled records moves in its segment; a record "
            "that was not sampled may move less, and undrawn segments may need other tolerances."
        )
    return said
