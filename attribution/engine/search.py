"""Which records moved an output: the largest and the smallest inner products with a query's gradient, through FAISS.

    score[i, q] = z_i · z_q        z: projected gradients of record i's loss and of query q's measurement

Positive: a step along record i's gradient lowers the measurement of query q; up to scale, and up to the projection's error (see
projection.py), it is `graddot` at the state of the store. Two ways:

* *exact*: FAISS's brute force over the memory-mapped shards, merged; the cost is reading the whole store once per block of queries.
* *shortlist*: an inverted file over the vectors' coordinates in the K' directions that hold most of their energy (an uncentred
  PCA; to subtract a mean would change inner products), each kept in 8 bits or by product quantization (Jégou et al. 2011),
  proposes candidates, whose scores are then computed exactly from the store. How many lists are visited and how many candidates
  are taken is not the user's guess: on queries of the task the recall against the exact answer is measured, the least that
  reaches TARGET on half of them is chosen, and the recall on the other half is what is reported.

The most harmful records are the ones most helpful to −z_q. Johnson, Douze & Jégou 2017, arXiv:1702.08734.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from attribution.engine.errors import EngineError
from attribution.engine.files import write_bytes
from attribution.engine.store import Store
from attribution.engine.task import Task
from attribution.engine.training import Progress

Array = NDArray[Any]

SHORTLIST_FROM = 100_000  # records; below, reading the whole store takes a few tenths of a second
ROWS = 16_384  # of the store held at once
N_SAMPLE = 40_960  # vectors that the directions and the lists are learned from
DIRECTIONS = 128
PROMISED = 0.95  # recall@100; a shortlist that was measured to find less is not used
TARGET = 0.97  # on either side of the queries that choose its settings
RECALL_AT = 100
N_JUDGES = 64  # queries on which a shortlist is tuned and measured
PROBES = (8, 16, 32, 64, 128, 256, 512)
CANDIDATES = (200, 400, 800, 1600, 3200)
INDEX, REPORT = "shortlist.faiss", "shortlist.json"


@dataclass(frozen=True)
class Found:
    """The k records with the largest scores, best first: (n_query, k) int64 and float32."""

    records: Array
    scores: Array


@dataclass(frozen=True)
class Moved:
    """What moved one query, in order of weight: (record, score), positive scores in `helpful`, negative in `harmful`."""

    query: int
    helpful: list[tuple[int, float]]
    harmful: list[tuple[int, float]]


@dataclass(frozen=True)
class Answer:
    """`recall` is 1 for the exact search, else the measured recall@100 of the shortlist."""

    queries: list[Moved]
    way: str  # "exact" or "shortlist"
    recall: float


def search(task: Task, store: Store, queries: Sequence[int], *, k: int = RECALL_AT, is_exact: bool = False) -> Answer:
    """The k records that helped each query most and the k that harmed it most; a class of copies is its representative.

    Uses the shortlist where there is one that was measured to find 95 % of the exact answer, unless told to be exact.

    Raises:
        EngineError: a query or k out of range; a store of another task.
    """
    for number, query in enumerate(queries):
        if not 0 <= query < task.n_query:
            raise EngineError(f"{query} is not in 0..{task.n_query - 1}", pointer=f"/query/{number}")
    if not queries:
        raise EngineError("name at least one query", pointer="/query")
    playing = players(task)
    _check_k(k, task.n_train if playing is None else len(playing))
    Q = store.query_vectors(task, torch.tensor(list(queries)))
    asked = np.concatenate([Q, -Q])
    shortlist = None if is_exact else open_shortlist(store)
    if shortlist and shortlist.recall >= PROMISED and k <= RECALL_AT:
        way, recalled, found = "shortlist", shortlist.recall, shortlist.search(store, asked, k=k)
    else:
        way, recalled, found = "exact", 1.0, exact_search(store, asked, k=k, players=playing)
    pairs = [
        [(int(i), float(s)) for i, s in zip(records, scores, strict=True) if s > 0]
        for records, scores in zip(found.records, found.scores, strict=True)
    ]
    n = len(queries)
    moved = [Moved(q, pairs[j], [(i, -s) for i, s in pairs[n + j]]) for j, q in enumerate(queries)]
    return Answer(moved, way, recalled)


def players(task: Task) -> Array | None:
    """The representatives of the classes of copies, ascending; None if no record is a copy."""
    return None if task.copy_of is None else np.unique(task.copy_of.numpy().astype(np.int64))


def exact_search(store: Store, queries: Array, *, k: int, players: Array | None = None) -> Found:
    """The k records with the largest inner products, by reading every vector of the store.

    Args:
        queries: (n_query, K) float32.
        players: the records that take part, ascending (representatives of their copies); all by default.

    Raises:
        EngineError: k is not in 1..number of players.
    """
    n = len(store) if players is None else len(players)
    _check_k(k, n)
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries = np.ascontiguousarray(queries, np.float32)
    best = Found(np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32))
    for records, vectors in _played(store, players):
        scores, rows = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        best = _largest(np.hstack([best.records, records[rows]]), np.hstack([best.scores, scores]), k)
    return best


class Shortlist:
    """An approximate index beside a store, whose candidates are scored exactly from it."""

    def __init__(self, index: Any, report: dict[str, Any]) -> None:
        self.index, self.report = index, report
        self._lists = faiss.extract_index_ivf(index)

    @property
    def recall(self) -> float:
        """Measured recall@100 against the exact search, on queries that took no part in the choice of settings."""
        return float(self.report["recall"])

    def search(self, store: Store, queries: Array, *, k: int) -> Found:
        """The k records with the largest inner products among the candidates.

        Raises:
            EngineError: k is above what the shortlist was measured for, or above the number of records.
        """
        _check_k(k, self.index.ntotal)
        return self._search(store, queries, k, self.report["n_probe"], self.report["n_candidate"])

    def _search(self, store: Store, queries: Array, k: int, n_probe: int, n_candidate: int) -> Found:
        faiss.omp_set_num_threads(torch.get_num_threads())
        queries = np.ascontiguousarray(queries, np.float32)
        self._lists.nprobe = n_probe
        _, proposed = self.index.search(queries, min(max(n_candidate, 2 * k), self.index.ntotal))
        parts = []
        for query, candidates in zip(queries, proposed, strict=True):
            candidates = np.sort(candidates[candidates >= 0])
            parts.append(_largest(candidates[None], store.scores(candidates, query)[None], k))
        width = min(p.records.shape[1] for p in parts)
        return Found(
            np.concatenate([p.records[:, :width] for p in parts]), np.concatenate([p.scores[:, :width] for p in parts])
        )


def build_shortlist(
    store: Store,
    queries: Array,
    *,
    kind: str = "sq8",
    players: Array | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shortlist:
    """Learn, fill and measure an approximate index, and keep it beside the store.

    Args:
        queries: (n_query, K) of the task, on which recall is measured; both their signs are asked.
        kind: "sq8" keeps a direction in 8 bits; "pq" keeps each four directions in 8 bits, a quarter of the size.
        progress: told (vectors taken in, vectors in all).

    Raises:
        EngineError: fewer than two queries; another kind.
    """
    if len(queries) < 2:
        raise EngineError("recall is measured on other queries than it is tuned on; two are needed", pointer="/queries")
    everyone = np.arange(len(store)) if players is None else players
    d = min(DIRECTIONS, store.width)
    specs = {"sq8": "SQ8", "pq": f"PQ{max(1, d // 4)}np"}  # np: no polysemous training; nothing here uses its minutes
    if kind not in specs:
        raise EngineError(f"{kind!r} is none of {sorted(specs)}", pointer="/kind")
    faiss.omp_set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(everyone), min(len(everyone), N_SAMPLE), replace=False))
    sample = store.vectors(everyone[drawn])
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :d]  # (K, d)
    n_list = int(2 ** np.clip(round(np.log2(max(len(everyone), 1)) / 2), 0, 16))  # about √n lists of about √n vectors
    n_list = min(n_list, max(1, len(sample) // 40))
    lists: Any = faiss.index_factory(d, f"IVF{n_list},{specs[kind]}", faiss.METRIC_INNER_PRODUCT)
    lists.cp.niter, lists.cp.seed = 10, seed + 1
    if kind == "pq":
        lists.pq.cp.niter, lists.pq.cp.seed, lists.pq.cp.max_points_per_centroid = 10, seed + 1, 64
    lists.train(np.ascontiguousarray(sample @ directions))
    index = faiss.IndexPreTransform(_linear(directions), lists)
    done = 0
    for records, vectors in _played(store, players):
        index.add_with_ids(vectors, records)
        done += len(records)
        if progress:
            progress(done, len(everyone))
    found = Shortlist(index, {"kind": kind, "directions": d, "n_list": n_list, "store": store.digest})
    _choose(found, store, queries, players)
    _write(found, store.folder)
    return found


def open_shortlist(store: Store) -> Shortlist | None:
    """The shortlist beside a store; None if there is none, or one of an earlier state of the store.

    Raises:
        EngineError: it is damaged.
    """
    path = store.folder / INDEX
    try:
        report = json.loads((store.folder / REPORT).read_text(encoding="utf-8"))
        if report["store"] != store.digest:
            return None
        content = path.read_bytes()
        is_whole = hashlib.sha256(content).hexdigest() == report["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"cannot be read ({error}); run `index` again", pointer=str(path)) from error
    if not is_whole:
        raise EngineError("its checksum does not match, the file is damaged; run `index` again", pointer=str(path))
    return Shortlist(faiss.deserialize_index(np.frombuffer(content, np.uint8)), report)


def drop_shortlist(store: Store) -> None:
    """Let `search` be exact until another shortlist is built."""
    (store.folder / REPORT).unlink(missing_ok=True)


def _choose(found: Shortlist, store: Store, queries: Array, players: Array | None) -> None:
    """The least lists and candidates that reach TARGET on every other query; the rest say what recall that gives."""
    k = min(RECALL_AT, found.index.ntotal)
    asked = np.concatenate([queries, -queries])
    truth = exact_search(store, asked, k=k, players=players).records
    n = len(queries)
    judges, held = (np.concatenate([np.arange(a, n, 2), n + np.arange(a, n, 2)]) for a in (0, 1))
    for n_probe in [p for p in PROBES if p < found.report["n_list"]] + [found.report["n_list"]]:
        for n_candidate in CANDIDATES:
            records = found._search(store, asked[judges], k, n_probe, n_candidate).records
            half = len(judges) // 2  # the helpful and the harmful may lie in different lists: each must be found
            reached = min(recall(records[:half], truth[judges[:half]]), recall(records[half:], truth[judges[half:]]))
            if reached >= TARGET:
                break
        if reached >= TARGET:
            break
    measured = recall(found._search(store, asked[held], k, n_probe, n_candidate).records, truth[held])
    found.report |= {"n_probe": n_probe, "n_candidate": n_candidate, "recall": measured, "recall_at": k}


def recall(found: Array, truth: Array) -> float:
    """Mean part of the true records (n_query, k) that were found."""
    return float(np.mean([np.isin(t, f).mean() for f, t in zip(found, truth, strict=True)]))


def _largest(records: Array, scores: Array, k: int) -> Found:
    """The k largest of each row, best first; ties go to the lower record."""
    order = np.lexsort((records, -scores), axis=1)[:, :k]
    return Found(np.take_along_axis(records, order, 1), np.take_along_axis(scores, order, 1))


def _played(store: Store, players: Array | None) -> Iterator[tuple[Array, Array]]:
    """The vectors of those who take part, in order, ROWS of the store at a time."""
    for start, vectors in store.blocks(ROWS):
        records = np.arange(start, start + len(vectors))
        if players is not None:
            records = players[np.searchsorted(players, start) : np.searchsorted(players, start + len(vectors))]
            vectors = vectors[records - start]
        if len(records):
            yield records, np.ascontiguousarray(vectors)


def _linear(directions: Array) -> Any:
    K, d = directions.shape
    transform = faiss.LinearTransform(K, d, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(directions.T, np.float32).ravel(), transform.A)
    transform.is_trained = True
    return transform


def _write(found: Shortlist, folder: Path) -> None:
    content = faiss.serialize_index(found.index).tobytes()
    (folder / REPORT).unlink(missing_ok=True)
    write_bytes(folder / INDEX, content)
    found.report["sha256"] = hashlib.sha256(content).hexdigest()
    write_bytes(folder / REPORT, (json.dumps(found.report, indent=2) + "\n").encode())


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise EngineError(f"{k} is not in 1..{n}, the number of records that are not copies of others", pointer="/k")
