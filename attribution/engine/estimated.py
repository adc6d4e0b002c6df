"""Owners' shares from checkpoints alone: TRAK's influence with exact curvature, in pieces that any worker can compute.

    fisher   for each checkpoint and range of records     F = (1/n) Σ g gᵀ, and the mean gradient: sums over the range
    solve    for each checkpoint                           the age τ that it shows, and A = (F + 1/τ)⁻¹ · mean query gradients
    scores   for each range of records                     g_i · A / n, mean over checkpoints

The formulas, and how a checkpoint shows its age, are `estimators/trak.py`'s for several checkpoints (one alone is not rewound
here). Queries are dealt into parts whose gradients are averaged before anything is solved: a record needs a number for each
part, not for each query, and the parts are what the intervals redraw.

A plan is JSON; a piece's bytes are the same on every re-run on one machine and thread count, and depend on the pieces that it
`needs` alone. `unreplayed.divide` makes shares of the values.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attribution.engine.checkpoints import load_checkpoint
from attribution.engine.curvature import curvature_rows, labels_of
from attribution.engine.errors import EngineError
from attribution.engine.estimators.trak import age_of, fisher_of, gradient_rows, width_of
from attribution.engine.gradients import block_rows, named_gradients, parameter_count
from attribution.engine.shares import RoundResult
from attribution.engine.task import Task, seed_of
from attribution.engine.training import Program, Progress, State
from attribution.engine.unreplayed import RECORD, UnreplayedShares, divide, parts_of

PIECE_FLOPS = 6e10  # about 30 s of small products on one core of 2020
PIECE_RECORDS = 50_000  # where a record costs next to nothing
MAX_PIECES = 5_000  # two days of one core
INTERVALS = "95 %, given these checkpoints, queries bootstrapped"
STAGES = ("fisher", "solve", "scores")
HALVINGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the last checkpoint's steps: where in training it is looked at
NEAR = 1.5  # a checkpoint at most this factor from there will do


@dataclass(frozen=True)
class Piece:
    """One job's work."""

    stage: str
    checkpoint: int  # index into the plan's; -1: all of them
    first: int  # of the records
    last: int


@dataclass(frozen=True)
class EstimatePlan:
    """Which checkpoints are looked at, and who looks at which records."""

    task_digest: str
    seed: int
    checkpoints: tuple[int, ...]  # indices into the task's, ascending
    n_part: int  # of the queries
    pieces: tuple[Piece, ...]  # by stage

    def needs(self, number: int) -> list[int]:
        """The pieces that this one is made from; they come before it."""
        piece = self.pieces[number]
        if piece.stage == "fisher":
            return []
        before = STAGES[STAGES.index(piece.stage) - 1]
        return [
            other for other, p in enumerate(self.pieces) if p.stage == before and piece.checkpoint in (-1, p.checkpoint)
        ]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "EstimatePlan":
        pieces = tuple(Piece(**piece) for piece in document["pieces"])
        return cls(**{**document, "checkpoints": tuple(document["checkpoints"]), "pieces": pieces})

    @cached_property
    def digest(self) -> str:
        return f"{seed_of('estimate', json.dumps(self.to_json(), sort_keys=True)):016x}"


def plan_estimate(task: Task, *, seed: int = 0, records_per_piece: int | None = None) -> EstimatePlan:
    """Choose the checkpoints nearest to HALVINGS of the training, and cut the records into pieces.

    Raises:
        EngineError: no checkpoint, or one that is not of this model, or holds NaN.
    """
    if not task.checkpoints:
        raise EngineError("give a checkpoint: an estimate looks at trained weights", pointer="/checkpoints")
    program, chosen = Program(task), chosen_checkpoints([step for step, _ in task.checkpoints])
    states = [load_checkpoint(program, number) for number in chosen]
    size = records_per_piece or _records_per_piece(program, states[-1])
    _check_cost(task.n_train, size)
    ranges = [(a, min(a + size, task.n_train)) for a in range(0, task.n_train, size)]
    pieces = [Piece("fisher", c, a, b) for c in range(len(chosen)) for a, b in ranges]
    pieces += [Piece("solve", c, 0, task.n_train) for c in range(len(chosen))]
    pieces += [Piece("scores", -1, a, b) for a, b in ranges]
    return EstimatePlan(task.digest, seed, tuple(chosen), parts_of(task.n_query), tuple(pieces))


def chosen_checkpoints(steps: Sequence[int]) -> list[int]:
    """Indices, ascending, of the checkpoints nearest to HALVINGS of the last one's steps, as a ratio; the last is among them."""
    return sorted({_nearest(steps, part * steps[-1]) for part in HALVINGS})


