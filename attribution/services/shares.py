"""Where floats end: measured shares become integer weights in parts per quadrillion."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from attribution.documents import Payee, TrainingRecords
from attribution.engine.division import Share as MeasuredShare
from attribution.engine.shares import SharesResult
from attribution.engine.unreplayed import UnreplayedShares
from attribution.models import PPQ, Share


def to_ppq(weights: Mapping[int, float]) -> dict[int, int]:
    """Weights of 0 or more as integers that sum to PPQ exactly.

    Largest-remainder (Hamilton) method over the floats' exact values; ties go to the lower key.
    """
    if any(not math.isfinite(weight) or weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"Not weights: {dict(weights)}")
    exact = {key: Fraction(weight) for key, weight in weights.items()}
    total = sum(exact.values())
    parts = {key: divmod(PPQ * weight, total) for key, weight in exact.items()}
    leftover = PPQ - sum(int(floor) for floor, _ in parts.values())
    lucky = set(sorted(parts, key=lambda key: (-parts[key][1], key))[:leftover])
    return {key: int(floor) + (key in lucky) for key, (floor, _) in parts.items()}


def shares_by_influence(measured: SharesResult | UnreplayedShares, records: TrainingRecords) -> list[Share]:
    """Both partitions' shares as the engine measured them, unsaved."""
    return [
        *_partition(Share.Partition.RIGHTS_HOLDER, measured.owners, records.owners),
        *_partition(Share.Partition.LABELLER, measured.groups["labeller"], records.labellers),
    ]


def shares_by_count(records: TrainingRecords) -> list[Share]:
    """Both partitions' shares by the number of distinct records alone, unsaved."""
    shares = []
    for partition, ids, payees in (
        (Share.Partition.RIGHTS_HOLDER, records.owner, records.owners),
        (Share.Partition.LABELLER, records.labeller, records.labellers),
    ):
        counts = records.distinct_counts(ids)
        for key, ppq in to_ppq(counts).items():
            payee = payees[key]
            shares.append(
                Share(
                    version_id=payee.version_id,
                    party_id=payee.party_id,
                    partition=partition,
                    n_records=counts[key],
                    count_ppq=ppq,
                    paid_ppq=ppq,
                )
            )
    return shares


def _partition(partition: str, measured: Sequence[MeasuredShare], payees: Sequence[Payee]) -> list[Share]:
    """A payee all of whose records repeat another cited record has no record of their own, and no row."""
    members = [member for member in measured if member.n_records]
    paid = to_ppq({member.owner: member.paid_share for member in members})
    count = to_ppq({member.owner: member.n_records for member in members})
    return [
        Share(
            version_id=payees[member.owner].version_id,
            party_id=payees[member.owner].party_id,
            partition=partition,
            n_records=member.n_records,
            count_ppq=count[member.owner],
            raw=_finite(member.share),
            low=_finite(member.low),
            high=_finite(member.high),
            paid_ppq=paid[member.owner],
        )
        for member in members
    ]


def _finite(value: float) -> float | None:
    """A total of exactly 0 leaves no raw share to state."""
    return value if math.isfinite(value) else None
