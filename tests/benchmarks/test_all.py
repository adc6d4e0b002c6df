import json
import os
import subprocess

import numpy as np
import pytest
import torch

from attribution.engine import replay_values
from benchmarks.attribution import all as table
from benchmarks.attribution import truth, worlds
from benchmarks.attribution.estimators import ROOT


@pytest.fixture(scope="module")
def world():
    task = worlds.make_task(worlds.WORLDS["gpt"])
    n = task.n_train
    generator = torch.Generator().manual_seed(0)
    kept = [(torch.rand(6, n, generator=generator) < share).float() for share in (0.5, 0.95, 0.99)]
    values = list(replay_values(task, torch.cat(kept), per_query=True).split(6))
    owners = task.owners.numpy()
    shares = np.linspace(1, 10, 10) / 55
    record = shares[owners] / np.bincount(owners)[owners]
    return table.Measured(
        "gpt", task, truth.Truth(shares, shares * 0, record, record * 0, 1.0, 0.0, 1, 0.0), kept, values
    )


def test_scores_that_are_the_truth_up_to_scale_have_no_share_error(world):
    row = world.judged(world.row("m", "", 7 * world.truth.values))

    assert row["tv"] == pytest.approx(0, abs=1e-9)
    assert len(row["lds"]) == 3 and row["lds_by_query"] is None


def test_counting_is_off_by_its_total_variation_and_no_blend_with_itself_helps(world):
    row = world.judged(world.row("counting", "", np.ones(world.task.n_train)))
    count = np.bincount(world.owners) / world.task.n_train

    assert row["tv"] == pytest.approx(np.abs(count - world.truth.shares).sum() / 2)
    assert row["mixed"] == pytest.approx(row["tv"])


def test_scores_that_add_up_to_nothing_divide_nothing(world):
    row = world.judged(world.row("m", "", np.zeros(world.task.n_train)))

    assert np.isnan(row["tv"])


def test_peers_are_given_their_best_setting(world):
    good = world.row("p", "", world.truth.values, setting="a")
    bad = world.row("p", "", np.ones(world.task.n_train), setting="b")

    row = world.best([bad, good])

    assert row["tv"] == pytest.approx(0, abs=1e-9)
    assert set(row["candidates"]) == {"a", "b"}


def test_a_row_is_measured_once_and_again_when_its_key_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS", tmp_path)
    made = []

    def make():
        made.append(1)
        return {"n": len(made)}

    assert table.kept_row(("a", 1), make) == table.kept_row(("a", 1), make) == {"n": 1}
    assert table.kept_row(("a", 2), make) == {"n": 2}


@pytest.mark.skipif(
    not (table.PYDVL / "installed.txt").exists(), reason="var/pydvl is made by ./run bench attribution/all"
)
def test_pydvl_asks_for_no_more_runs_than_it_is_given(tmp_path):
    game = {"n": 12, "budget": 40, "seed": 0, "none": 0.0, "all": 12.0}
    (tmp_path / "game.json").write_text(json.dumps(game))
    command = [str(table.PYDVL / "bin" / "python"), str(ROOT / "benchmarks" / "attribution" / "pydvl_values.py")]
    subprocess.run([*command, "ask", str(tmp_path)], check=True, env=os.environ)
    for path in list(tmp_path.glob("*.npy")):
        sets = np.load(path)
        assert 0 < len(sets) <= 40
        np.save(tmp_path / f"{path.stem}.values.npy", sets.sum(1).astype(float))  # every record is worth 1
    subprocess.run([*command, "divide", str(tmp_path)], check=True, env=os.environ)

    found = np.load(tmp_path / "antithetic permutation.shares.npy")
    np.testing.assert_allclose(found, 1, atol=1e-9)
