"""Who owns and who labelled each of scikit-learn's digit images: assigned here, by a seed; the images are real.

1,797 handwritten digits of 8 × 8 pixels, 0..16 (UCI "Optical Recognition of Handwritten Digits"). Ten rights holders
differ in size and in the digits they hold. Rights holder 9 owns no image of its own: it re-uploads exact copies of
rights holder 0's. Labeller 4 gives a wrong label 40 % of the time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

N_HOLDERS = 10
N_LABELLERS = 5
N_QUERY = 360
N_COPIES = 60
COPIED_HOLDER, COPYING_HOLDER = 0, 9
CARELESS_LABELLER, WRONG_RATE = 4, 0.4
SIZES = np.array([1.3, 0.8, 1.0, 1.2, 0.7, 1.1, 0.9, 1.4, 0.6])  # of the holders of originals, relative


@dataclass(frozen=True)
class Assignment:
    """Parallel arrays, one entry per record; queries are records that nobody owns and every trainer may see."""

    images: NDArray[np.uint8]  # (n, 64), 0..16
    true_label: NDArray[np.int64]
    given_label: NDArray[np.int64]
    rights_holder: NDArray[np.int64]  # 0..9; -1 for queries
    labeller: NDArray[np.int64]  # 0..4; -1 for queries
    is_query: NDArray[np.bool_]


def assign(seed: int) -> Assignment:
    """The same arrays for the same seed, on every machine: 1,797 images in the dataset's own order, then 60 copies."""
    images, labels = load_digits(return_X_y=True)
    n = len(labels)
    rng = np.random.Generator(np.random.PCG64(seed))
    is_query = np.zeros(n, bool)
    is_query[rng.permutation(n)[:N_QUERY]] = True

    # Each holder favours some digits: a mild Dirichlet tilt of its chance of holding a given class.
    tilt = rng.dirichlet(np.full(len(SIZES), 4.0), size=10) * SIZES  # (class, holder)
    tilt /= tilt.sum(1, keepdims=True)
    draw = rng.random(n)
    holder = np.array([np.searchsorted(np.cumsum(tilt[y]), u) for y, u in zip(labels, draw, strict=True)])
    holder = np.minimum(holder, len(SIZES) - 1)
    labeller = rng.integers(0, N_LABELLERS, n)
    wrong = (labeller == CARELESS_LABELLER) & (rng.random(n) < WRONG_RATE)
    given = np.where(wrong, (labels + rng.integers(1, 10, n)) % 10, labels)

    given[is_query] = labels[is_query]
    holder[is_query] = labeller[is_query] = -1
    copied = rng.permutation(np.flatnonzero(holder == COPIED_HOLDER))[:N_COPIES]
    return Assignment(
        images=np.concatenate([images, images[copied]]).astype(np.uint8),
        true_label=np.concatenate([labels, labels[copied]]).astype(np.int64),
        given_label=np.concatenate([given, given[copied]]).astype(np.int64),
        rights_holder=np.concatenate([holder, np.full(len(copied), COPYING_HOLDER)]).astype(np.int64),
        labeller=np.concatenate([labeller, labeller[copied]]).astype(np.int64),
        is_query=np.concatenate([is_query, np.zeros(len(copied), bool)]),
    )
