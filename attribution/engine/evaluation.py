"""Do the scores predict what retraining does, and do they divide as the game divides?

f_q(S) is minus the measurement of query q after the recorded training with the players outside S at weight 0, order and
seed as recorded. Every figure here compares scores with retrains that no method has seen.

LDS, the linear datamodeling score. Over M random subsets that keep a fraction of the players,

    LDS = mean over q of Spearman_m( f_q(S_m), Σ_{i ∈ S_m} score[i, q] )                                    (1)

1: the scores put all retrains in their order; 0: they know nothing. Ilyas et al. 2022, arXiv:2202.00622; Park et al. 2023,
arXiv:2303.14186. At half kept it asks for large changes, at 95 or 99 % kept for small ones: methods differ in which they
predict. Its interval is 95 %, subsets and queries redrawn.

Share error. With few players all 2^n subsets are retrained, and Shapley's value is what it is defined to be:

    φ_i = Σ_{S ∌ i} (f(S ∪ i) − f(S)) / (n · C(n−1, |S|))                                                    (2)

The error of a division is its total variation from the true one, the part of the pool that goes to the wrong owners.

Leave-k-out. The k players scored highest on average are left out and the model retrained: the measurement must rise, and by
more than when k random ones are left out.

Detection. Wrong labels, ranked by harmfulness (minus the mean score over queries) or by self-influence (the score of a
record for its own loss: Koh & Liang 2017, arXiv:1703.04730; Pruthi et al. 2020, arXiv:2002.08484); copies, ranked by the
cosine of a record's scores to those of the record most like it. AUC: the chance that a wrong one ranks above a right one.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from attribution.engine.coalitions import Players
from attribution.engine.errors import EngineError
from attribution.engine.files import arrays_digest, written_whole
from attribution.engine.progress import Interrupted
from attribution.engine.ranks import Ranked, spearman
from attribution.engine.task import Batch, Records, Task, seed_of
from attribution.engine.training import Program, Progress, replay_values
from attribution.engine.workers import claimed

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

CHUNK = 50  # retrains to a file: what a killed command loses at most
MAX_EXACT_PLAYERS = 12
N_REPLICATES = 400
N_RANDOM = 10  # random orders of leaving out
MIN_SUBSETS = 10
SAME = 1e-3  # of f(all) − f(none): how far a repeated run may be off on another machine


class GroundTruth:
    """Retrains of any sets of players, each chunk kept in a file under its task and masks, and read from there again.

    A file that is broken, was changed, or belongs to other masks is measured again. `task.digest` cannot see what `model`,
    `loss` and `measurement` do, so the runs with all records and with none are repeated each time and compared.
    """

    def __init__(
        self,
        task: Task,
        folder: Path | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
        is_shared: bool = False,
    ) -> None:
        self.task, self.players, self.stop = task, Players.of(task), stop
        self.is_shared = is_shared  # with other processes that fill the folder
        self.program = Program(task)
        self.folder = folder / task.digest[:16] if folder else None
        self.measured = self.reused = self.redone = 0  # chunks
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.f_all, self.f_none = self._ends()

    @property
    def n(self) -> int:
        return len(self.players.records)

    def values(self, masks: Mask, *, progress: Progress | None = None) -> Array:
        """f_q(S), (len(masks), n_query), of the sets given by masks (R, n_player)."""
        if masks.ndim != 2 or masks.shape[1] != self.n:
            raise EngineError(f"must be (runs, {self.n}), one column per player, is {masks.shape}", pointer="/masks")
        parts = []
        for start in range(0, len(masks), CHUNK):
            chunk = masks[start : start + CHUNK]
            found = self._kept(chunk)
            if found is None and self.is_shared:
                found = self._measured_by_someone(chunk)
            if found is None:
                if self.stop():
                    raise Interrupted("finished retrains are kept")
                told = _within(progress, start, len(chunk), len(masks))
                found = self._measure(chunk, told)
                self._keep(chunk, found)
                self.measured += 1
            elif progress:
                progress(start + len(chunk), len(masks))
            parts.append(found)
        return np.concatenate(parts).astype(np.float64)

    def _measured_by_someone(self, chunk: Mask) -> NDArray[np.float32]:
        """Measure a chunk that no other process is measuring; of another's nothing is known yet."""
        where = self._path(chunk)
        assert where is not None, "processes share a folder"
        if self.stop():
            raise Interrupted("finished retrains are kept")
        with claimed(where[0]) as is_mine:
            if is_mine:
                self._keep(chunk, self._measure(chunk, None))
        return np.full((len(chunk), self.task.n_query), np.nan, np.float32)

    def _ends(self) -> tuple[Array, Array]:
        masks = np.array([[True] * self.n, [False] * self.n])
        now, kept = self._measure(masks, None), self._kept(masks)
        if kept is None:
            self._keep(masks, now)
        elif not np.allclose(now, kept, rtol=0, atol=SAME * max(1e-12, float(np.abs(now[0] - now[1]).mean()))):
            raise EngineError(
                "was measured with another model, loss or measurement, or where training is chaotic on another machine; "
                "remove it or choose another folder",
                pointer=str(self.folder),
            )
        else:
            self.reused -= 1  # read to be compared
        return now[0].astype(np.float64), now[1].astype(np.float64)

    def _measure(self, masks: Mask, progress: Progress | None) -> NDArray[np.float32]:
        W = self.players.weights(torch.from_numpy(masks).float())
        f = replay_values(self.task, W, per_query=True, program=self.program, progress=progress)
        return f.float().cpu().numpy()

    def _path(self, masks: Mask) -> tuple[Path, str] | None:
        if self.folder is None:
            return None
        digest = arrays_digest({"masks": masks})
        return self.folder / f"{digest[:32]}.safetensors", digest

    def _keep(self, masks: Mask, values: NDArray[np.float32]) -> None:
        where = self._path(masks)
        if where is None:
            return
        path, digest = where
        header = {"task": self.task.digest, "masks": digest, "sha256": arrays_digest({"values": values})}
        with written_whole(path) as partial:
            save_file({"values": values}, partial, metadata={"residual": json.dumps(header, sort_keys=True)})

    def _kept(self, masks: Mask) -> NDArray[np.float32] | None:
        where = self._path(masks)
        if where is None or not where[0].exists():
            return None
        path, digest = where
        try:
            with safe_open(path, "np") as file:
                header = json.loads((file.metadata() or {})["residual"])
                values: NDArray[np.float32] = file.get_tensor("values")
        except (SafetensorError, KeyError, OSError, json.JSONDecodeError):
            self.redone += 1
            return None
        expected = {"task": self.task.digest, "masks": digest, "sha256": arrays_digest({"values": values})}
        if header != expected or values.shape != (len(masks), self.task.n_query):
            self.redone += 1
            return None
        self.reused += 1
        return values


