"""Records' Shapley values, summed to owners' shares, with intervals and a measured reliability.

The game. Players are classes of copies that the order uses, n of them; f(S) is minus the mean measurement after the
recorded training with the weights of all records outside S at 0. Written over sizes, with t = k/n, Shapley's value is

    φ_i = (f(all) − f(none)) / n + 1/n Σ_{k=1}^{n−1} E_{|S|=k}[ f(S) · (s_i − t) / (t (1 − t)) ]            (1)

(sort the permutation form by size). The second part sums to 0 over i at every size, so both ends are replayed, the total
is exact, and there is no gap left to spread: counting is the zeroth order of (1) and everything else a deviation from it.

The surrogate. With all records at one weight t, the metagradient ψ_i(t) = ∂f/∂w_i at w = (t, …, t) answers for all records
at once, and along this diagonal nothing is random: ∫ ψ_i dt is the game's Aumann–Shapley value (1974), whose sum is
f(all) − f(none) exactly. Eight nodes of a golden-ratio sequence in u, t = u^1.5, with straight lines between them, are within
0.003 in TV of thirty-two. It differs from Shapley's value by a few points of the pool where training is smooth, less than hundreds of
metagradients at random sets, whose sum overshoots by half or more: a slope at weight 0 is steeper than the step to 1.

Where equal weights change nothing, because Adam or the normalizer "weight" divides them out, the surrogate is taken at
random sets S ~ t instead, averaged over those of like size: ψ_i(u) = Σ_m A_m(u) g_i(S_m). A kept record's slope is then at weight 1,
a dropped one's at 0; weighting them 1/2t and 1/2(1 − t), a trapezoid in the record's own weight, is a second
surrogate, ψ'_i, that enters by its difference from the first.

The correction. Plain replays at random sets, in antithetic twins, give in units of their noise σ(u)

    f(S) = F(u) + Σ_i (s_i − t) (b ψ_i + c (ψ'_i − ψ_i) + d_i)(u) + σ(u) ε                                          (2)

with normal priors: F smooth, b(u) around 1, c around 0 (without ψ', none), d_i(u) = cluster effect + record effect, smooth in u. Their
variances are averaged over a grid by the probability of the replays, a step wider costing 3 nats: a few replays move nothing
without evidence, and with more and more the priors lose their say, so that φ tends to (1) whatever the surrogate
(regression-adjusted Monte Carlo, Witter et al. 2025, arXiv:2506.11849). Then

    φ_i = (f(all) − f(none)) / n + mean over sizes of (b ψ_i + c (ψ'_i − ψ_i) + d_i − the same averaged over i).

The intervals. Draws of the queries (folds, with replacement; Student's t, as folds are few), of metagradients at random sets
(pairs, with replacement), and of what the replays leave open about b, c and d: the posterior of (2), mixed over its priors. So the
surrogate's error is in the interval as far as replays have not ruled it out, which redrawing the replays alone would not show. One query
alone cannot be redrawn: then nothing says how far its total is the kind's, and the count pays.

The count also pays where the interval of the total touches or lies below 0. There φ / total is no division of anything: it
flips every sign, and would pay the records that did the harm.

The reliability comes from tilted twins, in which half of the clusters are kept more often, in the other twin the other half. They
are predicted and teach (2) nothing: what is true of heavily tilted sets is not what Shapley's value asks about. Nothing here looks at owners or groups: a record's value
is the same to the bit however accounts are split. Shapley 1953; Aumann & Shapley 1974; Owen 1972; Lundberg & Lee 2017;
Faithful Group Shapley, arXiv:2505.19013.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from attribution.engine.errors import EngineError
from attribution.engine.files import arrays_digest, written_whole
from attribution.engine.gradients import block_rows, record_gradients, sketched
from attribution.engine.task import Task, seed_of
from attribution.engine.training import (
    Cost,
    Program,
    Progress,
    cost,
    metagradients,
    plan_reverse,
    replay_values,
    train,
)

Array = NDArray[np.float64]

POWER = 1.5  # t = u^1.5 for uniform u: small sets hold most of the value of a small dataset, and most of the noise
MAX_FOLDS = 10
FEW_FOLDS = 4  # of queries, where the budget is small
SMALL_BUDGET = 160.0
NODES = (
    8,
    13,
)  # on the diagonal, for a small budget and for others; golden-ratio sequences are most even at these lengths
MAX_CLUSTERS = 64
CLUSTER_SIZE = 12
SKETCH = 64
TILT = 0.8  # of a cluster's chance to be kept, up or down
TILTED_SIZES = (0.3, 0.9)  # in u: a few records, or all but a few, leave clusters little to be tilted
PROBE_TOGGLES = 0.05  # of the records, for the regime
ROUND_FLOPS = 6e10  # about 30 s of small batched products on one core of 2020
MAX_GRADIENT_RATIO = 8.0  # a metagradient longer than this times its neighbours' median is scaled down to it
N_REPLICATES = 400
RESOLUTION = 1e-6  # of a measurement: values nearer to each other are one value, rounded
REPLICATE_BLOCK = 50  # so that replicates of a million records need not be held at once
EVIDENCE_LIMIT = 512  # replays that the choice of priors looks at
STUDENT = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
)  # 97.5 % points of Student's t at 1..9 degrees of freedom
GOLDEN = 0.6180339887498949
INTERVALS = "95 %, given these queries and this seed, queries bootstrapped"
KINDS = ("ends", "folds", "path", "gradients", "values", "toggles", "probes")
REVERSE = ("folds", "path", "gradients")  # the metagradients


@dataclass(frozen=True)
class Round:
    """One job's work: for each kind, the half-open range of its items."""

    index: int
    items: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """What to measure. Masks are not stored: each follows from the seed, its kind and its number."""

    task_digest: str
    seed: int
    budget: float  # run equivalents asked for
    run_equivalents: float  # of the planned work, planning included
    n_player: int
    n_fold: int
    clusters: tuple[int, ...]  # (n_player,): similar records, by gradient; never by account
    rounds: tuple[Round, ...]
    diagonal: bool = False  # metagradients at equal weights t of all records, not at random sets alone

    def count(self, kind: str) -> int:
        return max((r.items[kind][1] for r in self.rounds), default=0)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Plan":
        rounds = tuple(
            Round(r["index"], {kind: (a, b) for kind, (a, b) in r["items"].items()}) for r in document["rounds"]
        )
        return cls(**{**document, "clusters": tuple(document["clusters"]), "rounds": rounds})

    @cached_property
    def digest(self) -> str:
        return f"{seed_of('plan', json.dumps(self.to_json(), sort_keys=True)):016x}"


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
class Share:
    """One member of a partition. `share` is raw: signed, summing to 1; `paid_share` is what money follows."""

    owner: int
    share: float
    low: float
    high: float
    paid_share: float
    count_share: float
    n_records: int
    value: float


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