def is_spread(steps: Sequence[int]) -> bool:
    """Whether checkpoints show training from its first eighth on; at its end alone, values are not worth what `RECORD` says."""
    if len(chosen_checkpoints(steps)) < len(HALVINGS):
        return False
    wanted = [part * steps[-1] for part in HALVINGS]
    return all(1 / NEAR <= steps[_nearest(steps, at)] / at <= NEAR for at in wanted)


def _nearest(steps: Sequence[int], at: float) -> int:
    return min(range(len(steps)), key=lambda k: abs(math.log(max(steps[k], 1e-9) / at)))


def run_piece(
    task: Task,
    plan: EstimatePlan,
    number: int,
    inputs: Mapping[int, RoundResult],
    *,
    progress: Progress | None = None,
) -> RoundResult:
    """Compute one piece.

    Args:
        inputs: the results of the pieces that it needs, by number.

    Raises:
        EngineError: an input is missing or another plan's, or numbers that are not finite came out.
    """
    _check(task, plan)
    for other in plan.needs(number):
        if other not in inputs or inputs[other].plan_digest != plan.digest or inputs[other].index != other:
            raise EngineError(f"needs piece {other} of this plan; run that first", pointer=f"/pieces/{number}")
    piece, program = plan.pieces[number], Program(task)
    given = [inputs[other].arrays for other in plan.needs(number)]
    make = {"fisher": _fisher, "solve": _solved, "scores": _scored}[piece.stage]
    arrays = make(program, plan, piece, given, progress or (lambda done, total: None))
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise EngineError(
                f"{name} came out not finite: some record's gradient explodes at these weights; take earlier checkpoints",
                pointer=f"/checkpoints/{plan.checkpoints[max(piece.checkpoint, 0)]}",
            )
    return RoundResult(plan.digest, number, arrays)


def merge_pieces(task: Task, plan: EstimatePlan, results: Mapping[int, RoundResult]) -> UnreplayedShares:
    """Divide by the scores of all ranges, once every piece is there."""
    _check(task, plan)
    found, ages = np.zeros((task.n_train, plan.n_part)), []
    for number, piece in enumerate(plan.pieces):
        if piece.stage == "fisher":
            continue
        if number not in results or results[number].plan_digest != plan.digest:
            raise EngineError("is missing or another plan's; run it first", pointer=f"/pieces/{number}")
        arrays = results[number].arrays
        if piece.stage == "scores":
            found[piece.first : piece.last] = arrays["scores"]
        else:
            ages.append(float(arrays["tau"][0]))
    sizes = np.array([len(part) for part in _parts(task.n_query, plan)])
    return divide(
        task,
        found * sizes / task.n_query,
        record=RECORD["estimated" if is_spread([step for step, _ in task.checkpoints]) else "estimated at the end"],
        why_no_record="checkpoints from an eighth of the training on are needed, and these show its end alone",
        seed=plan.seed,
        intervals=INTERVALS,
        details={
            "method": "trak",
            "checkpoints": [task.checkpoints[number][0] for number in plan.checkpoints],
            "ages": ages,
            "pieces": len(plan.pieces),
        },
    )


def estimate_shares(task: Task, *, seed: int = 0, records_per_piece: int | None = None) -> UnreplayedShares:
    """All pieces, one after the other."""
    plan = plan_estimate(task, seed=seed, records_per_piece=records_per_piece)
    results: dict[int, RoundResult] = {}
    for number in range(len(plan.pieces)):
        results[number] = run_piece(task, plan, number, results)
    return merge_pieces(task, plan, results)


Arrays = dict[str, NDArray[Any]]


def _fisher(program: Program, plan: EstimatePlan, piece: Piece, given: list[Arrays], tell: Progress) -> Arrays:
    task, state = program.task, _state(program, plan, piece.checkpoint)
    labels, width = labels_of(program, state), width_of(parameter_count(program, state))
    k = width or parameter_count(program, state)
    fisher = torch.zeros(k, k, dtype=torch.float64)
    gradient = {name: torch.zeros(p[0].shape, dtype=torch.float64) for name, p in state.parameters.items()}
    index = torch.arange(piece.first, piece.last)
    for part in index.split(curvature_rows(program, state, labels)):
        fisher += fisher_of(program, state, part, labels, width=width, visits=torch.ones(len(part)))
        tell(int(part[-1]) + 1 - piece.first, 2 * len(index))
    for part in index.split(block_rows(program, state)):
        for name, g in named_gradients(program, state, task.train, part, of_loss=True).items():
            gradient[name] += g.sum(0).double() / task.n_train
        tell(len(index) + int(part[-1]) + 1 - piece.first, 2 * len(index))
    return {"fisher": fisher.numpy()} | {f"gradient.{name}": g.numpy() for name, g in gradient.items()}


