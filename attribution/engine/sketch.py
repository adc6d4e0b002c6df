"""Which datasets would help a trainer: their validation set as one vector, compared with each dataset's mean gradient.

At a public reference model, all projected by one map (projection.py), with v the mean gradient of the measurement over the
trainer's validation records and m_D the mean gradient of the loss over dataset D's records, training on D lowers the trainer's
measurement by v · Δ_D to first order, Δ_D being how far training moves the model. A gentle step moves it along m_D. Longer training
saturates: gradient descent for a time τ = Σ_s rate_s / (1 − momentum) on a quadratic of curvature F has come

    Δ_D = (1 − e^(−τF)) F⁻¹ m_D         F = mean of z zᵀ over all datasets' records (the empirical Fisher information)

so directions that every dataset teaches soon count for no more than they are worth, and rare ones count. Trained on D alone, the model
also forgets what D does not hold, and the second-order term is needed: v · Δ_D − ½ Δ_Dᵀ F Δ_D.

The trainer sends v and nothing else. A mean over few records gives them away, so fewer than MIN_RECORDS are refused here; quotas
and coarse ranks are for whoever answers strangers. Gradient matching for choosing data: Xia et al. 2024, arXiv:2402.04333 (LESS).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attribution.engine.errors import EngineError
from attribution.engine.projection import WIDTH, Projector
from attribution.engine.store import Store, final_state, state_digest
from attribution.engine.task import Records, Task

Array = NDArray[Any]

MIN_RECORDS = 64  # behind one sketch


@dataclass(frozen=True)
class Reference:
    """The public model and the map: sketches of equal references can be compared, others not."""

    state: str  # SHA-256 of the model's tensors
    width: int
    seed: int


@dataclass(frozen=True)
class Sketch:
    """A validation set as one vector: its mean projected gradient, float32 (K,)."""

    vector: Array
    n_records: int
    reference: Reference


@dataclass(frozen=True)
class DatasetGradient:
    """A dataset's mean projected gradient (K,), and the second moment of its records' (K, K), float64."""

    mean: Array
    second: Array
    n_records: int
    reference: Reference


@dataclass(frozen=True)
class Ranked:
    """One dataset's predicted fall of the trainer's measurement; positive: it would help."""

    dataset: str
    score: float


def gradient_sketch(reference: Task, validation: Records, *, width: int = WIDTH, seed: int = 0) -> Sketch:
    """One vector for a validation set, at the last state of a public reference model.

    Args:
        reference: its model, its measurement and its last checkpoint (or recipe) count; its records do not.
        validation: at least MIN_RECORDS records, in the form of the reference's queries.

    Raises:
        EngineError: too few records, or a gradient that is not finite.
    """
    if len(validation) < MIN_RECORDS:
        raise EngineError(
            f"{len(validation)} records: a mean over fewer than {MIN_RECORDS} would give them away",
            pointer="/validation",
        )
    z, at = _projected(reference, validation, width, seed, of_loss=False)
    return Sketch(z.mean(0, dtype=np.float64).astype(np.float32), len(validation), at)


def dataset_gradient(reference: Task, records: Records, *, width: int = WIDTH, seed: int = 0) -> DatasetGradient:
    """A dataset's side of the comparison, from its records.

    Raises:
        EngineError: no records, or a gradient that is not finite.
    """
    if len(records) == 0:
        raise EngineError("no records", pointer="/records")
    z, at = _projected(reference, records, width, seed, of_loss=True)
    return _moments([z], at)


def dataset_gradient_from_store(store: Store) -> DatasetGradient:
    """A dataset's side of the comparison, from the store of its records at the reference model."""
    settings = store.settings
    at = Reference(settings.state, settings.width, settings.seed)
    return _moments([vectors for _, vectors in store.blocks()], at)


def rank_datasets(
    sketch: Sketch, datasets: Mapping[str, DatasetGradient], *, horizon: float = 0.0, is_alone: bool = False
) -> list[Ranked]:
    """Datasets by how much training on them would lower the measurement of the sketched records, best first.

    Args:
        horizon: τ, the sum of the learning rates over 1 − momentum; 0 ranks by the inner product of the mean gradients,
            which is the limit of short training.
        is_alone: trained on the dataset alone, not beside data that the trainer has already.

    Raises:
        EngineError: a dataset whose gradients are of another reference model or map; a horizon below 0.
    """
    if not 0 <= horizon < float("inf"):
        raise EngineError(f"{horizon} is not a number of 0 or more", pointer="/horizon")
    if is_alone and horizon == 0:
        raise EngineError("forgetting is of second order in how long the training is; give it", pointer="/horizon")
    for name, dataset in datasets.items():
        if dataset.reference != sketch.reference:
            raise EngineError(
                f"made at {dataset.reference}, the sketch at {sketch.reference}", pointer=f"/datasets/{name}"
            )
    v = sketch.vector.astype(np.float64)
    names = list(datasets)
    M = np.stack([datasets[name].mean for name in names]) if names else np.zeros((0, len(v)))  # (n_dataset, K)
    if horizon == 0:
        scores = M @ v
    else:
        n = sum(dataset.n_records for dataset in datasets.values())
        F = sum((d.second * (d.n_records / n) for d in datasets.values()), np.zeros((len(v), len(v))))
        moved = M @ _time(F, horizon)  # Δ, (n_dataset, K)
        scores = moved @ v
        if is_alone:
            scores = scores - np.einsum("dk,kl,dl->d", moved, F, moved) / 2
    order = sorted(range(len(names)), key=lambda i: (-scores[i], names[i]))
    return [Ranked(names[i], float(scores[i])) for i in order]


def _time(F: Array, horizon: float) -> Array:
    """(1 − e^(−τF)) F⁻¹, which is τ where F is 0."""
    eigenvalues, directions = np.linalg.eigh(F)
    x = horizon * np.maximum(eigenvalues, 0)
    small = x < 1e-6
    gains = horizon * np.where(small, 1 - x / 2, -np.expm1(-x) / np.where(small, 1, x))
    return np.asarray((directions * gains) @ directions.T)


def _projected(reference: Task, records: Records, width: int, seed: int, *, of_loss: bool) -> tuple[Array, Reference]:
    state = final_state(reference)
    projector = Projector(reference, state, width=width, seed=seed)
    z = projector.gradients(records, torch.arange(len(records)), of_loss=of_loss).numpy()
    return z, Reference(state_digest(state), width, seed)


def _moments(blocks: list[Array], at: Reference) -> DatasetGradient:
    n = sum(len(z) for z in blocks)
    mean = sum((z.sum(0, dtype=np.float64) for z in blocks), np.zeros(at.width)) / n
    second = sum((z.T.astype(np.float64) @ z.astype(np.float64) for z in blocks), np.zeros((at.width, at.width))) / n
    return DatasetGradient(mean, second, n, at)
