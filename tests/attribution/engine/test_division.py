"""A game whose every derivative is known: f(w) = (a · w) + (a · w)³ / 30."""

from dataclasses import replace

import numpy as np
import pytest

from attribution.engine.coalitions import POWER, Masks, Plan, Round
from attribution.engine.division import Division, Evidence

N = 40
A = np.linspace(0.02, 0.18, N)
COUNTS = {"ends": 2, "folds": 6, "path": 7, "gradients": 52, "values": 4, "toggles": 8, "probes": 6}


def f(w):
    """(..., n) -> (...)"""
    return w @ A + (w @ A) ** 3 / 30


def slopes(w):
    """∂f/∂w, (..., n)"""
    return (1 + (w @ A)[..., None] ** 2 / 10) * A


def measured(seed=0, rounds=1, **counts):
    """What replays of this game would give, two queries in two folds, equal but for a factor."""
    counts = COUNTS | counts
    cuts = {
        kind: [round(c * r / rounds / 2) * 2 if r < rounds else c for r in range(rounds + 1)]
        for kind, c in counts.items()
    }
    cuts["ends"] = [0] + [2] * rounds
    planned = tuple(Round(r, {kind: (cut[r], cut[r + 1]) for kind, cut in cuts.items()}) for r in range(rounds))
    plan = Plan("", seed, 512.0, 512.0, N, 2, tuple(range(N)), planned, diagonal=True)
    masks, queries, done = Masks(plan), np.array([0.9, 1.1]), {}
    for r in planned:
        arrays = done[r.index] = {}
        for kind, (start, stop) in r.items.items():
            if start == stop:
                continue
            W = np.array([masks.weights(kind, j) for j in range(start, stop)], np.float64)
            values = f(W)[:, None] * queries
            if kind in ("folds", "path", "gradients"):
                arrays[f"{kind}.values"] = values
                arrays[kind] = queries[:, None, None] * slopes(W) if kind == "folds" else slopes(W)
            else:
                arrays[kind] = values
    return plan, done


def test_a_pair_lies_evenly_around_its_node_and_reaches_an_edge():
    masks = Masks(measured()[0])

    for number in range(0, 52, 2):
        t = masks.node(masks.place("gradients", number)) ** POWER
        one, other = (masks.weights("gradients", number + k) for k in (0, 1))
        assert one + other == pytest.approx(2 * t * np.ones(N), abs=1e-6)
        assert np.abs(one - t) == pytest.approx(min(t, 1 - t) * np.ones(N), abs=1e-6)
        assert {masks.place("gradients", number + k) for k in range(2)} == {number // 2 % 13}


def test_pairs_show_the_second_order_and_no_first():
    """(g(t + δz) + g(t − δz)) / 2 − g(t) is a_i δ² (a · z)² / 10 here, whose mean over z is a_i δ² |a|² / 10."""
    evidence = Evidence.of(*measured(gradients=2 * 13 * 40))
    t = evidence.spread_u**POWER
    delta = np.minimum(t, 1 - t)

    in_units = evidence.spread / (A * delta[:, None] ** 2 * (A @ A) / 10)

    assert np.ptp(in_units, axis=1) == pytest.approx(0, abs=0.02)
    assert in_units.mean() == pytest.approx(1, abs=0.2)  # four standard errors


def test_the_division_takes_the_second_order_to_the_variance_of_random_sets():
    """Where t is between 1/4 and 3/4 it is made up whole: a_i t (1 − t) |a|² / 10."""
    division = Division(Evidence.of(*measured(gradients=2 * 13 * 40)))
    u = np.linspace(0.45, 0.8, 8)
    t = u**POWER

    second = division._mixtures(u, division.even)[1] @ division.rows

    centred = A - A.mean()
    expected = np.outer(t * (1 - t), centred) * (A @ A) / 10
    assert np.ptp(second / expected, axis=1) == pytest.approx(0, abs=0.02)  # one factor for all records
    assert (second / expected).mean() == pytest.approx(1, abs=0.25)


def test_a_second_order_that_adds_to_the_total_is_trusted_little():
    evidence = Evidence.of(*measured())
    inflated = replace(evidence, spread=evidence.spread + evidence.nodes.mean())

    assert Division(evidence).trust == 1.0
    assert Division(inflated).trust == 0.25


def test_a_pair_whose_node_is_not_measured_yet_waits():
    plan, done = measured(rounds=4)

    early, whole = Evidence.of(plan, {0: done[0]}), Evidence.of(plan, done)

    assert len(early.nodes) < 13 == len(whole.nodes)
    assert 0 < len(early.spread) < plan.rounds[0].items["gradients"][1] // 2
    assert len(whole.spread) == 26
    assert set(early.spread_u) <= set(early.node_u)


@pytest.mark.parametrize(("agreement", "least", "most"), [(None, 0.0, 0.8), (0.0, 0.0, 0.8), (0.99, 0.9, 1.0)])
def test_reliability_begins_with_what_the_probes_showed(agreement, least, most):
    """Six pairs whose outcome is mostly noise say little by themselves."""
    evidence = Evidence.of(*measured(gradients=0))
    noise = np.random.default_rng(0).normal(0, 2.0, (12, 1))

    reliability, slope = Division(replace(evidence, values=evidence.values + noise)).reliability(agreement)

    assert least <= reliability <= most
    assert reliability == min(1.0, max(0.0, slope))


def test_reliability_is_whole_where_predictions_hold():
    reliability, _ = Division(Evidence.of(*measured(values=80, toggles=40))).reliability(None)

    assert reliability > 0.9
