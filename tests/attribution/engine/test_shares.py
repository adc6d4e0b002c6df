import itertools
import json
from dataclasses import replace
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attribution.engine import EngineError, TensorRecords, epoch_order, replay_values, training
from attribution.engine.coalitions import Masks, Plan, Players, Round, fold_weights
from attribution.engine.division import Partition
from attribution.engine.shares import RoundResult, merge_rounds, plan_shares, run_round
from attribution.engine.training import cost, plan_reverse


def enumerated(task):
    """Every record's Shapley value by its definition, from the retrains of all subsets."""
    n = task.n_train
    subsets = list(itertools.product([0.0, 1.0], repeat=n))
    f = dict(zip(subsets, replay_values(task, torch.tensor(subsets, dtype=torch.float64)).tolist(), strict=True))
    phi = np.zeros(n)
    for i, (S, value) in itertools.product(range(n), f.items()):
        if not S[i]:
            phi[i] += (f[(*S[:i], 1.0, *S[i + 1 :])] - value) / (n * comb(n - 1, int(sum(S))))
    return phi


def measured(task, *, budget, seed=0, n_rounds=None):
    plan = plan_shares(task, budget=budget, seed=seed, n_rounds=n_rounds)
    return plan, [run_round(task, plan, r) for r in range(len(plan.rounds))]


@pytest.fixture(scope="module")
def eight(make_task):
    """Eight records, a task where every subset can be retrained; a record's share runs from 2 % to 31 %."""
    torch.set_num_threads(1)
    return make_task(n_train=8, n_query=40, batch=4, epochs=5)


@pytest.fixture(scope="module")
def eight_truth(eight):
    return enumerated(eight)


@pytest.fixture(scope="module")
def eight_measured(eight):
    plan, rounds = measured(eight, budget=300, n_rounds=3)
    return plan, rounds, merge_rounds(eight, plan, rounds)


def test_intervals_cover_an_exact_enumeration(eight_truth, eight_measured):
    _, _, result = eight_measured
    truth = eight_truth / eight_truth.sum()

    assert [o.low <= share <= o.high for o, share in zip(result.owners, truth, strict=True)] == [True] * 8
    assert max(o.high - o.low for o in result.owners) < 0.6
    assert result.total == pytest.approx(eight_truth.sum(), rel=1e-5)
    assert result.values.sum() == pytest.approx(result.total, rel=1e-9)


def test_more_replays_come_closer_to_the_enumeration(eight, eight_truth):
    truth = eight_truth / eight_truth.sum()

    def error(budget, seeds):
        shares = [merge_rounds(eight, *measured(eight, budget=budget, seed=s)).owners for s in seeds]
        return np.array([[o.share for o in owners] for owners in shares]) - truth

    few, many = error(120, range(3)), error(1000, range(1))

    assert np.sqrt((many**2).mean()) < 0.02  # a chance of 1/8 each would be off by 0.09
    assert np.sqrt((many**2).mean()) < 0.5 * np.sqrt((few**2).mean())


