"""Which sets of records are replayed for `shares`, each from (seed, kind, number) alone."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution.engine.gradients import block_rows, record_gradients, sketched
from attribution.engine.task import Task, seed_of
from attribution.engine.training import Program, Progress, train

Array = NDArray[np.float64]

POWER = 1.5  # t = u^1.5 for uniform u: small sets hold most of the value of a small dataset, and most of the noise
MAX_CLUSTERS = 64
CLUSTER_SIZE = 12
SKETCH = 64
TILT = 0.8  # of a cluster's chance to be kept, up or down
TILTED_SIZES = (0.3, 0.9)  # in u: a few records, or all but a few, leave clusters little to be tilted
PROBE_TOGGLES = 0.05  # of the records, for the regime
GOLDEN = 0.6180339887498949
KINDS = ("ends", "folds", "path", "gradients", "values", "toggles", "probes")


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

    @property
    def n_node(self) -> int:
        """Metagradients on the diagonal: those by fold of queries, then the others."""
        return self.plan.count("folds") + self.plan.count("path")

    def place(self, kind: str, number: int) -> int:
        """The node that an item of "folds" or "path" is, a pair of "gradients" is spread around, or a probe starts from."""
        match kind:
            case "path":
                return self.plan.count("folds") + number
            case "gradients":
                return number // 2 % self.n_node
        return number

    def node(self, place: int) -> float:
        """u of a node of the diagonal."""
        offset = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, "path"))).random()
        return float((offset + place * GOLDEN) % 1.0)

    def weights(self, kind: str, number: int) -> NDArray[np.float32]:
        """(n,), what a run is trained with: 0 or 1, or on the diagonal the same t for all records, or around it."""
        if not self.plan.diagonal or kind in ("ends", "values", "toggles"):
            return self.mask(kind, number).astype(np.float32)
        t = self.node(self.place(kind, number)) ** POWER
        at_node = np.full(self.n, t)
        if kind == "gradients":
            # A random half of the records goes up, in the twin the other half, as far as 0 or 1 is.
            rng = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, kind, number // 2)))
            up = (rng.integers(0, 2, self.n) * 2 - 1) * (1 - number % 2 * 2)
            at_node += min(t, 1 - t) * up
        elif kind == "probes":
            # Half of a few random records at 1 and the other half at 0.
            rng = np.random.Generator(np.random.PCG64(seed_of(self.plan.seed, kind, number)))
            toggled = rng.permutation(self.n)[: max(2, round(PROBE_TOGGLES * self.n))]
            at_node[toggled] = np.arange(len(toggled)) % 2
        return at_node.astype(np.float32)

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


def clusters_of(task: Task, players: Players, progress: Progress | None) -> NDArray[np.int64]:
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