def random_subsets(n_player: int, kept: float, n_subsets: int, seed: int) -> Mask:
    """(n_subsets, n_player): each mask from (seed, kept, number) alone, so that more subsets extend fewer."""
    if not 0 < kept < 1:
        raise EngineError(f"{kept} is not a fraction between 0 and 1, such as 0.5", pointer="/kept")
    if n_subsets < MIN_SUBSETS:
        raise EngineError(f"{n_subsets}: fewer than {MIN_SUBSETS} retrains show no order", pointer="/subsets")
    if n_player < 2:
        raise EngineError("one player alone has no subsets to compare", pointer="/train")
    k = min(n_player - 1, max(1, round(kept * n_player)))
    masks = np.zeros((n_subsets, n_player), bool)
    for number, mask in enumerate(masks):
        rng = np.random.Generator(np.random.PCG64(seed_of("subsets", seed, kept, number)))
        mask[rng.permutation(n_player)[:k]] = True
    return masks


@dataclass(frozen=True)
class LDS:
    """Equation (1), its 95 % interval, and what it was taken over."""

    kept: float
    lds: float
    low: float
    high: float
    n_subsets: int
    n_query: int
    n_constant: int  # queries that no retrain moves; left out


def datamodeling_score(values: Array, masks: Mask, scores: Array, *, kept: float, seed: int = 0) -> LDS:
    """LDS of scores (n_player, n_query) against the retrains' values (M, n_query) at masks (M, n_player)."""
    truth, said = Ranked(values), Ranked(_rounded(masks.astype(np.float64) @ scores))
    used = ~truth.is_constant
    if not used.any():
        raise EngineError("no retrain changes any query; keep fewer records, or train longer", pointer="/kept")
    m, n_query = values.shape
    per_query = spearman(truth, said, np.ones(m))
    rng = np.random.Generator(np.random.PCG64(seed_of("lds", seed)))
    drawn = np.empty(N_REPLICATES)
    for r in range(N_REPLICATES):
        rho = spearman(truth, said, rng.multinomial(m, np.full(m, 1 / m)).astype(np.float64))[used]
        drawn[r] = rho[rng.integers(0, len(rho), len(rho))].mean()
    lds = float(per_query[used].mean())
    low, high = np.clip(lds + np.quantile(drawn, [0.025, 0.975]) - drawn.mean(), -1, 1)
    return LDS(kept, lds, float(low), float(high), m, n_query, int(truth.is_constant.sum()))