@dataclass(frozen=True)
class Players:
    """Who plays: classes of copies with at least one slot in the order."""

    records: Tensor  # (n_player,): their representatives
    of_record: Tensor  # (n_train,): the player of each record; -1 where the order never uses its class

    @classmethod
    def of(cls, task: Task) -> "Players":
        order, representative = task.require_recipe().order, task.representative
        records = representative[order[order >= 0].unique()].unique()
        of_record = torch.full((task.n_train,), -1)
        of_record[records] = torch.arange(len(records))
        return cls(records, of_record[representative])

    def weights(self, masks: Tensor) -> Tensor:
        """(R, n_player) -> (R, n_train)"""
        return masks[:, self.of_record.clamp_min(0)] * (self.of_record >= 0)

    def summed(self, gradients: Tensor) -> Tensor:
        """(..., n_train) -> (..., n_player)"""
        used = self.of_record >= 0
        out = torch.zeros(*gradients.shape[:-1], len(self.records), dtype=gradients.dtype)
        return out.index_add_(-1, self.of_record[used], gradients[..., used])


def plan_shares(
    task: Task, *, budget: float, seed: int = 0, n_rounds: int | None = None, progress: Progress | None = None
) -> Plan:
    """Decide what to measure for about `budget` run equivalents; trains once, to find similar records.

    First the diagonal: a few metagradients, some of them by fold of queries. Then replays, a quarter of the budget tilted over
    clusters and kept apart for the reliability, and where the budget allows it metagradients at random sets. Masks are numbered so that any first part of the
    rounds is a balanced sample by itself. Each kind needs a few, so a plan takes about 60 run equivalents even where less
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
    toggles = max(16, min(128, _even(0.25 * budget)))
    gradients = 0 if diagonal else max(4, _even(0.36 * budget / ratio))
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
        clusters=tuple(_clusters(task, players, progress).tolist()),
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
    evidence = Evidence.of(plan, results)
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
    reliability, slope = division.reliability()
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
    agreement = evidence.agreement()
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


class Masks:
    """The coalitions of a plan, each from (seed, kind, number) alone, so that rounds need not be told of each other.

    Numbers 2p and 2p + 1 are an antithetic pair: the first k and the last k of one permutation. u follows a golden-ratio
    sequence, so that any first part of the pairs covers all sizes.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.n = plan.n_player
        self.clusters = np.array(plan.clusters)
        self.edges = (np.arange(self.n) / max(self.n - 1, 1)) ** (1 / POWER)  # size k is drawn for u in [edge k-1, k)

    def size(self, kind: str, number: int) -> int:
        offset = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, kind))).random()
        # Of the few fold masks each has a size of its own.
        u = (offset + (number if kind == "folds" else number // 2) * GOLDEN) % 1.0
        if kind == "toggles":
            u = TILTED_SIZES[0] + (TILTED_SIZES[1] - TILTED_SIZES[0]) * u
        return min(self.n - 1, 1 + int((self.n - 1) * u**POWER))

    def size_probability(self, sizes: NDArray[np.int64]) -> Array:
        return self.edges[sizes] - self.edges[sizes - 1]

    def node(self, kind: str, number: int) -> float:
        """u of a metagradient on the diagonal: those by fold and the others are parts of one sequence."""
        offset = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, "path"))).random()
        return float((offset + (number + (self.plan.count("folds") if kind == "path" else 0)) * GOLDEN) % 1.0)

    def weights(self, kind: str, number: int) -> NDArray[np.float32]:
        """(n,), what a run is trained with: 0 or 1, or the same t for all records on the diagonal."""
        if self.plan.diagonal and kind in ("folds", "path"):
            return np.full(self.n, self.node(kind, number) ** POWER, np.float32)
        if self.plan.diagonal and kind == "probes":
            return self._probe_of_diagonal(number)
        return self.mask(kind, number).astype(np.float32)

    def mask(self, kind: str, number: int) -> NDArray[np.bool_]:
        if kind == "ends":
            return np.full(self.n, number == 0)
        if kind == "probes":
            return self._probe(number)
        rng = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, kind, number // 2)))
        k, antithetic = self.size(kind, number), number % 2 == 1
        if kind == "toggles":
            return self._tilted(rng, k, antithetic)
        mask = np.zeros(self.n, bool)
        order = rng.permutation(self.n) if kind == "values" else self._balanced(rng)
        mask[order[-k:] if antithetic else order[:k]] = True
        return mask

    def _balanced(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """A permutation whose every prefix holds each cluster in proportion; each record is equally likely anywhere."""
        shuffled = rng.permutation(self.n)
        by_cluster = shuffled[np.argsort(self.clusters[shuffled], kind="stable")]
        sizes = np.bincount(self.clusters)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        labels = self.clusters[by_cluster]
        rank = np.arange(self.n) - starts[labels]
        return by_cluster[np.argsort((rank + rng.random(self.n)) / sizes[labels], kind="stable")]

    def _tilted(self, rng: np.random.Generator, k: int, antithetic: bool) -> NDArray[np.bool_]:
        """k records; those of one random half of the clusters are kept more often, in its twin the other half's.

        Whole clusters are not dropped: what the last records of a kind are worth is another question than the records'
        values answer, and its answer would drown theirs. Twins are of one size, so that their difference is free of F.
        """
        order, uniform = rng.permutation(self.clusters.max() + 1), rng.random(self.n)
        reached = np.cumsum(np.bincount(self.clusters)[order])
        favoured = np.isin(self.clusters, order[reached <= self.n / 2]) ^ antithetic
        t = k / self.n
        tilt = min(TILT, (1 - t) / t)
        mask = np.zeros(self.n, bool)
        mask[np.argsort(uniform / np.where(favoured, 1 + tilt, 1 - tilt + 1e-9), kind="stable")[:k]] = True
        return mask

    def _probe_of_diagonal(self, number: int) -> NDArray[np.float32]:
        """The weights of that node, half of a few random records at 1 and the other half at 0."""
        kind, place = (
            ("folds", number) if number < self.plan.count("folds") else ("path", number - self.plan.count("folds"))
        )
        weights = self.weights(kind, place)
        rng = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, "probes", number)))
        toggled = rng.permutation(self.n)[: max(2, round(PROBE_TOGGLES * self.n))]
        weights[toggled] = np.arange(len(toggled)) % 2
        return weights

    def _probe(self, number: int) -> NDArray[np.bool_]:
        """The metagradient's mask of that number with a few random records toggled."""
        mask = self.mask("gradients", number)
        rng = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, "probes", number)))
        toggled = rng.permutation(self.n)[: max(1, round(PROBE_TOGGLES * self.n))]
        mask[toggled] ^= True
        return mask


