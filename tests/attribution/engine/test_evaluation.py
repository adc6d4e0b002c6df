import itertools
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from attribution.engine import EngineError, TensorRecords, evaluation, replay_values
from attribution.engine.__main__ import main
from attribution.engine.charts import evaluation_svg
from attribution.engine.estimators import graddot, replay
from attribution.engine.evaluation import (
    GroundTruth,
    Scored,
    auc,
    evaluate,
    exact_values,
    has_copy,
    likeness,
    random_subsets,
    scores_without_copies,
    self_influence,
    share_error,
)
from attribution.engine.ranks import Ranked, spearman


def linear_model():
    return nn.Linear(4, 1, bias=False).double()


def minus_output(model, batch):
    return -model(batch[0])[:, 0]


@pytest.fixture
def linear(make_task):
    """A loss linear in the weights: every step adds the same vector per record, so f is a sum over records, exactly."""
    return make_task(
        n_train=30,
        n_query=12,
        batch=5,
        build=linear_model,
        options={},
        task={"loss": minus_output, "measurement": minus_output},
    )


def additive_scores(task):
    x, _ = task.train[torch.arange(task.n_train)]
    q, _ = task.queries[torch.arange(task.n_query)]
    return (0.1 * 3 / 5 * x @ q.T).numpy()  # rate · epochs / batch


def ranked(x):
    return Ranked(np.asarray(x, dtype=np.float64)[:, None])


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=3, max_size=30),
)
def test_spearman_is_scipys_with_ties_and_repeated_rows(rows):
    x, y, counts = np.array(rows, dtype=np.float64).T
    repeated_x, repeated_y = np.repeat(x, counts.astype(int)), np.repeat(y, counts.astype(int))
    if len(set(repeated_x)) < 2 or len(set(repeated_y)) < 2:
        return

    found = spearman(ranked(x), ranked(y), counts)

    assert found[0] == pytest.approx(stats.spearmanr(repeated_x, repeated_y).statistic, abs=1e-12)


def test_what_never_varies_correlates_with_nothing():
    x = np.arange(6.0)

    assert spearman(ranked(np.ones(6)), ranked(x), np.ones(6))[0] == 0
    assert Ranked(np.stack([x, np.ones(6)], 1)).is_constant.tolist() == [False, True]


def test_lds_of_a_linear_games_own_scores_is_one_of_their_negative_minus_one_of_random_ones_nothing(linear):
    scores = additive_scores(linear)
    noise = np.random.default_rng(0).standard_normal(scores.shape)

    result = evaluate(
        linear,
        [Scored("true", scores), Scored("negated", -scores), Scored("random", noise), Scored("equal", np.ones(30))],
        kept=[0.5, 0.9],
    )

    true, negated, random, equal = ([lds.lds for lds in method.lds] for method in result.methods)
    assert true == pytest.approx([1, 1], abs=1e-9)
    assert negated == pytest.approx([-1, -1], abs=1e-9)
    assert np.abs(random).max() < 0.15  # twelve queries, correlated: four standard errors
    assert equal == [0, 0]
    for lds in result.methods[2].lds:
        assert lds.low < 0 < lds.high
        assert (lds.n_subsets, lds.n_query, lds.n_constant) == (100, 12, 0)
    assert replay.score(linear).numpy() == pytest.approx(scores, abs=1e-6)


def test_lds_matches_a_slow_loop(make_task):
    task = make_task(n_train=14, n_query=5)
    scores = graddot.score(task).double().numpy()
    masks = random_subsets(14, 0.5, 20, 3)

    result = evaluate(task, [Scored("graddot", scores)], n_subsets=20, seed=3)

    f = replay_values(task, torch.from_numpy(masks).double(), per_query=True).numpy()
    slow = [stats.spearmanr(f[:, q], [scores[m, q].sum() for m in masks]).statistic for q in range(5)]
    assert result.methods[0].lds[0].lds == pytest.approx(np.mean(slow), abs=1e-6)
    assert masks.sum(1).tolist() == [7] * 20
    assert np.array_equal(random_subsets(14, 0.5, 30, 3)[:20], masks)
    assert not np.array_equal(random_subsets(14, 0.5, 20, 4), masks)


