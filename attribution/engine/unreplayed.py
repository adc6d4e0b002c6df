"""Owners' shares from values that no replay has measured: estimated from checkpoints, or metered while training ran.

Such values are known up to scale, so they are divided by their own sum. That sum is small wherever records pull against each
other (at a minimum of the training loss the gradients cancel), and dividing by it blows every difference up. With

    κ = Σ φ_i / Σ |φ_i|        over records, 1: all helped, 0: what helped and what harmed cancel        the values' coherence

a share is off from counting by (φ_o − Σφ · count_o) / (κ Σ|φ|). Over tasks whose exact division is known, the slope λ of what the
exact shares were on what the values said, both beyond counting, is near a constant times κ, whatever the checkpoints: the
record of the method. So

    λ = record · κ        paid = λ · raw + (1 − λ) · count

moves money by at most record · (φ_o − Σφ · count_o) / Σ|φ| and no small sum can blow it up. κ is over records, never over accounts: splitting or
merging accounts moves neither it nor any value. Where Σφ may be 0 or less by its interval, the count pays.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attribution.engine.errors import EngineError
from attribution.engine.shares import Share
from attribution.engine.task import Task, seed_of

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

#: What each method's values were worth beyond counting, over κ: below the least of all worlds and seeds that
#: `./run bench attribution/estimated` measured, under the conditions that the method asks for (`estimated.is_spread`,
#: `metered.MIN_VISITS` and `metered.HELD`). 0 where in some world they were worth nothing.
RECORD = {"estimated": 0.5, "estimated at the end": 0.0, "metered": 0.5}
NO_RECORD = "no record says that values got in this way are worth more than counting"
N_REPLICATES = 400
MAX_PARTS = 20  # of queries, or of measured steps, that are redrawn
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20}
STUDENT |= {
    13: 2.18,
    14: 2.16,
    15: 2.14,
    16: 2.13,
    17: 2.12,
    18: 2.11,
    19: 2.10,
    20: 2.09,
}  # 97.5 %, by number of parts
NORMAL = 1.96
BLOCK = 50  # draws at once


@dataclass(frozen=True)
class UnreplayedShares:
    """Values, shares, and on which record they are trusted; read like `shares.SharesResult`."""

    values: Array  # (n_train,): signed, known up to scale; a class of copies has its value at the representative
    owners: list[Share]
    groups: dict[str, list[Share]]
    total: float  # Σ values
    total_low: float
    total_high: float
    coherence: float  # κ
    record: float
    counted: bool  # the count pays
    why_counted: str
    intervals: str
    details: Mapping[str, Any] = field(default_factory=dict)
    regime: str = "unknown"  # nothing was replayed that could tell

    @property
    def reliability(self) -> float:
        """λ; 0 where the count pays."""
        return 0.0 if self.counted else min(1.0, max(0.0, self.record * self.coherence))

    def to_json(self) -> dict[str, Any]:
        """Plain data, as shares.json has it."""
        return {
            "owners": [asdict(o) for o in self.owners],
            "groups": {name: [asdict(o) for o in members] for name, members in self.groups.items()},
            "total": {"value": self.total, "low": self.total_low, "high": self.total_high},
            "reliability": self.reliability,
            "reliability_source": "record",
            "record": self.record,
            "coherence": self.coherence,
            "paid_by_count": self.counted,
            "why_counted": self.why_counted,
            "regime": self.regime,
            "intervals": self.intervals,
            "details": dict(self.details),
        }


def divide(
    task: Task,
    parts: Array,
    *,
    record: float,
    seed: int,
    intervals: str,
    why_no_record: str = NO_RECORD,
    details: Mapping[str, Any] | None = None,
) -> UnreplayedShares:
    """Sum records' values to owners' shares, with intervals from redrawing the parts.

    Args:
        parts: (n_train, K): each record's value in each part of the questions, or of the steps, that were asked; they add up to
            its value. Whatever lies at a copy is counted at its representative.
        record: of the method, see `RECORD`; 0 where it has none here, and then `why_no_record` says why.
        seed: of the draws.
        intervals: what they promise, in words.

    Raises:
        EngineError: of another shape, or not finite.
    """
    if parts.ndim != 2 or len(parts) != task.n_train or not parts.shape[1]:
        raise EngineError(f"values of shape {parts.shape} for {task.n_train} records", pointer="/values")
    if not np.isfinite(parts).all():
        row = int(np.flatnonzero(~np.isfinite(parts).all(1))[0])
        raise EngineError(f"record {row} has a value that is not finite; take earlier checkpoints", pointer="/values")
    representative = task.representative.numpy()
    summed = np.zeros((task.n_train, parts.shape[1]))
    np.add.at(summed, representative, parts)
    values, players = summed.sum(1), np.flatnonzero(representative == np.arange(task.n_train))
    n_part, size = parts.shape[1], float(np.abs(values).sum())
    total = float(values.sum())
    weights = _draws(n_part, seed)
    totals = np.sort(weights @ summed.sum(0))
    low, high = (float(x) for x in np.quantile(totals, [0.025, 0.975]))
    coherence = total / size if size else 0.0
    why = ""
    if size == 0:
        why = "no record has any value"
    elif n_part < 2:
        why = "there is one part alone, which cannot be redrawn: nothing says how far the total is from 0"
    elif low <= 0:
        why = "the interval of the total touches or lies below 0"
    elif record <= 0:
        why = why_no_record
    result = UnreplayedShares(
        values=values,
        owners=[],
        groups={},
        total=total,
        total_low=min(low, total),
        total_high=max(high, total),
        coherence=coherence,
        record=record,
        counted=bool(why),
        why_counted=why,
        intervals=intervals,
        details=details or {},
    )
    trust = result.reliability
    owners = _members(task.owners.numpy(), players, summed, total, weights, trust)
    groups = {
        name: _members(ids.long().numpy(), players, summed, total, weights, trust) for name, ids in task.groups.items()
    }
    result.owners.extend(owners)
    result.groups.update(groups)
    return result


def parts_of(n: int) -> int:
    """Into how many parts n questions or steps are dealt."""
    return min(n, MAX_PARTS)


def _draws(n_part: int, seed: int) -> Array:
    """(R, K) weights of a bootstrap over parts, mean 1, spread as Student's t asks of so few."""
    rng = np.random.Generator(np.random.PCG64(seed_of("unreplayed", seed)))
    drawn = rng.multinomial(n_part, np.full(n_part, 1 / n_part), N_REPLICATES).astype(np.float64)
    if n_part == 1:
        return drawn
    return 1 + (drawn - 1) * math.sqrt(n_part / (n_part - 1)) * STUDENT[n_part] / NORMAL


