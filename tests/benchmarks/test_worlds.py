import numpy as np
import pytest
import torch

from attribution.engine import replay_values
from attribution.engine.training import train
from benchmarks.attribution import worlds
from benchmarks.attribution.texts import hashed_words, projects, windows


@pytest.fixture(scope="module")
def lora():
    return worlds.make_task(worlds.WORLDS["lora"])


def test_every_new_world_comes_in_a_smooth_and_a_chaotic_recipe():
    for name in ("logistic", "mlp", "cnn", "text", "gpt", "lora"):
        assert worlds.WORLDS[name].is_smooth
        assert not worlds.WORLDS[f"{name}-chaotic"].is_smooth


def test_a_world_is_the_same_every_time_and_another_for_another_seed():
    gpt = worlds.WORLDS["gpt"]

    assert worlds.make_task(gpt).digest == worlds.make_task(gpt).digest != worlds.make_task(gpt, seed=1).digest


def test_queries_are_windows_that_no_record_shows(lora):
    (records,), (queries,) = (part[torch.arange(len(part))] for part in (lora.train, lora.queries))
    shown = {tuple(row.tolist()) for row in records}

    assert not any(tuple(row.tolist()) in shown for row in queries)
    assert lora.owners.bincount().tolist() == list(worlds.FEW)


def test_an_owner_has_near_copies_and_another_shuffled_bytes():
    task = worlds.make_task(worlds.WORLDS["gpt"])
    (rows,) = task.train[torch.arange(task.n_train)]
    copyist = rows[task.owners == worlds.COPYIST]
    careless = rows[task.owners == worlds.CARELESS]
    texts = [text for _, text in projects()]

    assert ((copyist[0] != copyist[2]).sum()) <= 2  # each of the two differs from their source in one byte
    honest = [bytes(row.tolist()).decode() in texts[worlds.CARELESS] for row in careless]
    assert honest == [False] * 4 + [True] * 4


def test_the_adapter_trains_and_its_base_does_not(lora):
    before, after = lora.recipe.initial_state, train(lora).model_state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}

    assert moved
    assert all(name.endswith((".A.weight", ".B.weight")) for name in moved)


def test_the_adapter_learns_from_the_records(lora):
    f_all, f_none = replay_values(lora, torch.tensor([[1.0], [0.0]]).expand(2, lora.n_train)).tolist()

    assert f_all > f_none + 1  # a nat a byte


def test_words_have_the_same_numbers_everywhere_and_0_is_none():
    found = hashed_words("It works, it works!", length=8, vocabulary=256)

    assert found.tolist()[1] == found.tolist()[4] != 0
    assert found.tolist()[-2:] == [0, 0]
    assert found.max() < 256
    np.testing.assert_array_equal(windows("abcdefg", 3), [[97, 98, 99], [100, 101, 102]])
