"""Records' Shapley values, summed to owners' shares, with intervals and a measured reliability.

The game. Players are classes of copies that the order uses, n of them; f(S) is minus the mean measurement after the
recorded training with the weights of all records outside S at 0. Written over sizes, with t = k/n, Shapley's value is

    φ_i = (f(all) − f(none)) / n + 1/n Σ_{k=1}^{n−1} E_{|S|=k}[ f(S) · (s_i − t) / (t (1 − t)) ]            (1)

(sort the permutation form by size). The second part sums to 0 over i at every size, so both ends are replayed, the total
is exact, and there is no gap left to spread: counting is the zeroth order of (1) and everything else a deviation from it.

The surrogate. At masks S ~ t the metagradient g_i = ∂f/∂w_i answers for all records at once. Averaged over masks of like
size, ψ_i(u) = Σ_m A_m(u) g_i(S_m) with t = u^1.5, it predicts f(S) ≈ F(u) + Σ_i (s_i − t) ψ_i(u). Its sum overshoots
the total; but only deviations from its mean are used, and those are right to a few per cent where training is smooth.
A kept record's slope is taken at weight 1, a dropped one's at 0; weighting them 1/2t and 1/2(1 − t), a trapezoid in
the record's own weight, is a second surrogate, ψ'_i, that enters by its difference from the first.

The correction. Plain replays at masks that no metagradient has seen give, in units of their noise σ(u),

    f(S) = F(u) + b Σ_i (s_i − t) ψ_i(u) + c Σ_i (s_i − t) (ψ'_i − ψ_i)(u) + Σ_i (s_i − t) d_i(u) + σ(u) ε           (2)

with normal priors: F smooth, b around 1, c around 0, d_i(u) = cluster effect + record effect, smooth in u. Their variances
are chosen by the error on left-out pairs, from none to so wide that at every size (2) is KernelSHAP's regression. Then

    φ_i = (f(all) − f(none)) / n + mean over sizes of (b ψ_i + c (ψ'_i − ψ_i) + d_i − the same averaged over i).

This is regression-adjusted Monte Carlo (Witter et al. 2025, arXiv:2506.11849) with a shrunken regression: with
more and more replays the priors lose their say and φ tends to (1) whatever the surrogate; with few, what replays do
not contradict is the surrogate's word. The reliability, from replays kept apart, says how good that word was. Nothing here looks at owners or groups: a record's value is the same
to the bit however accounts are split. Shapley 1953; Owen 1972; Lundberg & Lee 2017; Faithful Group Shapley, 2505.19013.
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
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
from attribution.engine.training import Cost, Program, Progress, cost, metagradients, replay_values, train

Array = NDArray[np.float64]

POWER = 1.5  # t = u^1.5 for uniform u: small sets hold most of the value of a small dataset, and most of the noise
MAX_FOLDS = 10
MAX_CLUSTERS = 64
CLUSTER_SIZE = 12
SKETCH = 64
TILT = 0.5  # of a cluster's chance to be kept, up or down
PROBE_TOGGLES = 0.05  # of the records, for the regime
ROUND_FLOPS = 6e10  # about 30 s of small batched products on one core of 2020
MAX_GRADIENT_RATIO = 8.0  # a metagradient longer than this times its neighbours' median is scaled down to it
N_REPLICATES = 400
KINDS = ("ends", "values", "gradients", "folds", "toggles", "probes")


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
    """Values, shares and how far to trust them. Intervals are 95 %, given these queries and this seed."""

    values: Array  # (n_train,): raw, signed; a class of copies at its representative
    replicates: Array  # (R, n_owner), in the order of `owners`: shares
    owners: list[Share]
    groups: dict[str, list[Share]]
    total: float
    total_low: float
    total_high: float
    reliability: float
    reliability_slope: float
    counted: bool  # the total's interval touches 0, so the count pays
    agreement: float
    regime: str
    run_equivalents: float
    stopping: dict[str, Any]
    details: dict[str, Any]

    @property
    def width(self) -> float:
        """The widest owner's interval, as a fraction of the pool."""
        return max(o.high - o.low for o in self.owners)

    def to_json(self) -> dict[str, Any]:
        return {
            "owners": [asdict(o) for o in self.owners],
            "groups": {name: [asdict(o) for o in members] for name, members in self.groups.items()},
            "total": {"value": self.total, "low": self.total_low, "high": self.total_high},
            "reliability": self.reliability,
            "reliability_slope": self.reliability_slope,
            "paid_by_count": self.counted,
            "regime": self.regime,
            "agreement": self.agreement,
            "run_equivalents": self.run_equivalents,
            "stopping": self.stopping,
            "intervals": "95 %, given these queries and this seed",
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

    A third of the budget goes to metagradients, a quarter to plain replays, a fifth to metagradients by fold of queries, the
    rest to the reliability. Masks are numbered so that any first part of the rounds is a balanced sample by itself. Each kind
    needs a few, so a plan takes about 100 run equivalents even where less is asked; `run_equivalents` says how many.
    """
    if not budget >= 40:
        raise EngineError(f"{budget}: at least 40 run equivalents, or nothing can be measured", pointer="/budget")
    players, known = Players.of(task), cost(task)
    n, ratio = len(players.records), known.metagradient_ratio
    n_fold = min(task.n_query, MAX_FOLDS)
    fold_ratio = _fold_ratio(known, n_fold)
    folds = min(24, max(4, _even(0.2 * budget / fold_ratio)))
    toggles = min(128, max(24, _even(0.16 * budget)))
    gradients = max(4, _even(0.36 * budget / ratio))
    probes = min(gradients, 16)
    values = max(16, _even(budget - 3 - folds * fold_ratio - toggles - gradients * ratio - probes))
    counts = {"ends": 2, "values": values, "gradients": gradients, "folds": folds, "toggles": toggles, "probes": probes}
    if n == 1:
        counts = dict.fromkeys(KINDS, 0) | {"ends": 2}
    spent = _run_equivalents(counts, known, fold_ratio)
    if n_rounds is None:
        n_rounds = math.ceil(spent * known.run_flops / ROUND_FLOPS)
    n_rounds = max(1, min(n_rounds, counts["folds"] or 1, counts["gradients"] // 2 or 1))
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
        run_equivalents=spent,
        n_player=n,
        n_fold=n_fold,
        clusters=tuple(_clusters(task, players, progress).tolist()),
        rounds=rounds,
    )


def run_round(task: Task, plan: Plan, index: int, *, progress: Progress | None = None) -> RoundResult:
    """Measure one round. Rounds are independent; one takes about half a minute on one core."""
    _check_plan(task, plan)
    if not 0 <= index < len(plan.rounds):
        raise EngineError(f"round {index} of {len(plan.rounds)}", pointer="/index")
    players, program = Players.of(task), Program(task)
    masks = Masks(plan)
    arrays: dict[str, NDArray[np.float32]] = {}
    items = plan.rounds[index].items
    report = _Stages(
        progress, [2.0 * (b - a) if kind in ("gradients", "folds") else b - a for kind, (a, b) in items.items()]
    )
    for stage, (kind, (start, stop)) in enumerate(items.items()):
        if start == stop:
            continue
        S = torch.from_numpy(np.stack([masks.mask(kind, j) for j in range(start, stop)]))
        W = players.weights(S.float())
        told = report.stage(stage)
        if kind in ("gradients", "folds"):
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
    """Divide the value over records, owners and groups, from all rounds of a plan or from the first few."""
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
    estimate = division.solve(evidence.once)
    total = estimate.total
    phi = division.value(estimate, division.summed(np.arange(plan.n_player), plan.n_player))
    values[players.records.numpy()] = phi
    drawn = [division.solve(draw) for draw in evidence.bootstrap(seed_of("bootstrap", plan.seed))]
    totals = np.array([solution.total for solution in drawn])
    total_low, total_high = _interval(_centred(totals, total, evidence.inflation))
    reliability, slope = _reliability(division, estimate)
    counted = total_low <= 0 <= total_high
    trust = 0.0 if counted else reliability

    partitions = {"": task.owners} | {name: ids.long() for name, ids in task.groups.items()}
    owners: list[Share] = []
    groups: dict[str, list[Share]] = {}
    replicates = np.zeros((0, 0))
    for name, ids in partitions.items():
        members, position = torch.unique(ids, return_inverse=True)
        of_player = position[players.records].numpy()
        summed = division.summed(of_player, len(members))
        shares = np.array([division.value(solution, summed) for solution in drawn]) / totals[:, None]  # (R, n_member)
        # Summed from the records' own values, so that splitting an account splits its sum and nothing else.
        sums: Array = np.bincount(of_player, phi, len(members)).astype(np.float64)
        shares = _centred(shares, sums / total if total else 0.0, evidence.inflation)
        table = _table(members.numpy(), summed.counts, sums, total, shares, trust)
        if name:
            groups[name] = table
        else:
            owners, replicates = table, shares

    done = [plan.rounds[r.index].items for r in results]
    counts = {kind: sum(items[kind][1] - items[kind][0] for items in done) for kind in KINDS}
    known = cost(task)
    fold_ratio = _fold_ratio(known, plan.n_fold)
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
        regime="smooth" if agreement >= 0.5 else "chaotic",
        run_equivalents=_run_equivalents(counts, known, fold_ratio),
        stopping=stopping,
        details=division.details(estimate) | {"counts": counts, "n_player": plan.n_player},
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
        u = (offset + (number if kind == "folds" else number // 2) * 0.6180339887498949) % 1.0
        return min(self.n - 1, 1 + int((self.n - 1) * u**POWER))

    def size_probability(self, sizes: NDArray[np.int64]) -> Array:
        return self.edges[sizes] - self.edges[sizes - 1]

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
        """About k records; those of one random half of the clusters are kept more often, in its twin the other half's.

        Whole clusters are not dropped: what the last records of a kind are worth is another question than the records'
        values answer, and its answer would drown theirs.
        """
        order, uniform = rng.permutation(self.clusters.max() + 1), rng.random(self.n)
        reached = np.cumsum(np.bincount(self.clusters)[order])
        favoured = np.isin(self.clusters, order[reached <= self.n / 2]) ^ antithetic
        t = k / self.n
        tilt = min(TILT, (1 - t) / t)
        mask = uniform < t * np.where(favoured, 1 + tilt, 1 - tilt)
        first = int(np.argmin(uniform))
        mask[first] = True  # neither nobody nor everybody
        mask[int(np.argmax(uniform))] &= not mask.all()
        return mask

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
class Draw:
    """Multiplicities of one bootstrap replicate; all ones is the estimate itself."""

    values: Array
    gradients: Array
    folds: Array


@dataclass(frozen=True)
class Evidence:
    """All that was measured, in double precision."""

    plan: Plan
    value_masks: NDArray[np.bool_]  # (M_v, n)
    values: Array  # (M_v, n_fold): f by fold
    gradient_masks: NDArray[np.bool_]  # (M_g, n), of "gradients", then of "folds"
    gradients: Array  # (M_g, n)
    gradient_values: Array  # (M_g,)
    n_plain: int  # how many of M_g are of "gradients"
    fold_gradients: Array  # (n_fold, M_f, n)
    ends: Array  # (2, n_fold): f(all), f(none)
    toggle_masks: NDArray[np.bool_]
    toggles: Array  # (M_t,)
    probe_masks: NDArray[np.bool_]
    probes: Array  # (M_p,)
    fold_sizes: Array  # (n_fold,)

    @classmethod
    def of(cls, plan: Plan, results: Sequence[RoundResult]) -> "Evidence":
        masks = Masks(plan)
        numbers = {kind: [j for r in results for j in range(*plan.rounds[r.index].items[kind])] for kind in KINDS}

        def stacked(kind: str, axis: int = 0) -> Array:
            parts = [r.arrays[kind] for r in results if kind in r.arrays]
            return np.concatenate(parts, axis).astype(np.float64) if parts else np.zeros((0, 0))

        def sets(kind: str) -> NDArray[np.bool_]:
            return np.array([masks.mask(kind, j) for j in numbers[kind]], dtype=bool).reshape(-1, plan.n_player)

        ends = stacked("ends")
        Q = fold_weights(ends.shape[1], plan.n_fold).numpy()
        sizes = (Q > 0).sum(1).astype(np.float64)
        share = sizes / sizes.sum()
        fold_gradients = stacked("folds", 1) if numbers["folds"] else np.zeros((plan.n_fold, 0, plan.n_player))
        plain = stacked("gradients").reshape(-1, plan.n_player)
        values = stacked("values").reshape(-1, ends.shape[1])

        def mean(kind: str) -> Array:
            return stacked(kind).reshape(-1, ends.shape[1]).mean(1)

        return cls(
            plan=plan,
            value_masks=sets("values"),
            values=values @ Q.T,
            gradient_masks=np.concatenate([sets("gradients"), sets("folds")]),
            gradients=np.concatenate([plain, np.einsum("g,gmn->mn", share, fold_gradients)]),
            gradient_values=np.concatenate([mean("gradients.values"), mean("folds.values")]),
            n_plain=len(plain),
            fold_gradients=fold_gradients,
            ends=ends @ Q.T,
            toggle_masks=sets("toggles"),
            toggles=mean("toggles"),
            probe_masks=sets("probes"),
            probes=mean("probes"),
            fold_sizes=sizes,
        )

    @property
    def inflation(self) -> float:
        """The bootstrap of n_fold folds knows their variance up to (n_fold − 1) / n_fold."""
        return math.sqrt(self.plan.n_fold / max(self.plan.n_fold - 1, 1))

    @property
    def once(self) -> Draw:
        return Draw(np.ones(len(self.values)), np.ones(len(self.gradients)), np.ones(self.plan.n_fold))

    def bootstrap(self, seed: int) -> list[Draw]:
        """Pairs of masks (those by fold are single), and folds of queries, drawn with replacement."""
        rng = np.random.Generator(np.random.PCG64(seed))

        def pairs(n: int) -> Array:
            return (
                np.repeat(rng.multinomial(n // 2, np.full(n // 2, 2 / n)), 2).astype(np.float64) if n else np.zeros(0)
            )

        def singles(n: int) -> Array:
            return rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64) if n else np.zeros(0)

        G = self.plan.n_fold
        return [
            Draw(
                pairs(len(self.values)),
                np.concatenate([pairs(self.n_plain), singles(len(self.gradients) - self.n_plain)]),
                rng.multinomial(G, np.full(G, 1 / G)).astype(np.float64),
            )
            for _ in range(N_REPLICATES)
        ]

    def agreement(self) -> float:
        """Correlation of what toggling a few records did with what the metagradient said it would do."""
        m = len(self.probes)
        if m < 4:
            return 0.0
        before = self.gradient_masks[: self.n_plain][:m]
        moved = self.probe_masks.astype(np.float64) - before
        said = (moved * self.gradients[:m]).sum(1)
        did = self.probes - self.gradient_values[:m]
        scale = np.sqrt(before.mean(1))  # effects at small sizes are larger: no single mask should decide
        said, did = said * scale, did * scale
        if not (np.isfinite(said).all() and said.any() and did.any()):
            return 0.0
        return float((said @ did) / math.sqrt((said @ said) * (did @ did)))


@dataclass(frozen=True)
class Solution:
    """Equation (2) solved for one draw, still as weights of what was measured, so that any partition can be summed."""

    total: float
    slopes: Array  # (b, c)
    dual: Array  # (M_v,): what each replay adds to the effects and to F
    mean: Array  # (M_g,): ∫A_m
    fold_mean: Array  # (M_f,)
    fold_shift: Array  # (n_fold,): what the draw of queries changes
    none: float  # f(none)


@dataclass(frozen=True)
class Summed:
    """The columns of (2), centred over records and summed over the members of a partition."""

    counts: Array  # (n_member,)
    surrogates: list[Array]  # (M_g, n_member) for each slope
    folds: Array  # (n_fold, M_f, n_member)
    effects: Array  # (M_v, n_member): clusters and records, by their prior variances


class Division:
    """Equation (2): everything is linear in the metagradients, so a bootstrap draw only mixes small matrices."""

    BANDWIDTH = 0.08  # of the smoother over u
    REACH = 0.3  # over u, of an effect d(u): half of its prior variance is common to all sizes
    SLOPE_VARIANCE = 0.25  # of b around 1
    CLUSTER_GRID = (0.0, 0.1, 1.0, 10.0)  # prior variance of the cluster effects, over the noise's
    RECORD_GRID = (0.1, 1.0, 10.0)  # of the record effects: never 0, or few replays could not contradict the surrogate
    OWN_GRID = (0.0, 0.05, 0.5)  # of c around 0
    CURVE_REACH = 0.1  # over u, of F

    def __init__(self, evidence: Evidence) -> None:
        self.e, self.n = evidence, evidence.plan.n_player
        self.alone = self.n == 1
        if self.alone:
            return
        n, plan = self.n, evidence.plan
        S = evidence.value_masks.astype(np.float64)
        t = S.mean(1)
        self.u = t ** (1 / POWER)
        centred = S - t[:, None]  # (M_v, n)

        G = evidence.gradient_masks.astype(np.float64)
        tg = G.mean(1, keepdims=True)
        own = G / (2 * tg) + (1 - G) / (2 * (1 - tg)) - 1
        ug = tg[:, 0] ** (1 / POWER)
        self.u_gradient, uf = ug, ug[evidence.n_plain :]
        tamed = _tamed(evidence.gradients, ug)
        self.surrogates = [tamed, tamed * own]  # (M_g, n) each
        self.cross = [centred @ source.T for source in self.surrogates]  # (M_v, M_g) each
        self.fold_cross = np.einsum("vn,gmn->gvm", centred, evidence.fold_gradients)  # (n_fold, M_v, M_f)

        # The integral over sizes: every size, or 2,048 of them where there are more.
        k = np.unique(np.linspace(1, n - 1, min(n - 1, 2048)).round().astype(np.int64))
        self.grid_weight = np.gradient(k.astype(np.float64)) if len(k) > 1 else np.ones(1)
        self.grid_weight /= self.grid_weight.sum()
        grid_t = k / n
        grid_u = grid_t ** (1 / POWER)
        self.near = _kernel(self.u, ug, self.BANDWIDTH)
        self.near_grid = _kernel(grid_u, ug, self.BANDWIDTH)
        # Few masks show how queries differ, and their own noise is in that difference already: they are not redrawn.
        self.at_fold = _normalised(_kernel(self.u, uf, self.BANDWIDTH))
        self.fold_mean = self.grid_weight @ _normalised(_kernel(grid_u, uf, self.BANDWIDTH))

        self.share = evidence.fold_sizes / evidence.fold_sizes.sum()
        y, x = self._observed(evidence.once, self.share)
        scale = max(abs(float((evidence.ends @ self.share) @ [1, -1])), 1e-300)
        self.Kf = scale**2 * self._curve_kernel(self.u)
        self.scale_f = scale**2
        self.log_variance = np.array([0.0, 0.0, 2 * math.log(0.03 * scale)])
        for _ in range(2):  # the noise's profile and the fit that shows it
            self.noise = self.noise_at(self.u)
            self.log_variance = _log_variance(self.u, self._left_out(y, x, (0.0, 0.0, 0.0)) * self.noise)
        self.noise = self.noise_at(self.u)

        # Effects in units of the noise: z has length about 1 at every size.
        self.onehot = np.eye(max(plan.clusters) + 1)[list(plan.clusters)]  # (n, C)
        self.z = centred / np.sqrt(n * t * (1 - t))[:, None]
        clustered = self.z @ self.onehot  # (M_v, C)
        common = self._common(self.u)
        Kc, Kr = clustered @ clustered.T, self.z @ self.z.T
        self.scale_c, self.scale_r = (max(np.trace(K) / len(K), 1e-12) for K in (Kc, Kr))
        self.Kc, self.Kr = common * Kc / self.scale_c, common * Kr / self.scale_r
        self.reach = (self.grid_weight * self.noise_at(grid_u) / np.sqrt(n * grid_t * (1 - grid_t))) @ self._common(
            grid_u
        )
        self.prior = self._choose_prior(y, x)

    def noise_at(self, u: Array) -> Array:
        """Standard deviation of f(S) at sets of one size, beyond the surrogate."""
        return np.exp(0.5 * np.polyval(self.log_variance, u))

    def _common(self, u: Array) -> Array:
        """Prior correlation of an effect at sizes u with itself at the measured sizes, (len(u), M_v)."""
        return 0.5 + 0.5 * np.exp(-0.5 * ((u[:, None] - self.u[None]) / self.REACH) ** 2)

    def _observed(self, draw: Draw, weights: Array) -> tuple[Array, Array]:
        """f(S) beyond the line between both ends, (M_v,), and the surrogates' predictions, (M_v, 2), of one draw."""
        f_all, f_none = self.e.ends @ weights
        y = self.e.values @ weights - f_none - (f_all - f_none) * self.u
        A = _normalised(self.near * draw.gradients)
        x = np.stack([(A * cross).sum(1) for cross in self.cross], 1)
        if len(self.e.fold_gradients[0]):
            x[:, 0] += np.einsum("g,vm,gvm->v", weights - self.share, self.at_fold, self.fold_cross)
        return y, x

    def summed(self, member: NDArray[np.int64], n_member: int) -> Summed:
        """Sum over members; `member` is (n,). Centring first makes every column sum to 0 over all members."""
        order = np.argsort(member, kind="stable")
        present, starts = np.unique(member[order], return_index=True)

        def reduce(X: Array) -> Array:
            out = np.zeros((*X.shape[:-1], n_member))
            if X.size:
                X = X - X.mean(-1, keepdims=True)
                out[..., present] = np.add.reduceat(X[..., order], starts, -1)
            return out

        counts = np.bincount(member, minlength=n_member).astype(np.float64)
        if self.alone:
            none = np.zeros((0, n_member))
            return Summed(counts, [], none[None], none)
        a_c, a_r, _ = self.prior
        effects = (a_c / self.scale_c) * (self.z @ self.onehot) @ self.onehot.T + (a_r / self.scale_r) * self.z
        return Summed(
            counts, [reduce(source) for source in self.surrogates], reduce(self.e.fold_gradients), reduce(effects)
        )

    def value(self, solution: Solution, summed: Summed) -> Array:
        """φ of every member, (n_member,); they sum to f(all) − f(none)."""
        phi = solution.total * summed.counts / self.n
        if self.alone:
            return phi
        for slope, source in zip(solution.slopes, summed.surrogates, strict=True):
            phi = phi + slope * (solution.mean @ source)
        shift = np.einsum("g,m,gmo->o", solution.fold_shift, solution.fold_mean, summed.folds)
        return phi + solution.slopes[0] * shift + (solution.dual * self.reach) @ summed.effects

    def solve(self, draw: Draw) -> Solution:
        weights = draw.folds * self.e.fold_sizes
        weights = weights / weights.sum()
        ends = self.e.ends @ weights
        total = float(ends[0] - ends[1])
        if self.alone:
            none = np.zeros(0)
            return Solution(total, none, none, none, none, none, float(ends[1]))
        y, x = self._observed(draw, weights)
        used = draw.values > 0
        noise = self.noise[used]
        x_used = x[used] / noise[:, None]
        K = self._prior_kernel(x_used, self.prior, used)
        alpha = np.linalg.solve(K + np.diag(1 / draw.values[used]), y[used] / noise - x_used[:, 0])
        dual = np.zeros(len(y))
        dual[used] = alpha
        slopes = np.array([self.SLOPE_VARIANCE, self.prior[2]]) * (x_used.T @ alpha)
        slopes[0] += 1
        return Solution(
            total=total,
            slopes=slopes,
            dual=dual,
            mean=self.grid_weight @ _normalised(self.near_grid * draw.gradients),
            fold_mean=self.fold_mean,
            fold_shift=weights - self.share,
            none=float(ends[1]),
        )

    def curve(self, solution: Solution, u: Array) -> Array:
        """F(u): the mean of f at sets of each size."""
        return solution.none + solution.total * u + self.scale_f * self._curve_kernel(u) @ (solution.dual / self.noise)

    def beyond_counting(self, solution: Solution, masks: NDArray[np.bool_]) -> Array:
        """What the records' values at these sets' sizes say of f(S) − F, (M,). Their mean over sizes is φ."""
        S = masks.astype(np.float64)
        t = S.mean(1)
        u = t ** (1 / POWER)
        centred = S - t[:, None]
        near = _normalised(_kernel(u, self.u_gradient, self.BANDWIDTH))
        predicted = sum(
            slope * (near * (centred @ source.T)).sum(1)
            for slope, source in zip(solution.slopes, self.surrogates, strict=True)
        )
        z = centred / np.sqrt(self.n * t * (1 - t))[:, None]
        a_c, a_r, _ = self.prior
        onehot = self.onehot
        covariance = a_c / self.scale_c * (z @ onehot) @ (self.z @ onehot).T + a_r / self.scale_r * z @ self.z.T
        return predicted + self.noise_at(u) * ((covariance * self._common(u)) @ solution.dual)

    def _curve_kernel(self, u: Array) -> Array:
        """Prior covariance of F, beyond the line between its known ends, with itself at the measured sizes."""
        gap = (u[:, None] - self.u[None]) / self.CURVE_REACH
        return np.exp(-0.5 * gap**2) * _bridge(u)[:, None] * _bridge(self.u)[None]

    def _prior_kernel(self, x: Array, prior: tuple[float, float, float], used: NDArray[np.bool_]) -> Array:
        """Covariance of f(S) at the used masks, in units of the noise: of F, of the slopes, and of the effects."""
        block, noise = np.ix_(used, used), self.noise[used]
        a_c, a_r, own = prior
        K = self.Kf[block] / np.outer(noise, noise) + self.SLOPE_VARIANCE * np.outer(x[:, 0], x[:, 0])
        if own:
            K += own * np.outer(x[:, 1], x[:, 1])
        if a_c:
            K += a_c * self.Kc[block]
        if a_r:
            K += a_r * self.Kr[block]
        return K

    def _left_out(self, y: Array, x: Array, prior: tuple[float, float, float], slope: float = 1.0) -> Array:
        """Errors of predicting each pair of masks from all others, in units of the noise, in closed form.

        With P the inverse of the covariance, what a pair's own data do not explain is P_pair⁻¹ (P y)_pair. Pairs are
        left out whole: a mask's antithetic twin has the same size and would give F away.
        """
        x = x / self.noise[:, None]
        K = self._prior_kernel(x * slope, prior, np.ones(len(y), bool))
        P = np.linalg.inv(K + np.eye(len(y)))
        m = len(y) // 2
        Py = (P @ (y / self.noise - slope * x[:, 0])).reshape(m, 2, 1)
        pairs = P.reshape(m, 2, m, 2)[np.arange(m), :, np.arange(m), :]  # (m, 2, 2)
        return np.linalg.solve(pairs, Py).reshape(-1)

    def _choose_prior(self, y: Array, x: Array) -> tuple[float, float, float]:
        """The prior variances that predict held-out pairs of masks best."""
        losses = {
            prior: float((self._left_out(y, x, prior) ** 2).mean())
            for prior in itertools.product(self.CLUSTER_GRID, self.RECORD_GRID, self.OWN_GRID)
        }
        best = min(losses, key=losses.__getitem__)
        self.explained = 1 - losses[best] / float((self._left_out(y, x, (0.0, 0.0, 0.0), slope=0.0) ** 2).mean())
        return best

    def details(self, solution: Solution) -> dict[str, Any]:
        if self.alone:
            return {}
        return {
            "slopes": solution.slopes.tolist(),
            "prior": list(self.prior),
            "explained": self.explained,  # of the variance of f(S) at sets of one size, left out
        }


def _bridge(u: Array) -> Array:
    """1 inside, falling to 0 at both ends, where F is measured."""
    return np.sqrt(1 - (2 * u - 1) ** 6)


def _log_variance(u: Array, residual: Array) -> Array:
    """Coefficients of log variance, quadratic in u; the mean of log χ²₁ is −1.27."""
    squares = residual**2
    coefficients = np.polyfit(u, np.log(squares + 1e-6 * squares.mean() + 1e-300), 2)
    coefficients[-1] += 1.27
    return coefficients


def _reliability(division: Division, solution: Solution) -> tuple[float, float]:
    """λ: the slope of what tilting clusters did on what the values say it does, both beyond what counting says.

    Over pairs of replays that no other number uses: in one, half of the clusters are kept more often, in its twin the other
    half. The twins' difference is compared, in which whatever depends on the number of records alone cancels.
    """
    e = division.e
    if division.alone or len(e.toggles) < 4:
        return 0.0, 0.0
    u = e.toggle_masks.mean(1) ** (1 / POWER)
    happened = e.toggles - division.curve(solution, u)
    predicted = division.beyond_counting(solution, e.toggle_masks)
    x, y = predicted[::2] - predicted[1::2], happened[::2] - happened[1::2]
    precision = division.noise_at(u[::2]) ** -2
    spread = float((precision * x * x).sum())
    slope = float((precision * x * y).sum()) / spread if spread > 0 else 0.0
    return min(1.0, max(0.0, slope)), slope


def _table(ids: NDArray[np.int64], counts: Array, phi: Array, total: float, drawn: Array, trust: float) -> list[Share]:
    """Shares of one partition; `drawn` is (R, n_member)."""
    count = counts / counts.sum()
    point = phi / total if total else np.zeros_like(phi)
    blended = np.maximum(trust * point + (1 - trust) * count, 0)
    paid = blended / blended.sum()
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [
        Share(
            owner=int(ids[j]),
            share=float(point[j]),
            low=float(low[j]),
            high=float(high[j]),
            paid_share=float(paid[j]),
            count_share=float(count[j]),
            n_records=int(counts[j]),
            value=float(phi[j]),
        )
        for j in range(len(ids))
    ]


def _kernel(at: Array, of: Array, width: float) -> Array:
    """Weights (len(at), len(of)) of a kernel average; its far tail only counts where nothing is near."""
    gap = (at[:, None] - of[None]) / width
    return np.exp(-0.5 * gap**2) + 1e-6 / (1 + gap**2)


def _normalised(weights: Array) -> Array:
    return weights / weights.sum(1, keepdims=True)


def _tamed(gradients: Array, u: Array) -> Array:
    """Scale a metagradient far longer than those at neighbouring sizes down to a multiple of their median length.

    Where training is chaotic a few derivatives explode. Any surrogate leaves (2) unbiased; a wild one leaves it noisy.
    """
    length = np.linalg.norm(np.where(np.isfinite(gradients), gradients, 0), axis=1)
    usual = np.array([np.median(length[np.argsort(np.abs(u - at), kind="stable")[:9]]) for at in u])
    factor = np.minimum(1, MAX_GRADIENT_RATIO * usual / np.maximum(length, 1e-300))
    return np.where(np.isfinite(gradients), gradients, 0) * factor[:, None]


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
    return _kmeans(torch.cat(parts, 1).numpy(), k)


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


def _centred(drawn: Array, point: Array | float, inflation: float) -> Array:
    return point + (drawn - drawn.mean(0)) * inflation


def _run_equivalents(counts: dict[str, int], known: Cost, fold_ratio: float) -> float:
    """FLOPs of everything, the run that found the clusters included, over those of one unbatched run."""
    plain = 1 + counts["ends"] + counts["values"] + counts["toggles"] + counts["probes"]
    return plain + counts["gradients"] * known.metagradient_ratio + counts["folds"] * fold_ratio


def _fold_ratio(known: Cost, n_fold: int) -> float:
    """Run equivalents of one metagradient for n_fold questions: they share the forward pass and its recomputation."""
    return 2 + max(0.0, known.metagradient_ratio - 2) * n_fold


def _even(x: float) -> int:
    return max(0, 2 * int(x // 2))


def _cut(kind: str, count: int, part: int, parts: int) -> int:
    """Where a part of `count` items begins: between pairs; the two ends stay together in the first part."""
    if part == 0 or part == parts or kind == "ends":
        return count if part else 0
    step = 1 if kind == "folds" else 2
    return min(count, step * round(count * part / parts / step))


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
