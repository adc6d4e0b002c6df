"""Divide an amount by integer weights, to the last micro."""

from collections.abc import Mapping

from marketplace.money import Money


def allocate(pool: Money, weights: Mapping[int, int]) -> dict[int, Money]:
    """Split a pool in proportion to integer weights, to the last micro.

    Largest-remainder (Hamilton) method; ties go to the lower key, so the split is reproducible.

    Raises:
        ValueError: a negative pool or weight, or no weight at all.
    """
    total = sum(weights.values())
    if pool.micros < 0 or total <= 0 or min(weights.values()) < 0:
        raise ValueError(f"Cannot split {pool} by {dict(weights)}")

    parts = {key: divmod(pool.micros * weight, total) for key, weight in weights.items()}
    leftover = pool.micros - sum(floor for floor, _ in parts.values())
    lucky = set(sorted(parts, key=lambda key: (-parts[key][1], key))[:leftover])
    return {key: Money(floor + (key in lucky), pool.currency) for key, (floor, _) in parts.items()}