def all_subsets(n: int) -> Mask:
    """(2^n, n): subset number Σ 2^i over its members."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1


def exact_values(truth: GroundTruth, *, progress: Progress | None = None) -> Array:
    """Equation (2) for every player and query, (n_player, n_query), from the retrains of all subsets.

    Raises:
        EngineError: more than twelve players.
    """
    n = truth.n
    _check_exact(n)
    code, masks = np.arange(2**n), all_subsets(n)
    f = truth.values(masks, progress=progress)
    size = masks.sum(1)
    phi = np.empty((n, f.shape[1]))
    for i in range(n):
        without = code[~masks[:, i]]
        weight = 1 / (n * np.array([math.comb(n - 1, k) for k in size[without]]))
        phi[i] = weight @ (f[without | 1 << i] - f[without])
    return phi


@dataclass(frozen=True)
class ShareError:
    """How far a division over the owners is from the exact one; None where the scores' sum, or the game's, is near 0 or below."""

    owners: float | None  # total variation
    records: float | None  # the same with every player as its own owner
    blended: float | None  # owners, after the best blend with counting, its weight picked on the truth
    correlation: float  # of the players' values with the exact ones


def share_error(values: Array, exact: Array, owner: NDArray[np.int64]) -> ShareError:
    """Compare players' values (n,) with the exact ones (n,), summed by owner (n,)."""
    member = np.unique(owner, return_inverse=True)[1]
    size = np.bincount(member).astype(np.float64)
    count = size / size.sum()
    if not exact.sum() > SAME * np.abs(exact).sum():  # f(all) − f(none) near 0 or below: there is nothing to divide
        return ShareError(None, None, None, correlation_of(values, exact))
    true = np.bincount(member, exact) / exact.sum()
    correlation = correlation_of(values, exact)
    if not values.sum() > SAME * np.abs(values).sum():
        return ShareError(None, None, None, correlation)
    said = np.bincount(member, values) / values.sum()

    def variation(a: Array, b: Array) -> float:
        return float(np.abs(a - b).sum() / 2)

    blends = [variation(w * said + (1 - w) * count, true) for w in np.linspace(0, 1, 101)]
    return ShareError(
        variation(said, true), variation(values / values.sum(), exact / exact.sum()), min(blends), correlation
    )


