"""Shares with their intervals, laid out for drawing: positions in per cent of the plot's width, so that a page of any width fits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Tick:
    x: str
    label: str
    is_zero: bool


@dataclass(frozen=True)
class Mark:
    """One row: the measured share with its 95 % interval, and the share by count."""

    x: str
    low: str
    high: str
    count: str
    has_measure: bool


@dataclass(frozen=True)
class Forest:
    ticks: list[Tick]
    marks: list[Mark]


def forest(rows: Sequence[tuple[float, float | None, float | None, float | None]]) -> Forest:
    """Lay out rows of (share by count, measured share, low, high), all as fractions; None where nothing was measured."""
    values = [value for row in rows for value in row if value is not None and math.isfinite(value)]
    low, high = min(0.0, *values), max(0.01, *values)
    step = _step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    start, width = first * step, (last - first) * step

    def place(value: float | None) -> str:
        return f"{100 * ((value or 0.0) - start) / width:.2f}%"

    digits = max(0, -math.floor(math.log10(step * 100) + 1e-9))
    return Forest(
        ticks=[
            Tick(place(n * step), f"{100 * n * step:.{digits}f} %".replace("-", "−"), n == 0)
            for n in range(first, last + 1)
        ],
        marks=[
            Mark(
                x=place(share),
                low=place(share if below is None else below),
                high=place(share if above is None else above),
                count=place(count),
                has_measure=share is not None,
            )
            for count, share, below, above in rows
        ],
    )


def _step(least: float) -> float:
    """The smallest round number that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in STEPS if step * power >= least * (1 - 1e-9))