def fold_weights(n_query: int, n_fold: int) -> Tensor:
    """(n_fold, n_query): the mean over each fold; query q is in fold q mod n_fold."""
    member = torch.arange(n_query) % n_fold == torch.arange(n_fold)[:, None]
    return member.double() / member.sum(1, keepdim=True)


@dataclass(frozen=True)
class Evidence:
    """All that was measured, in double precision."""

    plan: Plan
    value_masks: NDArray[np.bool_]  # (M_v, n), of "values", then of "toggles"
    values: Array  # (M_v, n_fold): f by fold
    n_value: int  # how many of M_v are of "values"
    node_u: Array  # (D,), of "folds", then of "path", if they are on the diagonal
    nodes: Array  # (D, n): metagradients there
    gradient_masks: NDArray[np.bool_]  # (M_g, n), of "gradients", then of "folds" unless those are on the diagonal
    gradients: Array  # (M_g, n)
    n_plain: int  # how many of M_g are of "gradients"
    fold_u: Array  # (M_f,)
    fold_gradients: Array  # (n_fold, M_f, n)
    ends: Array  # (2, n_fold): f(all), f(none)
    moved: Array  # (M_p, n): what the probes changed of the weights
    said: Array  # (M_p, n): the metagradients there
    did: Array  # (M_p,): what it did to f
    probe_t: Array  # (M_p,)
    fold_sizes: Array  # (n_fold,)

    @classmethod
    def of(cls, plan: Plan, results: Sequence[RoundResult]) -> "Evidence":
        masks, n = Masks(plan), plan.n_player
        numbers = {kind: [j for r in results for j in range(*plan.rounds[r.index].items[kind])] for kind in KINDS}

        def stacked(kind: str, axis: int = 0) -> Array:
            parts = [r.arrays[kind] for r in results if kind in r.arrays]
            return np.concatenate(parts, axis).astype(np.float64) if parts else np.zeros((0, 0))

        def weights(kind: str) -> Array:
            return np.array([masks.weights(kind, j) for j in numbers[kind]], np.float64).reshape(-1, n)

        ends = stacked("ends")
        n_query = ends.shape[1]
        Q = fold_weights(n_query, plan.n_fold).numpy()
        sizes = (Q > 0).sum(1).astype(np.float64)

        def mean(kind: str) -> Array:
            return stacked(kind).reshape(-1, n_query).mean(1)

        fold_gradients = stacked("folds", 1) if numbers["folds"] else np.zeros((plan.n_fold, 0, n))
        by_fold = np.einsum("g,gmn->mn", sizes / sizes.sum(), fold_gradients)
        plain, path = (stacked(kind).reshape(-1, n) for kind in ("gradients", "path"))
        W_folds, W_gradients = weights("folds"), weights("gradients")
        if plan.diagonal:
            node_u = np.array([masks.node(kind, j) for kind in ("folds", "path") for j in numbers[kind]])
            fold_u = node_u[: len(W_folds)]
            nodes, gradient_masks, gradients = np.concatenate([by_fold, path]), W_gradients > 0, plain
        else:
            node_u, fold_u = np.zeros(0), W_folds.mean(1) ** (1 / POWER)
            nodes, gradients = np.zeros((0, n)), np.concatenate([plain, by_fold])
            gradient_masks = np.concatenate([W_gradients, W_folds]) > 0

        # What the probes started from: the first nodes of the diagonal, or the first random sets.
        before, said, was = W_gradients, plain, mean("gradients.values") if len(plain) else np.zeros(0)
        if plan.diagonal and len(nodes):
            before, said = np.concatenate([W_folds, weights("path")]), nodes
            was = np.concatenate([mean("folds.values"), mean("path.values")])
            place = {("folds", j): row for row, j in enumerate(numbers["folds"])}
            place |= {("path", j): len(W_folds) + row for row, j in enumerate(numbers["path"])}
            first = plan.count("folds")
            rows = [place.get(("folds", j) if j < first else ("path", j - first), -1) for j in numbers["probes"]]
        else:
            rows = [j if j < len(plain) else -1 for j in numbers["probes"]]
        kept = [number for number, row in enumerate(rows) if row >= 0]
        at = np.array([rows[number] for number in kept], np.int64)
        probed = weights("probes")[kept]
        values = np.concatenate([stacked(kind).reshape(-1, n_query) for kind in ("values", "toggles")])
        return cls(
            plan=plan,
            value_masks=np.concatenate([weights("values"), weights("toggles")]) > 0,
            values=values @ Q.T,
            n_value=len(numbers["values"]),
            node_u=node_u,
            nodes=nodes,
            gradient_masks=gradient_masks,
            gradients=gradients,
            n_plain=len(plain),
            fold_u=fold_u,
            fold_gradients=fold_gradients,
            ends=ends @ Q.T,
            moved=probed - before[at],
            said=said[at],
            did=(mean("probes")[kept] - was[at]) if kept else np.zeros(0),
            probe_t=before[at].mean(1),
            fold_sizes=sizes,
        )

    def agreement(self) -> float | None:
        """Correlation of what toggling a few records did with what the metagradient said it would do.

        None where that cannot be told: fewer than four probes, or nothing said and nothing done.
        """
        if len(self.did) < 4:
            return None
        scale = np.sqrt(self.probe_t)  # effects at small sizes are larger: no single probe should decide
        said, did = (self.moved * self.said).sum(1) * scale, self.did * scale
        if not (said.any() or did.any()):
            return None
        if not (np.isfinite(said).all() and said.any() and did.any()):
            return 0.0
        return float((said @ did) / math.sqrt((said @ said) * (did @ did)))