def correlation_of(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


@dataclass(frozen=True)
class LeftOut:
    """The mean measurement after k players were left out; lower is better."""

    fraction: float
    k: int
    measurement: float
    low: float  # of several random orders, the same number twice for a method's one
    high: float


def removal_counts(n_player: int, fractions: Sequence[float]) -> list[int]:
    for number, fraction in enumerate(fractions):
        if not 0 < fraction < 1:
            raise EngineError(f"{fraction} is not a fraction between 0 and 1", pointer=f"/leave_out/{number}")
    return [min(n_player - 1, max(1, round(fraction * n_player))) for fraction in fractions]


def removal_masks(orders: NDArray[np.int64], counts: Sequence[int]) -> Mask:
    """(len(orders) · len(counts), n_player): the first k of each order left out, for every k."""
    masks = np.ones((len(orders), len(counts), orders.shape[1]), bool)
    for o, order in enumerate(orders):
        for c, k in enumerate(counts):
            masks[o, c, order[:k]] = False
    return masks.reshape(-1, orders.shape[1])


def auc(is_positive: NDArray[np.bool_], by: Array) -> float:
    """The chance that a positive has the larger number than a negative, ties counted half (Mann & Whitney)."""
    n, n_positive = len(by), int(is_positive.sum())
    if not 0 < n_positive < n:
        raise EngineError(f"{n_positive} of {n} are marked; some must be and some not", pointer="/marked")
    rank = Ranked(by[:, None]).ranks(np.ones(n))[:, 0]
    return float((rank[is_positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * (n - n_positive)))


def likeness(scores: Array) -> Array:
    """(n_train,): the largest cosine of a record's row of scores with another record's."""
    length = np.linalg.norm(scores, axis=1, keepdims=True)
    rows = scores / np.where(length > 0, length, 1)
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), 1024):
        cosine = rows[start : start + 1024] @ rows.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -np.inf
        nearest[start : start + 1024] = cosine.max(1)
    return nearest


@dataclass(frozen=True)
class Scored:
    """One method's answers: `scores` is (n_train, n_query), or (n_train, 1) where all queries get the same."""

    name: str
    scores: Array
    calibrated: bool | None = None  # None: nobody said
    seconds: float | None = None
    self_influence: Array | None = None  # (n_train,), for wrong labels
    without_copies: Array | None = None  # (n_train, n_query), scored as if nobody knew the copies


@dataclass(frozen=True)
class Evaluated:
    """What was found about one method; a detection that was not asked for is None."""

    name: str
    calibrated: bool | None
    seconds: float | None
    lds: list[LDS]
    share_error: ShareError | None
    leave_out: list[LeftOut]
    mislabelled_auc: dict[str, float] | None
    copies_auc: float | None