def test_owners_groups_and_rounds_change_no_record_value(eight, eight_measured):
    plan, rounds, result = eight_measured
    one, split = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 0, 5, 5, 2, 2, 2, 1])

    together = merge_rounds(replace(eight, owner=one), plan, rounds)
    apart = merge_rounds(replace(eight, owner=split, groups={"pair": split // 2 - 1}), plan, list(reversed(rounds)))

    assert np.array_equal(together.values, result.values)
    assert np.array_equal(apart.values, result.values)
    assert [o.owner for o in apart.owners] == [0, 1, 2, 5]
    assert apart.owners[2].value == pytest.approx(result.values[4:7].sum(), rel=1e-12)
    assert [o.share for o in together.owners] == pytest.approx([1.0])
    assert [o.owner for o in apart.groups["pair"]] == [-1, 0, 1]
    for members in (apart.owners, apart.groups["pair"]):
        assert sum(o.share for o in members) == pytest.approx(1)
        assert sum(o.paid_share for o in members) == pytest.approx(1)
    assert apart.replicates.shape == (len(together.replicates), 4)
    assert apart.replicates.sum(1) == pytest.approx(1)


def test_paid_shares_blend_measurement_and_count_by_the_reliability(eight, eight_measured):
    plan, rounds, result = eight_measured
    owners = merge_rounds(replace(eight, owner=torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])), plan, rounds).owners

    assert [o.n_records for o in owners] == [1, 3, 4]
    trust = result.reliability
    assert 0 < trust <= 1
    blend = np.maximum([trust * o.share + (1 - trust) * o.n_records / 8 for o in owners], 0)
    assert [o.paid_share for o in owners] == pytest.approx(blend / blend.sum())


def test_a_round_repeats_to_the_byte_and_survives_its_file(eight, eight_measured, tmp_path):
    plan, rounds, result = eight_measured
    again = run_round(eight, Plan.from_json(json.loads(json.dumps(plan.to_json()))), 1)

    rounds[1].save(tmp_path / "a")
    again.save(tmp_path / "b")

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = [rounds[0], RoundResult.load(tmp_path / "b"), rounds[2]]
    assert merge_rounds(eight, plan, loaded).to_json() == result.to_json()
    assert json.dumps(result.to_json())


def test_the_first_rounds_are_a_result_by_themselves(eight, eight_measured):
    plan, rounds, result = eight_measured

    early = merge_rounds(eight, plan, rounds[:1], target_width=0.5)

    assert early.run_equivalents < result.run_equivalents / 2
    assert early.values.sum() == pytest.approx(result.total)
    assert early.stopping["rule"] == "interval"
    assert result.run_equivalents == pytest.approx(plan.run_equivalents)


def test_rounds_of_another_plan_task_or_with_a_gap_are_refused(eight, eight_measured, make_task, tmp_path):
    plan, rounds, _ = eight_measured
    other = replace(plan, seed=99)
    broken = tmp_path / "round"
    broken.write_bytes(b"\x80\x04not a round")

    with pytest.raises(EngineError, match="another plan"):
        merge_rounds(eight, other, rounds)
    with pytest.raises(EngineError, match="missing"):
        merge_rounds(eight, plan, [rounds[0], rounds[2]])
    with pytest.raises(EngineError, match="another task"):
        merge_rounds(make_task(), plan, rounds)
    with pytest.raises(EngineError, match="not a round"):
        RoundResult.load(broken)
    with pytest.raises(EngineError, match="at least 40"):
        plan_shares(eight, budget=3)


def test_copies_and_unused_records_earn_nothing(make_task):
    copies = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])
    order = epoch_order(10, 4, 3, 0)
    order[order == 8] = -1
    owner = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 2, 3])
    task = make_task(task={"copy_of": copies, "owner": owner}, order=order)

    result = merge_rounds(task, *measured(task, budget=60))

    assert result.values[8] == result.values[9] == 0
    assert [(o.n_records, o.paid_share) for o in result.owners[2:]] == [(0, 0.0), (0, 0.0)]
    assert result.values.sum() == pytest.approx(result.total)