def _members(ids: Ints, players: Ints, summed: Array, total: float, weights: Array, trust: float) -> list[Share]:
    members, position = np.unique(ids[players], return_inverse=True)
    n_records = np.bincount(position, minlength=len(members))
    by_part = np.zeros((len(members), summed.shape[1]))
    np.add.at(by_part, position, summed[players])
    value, count = by_part.sum(1), n_records / n_records.sum()
    point = value / total if total else count
    drawn = np.concatenate(
        [_shares(by_part, block, count) for block in np.split(weights, range(BLOCK, len(weights), BLOCK))]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    blended = np.maximum(trust * point + (1 - trust) * count, 0)
    paid = blended / blended.sum()
    return [
        Share(
            owner=int(members[j]),
            share=float(point[j]),
            low=float(min(low[j], point[j])),
            high=float(max(high[j], point[j])),
            paid_share=float(paid[j]),
            count_share=float(count[j]),
            n_records=int(n_records[j]),
            value=float(value[j]),
        )
        for j in range(len(members))
    ]


def _shares(by_part: Array, weights: Array, count: Array) -> Array:
    """(R, n_member): shares under each draw; a total of exactly 0 is divided by count."""
    sums = weights @ by_part.T
    totals = sums.sum(1, keepdims=True)
    return np.where(totals != 0, sums / np.where(totals != 0, totals, 1), count)