@dataclass(frozen=True)
class Evaluation:
    """All methods against the same retrains."""

    methods: list[Evaluated]
    random: list[LeftOut]
    by_count: ShareError | None
    measurement: float  # with all records
    measurement_without: float  # with none
    n_player: int
    settings: dict[str, Any]
    truth: dict[str, int] = field(default_factory=dict)  # chunks measured, reused, redone

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    task: Task,
    scored: Sequence[Scored],
    *,
    folder: Path | None = None,
    kept: Sequence[float] = (0.5,),
    n_subsets: int = 100,
    seed: int = 0,
    leave_out: Sequence[float] = (),
    exact: bool = False,
    mislabelled: NDArray[np.bool_] | None = None,
    copies: NDArray[np.bool_] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    spread: Callable[[], None] | None = None,
) -> Evaluation:
    """Compare methods with retrains of the recorded training, which are kept in `folder`.

    Args:
        kept: fractions of the players that the subsets of the LDS keep, a set of subsets for each.
        leave_out: fractions of the players to leave out, top-scored first.
        exact: also retrain all subsets, of at most twelve players.
        mislabelled: (n_train,), the records whose labels are known to be wrong.
        copies: (n_train,), the records that have a copy, or nearly one, among the others.
        stop: asked after every chunk of retrains.
        spread: once everything is checked, may have other processes do the retrains into `folder`; what it leaves is done here.

    Raises:
        Interrupted: told to stop; finished retrains are kept.
        EngineError: a recipe is missing, scores of another shape, a fraction or number out of range.
    """
    if not scored:
        raise EngineError("none was given", pointer="/methods")
    players = Players.of(task)
    n = len(players.records)
    sets = {fraction: random_subsets(n, fraction, n_subsets, seed) for fraction in kept}
    counts = removal_counts(n, leave_out)
    if exact:
        _check_exact(n)
    on_players = {s.name: _on_players(task, players, s) for s in scored}
    marked = None if mislabelled is None else _of_players(players, _flags(mislabelled, task.n_train, "/mislabelled"))
    copied = None if copies is None else _flags(copies, task.n_train, "/copies")

    random_orders = _random_orders(n, seed)
    top = {name: _top(s) for name, s in on_players.items()}
    jobs = [n_subsets] * len(kept) + [len(counts) * (N_RANDOM + len(scored))] + [2**n if exact else 0]
    total = sum(jobs)

    truth = GroundTruth(task, folder, stop=stop)
    if spread:
        spread()
    found = {
        fraction: truth.values(masks, progress=_within(progress, number * n_subsets, n_subsets, total))
        for number, (fraction, masks) in enumerate(sets.items())
    }
    done = n_subsets * len(kept)
    removed: dict[str, Array] = {}
    random_removed = np.zeros((0, 0))
    if counts:
        size = N_RANDOM * len(counts)
        told = _within(progress, done, size, total)
        random_removed = -truth.values(removal_masks(random_orders, counts), progress=told).mean(1)
        random_removed = random_removed.reshape(N_RANDOM, len(counts))
        done += size
        for name, order in top.items():
            told = _within(progress, done, len(counts), total)
            removed[name] = -truth.values(removal_masks(order[None], counts), progress=told).mean(1)
            done += len(counts)
    phi = exact_values(truth, progress=_within(progress, done, 2**n, total)).mean(1) if exact else None
    owner = task.owners[players.records].numpy()

    methods = []
    for s in scored:
        on = on_players[s.name]
        methods.append(
            Evaluated(
                name=s.name,
                calibrated=s.calibrated,
                seconds=s.seconds,
                lds=[datamodeling_score(found[f], sets[f], on, kept=f, seed=seed) for f in sets],
                share_error=share_error(on.mean(1), phi, owner) if phi is not None else None,
                leave_out=[
                    LeftOut(fraction, k, float(m), float(m), float(m))
                    for fraction, k, m in zip(leave_out, counts, removed.get(s.name, ()), strict=True)
                ],
                mislabelled_auc=None if marked is None else _mislabelled(s, players, on, marked),
                copies_auc=None
                if copied is None or s.without_copies is None
                else auc(copied, likeness(s.without_copies)),
            )
        )
    return Evaluation(
        methods=methods,
        random=[
            LeftOut(fraction, k, float(m.mean()), *map(float, np.quantile(m, [0.025, 0.975])))
            for fraction, k, m in zip(leave_out, counts, random_removed.T, strict=True)
        ]
        if counts
        else [],
        by_count=share_error(np.ones(n), phi, owner) if phi is not None else None,
        measurement=-float(truth.f_all.mean()),
        measurement_without=-float(truth.f_none.mean()),
        n_player=n,
        settings={"kept": list(kept), "subsets": n_subsets, "seed": seed, "leave_out": list(leave_out)},
        truth={"measured": truth.measured, "reused": truth.reused, "redone": truth.redone},
    )


def retrain_some(
    task: Task,
    scored: Sequence[Scored],
    *,
    folder: Path,
    kept: Sequence[float],
    n_subsets: int,
    seed: int,
    leave_out: Sequence[float],
    exact: bool,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Those retrains of an `evaluate` with these arguments that are neither in `folder` nor being done by another process."""
    truth = GroundTruth(task, folder, stop=stop, is_shared=True)
    counts = removal_counts(truth.n, leave_out)
    for fraction in kept:
        truth.values(random_subsets(truth.n, fraction, n_subsets, seed))
    if counts:
        truth.values(removal_masks(_random_orders(truth.n, seed), counts))
        for s in scored:
            truth.values(removal_masks(_top(_on_players(task, truth.players, s))[None], counts))
    if exact:
        truth.values(all_subsets(truth.n))


def _random_orders(n: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.Generator(np.random.PCG64(seed_of("leave-out", seed)))
    return np.array([rng.permutation(n) for _ in range(N_RANDOM)])


def _top(scores: Array) -> NDArray[np.int64]:
    """Players (n,) by their mean score (n, n_query), the highest first."""
    return np.argsort(-scores.mean(1), kind="stable")


class Chosen:
    """Some of a task's records, by index, as records of their own."""

    def __init__(self, records: Records, index: Tensor) -> None:
        self.records, self.index = records, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor, /) -> Batch:
        return self.records[self.index[index]]


