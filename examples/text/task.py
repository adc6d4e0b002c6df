"""Two text tasks: the mood of words, labelled by real raters, and a byte-level GPT on ten projects' docstrings.

Both are built from the same descriptions that a disclosure document gives, so the marketplace trains the very same models.
"""

import numpy as np
import torch
from corpus import CLASSES, draw_docstrings, draw_words

from attribution.engine import (
    Recipe,
    Task,
    TensorRecords,
    architectures,
    epoch_order,
    initial_state_from_seed,
)

SEED = 0
TRANSFORM = [{"kind": "hashed_ngrams", "shortest": 1, "longest": 5, "buckets": 1024}]
ARCHITECTURE = {
    "kind": "sequential",
    "layers": [{"kind": "linear", "in_features": 1024, "out_features": len(CLASSES)}],
}
GPT_TRANSFORM = [{"kind": "bytes", "length": 64}]
GPT = {"kind": "gpt", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}


def make_task(seed: int = SEED, *, n_train: int = 2_000, epochs: int = 10, batch: int = 100) -> Task:
    """Is a word sad, neutral or glad? Trained on one rater's rating each, asked about held-out words and all ten's mean."""
    data = draw_words(seed, n_train)
    features = architectures.transform(TRANSFORM, data.words)
    labels, train, queries = torch.from_numpy(data.label), ~data.is_query, data.is_query
    build, loss = architectures.builder(ARCHITECTURE), architectures.per_record("cross_entropy")
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(features[train], labels[train]),
        queries=TensorRecords(features[queries], labels[queries]),
        owner=torch.from_numpy(data.rater[train]),  # the lexicon's one holder would have all of it
        groups={"class": labels[train]},
        recipe=Recipe(
            optimizer="sgd",
            options={"momentum": 0.9},
            learning_rate=2.0,
            order=epoch_order(n_train, batch, epochs, seed),
            initial_state=initial_state_from_seed(build, seed),
            seed=seed,
            order_seed=seed,
            initial_seed=seed,
        ),
    )


def make_gpt_task(seed: int = SEED, *, n_each: int = 40, n_asked: int = 5, epochs: int = 6, batch: int = 25) -> Task:
    """What comes next in a docstring? Ten projects, `n_each` docstrings of each, asked about `n_asked` more of each."""
    texts, owner = draw_docstrings(seed, n_each + n_asked)
    tokens = architectures.transform(GPT_TRANSFORM, texts)
    is_query = np.arange(len(texts)) % (n_each + n_asked) >= n_each
    build, loss = architectures.builder(GPT), architectures.per_record("next_byte")
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(tokens[~is_query]),
        queries=TensorRecords(tokens[is_query]),
        owner=torch.from_numpy(owner[~is_query]),
        recipe=Recipe(
            optimizer="adamw",
            options={"weight_decay": 0.01},
            learning_rate=3e-3,
            order=epoch_order(10 * n_each, batch, epochs, seed),
            initial_state=initial_state_from_seed(build, seed),
            seed=seed,
            order_seed=seed,
            initial_seed=seed,
        ),
    )
