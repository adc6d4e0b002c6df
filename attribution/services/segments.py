"""Grade *metered*: segments are drawn once nothing can be changed, replayed with the meter on, and then the log counts."""

from typing import Any

from attribution.artifacts import local_path
from attribution.documents import TrainingRecords, build_task, checkpoint_paths, pointing, read_records
from attribution.engine import metered
from attribution.engine.training import Progress, environment
from attribution.engine.unreplayed import UnreplayedShares
from attribution.engine.verification import (
    commitment_of,
    draw_segments,
    miss_probability,
    segment_cuts,
    segments_needed,
    verify_segment,
)
from attribution.models import SegmentReplay, Verification
from attribution.services.meters import find_log, find_metered_run
from marketplace.models import Disclosure

#: A cheat in this part of a training's segments is missed with at most this probability.
FALSE_PART, MISS = 0.25, 0.05


def draw(verification: Verification) -> list[SegmentReplay]:
    """Open the drawn segments: by the seed that was made when the log was committed, and a digest of task and checkpoints."""
    disclosure = verification.disclosure
    task, seed = build_task(disclosure), find_metered_run(disclosure).commitment.seed
    with checkpoint_paths(disclosure) as paths:
        commitment = commitment_of(task, paths)
        cuts = segment_cuts(task.require_recipe().n_step, [step for step, _ in paths])
    wanted = segments_needed(len(cuts), part=FALSE_PART, chance=MISS)
    return SegmentReplay.objects.bulk_create(
        SegmentReplay(verification=verification, number=number, first_step=cuts[number][0], last_step=cuts[number][1])
        for number in draw_segments(len(cuts), wanted, seed, commitment)
    )


def replay(replay: SegmentReplay, *, progress: Progress) -> tuple[bool, dict[str, Any]]:
    """Whether a segment's weights and its log's entries come out again, and what was found."""
    disclosure = replay.verification.disclosure
    task = build_task(disclosure)
    first, last = replay.first_step, replay.last_step
    with checkpoint_paths(disclosure) as paths, local_path(find_log(disclosure)) as log, pointing(""):
        segment, differences, start = verify_segment(
            task, checkpoints=paths, first=first, last=last, progress=lambda done, total: progress(2 * done, 3 * total)
        )
        found: dict[str, Any] = {
            "weights": {
                "matches": segment.matches,
                "is_bit_equal": segment.end.is_bit_equal and not differences,
                "drift": segment.end.worst,
                "tolerance": segment.tolerance and segment.tolerance.drift,
                "finding": segment.finding
                or (f"{differences[0].tensor} differs" if not segment.matches and differences else ""),
            },
            "environment": environment(),
        }
        if not segment.matches:
            return False, found
        entries = metered.compare_segment(
            task, start, last, log, progress=lambda done, total: progress(2 * total + done, 3 * total)
        )
    found["log"] = {
        "matches": entries.matches,
        "measured_steps": entries.n_measured,
        "worst": entries.worst and entries.worst.distance,
        "tolerance": entries.tolerance,
        "finding": entries.finding,
    }
    return entries.matches, found


def report(verification: Verification) -> dict[str, Any]:
    """What all replayed segments say together; public."""
    replays = list(verification.segments.order_by("number"))
    disclosure = verification.disclosure
    steps = [spec["step"] for spec in disclosure.document["checkpoints"]]
    cuts = segment_cuts(steps[-1], steps)
    false = max(1, -(-len(cuts) // 4))
    findings = [
        f"Between steps {one.first_step} and {one.last_step}, {part['finding'] or 'the weights do not come out again'}."
        for one in replays
        for part in (one.report["weights"], one.report.get("log", {"matches": True}))
        if not part["matches"]
    ]
    n_step = sum(one.last_step - one.first_step for one in replays)
    return {
        "is_bit_equal": all(one.report["weights"]["is_bit_equal"] for one in replays),
        "n_step": steps[-1],
        "summary": " ".join(findings)
        or f"Replayed {len(replays)} of {len(cuts)} segments ({n_step:,} of {steps[-1]:,} steps), and weights and log entries came out again.",
        "draw": {
            "seed": find_metered_run(disclosure).commitment.seed,
            "n_segment": len(cuts),
            "drawn": [one.number for one in replays],
            "false_segments": false,
            "miss_probability": miss_probability(len(cuts), false, len(replays)),
        },
        "segments": [
            {"first": one.first_step, "last": one.last_step, "matches": one.matches, **one.report} for one in replays
        ],
    }


def divide(disclosure: Disclosure, *, seed: int) -> tuple[TrainingRecords, UnreplayedShares]:
    records = read_records(disclosure)
    task = build_task(disclosure, records)
    with local_path(find_log(disclosure)) as log, pointing(""):
        return records, metered.metered_shares(task, log, seed=seed)