def test_the_interval_covers_the_lds_over_many_subsets(make_task):
    task = make_task(n_train=24, n_query=8)
    scored = [Scored("graddot", graddot.score(task).numpy())]
    many = evaluate(task, scored, n_subsets=800, seed=99).methods[0].lds[0].lds

    few = [evaluate(task, scored, n_subsets=50, seed=seed).methods[0].lds[0] for seed in range(10)]

    assert sum(lds.low <= many <= lds.high for lds in few) >= 8
    assert all(0 < lds.high - lds.low < 0.6 for lds in few)


def test_replay_predicts_dropping_five_per_cent_where_training_is_smooth(make_task):
    task = make_task(n_train=60, n_query=20, batch=10, epochs=4, learning_rate=0.05)

    lds = evaluate(task, [Scored("replay", replay.score(task).numpy())], kept=[0.95]).methods[0].lds[0]

    assert lds.lds >= 0.97


def test_the_exact_game_is_shapleys_definition(make_task):
    task = make_task(n_train=5, n_query=3)
    truth = GroundTruth(task)

    phi = exact_values(truth)

    @cache
    def f(S):
        return replay_values(task, torch.tensor([[float(i in S) for i in range(5)]]), per_query=True)[0].numpy()

    for i in range(5):
        others = [j for j in range(5) if j != i]
        slow = sum(
            (f(S | {i}) - f(S)) / (5 * comb(4, k))
            for k in range(5)
            for S in map(frozenset, itertools.combinations(others, k))
        )
        assert phi[i] == pytest.approx(slow, abs=1e-6)
    assert phi.sum(0) == pytest.approx(truth.f_all - truth.f_none, abs=1e-6)


def test_share_error_is_the_part_of_the_pool_that_goes_wrong():
    owner, exact = np.array([4, 4, 7, 7]), np.array([3.0, 2.0, 4.0, 1.0])

    assert share_error(10 * exact, exact, owner).owners == 0
    wrong = share_error(np.array([5.0, 3.0, 1.0, 1.0]), exact, owner)
    assert (wrong.owners, wrong.records) == pytest.approx((0.3, 0.3))
    assert wrong.blended == pytest.approx(0)  # counting is right here
    assert share_error(-exact, exact, owner).owners is None