@dataclass(frozen=True)
class Prior:
    """Variances of (2)'s unknowns, in units of the noise's where no other is said."""

    clusters: float
    records: float
    slope: float  # of b around 1
    own: float  # of c
    noise: float


class Division:
    """Equation (2), solved by records. Owners come last, in `Partition`."""

    BANDWIDTH = 0.08  # of the smoother over u of metagradients at random sets
    REACH = 0.3  # over u, of an effect d(u): half of its prior variance is common to all sizes
    SLOPE_GRID = (0.003, 0.03, 0.3, 3.0)  # of b(u) around 1
    CLUSTER_GRID = (0.0, 0.1, 1.0, 10.0)
    RECORD_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # never 0, or few replays could not contradict the surrogate
    OWN_GRID = (0.0, 0.05, 0.5)  # of c around 0
    NOISE_GRID = (0.1, 0.3, 1.0)  # of what is noise without effects, that which stays noise with them
    STEP_ODDS = 3.0  # nats that the replays must give for each step to a wider prior
    CURVE_REACH = 0.1  # over u, of F
    APART = 1e6  # the variance of tilted replays in (2): they are predicted, and teach nothing

    def __init__(self, evidence: Evidence) -> None:
        self.e, self.n = evidence, evidence.plan.n_player
        self.weights = evidence.fold_sizes / evidence.fold_sizes.sum()
        ends = evidence.ends @ self.weights
        self.total = float(ends[0] - ends[1])
        self.alone = self.n == 1
        measured = np.concatenate([evidence.ends, evidence.values])
        spread = float(np.ptp(measured, axis=0).max())
        self.still = spread <= RESOLUTION * float(np.abs(measured).max())
        if self.still:
            self.total, self.values = 0.0, np.zeros(self.n)
            return
        if self.alone:
            self.values = np.array([self.total])
            return
        n = self.n
        S = evidence.value_masks.astype(np.float64)
        t = S.mean(1)
        self.u = t ** (1 / POWER)
        centred = S - t[:, None]  # (M_v, n)
        self._lay_out_surrogates(centred)

        # The integral over sizes: every size, or 2,048 of them where there are more.
        k = np.unique(np.linspace(1, n - 1, min(n - 1, 2048)).round().astype(np.int64))
        self.grid_weight = np.gradient(k.astype(np.float64)) if len(k) > 1 else np.ones(1)
        self.grid_weight /= self.grid_weight.sum()
        grid_t = k / n
        self.grid_u = grid_t ** (1 / POWER)

        y = evidence.values @ self.weights - ends[1] - self.total * self.u  # beyond the line between both ends
        x = self._predicted(np.ones(len(evidence.gradients)))
        scale = abs(self.total) if abs(self.total) > 1e-4 * spread else spread
        self.Kf = scale**2 * self._curve_kernel(self.u)
        self.kept_apart = np.where(np.arange(len(y)) < evidence.n_value, 0.0, self.APART)
        self.log_variance = np.array([2 * math.log(0.03 * scale)])
        for _ in range(3):  # the noise's profile and the fit that shows it
            self.noise = self._noise_at(self.u)
            residual = self._left_out(y / self.noise - x[:, 0] / self.noise, self._covariance(x, None)) * self.noise
            twins = residual.reshape(-1, 2)  # their difference: what both miss is F's, and no noise
            difference = (twins[:, 0] - twins[:, 1]) / math.sqrt(2)
            if np.abs(difference).max() <= 1e-7 * scale:  # every twin had its like's value: no noise to learn from
                self.log_variance = np.array([2 * math.log(1e-4 * scale)])
                break
            self.log_variance = _log_variance(self.u[::2], difference)
        self.noise = self._noise_at(self.u)

        # Effects in units of the noise: z has length about 1 at every size.
        clusters = np.array(evidence.plan.clusters)
        self.onehot = np.eye(clusters.max() + 1)[clusters]  # (n, C)
        self.z = centred / np.sqrt(n * t * (1 - t))[:, None]
        self.z_clustered = self.z @ self.onehot  # (M_v, C)
        Kc, Kr = self.z_clustered @ self.z_clustered.T, self.z @ self.z.T
        self.scale_c, self.scale_r = (max(float(np.diag(K)[: evidence.n_value].mean()), 1e-12) for K in (Kc, Kr))
        common = self._common(self.u, self.u)
        self.Kc, self.Kr = common * Kc / self.scale_c, common * Kr / self.scale_r
        self.reach_at = self.grid_weight * self._noise_at(self.grid_u) / np.sqrt(n * grid_t * (1 - grid_t))  # (grid,)
        self.reach = self.reach_at @ self._common(self.grid_u, self.u)  # (M_v,)

        self.x = x / self.noise[:, None]
        self.y = y / self.noise
        self.priors, self.credence = self._weigh_priors()
        self.inverses = [np.linalg.inv(self._covariance(x, prior)) for prior in self.priors]
        self.values = self._values(self.weights[None], np.ones((1, len(evidence.gradients))))[1][0]

    def _lay_out_surrogates(self, centred: Array) -> None:
        """Rows of metagradients; a surrogate at size u is a mixture of them, `_mixtures(u)`."""
        e = self.e
        parts = []
        if e.plan.diagonal:
            tamed, factor = _tamed(e.nodes, e.node_u)
            parts.append(tamed)
            by_fold = factor[: len(e.fold_u)]
        self.u_gradient = np.zeros(0)
        if len(e.gradients):
            G = e.gradient_masks.astype(np.float64)
            tg = G.mean(1, keepdims=True)
            self.u_gradient = tg[:, 0] ** (1 / POWER)
            own = G / (2 * tg) + (1 - G) / (2 * (1 - tg)) - 1
            tamed, factor = _tamed(e.gradients, self.u_gradient)
            parts += [tamed, tamed * own]
            if not e.plan.diagonal:
                by_fold = factor[e.n_plain :]
        self.rows = np.concatenate(parts)  # (M_r, n)
        self.rows -= self.rows.mean(1, keepdims=True)
        folds = np.where(np.isfinite(e.fold_gradients), e.fold_gradients, 0) * by_fold[:, None]
        self.folds = folds - folds.mean(2, keepdims=True)
        self.cross = centred @ self.rows.T  # (M_v, M_r)
        if len(e.fold_u):
            cross = np.einsum("vn,gmn->gvm", centred, self.folds)  # (n_fold, M_v, M_f)
            self.fold_predicted = (self._fold_mixture(self.u) * cross).sum(2)  # (n_fold, M_v)

    def _mixtures(self, u: Array, multiplicity: Array) -> tuple[Array, Array]:
        """Weights (len(u), M_r) of ψ(u), and of the second surrogate less the first."""
        K = _normalised(_kernel(u, self.u_gradient, self.BANDWIDTH) * multiplicity) if len(multiplicity) else None
        if not self.e.plan.diagonal:
            assert K is not None
            return np.hstack([K, 0 * K]), np.hstack([0 * K, K])
        along = _interpolation(u, self.e.node_u)
        if K is None:
            return along, 0 * along
        return np.hstack([along, 0 * K, 0 * K]), np.hstack([-along, K, K])

    def _fold_mixture(self, u: Array) -> Array:
        """Weights (len(u), M_f). Few metagradients show how queries differ; they are not redrawn."""
        if self.e.plan.diagonal:
            return _interpolation(u, self.e.fold_u)
        return _normalised(_kernel(u, self.e.fold_u, self.BANDWIDTH))

    def _noise_at(self, u: Array) -> Array:
        """Standard deviation of f(S) at sets of one size, beyond the surrogate."""
        return np.exp(0.5 * np.polyval(self.log_variance, u))

    def _common(self, u: Array, of: Array) -> Array:
        """Prior correlation of an effect at sizes u with itself at others, (len(u), len(of))."""
        return 0.5 + 0.5 * np.exp(-0.5 * ((u[:, None] - of[None]) / self.REACH) ** 2)

    def _curve_kernel(self, u: Array) -> Array:
        """Prior covariance of F, beyond the line between its known ends, with itself at the measured sizes."""
        gap = (u[:, None] - self.u[None]) / self.CURVE_REACH
        return np.exp(-0.5 * gap**2) * _bridge(u)[:, None] * _bridge(self.u)[None]

    def _predicted(self, multiplicity: Array) -> Array:
        """What the surrogates say of f(S) beyond its mean at each size, (M_v, 2)."""
        return np.stack([(A * self.cross).sum(1) for A in self._mixtures(self.u, multiplicity)], 1)

    def _covariance(self, x: Array, prior: Prior | None) -> Array:
        """Of f(S) − the surrogate at the measured masks, in units of the noise; without effects if no prior is given."""
        x = x / self.noise[:, None]
        K = self.Kf / np.outer(self.noise, self.noise)
        K += (prior.slope if prior else 0.1) * self._common(self.u, self.u) * np.outer(x[:, 0], x[:, 0])
        if prior:
            K += prior.own * np.outer(x[:, 1], x[:, 1]) + prior.clusters * self.Kc + prior.records * self.Kr
        K[np.diag_indices_from(K)] += self.kept_apart + (prior.noise if prior else 1.0)
        return K

    def _left_out(self, r: Array, K: Array) -> Array:
        """Errors of predicting each pair of masks from all others, in units of the noise, in closed form.

        With P the inverse of the covariance, what a pair's own data do not explain is P_pair⁻¹ (P r)_pair. Pairs are
        left out whole: a mask's twin has the same size and would give F away.
        """
        P = np.linalg.inv(K)
        m = len(r) // 2
        pairs = P.reshape(m, 2, m, 2)[np.arange(m), :, np.arange(m), :]  # (m, 2, 2)
        return np.linalg.solve(pairs, (P @ r).reshape(m, 2, 1)).reshape(-1)

    def _weigh_priors(self) -> tuple[list[Prior], Array]:
        """The prior variances that explain the replays, each with its posterior probability.

        An average over all that are plausible, not the best one alone: from few replays the best is often the narrowest,
        and intervals would forget that it was chosen.
        """
        m = self.e.n_value // 2
        pairs = np.unique(np.linspace(0, m - 1, min(m, EVIDENCE_LIMIT // 2)).astype(int))
        some = np.stack([2 * pairs, 2 * pairs + 1], 1).reshape(-1)
        block = np.ix_(some, some)
        r = (self.y - self.x[:, 0])[some]
        own_grid = self.OWN_GRID if np.any(self.x[:, 1]) else (0.0,)
        found = []
        base = (self.Kf / np.outer(self.noise, self.noise))[block]
        first = self._common(self.u[some], self.u[some]) * np.outer(self.x[some, 0], self.x[some, 0])
        second = np.outer(self.x[some, 1], self.x[some, 1])
        Kc, Kr = self.Kc[block], self.Kr[block]
        grids = (self.CLUSTER_GRID, self.RECORD_GRID, self.SLOPE_GRID, own_grid)
        for clusters, records, slope, own, noise in itertools.product(*grids, self.NOISE_GRID):
            K = base + slope * first + own * second + noise * (clusters * Kc + records * Kr)
            K[np.diag_indices_from(K)] += noise
            L = np.linalg.cholesky(K)
            half = np.linalg.solve(L, r)
            evidence = -0.5 * float(half @ half) - float(np.log(np.diag(L)).sum())
            steps = sum(grid.index(v) for grid, v in zip(grids, (clusters, records, slope, own), strict=True))
            evidence -= self.STEP_ODDS * steps
            found.append((evidence, Prior(noise * clusters, noise * records, slope, own, noise)))
        best = max(evidence for evidence, _ in found)
        plausible = [(math.exp(evidence - best), prior) for evidence, prior in found if evidence > best - 6]
        plausible = sorted(plausible, key=lambda one: -one[0])[:16]
        credence = np.array([weight for weight, _ in plausible])
        return [prior for _, prior in plausible], credence / credence.sum()

    def _values(self, weights: Array, multiplicity: Array) -> tuple[Array, Array]:
        """Totals (R,) and records' values (R, n) for R draws of queries (R, n_fold) and of metagradients (R, M_g)."""
        redrawn = multiplicity if multiplicity.size and np.ptp(multiplicity) else multiplicity[:1]
        ends = weights @ self.e.ends.T  # (R, 2)
        totals = ends[:, 0] - ends[:, 1]
        y = weights @ self.e.values.T - ends[:, 1:] - totals[:, None] * self.u  # (R, M_v)
        surrogate = np.stack([self._predicted(m)[:, 0] for m in redrawn])  # (R or 1, M_v)
        if len(self.e.fold_u):
            surrogate = surrogate + (weights - self.weights) @ self.fold_predicted
        r = ((y - surrogate) / self.noise).T  # (M_v, R)
        on_clusters, on_records, on_slope, on_own = 0.0 * r, 0.0 * r, 0.0 * r, 0.0 * r
        for credence, prior, inverse in zip(self.credence, self.priors, self.inverses, strict=True):
            alpha = credence * (inverse @ r)  # (M_v, R)
            on_clusters += prior.clusters * alpha
            on_records += prior.records * alpha
            on_slope += prior.slope * alpha
            on_own += prior.own * alpha
        slopes = 1 + self._slope(on_slope)  # (R, grid)
        phi = totals[:, None] / self.n + self._effects(on_clusters, on_records)
        mixtures = [self._mixtures(self.grid_u, m) for m in redrawn]
        if len(mixtures) == 1:
            mixed = (self.grid_weight * slopes) @ mixtures[0][0]
            mixed += np.outer(self.x[:, 1] @ on_own, self.grid_weight @ mixtures[0][1])
        else:
            mixed = np.stack([(self.grid_weight * b) @ A for b, (A, _) in zip(slopes, mixtures, strict=True)])
            own = np.stack([self.grid_weight @ B for _, B in mixtures])
            mixed += (self.x[:, 1] @ on_own)[:, None] * own
        phi += mixed @ self.rows
        if len(self.e.fold_u):
            at = (self.grid_weight * slopes) @ self._fold_mixture(self.grid_u)  # (R, M_f)
            by_fold = (weights - self.weights)[:, :, None] * at[:, None]  # (R, n_fold, M_f)
            phi += by_fold.reshape(len(phi), -1) @ self.folds.reshape(-1, self.n)
        return totals, phi

    def _slope(self, on_slope: Array) -> Array:
        """b(u) − 1 at every size of the integral, (R, grid)."""
        return (self._common(self.grid_u, self.u) @ (self.x[:, :1] * on_slope)).T

    def _effects(self, on_clusters: Array, on_records: Array) -> Array:
        """Records' values (R, n), centred, of effects that are these combinations (M_v, R) of the replays."""
        clusters = (self.reach[:, None] * on_clusters).T @ self.z_clustered / self.scale_c  # (R, C)
        effects = clusters @ self.onehot.T + (self.reach[:, None] * on_records).T @ self.z / self.scale_r
        return np.asarray(effects - effects.mean(1, keepdims=True))

    def replicates(self, seed: int) -> Iterator[tuple[Array, Array]]:
        """Blocks of draws: totals (R,) and values (R, n), as likely as the estimate given what was measured.

        Queries are redrawn by folds and metagradients at random sets by pairs (a bootstrap); what replays leave open is drawn
        from the posterior of (2), by simulating replays of drawn effects and subtracting the estimate from the simulation
        (Matheron's rule). Few folds know their own spread badly: Student's t.
        """
        e, G = self.e, self.e.plan.n_fold
        rng = np.random.Generator(np.random.PCG64(seed))
        degrees = max(G - 1, 1)
        wider = math.sqrt(G / degrees) * (STUDENT[degrees - 1] if degrees <= len(STUDENT) else 2.2) / 1.96
        for _ in range(N_REPLICATES // REPLICATE_BLOCK):
            drawn = rng.multinomial(G, np.full(G, 1 / G), REPLICATE_BLOCK) * e.fold_sizes
            drawn = drawn / drawn.sum(1, keepdims=True)
            weights = self.weights + wider * (drawn - self.weights)
            if self.still:
                yield np.zeros(REPLICATE_BLOCK), np.zeros((REPLICATE_BLOCK, self.n))
                continue
            if self.alone:
                ends = weights @ e.ends.T
                totals = ends[:, 0] - ends[:, 1]
                yield totals, totals[:, None]
                continue
            totals, phi = self._values(weights, self._redrawn(rng))
            yield totals, phi + self._unexplained(rng)

    def _redrawn(self, rng: np.random.Generator) -> Array:
        """(R, M_g): multiplicities of pairs of metagradients at random sets (those by fold are single)."""
        m, plain = len(self.e.gradients), self.e.n_plain
        if m == 0:
            return np.ones((REPLICATE_BLOCK, 0))
        pairs = rng.multinomial(plain // 2, np.full(plain // 2, 2 / plain), REPLICATE_BLOCK) if plain else None
        single = rng.multinomial(m - plain, np.full(m - plain, 1 / (m - plain)), REPLICATE_BLOCK) if m > plain else None
        parts = ([] if pairs is None else [np.repeat(pairs, 2, 1)]) + ([] if single is None else [single])
        return np.concatenate(parts, 1).astype(np.float64)

    def _unexplained(self, rng: np.random.Generator) -> Array:
        """(R, n): drawn effects less what the regression makes of their replays."""
        R, m = REPLICATE_BLOCK, len(self.y)
        along, at_grid = self._basis()
        basis = self.reach_at @ at_grid  # (B,)
        out = np.zeros((R, self.n))
        chosen = rng.choice(len(self.priors), R, p=self.credence)
        curve = np.linalg.cholesky(self.Kf + 1e-9 * np.trace(self.Kf) / m * np.eye(m)) / self.noise[:, None]
        first, second = (
            A @ self.rows for A in self._mixtures(self.grid_u, np.ones(len(self.e.gradients)))
        )  # (grid, n)
        for number in np.unique(chosen):
            prior, inverse = self.priors[number], self.inverses[number]
            rows = np.flatnonzero(chosen == number)
            slope = rng.standard_normal((len(rows), along.shape[1])) * math.sqrt(prior.slope)
            own = rng.standard_normal(len(rows)) * math.sqrt(prior.own)
            # Effects of each record and cluster as coefficients over u, (R, ·, B).
            on_c = rng.standard_normal((len(rows), self.onehot.shape[1], along.shape[1]))
            on_c *= math.sqrt(prior.clusters / self.scale_c)
            on_r = rng.standard_normal((len(rows), self.n, along.shape[1])) * math.sqrt(prior.records / self.scale_r)
            pair = rng.standard_normal((len(rows), m)) * np.sqrt(prior.noise + self.kept_apart)
            y = pair + rng.standard_normal((len(rows), m)) @ curve.T
            y += (slope @ along.T) * self.x[:, 0] + np.outer(own, self.x[:, 1])
            y += np.einsum("vc,rcb,vb->rv", self.z_clustered, on_c, along, optimize=True)
            y += np.einsum("vn,rnb,vb->rv", self.z, on_r, along, optimize=True)
            effects = (on_c @ basis) @ self.onehot.T + on_r @ basis
            alpha = inverse @ y.T
            slope = slope @ at_grid.T - self._slope(prior.slope * alpha)  # (rows, grid)
            own -= prior.own * (self.x[:, 1] @ alpha)
            out[rows] = effects - effects.mean(1, keepdims=True)
            out[rows] += (self.grid_weight * slope) @ first + np.outer(own, self.grid_weight @ second)
            out[rows] -= self._effects(prior.clusters * alpha, prior.records * alpha)
        return out

    def _basis(self) -> tuple[Array, Array]:
        """Functions of u, as many as matter, whose random combinations have the covariance of `_common`.

        Returns:
            Their values at the replays, (M_v, B), and at every size of the integral, (grid, B).
        """
        at = np.linspace(0, 1, 33)
        size, vectors = np.linalg.eigh(self._common(at, at))
        kept = size > 1e-4 * size[-1]
        functions = vectors[:, kept] * np.sqrt(size[kept])  # (33, B)
        return _interpolation(self.u, at) @ functions, _interpolation(self.grid_u, at) @ functions

    def reliability(self) -> tuple[float, float]:
        """λ: the slope of what tilting clusters did on what the other replays and the metagradients say it does.

        Over pairs of replays that no value is learned from. Twins have one size, so that in their difference whatever depends
        on the number of records alone, all that counting knows, cancels.
        """
        if self.still or self.alone or len(self.y) - self.e.n_value < 4:
            return 0.0, 0.0
        r = self.y - self.x[:, 0]
        x = self.x * self.noise[:, None]
        left_out = sum(
            credence * self._left_out(r, self._covariance(x, prior))
            for credence, prior in zip(self.credence, self.priors, strict=True)
        )
        y, error = self.y[self.e.n_value :], np.asarray(left_out)[self.e.n_value :]
        happened = y[::2] - y[1::2]
        said = happened - (error[::2] - error[1::2])
        spread = float(said @ said)
        slope = float(said @ happened) / spread if spread > 0 else 0.0
        self.explained = 1 - float(((happened - said) ** 2).sum()) / max(float(happened @ happened), 1e-300)
        return min(1.0, max(0.0, slope)), slope

    def details(self) -> dict[str, Any]:
        if self.still or self.alone:
            return {}
        best = self.priors[0]
        return {
            "surrogate": "diagonal" if self.e.plan.diagonal else "random sets",
            "prior": asdict(best),
            "explained": getattr(self, "explained", None),  # of the variance between twins, left out
        }


class Partition:
    """Members who own records: values and their draws, summed."""

    def __init__(self, name: str, ids: Tensor, players: Players, division: Division) -> None:
        self.name, self.division = name, division
        members, position = torch.unique(ids, return_inverse=True)
        self.members = members.numpy()
        of_player = position[players.records].numpy()
        self.counts = np.bincount(of_player, minlength=len(members)).astype(np.float64)
        self.sums: Array = np.bincount(of_player, division.values, len(members)).astype(np.float64)
        self.order = np.argsort(of_player, kind="stable")
        self.present, self.starts = np.unique(of_player[self.order], return_index=True)
        self.drawn: list[Array] = []

    def add(self, drawn: Array, totals: Array) -> None:
        """A block of draws: values (R, n), totals (R,). A total of exactly 0 is divided by count."""
        shares = np.zeros((len(drawn), len(self.members)))
        sums = np.add.reduceat(drawn[:, self.order], self.starts, 1)
        shares[:, self.present] = sums / np.where(totals, totals, 1)[:, None]
        shares[totals == 0] = self.counts / self.counts.sum()
        self.drawn.append(shares)

    def table(self, trust: float) -> tuple[list[Share], Array]:
        """Every member's share, and the draws (R, n_member), moved to have the estimate as their mean."""
        total = self.division.total
        count = self.counts / self.counts.sum()
        point = self.sums / total if total else count
        drawn = np.concatenate(self.drawn)
        drawn = drawn + point - drawn.mean(0)
        blended = np.maximum(trust * point + (1 - trust) * count, 0)
        paid = blended / blended.sum()
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        if self.division.still:
            low, high = np.zeros_like(point), np.ones_like(point)
        return [
            Share(
                owner=int(self.members[j]),
                share=float(point[j]),
                low=float(low[j]),
                high=float(high[j]),
                paid_share=float(paid[j]),
                count_share=float(count[j]),
                n_records=int(self.counts[j]),
                value=float(self.sums[j]),
            )
            for j in range(len(self.members))
        ], drawn


def _interpolation(at: Array, of: Array) -> Array:
    """Weights (len(at), len(of)) of the straight lines between points `of`; constant beyond the outermost."""
    order = np.argsort(of, kind="stable")
    points = of[order]
    right = np.clip(np.searchsorted(points, at), 1, max(len(of) - 1, 1))
    weights = np.zeros((len(at), len(of)))
    rows = np.arange(len(at))
    if len(of) == 1:
        return np.ones_like(weights)
    part = np.clip((at - points[right - 1]) / np.maximum(points[right] - points[right - 1], 1e-300), 0, 1)
    weights[rows, order[right - 1]] += 1 - part
    weights[rows, order[right]] += part
    return weights


def _bridge(u: Array) -> Array:
    """1 inside, falling to 0 at both ends, where F is measured."""
    return np.sqrt(1 - (2 * u - 1) ** 6)


def _log_variance(u: Array, residual: Array) -> Array:
    """Coefficients of log variance, a polynomial in u; the mean of log χ²₁ is −1.27."""
    squares = residual**2
    degree = min(2, len(u) // 8)
    log = np.log(squares + 0.01 * squares.mean() + 1e-300)  # the few that happen to be near 0 must not decide
    coefficients = np.polyfit(u, log, degree)
    coefficients[-1] += math.log(squares.mean() / np.exp(np.polyval(coefficients, u)).mean() + 1e-300)
    return coefficients


def _kernel(at: Array, of: Array, width: float) -> Array:
    """Weights (len(at), len(of)) of a kernel average; its far tail only counts where nothing is near."""
    gap = (at[:, None] - of[None]) / width
    return np.exp(-0.5 * gap**2) + 1e-6 / (1 + gap**2)


def _normalised(weights: Array) -> Array:
    return weights / weights.sum(1, keepdims=True)


def _tamed(gradients: Array, u: Array) -> tuple[Array, Array]:
    """Scale a metagradient far longer than those at neighbouring sizes down to a multiple of their median length.

    Where training is chaotic a few derivatives explode. Any surrogate leaves (2) unbiased; a wild one leaves it noisy.

    Returns:
        The metagradients (M, n), and what each was multiplied by, (M,).
    """
    length = np.linalg.norm(np.where(np.isfinite(gradients), gradients, 0), axis=1)
    usual = np.array([np.median(length[np.argsort(np.abs(u - at), kind="stable")[:9]]) for at in u])
    factor = np.minimum(1, MAX_GRADIENT_RATIO * usual / np.maximum(length, 1e-300))
    return np.where(np.isfinite(gradients), gradients, 0) * factor[:, None], factor


def _clusters(task: Task, players: Players, progress: Progress | None) -> NDArray[np.int64]:
    """Similar records: k-means over gradient directions at the initial and at the final weights."""
    program, n = Program(task), len(players.records)
    k = min(n, max(2, min(MAX_CLUSTERS, n // CLUSTER_SIZE))) if n > MAX_CLUSTERS else n
    if k == n:
        return np.arange(n)
    parts = []
    for state in (program.initial(1), train(task, progress=progress).state):
        rows = block_rows(program, state)
        blocks = [
            sketched(record_gradients(program, state, task.train, i, of_loss=True), SKETCH, 0)
            for i in players.records.split(rows)
        ]
        G = torch.cat(blocks).double()
        length = G.norm(dim=1, keepdim=True)
        parts.append(G / (length + length.median()))  # a record learned perfectly has no direction left
    return _kmeans(torch.cat(parts, 1).cpu().numpy(), k)


def _kmeans(X: Array, k: int, iterations: int = 25) -> NDArray[np.int64]:
    """Lloyd's algorithm from k-means++ seeds, by a fixed generator; every label 0..max is used."""
    rng = np.random.Generator(np.random.PCG64(0))
    centres = [X[rng.integers(len(X))]]
    nearest = ((X - centres[0]) ** 2).sum(1)
    while len(centres) < k and nearest.sum() > 0:
        centres.append(X[rng.choice(len(X), p=nearest / nearest.sum())])
        nearest = np.minimum(nearest, ((X - centres[-1]) ** 2).sum(1))
    C = np.array(centres)
    labels = np.zeros(len(X), np.int64)
    for _ in range(iterations):
        labels = np.argmin((C**2).sum(1) - 2 * X @ C.T, axis=1)
        for j in range(len(C)):
            if (labels == j).any():
                C[j] = X[labels == j].mean(0)
    return np.unique(labels, return_inverse=True)[1]


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


def _promise(n_fold: int, division: "Division") -> str:
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
