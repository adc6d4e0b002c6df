"""Does a gradient sketch rank datasets as training on them does?

    ./run bench attribution/sketch [--seeds 5] [--datasets 40]

Each seed draws, from scikit-learn's digits: 200 public records, on which a reference model (64-64-10 MLP) is trained for 40 steps; a
trainer's validation set of 200 with a class mix of its own; and datasets with class mixes of their own (Dirichlet 0.7), 30 to
480 records, up to nine tenths of them copies, and none to all labels drawn at random. Then a trainer continues the
reference model on each dataset, and the fall of the loss on the validation set is what happened. Spearman's correlation of what the
sketch predicted with what happened, mean and least over the seeds, for several ways and lengths of training:

    beside     half of each batch from the dataset, half from the public records that the trainer has already
    afresh     the same from the untrained model, with the reference used for the prediction alone
    alone      the dataset alone

Predictions: the inner product of the mean gradients; their cosine; `rank_datasets` with the training's horizon (with
`is_alone` where it is alone). Also: by size, by distinct records.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed, train  # noqa: E402
from attribution.engine.sketch import dataset_gradient, gradient_sketch, rank_datasets  # noqa: E402

N_PUBLIC, N_VALIDATION, N_STEP, BATCH, MOMENTUM = 200, 200, 40, 32, 0.9
WAYS = [  # name, half from public records, from the reference, steps, learning rate
    ("beside, 30 steps at 0.02", True, True, 30, 0.02),
    ("beside, 100 steps at 0.02", True, True, 100, 0.02),
    ("beside, 100 steps at 0.05", True, True, 100, 0.05),
    ("beside, 300 steps at 0.05", True, True, 300, 0.05),
    ("afresh, 140 steps at 0.02", True, False, 140, 0.02),
    ("alone, 10 steps at 0.005", False, True, 10, 0.005),
    ("alone, 30 steps at 0.01", False, True, 30, 0.01),
    ("alone, 30 steps at 0.05", False, True, 30, 0.05),
]
Pair = tuple[Tensor, Tensor]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def per_record_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def draw(seed: int, n_dataset: int) -> tuple[Pair, Pair, list[Pair], np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    shuffled = torch.randperm(len(X), generator=g)
    public, candidates, pool = shuffled[:N_PUBLIC], shuffled[N_PUBLIC : 3 * N_PUBLIC], shuffled[3 * N_PUBLIC :]
    mix = torch.tensor(rng.dirichlet(np.ones(10)))
    validation = candidates[torch.multinomial(mix[y[candidates]], N_VALIDATION, generator=g)]
    datasets, sizes, distinct_sizes = [], [], []
    for _ in range(n_dataset):
        mix = torch.tensor(rng.dirichlet(np.full(10, 0.7))) + 1e-9
        n = int(rng.choice([30, 60, 120, 240, 480]))
        distinct = max(10, int(n * rng.choice([1, 1, 1, 0.3, 0.1])))
        held = pool[torch.multinomial(mix[y[pool]], distinct, generator=g)]
        held = torch.cat([held, held[torch.randint(distinct, (n - distinct,), generator=g)]]) if n > distinct else held
        given = y[held].clone()
        wrong = torch.rand(len(held), generator=g) < float(rng.choice([0, 0, 0.1, 0.3, 0.6, 1]))
        given[wrong] = torch.randint(10, (int(wrong.sum()),), generator=g)
        datasets.append((X[held], given))
        sizes.append(len(held))
        distinct_sizes.append(distinct)
    return (X[public], y[public]), (X[validation], y[validation]), datasets, np.array(sizes), np.array(distinct_sizes)


def reference_of(public: Pair, seed: int) -> Task:
    """The public model: N_STEP steps on the public records."""
    return Task(
        model=build,
        loss=per_record_loss,
        measurement=per_record_loss,
        train=TensorRecords(*public),
        queries=TensorRecords(*public),
        recipe=Recipe(
            optimizer="sgd",
            options={"momentum": MOMENTUM},
            learning_rate=0.05,
            order=epoch_order(N_PUBLIC, BATCH, 6, seed)[:N_STEP],
            initial_state=initial_state_from_seed(build, seed),
        ),
    )


def trained_on(start: dict[str, Tensor], datasets: list[Pair], public: Pair, beside: bool, steps: int, rate: float):  # type: ignore[no-untyped-def]
    """All runs as one model with a leading dimension, on the same draws."""
    n, g = len(datasets), torch.Generator().manual_seed(2)
    model = build()
    P = {name: p.expand(n, *p.shape).clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.SGD(P.values(), rate, momentum=MOMENTUM)
    losses = torch.func.vmap(
        lambda p, x, t: cross_entropy(torch.func.functional_call(model, p, (x,)), t), in_dims=(0, 0, 0)
    )
    for _ in range(steps):
        u = torch.rand(BATCH, generator=g)
        x = torch.stack([X[(u * len(X)).long()] for X, _ in datasets])
        t = torch.stack([y[(u * len(y)).long()] for _, y in datasets])
        if beside:
            i = torch.randint(N_PUBLIC, (BATCH,), generator=g)
            x = torch.cat([x, public[0][i].expand(n, -1, -1)], 1)
            t = torch.cat([t, public[1][i].expand(n, -1)], 1)
        optimizer.zero_grad()
        losses(P, x, t).sum().backward()
        optimizer.step()
    return model, {name: p.detach() for name, p in P.items()}


def measured(model: nn.Module, P: dict[str, Tensor], validation: Pair) -> np.ndarray:
    x, t = validation
    return torch.func.vmap(lambda p: cross_entropy(torch.func.functional_call(model, p, (x,)), t))(P).numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--datasets", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.perf_counter()
    found: dict[str, dict[str, list[float]]] = {name: {} for name, *_ in WAYS}
    helped: dict[str, list[int]] = {name: [] for name, *_ in WAYS}
    sketch_seconds = 0.0
    for seed in range(given.seeds):
        public, validation, datasets, sizes, distinct = draw(seed, given.datasets)
        reference = reference_of(public, seed)
        with tempfile.TemporaryDirectory() as folder:
            done = train(reference, checkpoint_steps=[N_STEP], checkpoint_dir=Path(folder))
            at = replace(reference, recipe=None, checkpoints=done.checkpoints)
            begun = time.perf_counter()
            sketch = gradient_sketch(at, TensorRecords(*validation))
            gradients = {str(j): dataset_gradient(at, TensorRecords(*data)) for j, data in enumerate(datasets)}
            sketch_seconds += time.perf_counter() - begun
        states = {True: done.model_state(), False: dict(reference.require_recipe().initial_state)}
        means = np.stack([d.mean for d in gradients.values()])
        inner = means @ sketch.vector
        for name, beside, from_reference, steps, rate in WAYS:
            start = states[from_reference]
            before = measured(build(), {n: p[None] for n, p in start.items()}, validation)[0]
            fell = before - measured(*trained_on(start, datasets, public, beside, steps, rate), validation)
            horizon = steps * rate / (1 - MOMENTUM)
            ranked = rank_datasets(sketch, gradients, horizon=horizon, is_alone=not beside)
            predicted = np.zeros(len(datasets))
            for r in ranked:
                predicted[int(r.dataset)] = r.score
            helped[name].append(int((fell > 0).sum()))
            for way, scores in {
                "horizon": predicted,
                "inner product": inner,
                "cosine": inner / np.linalg.norm(means, axis=1),
                "size": sizes,
                "distinct": distinct,
            }.items():
                found[name].setdefault(way, []).append(spearman(scores, fell))
    ways = list(next(iter(found.values())))
    print(f"Spearman over {given.datasets} datasets, mean of {given.seeds} seeds (least)")
    print(f"{'training':28}{'it helped':>12}" + "".join(f"{way:>18}" for way in ways))
    for name, by_way in found.items():
        cells = "".join(f"{f'{np.mean(by_way[w]):.2f} ({min(by_way[w]):.2f})':>18}" for w in ways)
        print(f"{name:28}{f'{np.mean(helped[name]):.0f} of {given.datasets}':>12}{cells}")
    print("by seed, with the horizon:")
    for name, by_way in found.items():
        print(f"{name:28}" + " ".join(f"{r:.2f}" for r in by_way["horizon"]))
    print(
        f"{time.perf_counter() - started:.0f} s in all; a validation set's and {given.datasets} datasets' gradients: "
        f"{sketch_seconds / given.seeds:.1f} s a seed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