def test_a_copys_weight_is_its_representatives(make_task):
    task = make_task(task={"copy_of": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])})
    players = Players.of(task)

    weights = players.weights(torch.eye(9))

    assert weights[0].nonzero().flatten().tolist() == [0, 9]
    assert players.summed(torch.arange(10.0)).tolist() == [9.0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_the_count_pays_where_the_total_may_be_nothing(make_task):
    """Labels at random help nobody: whatever single records seem to do, they are paid alike."""
    x, y = torch.randn(24, 4).double(), torch.arange(24) % 3
    noise = TensorRecords(x[:12], y[torch.randperm(12)])
    task = make_task(
        n_train=12, task={"train": noise, "queries": TensorRecords(x[12:], y[12:])}, epochs=1, learning_rate=0.01
    )

    result = merge_rounds(task, *measured(task, budget=60))

    assert result.total_low <= 0 <= result.total_high
    assert result.counted
    assert [o.paid_share for o in result.owners] == pytest.approx([1 / 12] * 12)


def test_the_count_pays_where_training_harms(make_task):
    """Every label wrong: a value over the negative total would pay most to who did most harm."""
    right = make_task(n_train=12, n_query=40, batch=4, epochs=4, learning_rate=0.05)
    x, y = right.train[torch.arange(12)]
    task = replace(right, train=TensorRecords(x, (y + 1) % 3), owner=torch.tensor([0] * 3 + [1] * 9))

    result = merge_rounds(task, *measured(task, budget=60))

    assert result.total_high < 0
    assert result.counted and result.to_json()["paid_by_count"]
    assert [o.paid_share for o in result.owners] == pytest.approx([0.25, 0.75])


def constant(model, batch):
    return torch.ones(len(batch[0]), dtype=torch.float64)


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ({}, {"learning_rate": 0.0}),
        ({}, {"learning_rate": 0.0, "normalizer": "weight"}),
        ({}, {"learning_rate": 0.0, "optimizer": "adam", "options": {}}),
        ({"measurement": constant}, {}),
        ({"learning_rate": 0.0, "copy_of": torch.zeros(10, dtype=torch.int64)}, {}),
    ],
)
def test_training_that_moves_nothing_is_paid_by_count(make_task, task, recipe):
    recipe = recipe | {name: task[name] for name in ("learning_rate",) if name in task}
    task = {name: part for name, part in task.items() if name != "learning_rate"}
    still = make_task(task=task | {"owner": torch.tensor([0] * 4 + [1] * 6)}, **recipe)

    result = merge_rounds(still, *measured(still, budget=40))

    count = [1.0, 0.0] if task.get("copy_of") is not None else [0.4, 0.6]
    assert result.counted and result.total == result.total_low == result.total_high == 0
    assert not result.values.any()
    assert [o.paid_share for o in result.owners] == pytest.approx(count)
    assert [(o.low, o.high) for o in result.owners] == [(0, 1)] * 2
    assert (result.agreement, result.regime, result.reliability) == (None, "unknown", 0)
    assert result.intervals.startswith("none: ")
    assert result.replicates.sum(1) == pytest.approx(1)


def test_a_measurement_of_steps_is_divided_by_its_replays(make_task):
    """Errors, counted: metagradients are 0, and twins often agree to the bit."""

    def errors(model, batch):
        return (model(batch[0]).argmax(1) != batch[1]).double()

    task = make_task(n_query=20, task={"measurement": errors})

    result = merge_rounds(task, *measured(task, budget=60))

    assert result.total > 0 and result.regime == "chaotic"
    assert np.isfinite(result.replicates).all()
    assert result.values.sum() == pytest.approx(result.total)


def test_one_query_cannot_be_redrawn_so_the_count_pays(make_task):
    six = make_task()
    best = replay_values(six, torch.tensor([[1.0] * 10, [0.0] * 10]), per_query=True).diff(dim=0)[0].argmin()
    task = replace(six, queries=TensorRecords(*six.queries[best[None]]))

    result = merge_rounds(task, *measured(task, budget=40))

    assert result.counted and result.total > 0
    assert "not redrawn" in result.to_json()["intervals"]
    assert [o.paid_share for o in result.owners] == pytest.approx([0.1] * 10)


def test_what_a_few_probes_cannot_tell_is_called_unknown(eight):
    plan, rounds = measured(eight, budget=60, n_rounds=4)

    early, late = merge_rounds(eight, plan, rounds[:1]), merge_rounds(eight, plan, rounds)

    assert early.details["counts"]["probes"] < 4 <= late.details["counts"]["probes"]
    assert json.loads(json.dumps(early.to_json()))["agreement"] is None
    assert early.regime == "unknown" and late.regime in ("smooth", "chaotic")
    assert early.intervals == late.intervals == "95 %, given these queries and this seed, queries bootstrapped"