def test_exact_shares_on_a_small_task_and_not_on_a_large_one(make_task):
    task = make_task(n_train=8, task={"owner": torch.arange(8) // 4})
    values = exact_values(GroundTruth(task)).mean(1)

    result = evaluate(task, [Scored("exact", values), Scored("replay", replay.score(task).numpy())], exact=True)

    assert result.methods[0].share_error.owners == pytest.approx(0, abs=1e-6)
    assert result.methods[0].share_error.correlation == pytest.approx(1)
    assert result.by_count.owners > 0 and result.methods[1].share_error.owners > 0
    with pytest.raises(EngineError, match="at most 12") as refused:
        evaluate(make_task(n_train=13), [Scored("equal", np.ones(13))], exact=True)
    assert refused.value.pointer == "/exact"


def test_leaving_out_the_top_scored_hurts_more_than_leaving_out_at_random(linear):
    scores = additive_scores(linear).mean(1)

    result = evaluate(linear, [Scored("true", scores), Scored("negated", -scores)], leave_out=[0.1, 0.5])

    true, negated = ([point.measurement for point in method.leave_out] for method in result.methods)
    assert [(point.fraction, point.k) for point in result.random] == [(0.1, 3), (0.5, 15)]
    for worse, point, better in zip(true, result.random, negated, strict=True):
        assert better < point.low < point.high < worse
    expected = result.measurement + np.sort(scores)[::-1][:3].sum()  # what the three add, exactly
    assert true[0] == pytest.approx(expected, abs=1e-6)


def test_auc_is_mann_whitneys():
    rng = np.random.default_rng(1)
    by, marked = rng.integers(0, 8, 40).astype(float), rng.random(40) < 0.3

    expected = stats.mannwhitneyu(by[marked], by[~marked]).statistic / (marked.sum() * (~marked).sum())

    assert auc(marked, by) == pytest.approx(expected)


def test_wrong_labels_are_found_by_harmfulness_and_by_self_influence(make_task):
    clean = make_task(n_train=60, n_query=30, batch=10, epochs=6, learning_rate=0.05)
    x, y = clean.train[torch.arange(60)]
    wrong = np.random.default_rng(0).permutation(60) < 9
    task = replace(clean, train=TensorRecords(x, torch.where(torch.from_numpy(wrong), (y + 1) % 3, y)))

    for method in (graddot, replay):
        scored = Scored("m", method.score(task).numpy(), self_influence=self_influence(task, method))
        found = evaluate(task, [scored], n_subsets=10, mislabelled=wrong).methods[0].mislabelled_auc
        assert set(found) == {"harmfulness", "self_influence"}
        assert min(found.values()) > 0.8
        own = method.score(replace(task, queries=task.train, measurement=task.loss)).diagonal()
        assert scored.self_influence == pytest.approx(own.double().numpy(), rel=1e-4, abs=1e-7)


def test_copies_score_alike_when_nobody_marked_them(make_task):
    plain = make_task(
        n_train=20, n_query=15, batch=20, epochs=8
    )  # one batch an epoch: a copy does what its original does
    x, y = plain.train[torch.arange(20)]
    source = torch.arange(20)
    source[15:] = torch.arange(5)
    task = replace(plain, train=TensorRecords(x[source], y[source]), copy_of=source)

    unmarked = scores_without_copies(task, replay)

    assert has_copy(source.numpy(), 20).nonzero()[0].tolist() == [*range(5), *range(15, 20)]
    assert auc(has_copy(source.numpy(), 20), likeness(unmarked)) == 1
    assert replay.score(task)[15:].eq(0).all()


def test_likeness_ignores_its_blocks_and_a_row_of_zeros():
    rows = np.random.default_rng(0).standard_normal((1030, 3))
    rows[5] = 0

    found = likeness(rows)

    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(length > 0, length, 1)
    cosine = unit @ unit.T - 9 * np.eye(1030)
    assert found == pytest.approx(cosine.max(1), abs=1e-12)


# --- the ground truth on disk


def test_ground_truth_is_measured_once_and_a_broken_file_again(make_task, tmp_path, monkeypatch):
    task = make_task()
    masks = random_subsets(10, 0.5, 120, 0)
    first = GroundTruth(task, tmp_path)
    values = first.values(masks)
    assert (first.measured, first.reused) == (3, 0)

    monkeypatch.setattr(evaluation, "CHUNK", 50)
    again = GroundTruth(task, tmp_path)
    assert np.array_equal(again.values(masks), values)
    assert (again.measured, again.reused, again.redone) == (0, 3, 0)

    for harm in (truncate, flip_a_bit, replace_by_another):
        files = sorted(p for p in tmp_path.rglob("*.safetensors") if p.stat().st_size > 1000)
        harm(files)
        third = GroundTruth(task, tmp_path)
        assert np.array_equal(third.values(masks), values)
        assert (third.measured, third.redone) == (1, 1), harm
    assert not list(tmp_path.rglob("*.partial"))


def truncate(files):
    files[0].write_bytes(files[0].read_bytes()[:-7])


def flip_a_bit(files):
    content = bytearray(files[0].read_bytes())
    content[-7] ^= 1
    files[0].write_bytes(content)


def replace_by_another(files):
    files[0].write_bytes(files[1].read_bytes())


def test_an_interrupted_ground_truth_goes_on_where_it_was(make_task, tmp_path, monkeypatch):
    task, masks = make_task(), random_subsets(10, 0.5, 150, 0)
    measure, calls = GroundTruth._measure, []

    def stops(self, chunk, progress):
        calls.append(len(chunk))
        if len(calls) == 4:  # both ends, two chunks, and then
            raise KeyboardInterrupt
        return measure(self, chunk, progress)

    monkeypatch.setattr(GroundTruth, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        GroundTruth(task, tmp_path).values(masks)
    resumed = GroundTruth(task, tmp_path)
    values = resumed.values(masks)

    assert (resumed.measured, resumed.reused) == (1, 2)
    assert np.array_equal(values, GroundTruth(task).values(masks))


def test_ground_truth_of_another_task_is_not_used_and_of_another_measurement_refused(make_task, tmp_path):
    task = make_task()
    masks = random_subsets(10, 0.5, 10, 0)
    GroundTruth(task, tmp_path).values(masks)

    other = GroundTruth(make_task(learning_rate=0.2), tmp_path)
    other.values(masks)
    assert (other.measured, other.reused) == (1, 0)
    renamed = replace(
        task, measurement=lambda model, batch: 2 * task.measurement(model, batch)
    )  # the digest is the same
    with pytest.raises(EngineError, match="another model, loss or measurement"):
        GroundTruth(renamed, tmp_path)


def test_copies_are_left_out_together(make_task):
    task = make_task(task={"copy_of": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])})
    truth = GroundTruth(task)
    mask = np.ones((1, 9), bool)
    mask[0, 0] = False

    without = torch.ones(1, 10)
    without[0, [0, 9]] = 0
    assert truth.values(mask) == pytest.approx(replay_values(task, without, per_query=True).numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "pointer"),
    [
        ({"kept": [1.0]}, "/kept"),
        ({"kept": [0.0]}, "/kept"),
        ({"n_subsets": 3}, "/subsets"),
        ({"leave_out": [0.1, 1.5]}, "/leave_out/1"),
        ({"mislabelled": np.zeros(10)}, "/mislabelled"),
        ({"mislabelled": np.zeros(10, bool)}, "/mislabelled"),
        ({"mislabelled": np.ones(3, bool)}, "/mislabelled"),
        ({"copies": np.ones(10, bool)}, "/copies"),
        ({"scored": []}, "/methods"),
        ({"scored": [Scored("mine", np.ones((10, 5)))]}, "/scores/mine"),
        ({"scored": [Scored("mine", np.full((10, 6), np.nan))]}, "/scores/mine/0/0"),
    ],
)
def test_an_evaluation_is_refused_by_the_place_of_its_fault(make_task, arguments, pointer):
    given = {"scored": [Scored("equal", np.ones(10))]} | arguments

    with pytest.raises(EngineError) as refused:
        evaluate(make_task(), **given)

    assert refused.value.pointer == pointer