def self_influence(task: Task, method: Any, *, progress: Progress | None = None) -> Array:
    """(n_train,): each player's score, by a module of `estimators`, for its own training loss; 0 for other records."""
    records = Players.of(task).records
    own = replace(task, queries=Chosen(task.train, records), measurement=task.loss)
    scores = method.score(own, progress=progress)
    found = np.zeros(task.n_train)
    found[records.numpy()] = scores[records, torch.arange(len(records))].double().cpu().numpy()
    return found


def scores_without_copies(task: Task, method: Any, *, progress: Progress | None = None) -> Array:
    """(n_train, n_query) as if every record stood for itself: what a method could tell of copies that nobody marked."""
    found: Array = method.score(replace(task, copy_of=None), progress=progress).double().cpu().numpy()
    return found


def has_copy(representative: NDArray[Any], n_train: int) -> NDArray[np.bool_]:
    """(n_train,): whether another record has the same representative."""
    if representative.shape != (n_train,) or representative.dtype.kind not in "iu":
        raise EngineError(
            f"must be ({n_train},) integers, the index of each record's representative or its own, "
            f"is {representative.shape} {representative.dtype}",
            pointer="/copies",
        )
    _, position, size = np.unique(representative, return_inverse=True, return_counts=True)
    return size[position] > 1


def _check_exact(n: int) -> None:
    if n > MAX_EXACT_PLAYERS:
        raise EngineError(
            f"{n} records play, and all 2^{n} subsets would be retrained; that is done for at most {MAX_EXACT_PLAYERS}. "
            "Take a smaller task, or measure LDS instead",
            pointer="/exact",
        )


def _on_players(task: Task, players: Players, scored: Scored) -> Array:
    """(n_player, n_query): the scores of a class of copies are summed, for they are kept or left out together."""
    scores, pointer = scored.scores, f"/scores/{scored.name}"
    if scores.ndim == 1:
        scores = scores[:, None]
    if scores.shape not in ((task.n_train, task.n_query), (task.n_train, 1)):
        raise EngineError(
            f"must be ({task.n_train}, {task.n_query}), a number per record and query, or ({task.n_train},), "
            f"is {scored.scores.shape}",
            pointer=pointer,
        )
    wrong = np.argwhere(~np.isfinite(scores))
    if len(wrong):
        record, query = wrong[0].tolist()
        raise EngineError("is not a finite number; score again", pointer=f"{pointer}/{record}/{query}")
    wide = np.broadcast_to(scores, (task.n_train, task.n_query)).astype(np.float64)
    return players.summed(torch.from_numpy(np.ascontiguousarray(wide.T))).numpy().T


def _of_players(players: Players, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return flags[players.records.numpy()]


def _flags(flags: NDArray[Any], n_train: int, pointer: str) -> NDArray[np.bool_]:
    if flags.shape != (n_train,) or flags.dtype.kind not in "biu" or not np.isin(flags, (0, 1)).all():
        raise EngineError(
            f"must be ({n_train},) of 0 and 1, one per record, is {flags.shape} {flags.dtype}", pointer=pointer
        )
    found = flags.astype(bool)
    if found.all() or not found.any():
        raise EngineError("marks all records or none; there is nothing to tell apart", pointer=pointer)
    return found


def _mislabelled(scored: Scored, players: Players, scores: Array, marked: NDArray[np.bool_]) -> dict[str, float]:
    found = {"harmfulness": auc(marked, -scores.mean(1))}
    if scored.self_influence is not None:
        found["self_influence"] = auc(marked, scored.self_influence[players.records.numpy()])
    return found


def _rounded(x: Array) -> Array:
    """Sums that differ in the last bits only, as equal scores give, are equal."""
    scale = np.abs(x).max(0, keepdims=True)
    return np.round(x / np.where(scale > 0, scale, 1), 10)


def _within(progress: Progress | None, before: int, length: int, total: int) -> Progress | None:
    """One bar over parts of different length."""
    if progress is None:
        return None
    tell = progress
    return lambda done, of: tell(int(1000 * (before + length * done / of)), 1000 * total)
