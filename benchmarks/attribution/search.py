"""How fast is the store built, and how fast and how completely is it searched, on real gradients?

    ./run bench attribution/search [--records 1000000] [--out DIR] [--kinds sq8 pq] [--queries 100]

Records are scikit-learn's digits, each distorted in its own way (benchmarks/attribution/gradients_of_digits.py), the model an MLP of
50,826 weights. With --out the store is kept and found again. Prints:

* the build's throughput over that of a plain forward and backward pass on the same records, both by CPU time of one thread, since
  wall time on a busy machine says who else was there; for this model and for larger ones, up to a small GPT;
* exact search: seconds for one reading of the store;
* each kind of index: recall@100 against the exact answer on queries that took no part in choosing its settings, both for the
  most helpful and the most harmful records, and milliseconds per query, re-ranking included: wall time and CPU time.

The kinds are those of `build_shortlist` (sq8, pq), and for comparison "hnsw" (a graph over the same directions in 8 bits) and
"full" (an inverted file over all 1,024 numbers in 8 bits), each at its best setting of a small sweep.
"""

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "attribution")]

from gradients_of_digits import make_task, per_record_loss  # noqa: E402

from attribution.engine import Task, TensorRecords, train  # noqa: E402
from attribution.engine.projection import Projector  # noqa: E402
from attribution.engine.search import (  # noqa: E402
    DIRECTIONS,
    N_JUDGES,
    N_SAMPLE,
    build_shortlist,
    exact_search,
    recall,
)
from attribution.engine.store import Store, build_store, final_state  # noqa: E402

K = 100