def test_evaluation_needs_a_recipe_and_two_players(make_task):
    with pytest.raises(EngineError, match="recipe"):
        evaluate(replace(make_task(), recipe=None), [Scored("equal", np.ones(10))])
    with pytest.raises(EngineError, match="one player"):
        evaluate(make_task(task={"copy_of": torch.zeros(10, dtype=torch.int64)}), [Scored("equal", np.ones(10))])


def test_the_picture_is_well_formed_whatever_a_method_is_called(make_task):
    task = make_task()
    scored = [Scored("<b>&mine", np.arange(10.0)), Scored("other", -np.arange(10.0))]

    svg = evaluation_svg(evaluate(task, scored, kept=[0.5, 0.8], n_subsets=10, leave_out=[0.2]))

    root = ElementTree.fromstring(svg)  # noqa: S314 - our own text
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>&mine, 50 % kept" in texts and "at random" in texts
    assert "nan" not in svg and "inf" not in svg


# --- the command


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path}/task.py:make_task"


TASK = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed


def build():
    return nn.Linear(4, 3)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task(copy_of=None):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(20) % 3
    x = torch.eye(4)[y] + 0.3 * torch.randn(20, 4, generator=generator)
    recipe = Recipe(
        optimizer="sgd", learning_rate=0.5, order=epoch_order(8, 4, 2, 0), initial_state=initial_state_from_seed(build, 0)
    )
    return Task(
        model=build, loss=loss, measurement=loss, train=TensorRecords(x[:8], y[:8]), queries=TensorRecords(x[8:], y[8:]),
        owner=torch.arange(8) // 4, recipe=recipe, copy_of=copy_of,
    )


def with_copies():
    return make_task(torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]))
