"""Spearman's ρ, column by column: ranks, ties at their mean, of rows that may count more than once."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Ranked:
    """Columns of numbers, sorted once, so that ranks under any multiplicities of the rows are two cumulative sums."""

    def __init__(self, x: Array) -> None:
        self.order = np.argsort(x, axis=0, kind="stable")
        ordered = np.take_along_axis(x, self.order, 0)
        m = len(x)
        position = np.arange(m)[:, None]
        is_first = np.vstack([np.ones((1, x.shape[1]), bool), ordered[1:] != ordered[:-1]])
        is_last = np.vstack([is_first[1:], np.ones((1, x.shape[1]), bool)])
        self.first = np.maximum.accumulate(np.where(is_first, position, 0), axis=0)  # of each group of equals
        self.last = np.minimum.accumulate(np.where(is_last, position, m)[::-1], axis=0)[::-1]
        self.is_constant = is_first.sum(0) == 1

    def ranks(self, counts: Array) -> Array:
        """The mean rank of each group of equals, as if row m stood there counts[m] times; the lowest is 1."""
        before = np.vstack([np.zeros((1, self.order.shape[1])), np.cumsum(counts[self.order], axis=0)])
        grouped = np.take_along_axis(before, self.first, 0) + np.take_along_axis(before, self.last + 1, 0)
        ranks = np.empty_like(grouped)
        np.put_along_axis(ranks, self.order, (grouped + 1) / 2, 0)
        return ranks


def spearman(x: Ranked, y: Ranked, counts: Array) -> Array:
    """Spearman's ρ of each pair of columns, rows weighted by their multiplicities; 0 where a column does not vary."""
    a, b = x.ranks(counts), y.ranks(counts)
    a, b = a - counts @ a / counts.sum(), b - counts @ b / counts.sum()
    covariance = counts @ (a * b)
    scale = np.sqrt((counts @ (a * a)) * (counts @ (b * b)))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-9)