@pytest.mark.parametrize("recipe", [{}, {"optimizer": "adam", "options": {}, "learning_rate": 0.02}])
def test_steps_that_are_recomputed_for_want_of_memory_are_charged(make_task, monkeypatch, recipe):
    task = make_task(n_train=40, n_query=4, batch=4, epochs=10, **recipe)
    roomy = plan_shares(task, budget=40, n_rounds=2)
    monkeypatch.setattr(training, "MEMORY_BYTES", 1)

    tight = plan_shares(task, budget=40, n_rounds=2)
    early = merge_rounds(task, tight, [run_round(task, tight, 0)])

    counts = [{kind: b - a for kind, (a, b) in r.items.items()} for r in tight.rounds]

    def charged(rounds):
        plain = 1 + sum(c[kind] for c in rounds for kind in ("ends", "values", "toggles", "probes"))
        asked = [(c[kind], 4 if kind == "folds" else 1) for c in rounds for kind in ("folds", "path", "gradients")]
        return plain + sum(plan_reverse(task, *ask).run_equivalents for ask in asked if ask[0])

    assert plan_reverse(task, 4, 1).run_equivalents / 4 > cost(task).metagradient_ratio + 0.5
    assert tight.count("folds") == roomy.count("folds") and tight.run_equivalents > roomy.run_equivalents + 2
    assert tight.run_equivalents == pytest.approx(charged(counts))
    assert early.run_equivalents == pytest.approx(charged(counts[:1]))


def test_a_lone_player_has_the_whole_total(make_task):
    task = make_task(task={"copy_of": torch.zeros(10, dtype=torch.int64)})

    result = merge_rounds(task, *measured(task, budget=40))

    assert result.values[0] == result.total
    assert result.owners[0].share == 1


def test_masks_hold_their_size_and_every_record_as_often():
    plan = Plan("", 3, 1.0, 1.0, 30, 2, tuple(j % 7 for j in range(30)), ())
    masks = Masks(plan)

    for kind in ("values", "gradients", "folds"):
        drawn = np.array([masks.mask(kind, j) for j in range(400)])
        assert [m.sum() for m in drawn] == [masks.size(kind, j) for j in range(400)]
        expected = drawn.mean()
        assert np.abs(drawn.mean(0) - expected).max() < 0.12  # four standard errors
    sizes = np.arange(1, 30)
    drawn_sizes = np.array([masks.size("values", j) for j in range(0, 8000, 2)])
    frequency = np.bincount(drawn_sizes, minlength=30)[1:] / len(drawn_sizes)
    assert frequency == pytest.approx(masks.size_probability(sizes), abs=0.005)
    assert masks.size_probability(sizes).sum() == pytest.approx(1)
    tilted = np.array([masks.mask("toggles", j) for j in range(100)])
    assert ((tilted.sum(1) > 0) & (tilted.sum(1) < 30)).all()
    assert masks.mask("ends", 0).all() and not masks.mask("ends", 1).any()


def test_folds_average_to_the_mean_over_queries():
    Q = fold_weights(11, 4)

    sizes = (Q > 0).sum(1)
    assert torch.allclose((sizes[:, None] * Q).sum(0) / 11, torch.full((11,), 1 / 11, dtype=torch.float64))


def test_a_small_budget_divides_far_better_than_counting(make_task):
    """Ten records, all 1,024 subsets retrained, 64 run equivalents."""
    task = make_task(n_train=10, n_query=60, batch=10, epochs=6, learning_rate=0.05)
    truth = enumerated(task)

    result = merge_rounds(task, *measured(task, budget=64))

    shares, true = result.values / result.total, truth / truth.sum()
    assert np.abs(shares - true).sum() < 0.4 * np.abs(0.1 - true).sum()
    assert [o.low <= share <= o.high for o, share in zip(result.owners, true, strict=True)] == [True] * 10
    assert result.run_equivalents < 80


