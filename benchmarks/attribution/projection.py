"""Which seeded random projection to 1,024 numbers keeps inner products of real gradients best, and in how many bits?

    ./run bench attribution/projection [--seeds 3] [--records 1437]

Gradients of an MLP of 50,826 weights at its final state, on scikit-learn's digits with distortions (benchmarks/attribution/
gradients_of_digits.py). Each projection is applied to gradients that are held, so that only the map differs. Printed, over the
queries: Pearson's correlation of the projected scores with the exact ones, and recall of the 100 largest.

    dense      independent signs, the reference: too dear beyond small models
    count      a count sketch with one independent hash per weight: the gradients must be formed
    tensor     the engine's: the hash of a weight is the sum of its row's and its column's
    faces      elementwise products of two dense sign projections of the factors (face-splitting)
    logra      each layer's gradient between two dense projections of its sides, to 1,000 numbers in all (LoGra, 2405.13954)
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "attribution")]

from gradients_of_digits import make_task  # noqa: E402

from attribution.engine.gradients import record_gradients, sketched  # noqa: E402
from attribution.engine.projection import hashes, sketch  # noqa: E402
from attribution.engine.store import compressed  # noqa: E402
from attribution.engine.training import Program, train  # noqa: E402

WIDTH, SIDE = 1024, 20
Gradients = dict[str, Tensor]


def signs(n: int, k: int, g: torch.Generator) -> Tensor:
    return torch.randint(2, (n, k), generator=g) * 2.0 - 1


def project(kind: str, G: Gradients, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "tensor":
        return sketch(G, hashes({name: t[0] for name, t in G.items()}, WIDTH, seed))
    whole = torch.cat([t.flatten(1) for t in G.values()], 1)
    if kind == "count":
        return sketched(whole, WIDTH, seed)
    if kind == "dense":
        return whole @ signs(whole.shape[1], WIDTH, g) / WIDTH**0.5
    parts = []
    for t in G.values():
        if kind == "faces":
            row, column = signs(t.shape[1], WIDTH, g), signs(t.shape[2] if t.ndim == 3 else 1, WIDTH, g)
            parts.append(torch.einsum("nrc,rk,ck->nk", t.reshape(len(t), len(row), -1), row, column) / WIDTH**0.5)
        elif t.ndim == 3:  # LoGra leaves biases out
            sides = [torch.randn(n, SIDE, generator=g) / SIDE**0.5 if n > SIDE else torch.eye(n) for n in t.shape[1:]]
            parts.append(torch.einsum("nrc,ri,cj->nij", t, *sides).flatten(1))
    return sum(parts[1:], parts[0]) if kind == "faces" else torch.cat(parts, 1)


def compared(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    correlation = np.mean([np.corrcoef(scores[:, j], truth[:, j])[0, 1] for j in range(truth.shape[1])])
    found, best = (s.topk(100, 0).indices.T.numpy() for s in (scores, truth))
    return float(correlation), float(np.mean([np.isin(b, f).mean() for b, f in zip(best, found, strict=True)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=int, default=1437)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = make_task(60_000)
    program, state = Program(task), train(task).state

    def gradients(records, n: int, of_loss: bool) -> Gradients:  # type: ignore[no-untyped-def]
        flat = torch.cat(
            [record_gradients(program, state, records, i, of_loss=of_loss) for i in torch.arange(n).split(256)]
        )
        shapes = {name: p.shape[1:] for name, p in state.parameters.items()}
        parts = flat.split([s.numel() for s in shapes.values()], 1)
        return {name: part.reshape(n, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    train_gradients, query_gradients = gradients(task.train, given.records, True), gradients(task.queries, 120, False)
    flat = [torch.cat([t.flatten(1) for t in G.values()], 1) for G in (train_gradients, query_gradients)]
    truth = flat[0] @ flat[1].T
    print(
        f"{given.records} records, {truth.shape[1]} queries, {flat[0].shape[1]:,} weights; mean of {given.seeds} seeds"
    )
    print(f"{'':22}{'correlation':>12}{'recall@100':>12}")
    kept: dict[str, list[tuple[float, float]]] = {}
    for seed in range(given.seeds):
        for kind in ("dense", "count", "tensor", "faces", "logra"):
            z, q = (project(kind, G, seed) for G in (train_gradients, query_gradients))
            kept.setdefault(kind, []).append(compared(z @ q.T, truth))
            if kind == "tensor":
                vectors, scales = compressed(z.numpy())
                kept.setdefault("tensor, float16", []).append(compared(z.half().float() @ q.T, truth))
                held = torch.from_numpy(vectors * scales[:, None])
                kept.setdefault("tensor, int8 + scale", []).append(compared(held @ q.T, truth))
                kept.setdefault("int8 against float32", []).append(compared(held @ q.T, z @ q.T))
    for kind, figures in kept.items():
        correlation, found = np.mean(figures, 0)
        print(f"{kind:22}{correlation:12.4f}{found:12.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