class SmallGPT(nn.Module):
    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape
        h = self.token(x) + self.position(torch.arange(t))
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](h)).reshape(b, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
            h = h + block["out"](
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
            )
            h = h + block["down"](F.gelu(block["up"](block["norm2"](h))))
        return self.head(self.norm(h))


def next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x = batch[0]
    return F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def mlp(*sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.GELU()]
        return nn.Sequential(*layers[:-1])

    return build


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


def throughputs() -> None:
    """Rows of: model, weights, records a second of a plain pass and of the build, their ratio."""
    g = torch.Generator().manual_seed(0)
    text = TensorRecords(torch.randint(256, (64, 65), generator=g))

    def images(n: int, d: int) -> TensorRecords:
        return TensorRecords(torch.rand(n, d, generator=g), torch.randint(10, (n,), generator=g))

    worlds: list[tuple[str, Callable[[], nn.Module], Any, Any]] = [
        ("MLP 64-256-128-10", mlp(64, 256, 128, 10), per_record_loss, images(4096, 64)),
        ("MLP 64-1024-512-10", mlp(64, 1024, 512, 10), per_record_loss, images(2048, 64)),
        ("MLP 784-1024-1024-10", mlp(784, 1024, 1024, 10), per_record_loss, images(1024, 784)),
        ("CNN 16-32, 28 x 28", cnn, per_record_loss, images(512, 784)),
        ("GPT 128 wide, 2 layers, 64 tokens", lambda: SmallGPT(128, 2, 64), next_token, text),
        ("GPT 256 wide, 4 layers, 64 tokens", lambda: SmallGPT(256, 4, 64), next_token, text),
    ]
    print(f"{'model':36}{'weights':>12}{'forward+backward':>20}{'build':>12}   ratio (CPU seconds of one thread)")
    for name, build, loss, records in worlds:
        task = Task(model=build, loss=loss, measurement=loss, train=records, queries=records)
        model = build()
        projector = Projector(task, model.state_dict())
        rows = projector.rows(of_loss=True)
        batches = torch.arange(len(records)).split(rows)

        def plain(model: nn.Module = model, loss: Any = loss, batches: Any = batches, records: Any = records) -> None:
            for i in batches:
                model.zero_grad()
                loss(model, records[i]).mean().backward()

        def project(projector: Projector = projector, batches: Any = batches, records: Any = records) -> None:
            for i in batches:
                projector.of_batch(records[i], i, of_loss=True)

        floor, made = (len(records) / least_cpu(f) for f in (plain, project))
        print(f"{name:36}{projector.n_parameters:12,}{floor:18,.0f}/s{made:10,.0f}/s   {made / floor:.2f}", flush=True)


def least_cpu(f: Callable[[], None], times: int = 5) -> float:
    spent = []
    for _ in range(times + 1):
        begun = time.process_time()
        f()
        spent.append(time.process_time() - begun)
    return min(spent[1:])


def graph(store: Store, directions: np.ndarray) -> Any:
    index = faiss.IndexHNSWSQ(directions.shape[1], faiss.ScalarQuantizer.QT_8bit, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    index.train(store.vectors(np.arange(0, len(store), max(1, len(store) // N_SAMPLE))) @ directions)
    for _, vectors in store.blocks(16384):
        index.add(np.ascontiguousarray(vectors @ directions))
    return index


def full(store: Store, n_list: int) -> Any:
    index = faiss.index_factory(store.width, f"IVF{n_list},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 5, 40
    index.train(store.vectors(np.arange(0, len(store), max(1, len(store) // N_SAMPLE))))
    for _, vectors in store.blocks(16384):
        index.add(vectors)
    return index


def timed(ask: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[np.ndarray, str]:
    found, wall, cpu = [], [], []
    for q in queries:
        a, b = time.perf_counter(), time.process_time()
        found.append(ask(q[None]))
        wall.append(1e3 * (time.perf_counter() - a))
        cpu.append(1e3 * (time.process_time() - b))
    return np.concatenate(found), (
        f"wall {np.median(wall):6.2f} ms, p95 {np.quantile(wall, 0.95):6.2f}; CPU {np.median(cpu):6.2f} ms, p95 {np.quantile(cpu, 0.95):6.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100, help="that judge; others choose the settings")
    parser.add_argument("--kinds", nargs="*", default=["sq8", "pq"], choices=["sq8", "pq", "hnsw", "full"])
    parser.add_argument("--out", type=Path, help="where the store is kept; a temporary folder by default")
    parser.add_argument("--threads", type=int, default=2, help="of the search; the build is measured on one")
    parser.add_argument("--no-throughput", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.no_throughput:
        throughputs()
    folder = given.out or Path(tempfile.mkdtemp(prefix="residual-search-"))
    try:
        measure(given, folder)
    finally:
        if given.out is None:
            shutil.rmtree(folder)
    return 0


def measure(given: argparse.Namespace, folder: Path) -> None:
    trained = folder / "checkpoint"
    if not list(trained.glob("*.safetensors")):
        recipe_task = make_task()
        n_step = recipe_task.require_recipe().n_step
        train(recipe_task, checkpoint_steps=[n_step], checkpoint_dir=trained)
    task = make_task(given.records, checkpoint=next(trained.glob("*.safetensors")))
    cpu, wall, made = time.process_time(), time.perf_counter(), [0]
    store = build_store(task, folder / "store", progress=lambda done, total: made.__setitem__(0, done))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if made[0]:
        print(
            f"{made[0]:,} of {len(store):,} records projected: {wall:.0f} s, {cpu:.0f} s of one thread's CPU time, records drawn and written"
        )
    else:
        print(f"{len(store):,} records are there already, checked in {wall:.0f} s")
    print(f"{sum(p.stat().st_size for p in store.folder.glob('shard-*')) / 1e9:.2f} GB on disk")

    torch.set_num_threads(given.threads)
    projector = Projector(task, final_state(task))
    drawn = projector.gradients(task.queries, torch.arange(min(task.n_query, N_JUDGES + given.queries)), of_loss=False)
    choosing, Q = drawn[:N_JUDGES].numpy(), drawn[N_JUDGES:].numpy()
    asked = np.concatenate([Q, -Q])
    cpu, wall = time.process_time(), time.perf_counter()
    truth = exact_search(store, asked, k=K).records
    print(
        f"exact search of {len(asked)} questions at once: {time.perf_counter() - wall:.1f} s, CPU {time.process_time() - cpu:.1f} s"
    )
    directions = np.linalg.eigh(np.cov(store.vectors(np.arange(0, len(store), max(1, len(store) // N_SAMPLE))).T))[1]
    directions = np.ascontiguousarray(directions[:, ::-1][:, :DIRECTIONS]).astype(np.float32)
    for kind in given.kinds:
        cpu, wall = time.process_time(), time.perf_counter()
        if kind in ("sq8", "pq"):
            shortlist = build_shortlist(store, choosing, kind=kind)
            size = (store.folder / "shortlist.faiss").stat().st_size
            spent = f"{time.perf_counter() - wall:.0f} s, CPU {time.process_time() - cpu:.0f} s, {size / 1e6:.0f} MB"
            settings = {name: shortlist.report[name] for name in ("n_list", "n_probe", "n_candidate")}
            report(kind, f"{settings}, {spent}", lambda q, s=shortlist: s.search(store, q, k=K).records, asked, truth)
            continue
        index = graph(store, directions) if kind == "hnsw" else full(store, 1024)
        spent = f"{time.perf_counter() - wall:.0f} s, CPU {time.process_time() - cpu:.0f} s"
        for effort in (200, 400, 800) if kind == "hnsw" else (32, 64, 128):
            if kind == "hnsw":
                index.hnsw.efSearch = effort
            else:
                index.nprobe = effort

            def ask(q: np.ndarray, index: Any = index, kind: str = kind) -> np.ndarray:
                proposed = index.search(q @ directions if kind == "hnsw" else q, 400)[1][0]
                candidates = np.sort(proposed[proposed >= 0])
                scores = store.scores(candidates, q[0])
                return candidates[np.argsort(-scores, kind="stable")[:K]][None]

            report(f"{kind} {effort}", spent, ask, asked, truth)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB, memory-mapped pages of the store included; {given.threads} threads")


def report(
    name: str, spent: str, ask: Callable[[np.ndarray], np.ndarray], asked: np.ndarray, truth: np.ndarray
) -> None:
    for q in asked[:5]:
        ask(q[None])  # pages of the store and of the index are read once
    found, times = timed(ask, asked)
    n = len(asked) // 2
    print(
        f"{name:10} built in {spent}\n{'':10} recall@{K} {recall(found, truth):.3f} "
        f"(helpful {recall(found[:n], truth[:n]):.3f}, harmful {recall(found[n:], truth[n:]):.3f}); {times}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