def test_records_that_do_harm_have_negative_values(make_task):
    clean = make_task(n_train=24, n_query=60, batch=8, epochs=6, learning_rate=0.05)
    x, y = clean.train[torch.arange(24)]
    wrong = torch.arange(24) < 6
    task = replace(clean, train=TensorRecords(x, torch.where(wrong, (y + 1) % 3, y)), owner=wrong.long())

    result = merge_rounds(task, *measured(task, budget=120))

    assert result.owners[1].share < 0
    assert result.owners[1].value == pytest.approx(result.values[:6].sum())
    assert result.owners[0].share > 1


@pytest.mark.parametrize(
    ("recipe", "surrogate"),
    [
        ({"options": {"momentum": 0.9, "weight_decay": 0.01}, "clip_norm": 0.1}, "diagonal"),
        ({"optimizer": "adam", "options": {}, "learning_rate": 0.02}, "random sets"),
        ({"optimizer": "adamw", "options": {"weight_decay": 0.1}, "learning_rate": 0.02}, "random sets"),
        ({"normalizer": "weight"}, "random sets"),
    ],
)
def test_every_recipe_is_divided_to_the_exact_total(make_task, recipe, surrogate):
    """Batches of two: at small sets the first batches are fully masked."""
    task = make_task(n_train=10, n_query=20, batch=2, epochs=2, **recipe)

    result = merge_rounds(task, *measured(task, budget=60))

    ends = replay_values(task, torch.tensor([[1.0] * 10, [0.0] * 10]))
    assert result.details["surrogate"] == surrogate
    assert np.isfinite(result.values).all() and np.isfinite(result.replicates).all()
    assert result.values.sum() == pytest.approx(float(ends[0] - ends[1]), rel=1e-5)
    assert result.replicates.sum(1) == pytest.approx(1)


def test_the_number_of_owners_costs_nothing(make_task):
    alone = make_task(n_train=12, epochs=1)
    together = replace(alone, owner=torch.zeros(12, dtype=torch.int64))
    flops, results = [], []
    for task in (alone, together):
        with FlopCounterMode(display=False) as counter:
            results.append(merge_rounds(task, *measured(task, budget=40)))
        flops.append(counter.get_total_flops())

    assert flops[0] == flops[1] > 0
    assert [len(r.owners) for r in results] == [12, 1]
    assert results[0].run_equivalents == results[1].run_equivalents
    assert np.array_equal(results[0].values, results[1].values)


def test_ten_thousand_members_are_summed_in_one_pass():
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.permutation(np.concatenate([np.arange(10_000), rng.integers(0, 10_000, 2_000)])))
    players = Players(torch.arange(12_000), torch.arange(12_000))
    drawn = rng.standard_normal((5, 12_000))
    partition = Partition("", ids, players, SimpleNamespace(values=drawn[0], total=float(drawn[0].sum())))

    partition.add(drawn, drawn.sum(1))

    assert len(partition.drawn[0][0]) == 10_000
    expected = [np.bincount(ids.numpy(), row) / row.sum() for row in drawn]
    assert partition.drawn[0] == pytest.approx(np.array(expected))


def test_twins_are_of_one_size_and_a_node_weighs_all_records_alike():
    rounds = (Round(0, {"folds": (0, 3), "path": (0, 5)}),)
    plan = Plan("", 3, 1.0, 1.0, 30, 2, tuple(j % 7 for j in range(30)), rounds, diagonal=True)
    masks = Masks(plan)

    tilted = np.array([masks.mask("toggles", j) for j in range(40)])
    assert (tilted[::2].sum(1) == tilted[1::2].sum(1)).all()
    assert (tilted[::2] != tilted[1::2]).any(1).all()
    nodes = [masks.weights(kind, j) for kind, n in (("folds", 3), ("path", 5)) for j in range(n)]
    assert all(np.ptp(w) == 0 and 0 <= w[0] < 1 for w in nodes)
    u = np.sort([float(w[0]) ** (2 / 3) for w in nodes])
    assert np.diff(u).max() < 0.25  # eight in a golden-ratio sequence leave no wide gap
    moved = masks.weights("probes", 6) != masks.weights("path", 3)
    assert 0 < moved.sum() <= 2