def _solved(program: Program, plan: EstimatePlan, piece: Piece, given: list[Arrays], tell: Progress) -> Arrays:
    task, state = program.task, _state(program, plan, piece.checkpoint)
    width = width_of(parameter_count(program, state))
    fisher = torch.from_numpy(sum(part["fisher"] for part in given))
    mean = {name: torch.from_numpy(sum(part[f"gradient.{name}"] for part in given)) for name in state.parameters}
    tau, _ = age_of(program, state, fisher, mean, None, width=width)
    asked = torch.stack([_mean_query(program, state, part, width) for part in _parts(task.n_query, plan)], 1)  # (k, K)
    tell(1, 2)
    fisher.diagonal().add_(1 / tau)
    solved = torch.cholesky_solve(asked, torch.linalg.cholesky(fisher)) / task.n_train
    tell(2, 2)
    return {"adjoint": solved.contiguous().numpy(), "tau": np.array([tau])}


def _scored(program: Program, plan: EstimatePlan, piece: Piece, given: list[Arrays], tell: Progress) -> Arrays:
    task, n = program.task, piece.last - piece.first
    scores = torch.zeros(n, plan.n_part, dtype=torch.float64)
    for checkpoint, solved in enumerate(given):
        state, adjoint = _state(program, plan, checkpoint), torch.from_numpy(solved["adjoint"])
        width = width_of(parameter_count(program, state))
        for part in torch.arange(piece.first, piece.last).split(block_rows(program, state)):
            rows = gradient_rows(program, state, task.train, part, of_loss=True, width=width)
            scores[part - piece.first] += rows @ adjoint / len(given)
            tell(checkpoint * n + int(part[-1]) + 1 - piece.first, len(given) * n)
    return {"scores": scores.numpy()}


def _state(program: Program, plan: EstimatePlan, checkpoint: int) -> State:
    return load_checkpoint(program, plan.checkpoints[checkpoint])


def _parts(n_query: int, plan: EstimatePlan) -> list[Tensor]:
    """The queries, dealt at random into parts of like size."""
    generator = torch.Generator().manual_seed(seed_of("query parts", plan.seed))
    return [part.sort().values for part in torch.randperm(n_query, generator=generator).tensor_split(plan.n_part)]


def _mean_query(program: Program, state: State, part: Tensor, width: int | None) -> Tensor:
    """(k,): the mean gradient of some queries' measurement."""
    blocks = part.split(block_rows(program, state))
    queries = program.task.queries
    rows = [gradient_rows(program, state, queries, block, of_loss=False, width=width).sum(0) for block in blocks]
    return torch.stack(rows).sum(0) / len(part)


def _records_per_piece(program: Program, state: State) -> int:
    """So that the dearest piece takes about PIECE_FLOPS, counted by torch on a few records."""
    few = torch.arange(min(4, program.task.n_train))
    labels, width = labels_of(program, state), width_of(parameter_count(program, state))
    with FlopCounterMode(display=False) as counter:
        fisher_of(program, state, few, labels, width=width, visits=torch.ones(len(few)))
        gradient_rows(program, state, program.task.train, few, of_loss=True, width=width)
    per_record = max(1.0, counter.get_total_flops() / len(few))
    return max(1, min(PIECE_RECORDS, math.ceil(PIECE_FLOPS / per_record)))


def check_cost(task: Task, *, n_train: int) -> None:
    """Refuse early what would take days: the model on so many records, judged by a few of the task's.

    Raises:
        EngineError: with what would do.
    """
    program = Program(task)
    _check_cost(n_train, _records_per_piece(program, program.blank()))


def _check_cost(n_train: int, size: int) -> None:
    n_piece = len(HALVINGS) * math.ceil(n_train / size)
    if n_piece > MAX_PIECES:
        raise EngineError(
            f"an estimate for {n_train:,} records of this model takes {n_piece:,} pieces of half a minute, and {MAX_PIECES:,} are possible: "
            "cite fewer records, show a smaller model, or declare it without checkpoints",
            pointer="/checkpoints",
        )


def _check(task: Task, plan: EstimatePlan) -> None:
    if plan.task_digest != task.digest:
        raise EngineError("was made for another task: its checkpoints, records or queries differ", pointer="/plan")
