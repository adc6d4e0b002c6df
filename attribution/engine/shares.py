"""Records' Shapley values, summed to owners' shares, with intervals and a measured reliability.

The game. Players are classes of copies that the order uses, n of them; f(S) is minus the mean measurement after the
recorded training with the weights of all records outside S at 0. Written over sizes, with t = k/n, Shapley's value is

    φ_i = (f(all) − f(none)) / n + 1/n Σ_{k=1}^{n−1} E_{|S|=k}[ f(S) · (s_i − t) / (t (1 − t)) ]            (1)

(sort the permutation form by size). The second part sums to 0 over i at every size, so both ends are replayed, the total
is exact, and there is no gap left to spread: counting is the zeroth order of (1) and everything else a deviation from it. How the
deviations are estimated, from metagradients that plain replays correct, is in `division.py`; which sets are replayed, in `coalitions.py`.

The count pays where the interval of the total touches or lies below 0. There φ / total is no division of anything: it
flips every sign, and would pay the records that did the harm.

The reliability λ comes from replays that are predicted without them: of tilted twins, in which half of the clusters are kept more often, in
the other twin the other half, and of the others, each pair left out. Tilted ones teach no value anything:
what is true of heavily tilted sets is not what Shapley's value asks about. Nothing here looks at owners or groups: a record's value
is the same to the bit however accounts are split. Shapley 1953; Aumann & Shapley 1974; Owen 1972; Lundberg & Lee 2017;
Faithful Group Shapley, arXiv:2505.19013.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attribution.engine.coalitions import KINDS, Array, Masks, Plan, Players, Round, clusters_of, fold_weights
from attribution.engine.division import Division, Evidence, Partition, Share
from attribution.engine.errors import EngineError
from attribution.engine.files import arrays_digest, written_whole
from attribution.engine.task import Task, seed_of
from attribution.engine.training import Cost, Program, Progress, cost, metagradients, plan_reverse, replay_values

MAX_FOLDS = 10
FEW_FOLDS = 4  # of queries, where the budget is small
SMALL_BUDGET = 160.0
NODES = (
    8,
    13,
)  # on the diagonal, for a small budget and for others; golden-ratio sequences are most even at these lengths
ROUND_FLOPS = 6e10  # about 30 s of small batched products on one core of 2020
INTERVALS = "95 %, given these queries and this seed, queries bootstrapped"
REVERSE = ("folds", "path", "gradients")  # the metagradients


@dataclass(frozen=True)
class RoundResult:
    """What one round measured. The file's bytes are the same on every re-run on one machine and thread count."""

    plan_digest: str
    index: int
    arrays: dict[str, NDArray[np.float32]]

    def save(self, path: Path) -> None:
        kept = {"plan": self.plan_digest, "round": self.index, "sha256": arrays_digest(self.arrays)}
        with written_whole(path) as partial:
            # One metadata key: the order of several is not fixed by the format's writer.
            save_file(self.arrays, partial, metadata={"residual": json.dumps(kept, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "RoundResult":
        try:
            with safe_open(path, "np") as file:
                header = json.loads((file.metadata() or {})["residual"])
                names = list(file.keys())
                arrays = {name: file.get_tensor(name) for name in names}
            if header["sha256"] != arrays_digest(arrays):
                raise EngineError("was changed after it was written; run the round again", pointer=str(path))
        except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
            raise EngineError(f"is not a round of shares ({error}); run the round again", pointer=str(path)) from error
        return cls(header["plan"], header["round"], arrays)


@dataclass(frozen=True)
class SharesResult:
    """Values, shares and how far to trust them. Intervals are 95 %, given these queries and this seed, queries bootstrapped."""

    values: Array  # (n_train,): raw, signed; a class of copies at its representative
    replicates: Array  # (R, n_owner), in the order of `owners`: shares
    owners: list[Share]
    groups: dict[str, list[Share]]
    total: float
    total_low: float
    total_high: float
    reliability: float
    reliability_slope: float
    counted: bool  # the count pays: the total's interval touches or lies below 0, or there is one query alone
    agreement: float | None  # None: too few probes, or nothing moved
    regime: str  # smooth, chaotic or unknown
    run_equivalents: float
    intervals: str  # what they promise
    stopping: dict[str, Any]
    details: dict[str, Any]

    @property
    def width(self) -> float:
        """The widest owner's interval, as a fraction of the pool."""
        return max(o.high - o.low for o in self.owners)

    def to_json(self) -> dict[str, Any]:
        return {
            "owners": [asdict(o) for o in self.owners],
            "groups": {name: [asdict(o) for o in members if o.owner >= 0] for name, members in self.groups.items()},
            "nobody": {name: asdict(o) for name, members in self.groups.items() for o in members if o.owner < 0},
            "total": {"value": self.total, "low": self.total_low, "high": self.total_high},
            "reliability": self.reliability,
            "reliability_slope": self.reliability_slope,
            "paid_by_count": self.counted,
            "regime": self.regime,
            "agreement": self.agreement,
            "run_equivalents": self.run_equivalents,
            "stopping": self.stopping,
            "intervals": self.intervals,
            "details": self.details,
        }


def plan_shares(
    task: Task, *, budget: float, seed: int = 0, n_rounds: int | None = None, progress: Progress | None = None
) -> Plan:
    """Decide what to measure for about `budget` run equivalents; trains once, to find similar records.

    First the diagonal: a few metagradients, some of them by fold of queries, and where the budget allows it pairs spread around
    them. Then replays, an eighth of the budget tilted over clusters and kept apart for the reliability. Masks are numbered so
    that any first part of the rounds is a balanced sample by itself. Each kind needs a few, so a plan takes about 60 run equivalents even where less
    is asked; `run_equivalents` says how many.
    """
    if not budget >= 40:
        raise EngineError(f"{budget}: at least 40 run equivalents, or nothing can be measured", pointer="/budget")
    players, reversing = Players.of(task), Reversing(task)
    n, known = len(players.records), reversing.known
    small = budget < SMALL_BUDGET
    diagonal = _has_diagonal(task)
    n_fold = min(task.n_query, FEW_FOLDS if small else MAX_FOLDS)
    ratio, fold_ratio = reversing.ratio(1), reversing.ratio(n_fold)
    folds = max(3, min(6 if diagonal else 24, round(0.15 * budget / fold_ratio)))
    path = NODES[not small] - folds if diagonal else 0
    toggles = max(8, min(64, _even(0.125 * budget)))
    gradients = 0 if diagonal and small else max(4, _even(0.36 * budget / ratio))
    probes = min(6 if small else 16, (folds + path) if diagonal else gradients)
    values = max(4, _even(budget - 3 - folds * fold_ratio - toggles - (gradients + path) * ratio - probes))
    counts = {
        "ends": 2,
        "folds": folds,
        "path": path,
        "gradients": gradients,
        "values": values,
        "toggles": toggles,
        "probes": probes,
    }
    if n == 1:
        counts = dict.fromkeys(KINDS, 0) | {"ends": 2}
    if n_rounds is None:
        spent = _run_equivalents(counts, ratio, fold_ratio)
        n_rounds = math.ceil(spent * known.run_flops / ROUND_FLOPS)
    n_rounds = max(1, min(n_rounds, counts["values"] // 2, counts["toggles"] // 4))
    rounds = tuple(
        Round(
            r,
            {
                kind: (_cut(kind, counts[kind], r, n_rounds), _cut(kind, counts[kind], r + 1, n_rounds))
                for kind in KINDS
            },
        )
        for r in range(n_rounds)
    )
    return Plan(
        task_digest=task.digest,
        seed=seed,
        budget=float(budget),
        run_equivalents=reversing.run_equivalents(rounds, n_fold),
        n_player=n,
        n_fold=n_fold,
        clusters=tuple(clusters_of(task, players, progress).tolist()),
        rounds=rounds,
        diagonal=diagonal,
    )


def _has_diagonal(task: Task) -> bool:
    """Whether a record of weight t teaches less than one of weight 1.

    It does where the step is the gradient's multiple. Adam divides by the gradient's own size and the normalizer "weight" by
    the weights', so with equal weights of all records almost nothing depends on t; there the surrogate is taken at random sets.
    """
    recipe = task.require_recipe()
    return recipe.optimizer == "sgd" and recipe.normalizer == "batch"


def run_round(task: Task, plan: Plan, index: int, *, progress: Progress | None = None) -> RoundResult:
    """Measure one round. Rounds are independent; one takes about half a minute on one core."""
    _check_plan(task, plan)
    if not 0 <= index < len(plan.rounds):
        raise EngineError(f"round {index} of {len(plan.rounds)}", pointer="/index")
    players, program = Players.of(task), Program(task)
    masks = Masks(plan)
    arrays: dict[str, NDArray[np.float32]] = {}
    items = plan.rounds[index].items
    report = _Stages(progress, [2.0 * (b - a) if kind in REVERSE else b - a for kind, (a, b) in items.items()])
    for stage, (kind, (start, stop)) in enumerate(items.items()):
        if start == stop:
            continue
        W = players.weights(torch.from_numpy(np.stack([masks.weights(kind, j) for j in range(start, stop)])))
        told = report.stage(stage)
        if kind in REVERSE:
            Q = fold_weights(task.n_query, plan.n_fold if kind == "folds" else 1)
            f, g = metagradients(task, W, query_weights=Q, program=program, progress=told)
            summed = players.summed(g)  # (G, R, n_player)
            arrays[kind] = (summed if kind == "folds" else summed[0]).float().numpy()
            arrays[f"{kind}.values"] = f.float().numpy()
        else:
            arrays[kind] = replay_values(task, W, per_query=True, program=program, progress=told).float().numpy()
    return RoundResult(plan.digest, index, {name: np.ascontiguousarray(a) for name, a in arrays.items()})


def merge_rounds(
    task: Task,
    plan: Plan,
    rounds: Iterable[RoundResult],
    *,
    target_width: float | None = None,
) -> SharesResult:
    """Divide the value over records, owners and groups, from all rounds of a plan or from the first few.

    The count pays (`counted`) if the interval of the total touches or lies below 0, or if there is but one query to tell it by.
    """
    _check_plan(task, plan)
    results = sorted(rounds, key=lambda r: r.index)
    for number, result in enumerate(results):
        if result.plan_digest != plan.digest:
            raise EngineError("was measured for another plan; run the round again", pointer=f"/rounds/{number}")
        if result.index != number:
            raise EngineError(
                f"missing; the plan's rounds 0..{results[-1].index} are needed", pointer=f"/rounds/{number}"
            )
    if not results:
        raise EngineError("none was given", pointer="/rounds")
    evidence = Evidence.of(plan, {r.index: r.arrays for r in results})
    division = Division(evidence)
    players = Players.of(task)

    values = np.zeros(task.n_train)
    total, phi = division.total, division.values
    values[players.records.numpy()] = phi
    partitions = [
        Partition(name, ids, players, division)
        for name, ids in ({"": task.owners} | {name: ids.long() for name, ids in task.groups.items()}).items()
    ]
    totals = []
    for drawn_totals, drawn in division.replicates(seed_of("replicates", plan.seed)):
        totals.append(drawn_totals)
        for partition in partitions:
            partition.add(drawn, drawn_totals)
    total_low, total_high = _interval(np.concatenate(totals))
    agreement = evidence.agreement()
    reliability, slope = division.reliability(agreement)
    counted = total_low <= 0 or plan.n_fold == 1
    trust = 0.0 if counted else reliability

    owners, replicates = partitions[0].table(trust)
    groups = {partition.name: partition.table(trust)[0] for partition in partitions[1:]}

    done = [plan.rounds[r.index].items for r in results]
    counts = {kind: sum(items[kind][1] - items[kind][0] for items in done) for kind in KINDS}
    width = max(o.high - o.low for o in owners)
    stopping: dict[str, Any] = {"rule": "budget", "budget": plan.budget, "rounds": len(results), "width": width}
    if target_width is not None:
        stopping |= {"rule": "interval", "target": target_width, "reached": width <= target_width}
    return SharesResult(
        values=values,
        replicates=replicates,
        owners=owners,
        groups=groups,
        total=total,
        total_low=total_low,
        total_high=total_high,
        reliability=reliability,
        reliability_slope=slope,
        counted=counted,
        agreement=agreement,
        regime="unknown" if agreement is None else "smooth" if agreement >= 0.5 else "chaotic",
        run_equivalents=Reversing(task).run_equivalents([plan.rounds[r.index] for r in results], plan.n_fold),
        intervals=_promise(plan.n_fold, division),
        stopping=stopping,
        details=division.details() | {"counts": counts, "n_player": plan.n_player},
    )


def _interval(drawn: Array) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _run_equivalents(counts: dict[str, int], ratio: float, fold_ratio: float) -> float:
    """FLOPs of everything, the run that found the clusters included, over those of one unbatched run."""
    plain = 1 + counts["ends"] + counts["values"] + counts["toggles"] + counts["probes"]
    return plain + (counts["path"] + counts["gradients"]) * ratio + counts["folds"] * fold_ratio


def _fold_ratio(known: Cost, n_fold: int) -> float:
    """Run equivalents of one metagradient for n_fold questions, every state kept: they share the forward pass and its recomputation."""
    if n_fold == 1:
        return known.metagradient_ratio
    return 2 + max(0.0, known.metagradient_ratio - 2) * n_fold


class Reversing:
    """What metagradients cost in the memory that they are given: where it does not hold every state, steps are recomputed."""

    AT_ONCE = 8  # runs that the plan reckons with, before it knows its rounds

    def __init__(self, task: Task) -> None:
        self.task, self.program, self.known = task, Program(task), cost(task)

    def ratio(self, n_question: int) -> float:
        """Run equivalents of one metagradient, before the rounds are known."""
        return _fold_ratio(self.known, n_question) + self.recomputed(self.AT_ONCE, n_question) / self.AT_ONCE

    def recomputed(self, n_run: int, n_question: int) -> float:
        """Run equivalents of `n_run` metagradients beyond those with every state kept; 0 where every state is."""
        if n_run == 0:
            return 0.0
        plan = plan_reverse(self.task, n_run, n_question, program=self.program)
        if plan.snapshots >= self.program.recipe.n_step and plan.questions >= n_question:
            return 0.0
        return max(0.0, plan.run_equivalents - n_run * _fold_ratio(self.known, n_question))

    def run_equivalents(self, rounds: Sequence[Round], n_fold: int) -> float:
        """Of these rounds and of the run that found the clusters."""
        sizes = [{kind: b - a for kind, (a, b) in r.items.items()} for r in rounds]
        counts = {kind: sum(size[kind] for size in sizes) for kind in KINDS}
        kept = _run_equivalents(counts, self.known.metagradient_ratio, _fold_ratio(self.known, n_fold))
        asked = [(size[kind], n_fold if kind == "folds" else 1) for size in sizes for kind in REVERSE]
        return kept + sum(self.recomputed(n_run, n_question) for n_run, n_question in asked)


def _promise(n_fold: int, division: Division) -> str:
    """What the intervals say, in words."""
    if division.still:
        return "none: nothing that was left out moved the measurement, so the count pays and any division is possible"
    if n_fold == 1:
        return "95 %, given this one query and this seed: queries were not redrawn, so the count pays"
    return INTERVALS


def _even(x: float) -> int:
    return max(0, 2 * int(x // 2))


def _cut(kind: str, count: int, part: int, parts: int) -> int:
    """Where a part of `count` items begins: between pairs; the two ends stay together in the first part."""
    if part == 0 or part == parts or kind == "ends":
        return count if part else 0
    step = 2 if kind in ("values", "gradients", "toggles") else 1
    return min(count, step * math.ceil(count * part / parts / step))


def _check_plan(task: Task, plan: Plan) -> None:
    if plan.task_digest != task.digest:
        raise EngineError("was made for another task: its recipe, records or queries differ", pointer="/plan")


class _Stages:
    """One progress bar over stages of different length."""

    def __init__(self, progress: Progress | None, lengths: Sequence[float]) -> None:
        self.progress, self.lengths = progress, lengths

    def stage(self, number: int) -> Progress | None:
        if self.progress is None:
            return None
        before, here, total = sum(self.lengths[:number]), self.lengths[number], sum(self.lengths)
        tell = self.progress

        def report(done: int, of: int) -> None:
            tell(int(1000 * (before + here * done / of) / total), 1000)

        return report
