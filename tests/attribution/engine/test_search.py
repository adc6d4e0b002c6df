"""FAISS over the store against NumPy's own products, and the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution.engine import EngineError
from attribution.engine import __main__ as command_line
from attribution.engine import search as search_module
from attribution.engine import store as store_module
from attribution.engine.__main__ import main
from attribution.engine.estimators import graddot
from attribution.engine.search import build_shortlist, exact_search, open_shortlist, recall, search
from attribution.engine.store import MANIFEST, Settings, Store, build_store, compressed
from attribution.engine.training import train

TASK = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed


def build():
    return nn.Linear(4, 3)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task():
    y = torch.arange(24) % 3
    x = torch.eye(4)[y] + 0.3 * torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    train, queries = TensorRecords(x[:12], y[:12]), TensorRecords(x[12:], y[12:])
    recipe = Recipe(
        optimizer="sgd", learning_rate=0.5, order=epoch_order(12, 4, 2, 0), initial_state=initial_state_from_seed(build, 0)
    )
    return Task(model=build, loss=loss, measurement=loss, train=train, queries=queries, recipe=recipe)
"""


@pytest.fixture(scope="module")
def task(make_task):
    return make_task(30, 6)


@pytest.fixture(scope="module")
def store(task, tmp_path_factory):
    """At a width that holds all 43 parameters: its scores are graddot's, but for 8 bits."""
    return build_store(task, tmp_path_factory.mktemp("store"), width=64, shard_records=8)


def of_vectors(folder: Path, z: np.ndarray, rows: int) -> Store:
    """A store of given vectors, as `build_store` writes one."""
    folder.mkdir()
    settings, shards = Settings("0" * 64, z.shape[1], 0, rows), []
    for start in range(0, len(z), rows):
        stop = min(start + rows, len(z))
        shards.append(store_module._keep_shard(folder, settings, start, stop, "", *compressed(z[start:stop])))
    store_module._write_manifest(folder, settings, shards, 0)
    return Store.open(folder)