"""


def test_evaluate_writes_a_table_a_report_and_a_picture_and_reuses_its_retrains(task_file, tmp_path, capfd):
    out = tmp_path / "out"
    np.save(tmp_path / "mine.npy", np.arange(8.0))
    np.save(tmp_path / "wrong.npy", np.arange(8) < 2)
    np.save(tmp_path / "copies.npy", np.array([0, 1, 2, 3, 4, 5, 6, 0]))
    command = ["evaluate", task_file, "--out", str(out), "--kept", "0.5", "0.75", "--subsets", "20", "--exact"]
    command += ["--method", "graddot", "--method", "replay", "--scores", f"mine={tmp_path}/mine.npy"]
    command += ["--mislabelled", f"{tmp_path}/wrong.npy", "--self-influence", "--copies", f"{tmp_path}/copies.npy"]

    assert main(command) == 0
    first = json.loads((out / "evaluation.json").read_text())
    assert main(command) == 0
    again = json.loads((out / "evaluation.json").read_text())

    assert [method["name"] for method in first["methods"]] == ["graddot", "replay", "mine"]
    graddot_, replay_, mine = first["methods"]
    assert (graddot_["calibrated"], replay_["calibrated"], mine["calibrated"]) == (False, True, None)
    assert [lds["kept"] for lds in replay_["lds"]] == [0.5, 0.75]
    assert set(replay_["mislabelled_auc"]) == {"harmfulness", "self_influence"}
    assert set(mine["mislabelled_auc"]) == {"harmfulness"}
    assert 0 <= replay_["copies_auc"] <= 1 and mine["copies_auc"] is None
    assert replay_["share_error"]["owners"] >= 0
    truth = first["truth"]
    assert truth["measured"] > 0
    assert again["truth"] == {"measured": 0, "reused": truth["measured"] + truth["reused"], "redone": 0}
    assert [m["lds"] for m in again["methods"]] == [m["lds"] for m in first["methods"]]
    ElementTree.parse(out / "evaluation.svg")  # noqa: S314 - our own text
    assert np.load(out / "scores-replay.npy").shape == (8, 12)
    shown = capfd.readouterr().err
    assert "LDS, 75 % kept" in shown and "wrong labels, self-influence" in shown
    assert not list(out.rglob("*.partial"))


def test_a_method_without_an_answer_is_left_out_and_said_unless_it_is_the_only_one(
    task_file, tmp_path, capfd, monkeypatch
):
    def exploded(task, **_):
        raise EngineError("the derivative has exploded", pointer="/recipe")

    monkeypatch.setattr(replay, "score", exploded)
    command = ["evaluate", task_file, "--out", str(tmp_path / "out"), "--subsets", "10", "--method", "replay"]

    assert main(command) == 2
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert main([*command, "--method", "graddot"]) == 0

    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [method["name"] for method in report["methods"]] == ["graddot"]
    assert report["skipped"] == {"replay": "/recipe: the derivative has exploded"}
    assert "without replay" in capfd.readouterr().err


def test_evaluate_measures_every_method_there_is_unless_told(task_file, tmp_path):
    from attribution.engine.__main__ import METHODS

    assert main(["evaluate", task_file, "--out", str(tmp_path / "out"), "--subsets", "10", "--leave-out"]) == 0

    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [method["name"] for method in report["methods"]] == list(METHODS)
    assert report["random"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scores", "mine"], "is not NAME=PATH.npy"),
        (["--scores", "mine={folder}/none.npy"], "does not exist"),
        (["--scores", "mine={folder}/half.npy"], "is not a whole .npy file"),
        (["--scores", "mine={folder}/pickled.npy"], "is not a whole .npy file"),
        (["--scores", "mine={folder}/integers.npy"], "not floating-point"),
        (["--scores", "mine={folder}/short.npy"], "must be (8, 12)"),
        (["--scores", "graddot={folder}/short.npy"], "is taken"),
        (["--copies", "--method", "graddot"], "the task names no copies"),
        (["--copies", "{folder}/short.npy", "--method", "graddot"], "/copies"),
        (["--mislabelled", "{folder}/short.npy", "--method", "graddot"], "/mislabelled"),
        (["--kept", "50", "--method", "graddot"], "fraction between 0 and 1"),
        (["--subsets", "5", "--method", "graddot"], "fewer than 10"),
    ],
)
def test_evaluate_refuses_bad_input_and_writes_no_report(task_file, tmp_path, capfd, options, message):
    whole = tmp_path / "whole.npy"
    np.save(whole, np.ones((8, 12)))
    (tmp_path / "half.npy").write_bytes(whole.read_bytes()[:-100])
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "integers.npy", np.ones((8, 12), np.int64))
    np.save(tmp_path / "short.npy", np.ones(3))

    command = ["evaluate", task_file, "--out", str(tmp_path / "out"), *(o.format(folder=tmp_path) for o in options)]
    assert main(command) == 2

    assert message in capfd.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_copies_of_the_task_itself_are_looked_for_when_asked(task_file, tmp_path):
    reference = task_file.replace("make_task", "with_copies")

    command = ["evaluate", reference, "--out", str(tmp_path), "--method", "graddot", "--subsets", "10", "--copies"]
    assert main(command) == 0

    (method,) = json.loads((tmp_path / "evaluation.json").read_text())["methods"]
    assert method["copies_auc"] is not None