def clustered(n: int, width: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors in clusters, of norms over two orders of magnitude and with most energy in few directions."""
    rng = np.random.default_rng(seed)
    spread = 1 / np.arange(1, width + 1)
    centres = rng.normal(size=(50, width)) * spread
    z = centres[rng.integers(0, 50, n)] + 0.5 * rng.normal(size=(n, width)) * spread
    return (z * np.exp(rng.normal(size=(n, 1)))).astype(np.float32)


def test_exact_search_is_brute_force_over_the_store_s_vectors(store):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(5, 64)).astype(np.float32)

    found = exact_search(store, queries, k=12)

    scores = queries @ store.vectors(np.arange(30)).T
    order = np.argsort(-scores, axis=1)[:, :12]
    np.testing.assert_array_equal(found.records, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), rtol=1e-5)


def test_search_ranks_as_graddot_does_and_gives_both_ends(task, store):
    answer = search(task, store, [4, 0], k=30)

    scores = graddot.score(task, state=train(task).state)
    assert (answer.way, answer.recall) == ("exact", 1.0)
    for moved in answer.queries:
        truth = scores[:, moved.query].numpy()
        both = dict(moved.helpful) | dict(moved.harmful)
        assert sorted(both) == list(range(30))
        assert all(s > 0 for _, s in moved.helpful) and all(s < 0 for _, s in moved.harmful)
        assert moved.helpful == sorted(moved.helpful, key=lambda pair: -pair[1])
        assert moved.harmful == sorted(moved.harmful, key=lambda pair: pair[1])
        found = np.array([both[i] for i in range(30)])
        np.testing.assert_allclose(found, truth, atol=0.02 * np.abs(truth).max())
        assert np.corrcoef(found, truth)[0, 1] > 0.999
    assert [m.query for m in answer.queries] == [4, 0]


def test_a_class_of_copies_is_found_once_at_its_representative(task, store):
    copied = replace(task, copy_of=torch.tensor([0, 0, 0, *range(3, 30)]))

    (moved,) = search(copied, store, [1], k=28).queries

    found = {i for i, _ in moved.helpful + moved.harmful}
    assert found == {0, *range(3, 30)}
    with pytest.raises(EngineError, match=r"^/k: 29 is not in 1\.\.28"):
        search(copied, store, [1], k=29)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        ([0, 6], 3, r"^/query/1: 6 is not in 0\.\.5"),
        ([-1], 3, r"^/query/0: -1 is not in 0\.\.5"),
        ([], 3, "^/query: name at least one query"),
        ([0], 31, r"^/k: 31 is not in 1\.\.30"),
        ([0], 0, r"^/k: 0 is not in 1\.\.30"),
    ],
)
def test_what_is_out_of_range_is_refused(task, store, queries, k, message):
    with pytest.raises(EngineError, match=message):
        search(task, store, queries, k=k)


@pytest.mark.parametrize("kind", ["sq8", "pq"])
def test_a_shortlist_scores_exactly_and_says_its_recall(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(search_module, "DIRECTIONS", 32)
    store = of_vectors(tmp_path / "store", clustered(6000), 1000)
    queries = clustered(40, seed=1)

    shortlist = build_shortlist(store, queries, kind=kind)
    found, truth = shortlist.search(store, queries, k=100), exact_search(store, queries, k=100)

    assert shortlist.recall >= 0.95
    assert recall(found.records, truth.records) >= 0.95
    assert shortlist.report["n_probe"] < shortlist.report["n_list"]
    for q, records, scores in zip(queries, found.records, found.scores, strict=True):
        np.testing.assert_allclose(scores, store.vectors(records) @ q, rtol=1e-5)
        assert (np.diff(scores) <= 0).all()
    reopened = open_shortlist(store)
    np.testing.assert_array_equal(reopened.search(store, queries, k=100).records, found.records)


def test_a_shortlist_of_some_players_proposes_no_other(tmp_path):
    store = of_vectors(tmp_path / "store", clustered(2000), 512)
    players = np.arange(1, 2000, 2)

    shortlist = build_shortlist(store, clustered(10, seed=1), players=players)
    found = shortlist.search(store, clustered(10, seed=2), k=50)

    assert set(np.unique(found.records) % 2) == {1}


def test_a_damaged_shortlist_is_refused_and_one_of_another_store_is_not_used(tmp_path):
    store = of_vectors(tmp_path / "store", clustered(2000), 512)
    build_shortlist(store, clustered(10, seed=1))
    path = tmp_path / "store" / "shortlist.faiss"
    whole = path.read_bytes()

    path.write_bytes(whole[:-1])
    with pytest.raises(EngineError, match="its checksum does not match, the file is damaged; run `index` again"):
        open_shortlist(store)
    path.write_bytes(whole)
    manifest = tmp_path / "store" / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    assert open_shortlist(Store.open(tmp_path / "store")) is None


def test_a_shortlist_that_finds_too_little_is_not_used(task, store, monkeypatch):
    class Poor:
        recall = 0.9

    monkeypatch.setattr(search_module, "open_shortlist", lambda _: Poor())

    assert search(task, store, [0], k=5).way == "exact"


def test_index_and_search_from_the_command_line(tmp_path, capfd):
    (tmp_path / "task.py").write_text(TASK)
    reference, out = f"{tmp_path}/task.py:make_task", tmp_path / "out"

    assert main(["index", reference, "--out", str(out), "--width", "64", "--shard-records", "5"]) == 0
    assert "12 records x 64 in 3 shards" in capfd.readouterr().err
    assert main(["search", reference, "--out", str(out), "--query", "3", "7", "--k", "12"]) == 0

    found = json.loads((out / "search.json").read_text())
    assert (found["way"], found["k"], found["calibrated"]) == ("exact", 12, False)
    assert [q["query"] for q in found["queries"]] == [3, 7]
    first = found["queries"][0]
    assert sorted(pair["record"] for pair in first["helpful"] + first["harmful"]) == list(range(12))
    assert first["helpful"][0]["score"] > 0 > first["harmful"][0]["score"]
    assert not list(tmp_path.rglob("*.partial"))

    for arguments, message in [
        (["search", reference, "--out", str(out), "--query", "12"], "/query/0: 12 is not in 0..11"),
        (["search", reference, "--out", str(out), "--query", "1", "--k", "13"], "/k: 13 is not in 1..12"),
        (["search", reference, "--out", str(tmp_path / "empty"), "--query", "1"], "no gradient store is here"),
        (["index", reference, "--out", str(out), "--width", "64", "--shard-records", "6"], "shard_records 5, not 6"),
        (["index", reference, "--out", str(tmp_path / "odd"), "--width", "65"], "65 is not a power of two"),
    ]:
        assert main(arguments) == 2
        assert message in capfd.readouterr().err


def test_a_large_store_gets_its_shortlist_from_index(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    reference, out = f"{tmp_path}/task.py:make_task", tmp_path / "out"
    monkeypatch.setattr(command_line, "SHORTLIST_FROM", 10)

    assert main(["index", reference, "--out", str(out), "--width", "64"]) == 0
    assert main(["search", reference, "--out", str(out), "--query", "3", "--k", "5"]) == 0
    short = json.loads((out / "search.json").read_text())
    assert main(["search", reference, "--out", str(out), "--query", "3", "--k", "5", "--exact"]) == 0
    exact = json.loads((out / "search.json").read_text())

    assert (short["way"], exact["way"], short["recall"]) == ("shortlist", "exact", 1.0)
    for side in ("helpful", "harmful"):
        a, b = (found["queries"][0][side] for found in (short, exact))
        assert [pair["record"] for pair in a] == [pair["record"] for pair in b]
        assert [pair["score"] for pair in a] == pytest.approx([pair["score"] for pair in b])


def test_index_makes_a_damaged_shortlist_again_and_one_of_another_kind(tmp_path, monkeypatch, capfd):
    (tmp_path / "task.py").write_text(TASK)
    reference, out = f"{tmp_path}/task.py:make_task", tmp_path / "out"
    monkeypatch.setattr(command_line, "SHORTLIST_FROM", 10)
    monkeypatch.setattr(search_module, "DIRECTIONS", 4)
    index = ["index", reference, "--out", str(out), "--width", "64"]
    query = ["search", reference, "--out", str(out), "--query", "3", "--k", "5"]
    path, report = out / "shortlist.faiss", out / "shortlist.json"

    assert main(index) == 0
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    assert main(index) == 0
    assert path.stat().st_mtime_ns == made

    for harmed, content in ((path, whole[:-1]), (report, b"{}"), (report, b"[")):
        harmed.write_bytes(content)
        capfd.readouterr()
        assert main(query) == 2
        assert "run `index` again" in capfd.readouterr().err
        assert main(index) == 0
        assert path.read_bytes() == whole
        assert main(query) == 0
    capfd.readouterr()

    class Kind:
        built: list[str] = []

    def noting(*given, kind, **more):
        Kind.built.append(kind)
        found = build_shortlist(*given, kind="sq8", **more)  # too few records to learn product quantization from
        report.write_text(json.dumps(found.report | {"kind": kind}))
        return found

    monkeypatch.setattr(command_line, "build_shortlist", noting)
    for more in (["--kind", "sq8"], ["--kind", "pq"], ["--kind", "pq"], [], ["--kind", "sq8"]):
        assert main([*index, *more]) == 0
    assert Kind.built == ["pq", "sq8"]

    path.write_bytes(whole[:-1])
    monkeypatch.setattr(command_line, "SHORTLIST_FROM", 100)  # none is needed: the damaged one is no longer in the way
    assert main(index) == 0
    assert main(query) == 0
    assert json.loads((out / "search.json").read_text())["way"] == "exact"


OUTSIDE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed


class Scaled(nn.Module):
    # a bare parameter, which no layer's hook sees
    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        h = (x * self.scale)[:, None, None]
        return self.layer(scaled_dot_product_attention(h, h, h)[:, 0, 0])


def loss(model, batch):
    found = cross_entropy(model(batch[0]), batch[1], reduction="none")
    return found / max(1, found.sum().item() * 0)


def plain(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task(loss=loss):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    records = TensorRecords(x, torch.arange(12) % 3)
    recipe = Recipe(
        optimizer="sgd", learning_rate=0.5, order=epoch_order(12, 4, 2, 0), initial_state=initial_state_from_seed(Scaled, 0)
    )
    return Task(model=Scaled, loss=loss, measurement=plain, train=records, queries=records, recipe=recipe)


def make_plain():
    return make_task(plain)
"""


def test_index_says_as_score_does_what_cannot_be_mapped_over_records(tmp_path, capfd):
    (tmp_path / "outside.py").write_text(OUTSIDE)
    said = []
    for command in (["score", "--method", "graddot"], ["index", "--width", "64"]):
        name, *more = command
        assert main([name, f"{tmp_path}/outside.py:make_task", "--out", str(tmp_path / name), *more]) == 2
        said.append(capfd.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]
    assert said[0].startswith("error: /loss: cannot be mapped over records: ")
    assert "no .item()" in said[0]

    assert main(["index", f"{tmp_path}/outside.py:make_plain", "--out", str(tmp_path / "out"), "--width", "64"]) == 0
