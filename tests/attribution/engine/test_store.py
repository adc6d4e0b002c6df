"""The store on disk: what it holds, and what a kill, damage, a full disk, other settings and more records do to it."""

import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from attribution.engine import EngineError, Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed
from attribution.engine import store as store_module
from attribution.engine.estimators import graddot
from attribution.engine.projection import Projector
from attribution.engine.search import search
from attribution.engine.store import Store, build_store, compressed, final_state
from attribution.engine.training import train

ROOT = Path(__file__).resolve().parents[3]
SHARD = 8


@pytest.fixture(scope="module")
def task(make_task, tmp_path_factory):
    """20 records at a checkpoint, without a recipe: records may be added without another training."""
    trained = make_task(20, 6)
    n_step = trained.recipe.n_step
    done = train(trained, checkpoint_steps=[n_step], checkpoint_dir=tmp_path_factory.mktemp("checkpoints"))
    return replace(trained, recipe=None, checkpoints=done.checkpoints)


def build(task, folder, **settings):
    return build_store(task, folder, **({"width": 64, "shard_records": SHARD} | settings))


def of_first(task, n):
    return replace(task, train=TensorRecords(*(tensor[:n] for tensor in task.train.tensors)))


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def made_at(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("shard-*"))}


def test_the_store_holds_every_record_s_projected_gradient_in_8_bits(task, tmp_path):
    store = build(task, tmp_path)

    z = Projector(task, final_state(task), width=64).gradients(task.train, torch.arange(20), of_loss=True).numpy()
    held = store.vectors(np.array([19, 0, 7, 8, 8]))
    step = np.abs(z).max(1, keepdims=True) / 127
    assert (np.abs(held - z[[19, 0, 7, 8, 8]]) <= 0.51 * step[[19, 0, 7, 8, 8]]).all()
    np.testing.assert_array_equal(np.concatenate([v for _, v in store.blocks(3)]), store.vectors(np.arange(20)))
    assert (len(store), store.width, [s.file for s in store.shards]) == (
        20, 64, ["shard-000000000000.safetensors", "shard-000000000008.safetensors", "shard-000000000016.safetensors"],
    )  # fmt: skip


def test_compression_survives_zeros_and_any_scale():
    z = np.array([[0, 0, 0], [1e-30, -2e-30, 5e-31], [3e30, 1e30, 0]], np.float32)

    vectors, scales = compressed(z)

    np.testing.assert_allclose(vectors * scales[:, None], z, atol=0, rtol=0.01)


def test_shard_size_does_not_change_the_vectors(task, tmp_path):
    small, large = build(task, tmp_path / "small", shard_records=3), build(task, tmp_path / "large", shard_records=100)

    everyone = np.arange(20)
    np.testing.assert_allclose(small.vectors(everyone), large.vectors(everyone), rtol=1e-5, atol=1e-7)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_store(task, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(task, tmp_path / name, seed=seed)

    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


BUILD = """
import sys, time, torch
from pathlib import Path
from attribution.engine import store, Task, TensorRecords
from attribution.engine.store import build_store

torch.set_num_threads(1)
checkpoint, out, pace, limit = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, sys.argv[5])
from world import make_task
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def slowly(done, total):
    print(done, flush=True)
    time.sleep(pace)
build_store(make_task(checkpoint), out, width=1024, shard_records=64, progress=slowly)
"""
WORLD = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from attribution.engine import Task, TensorRecords

def build():
    return nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 5))

def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")

def make_task(checkpoint, n=256):
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    records = TensorRecords(x, torch.arange(n) % 5)
    return Task(model=build, loss=loss, measurement=loss, train=records, queries=records, checkpoints=[(1, checkpoint)])
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """How another process starts building a store of the world, and how this one makes its task."""
    (tmp_path / "world.py").write_text(WORLD)
    (tmp_path / "build.py").write_text(BUILD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "world", raising=False)
    world = importlib.import_module("world")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = world.build().state_dict()
    checkpoint = tmp_path / "step.safetensors"
    save_file({f"model.{name}": t for name, t in state.items()}, checkpoint)

    def start(out: str, *, pace: float = 0, limit: int = 0) -> subprocess.Popen:
        command = [sys.executable, tmp_path / "build.py", checkpoint, tmp_path / out, str(pace), str(limit), tmp_path]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    yield start, lambda: world.make_task(checkpoint)
    sys.modules.pop("world", None)


def test_a_build_killed_in_the_middle_goes_on_where_it_was_and_ends_with_the_same_bytes(elsewhere, tmp_path):
    start, _ = elsewhere
    with start("whole") as whole:
        said, error = whole.communicate()
    assert (whole.returncode, error) == (0, "")

    with start("killed", pace=0.3) as killed:
        for line in killed.stdout:  # 64 records a shard: the third has been computed and is not yet written
            if int(line) > 128:
                killed.send_signal(signal.SIGKILL)
                break
    assert killed.returncode == -signal.SIGKILL
    kept = made_at(tmp_path / "killed")
    assert 1 < len(kept) < 4
    with pytest.raises(EngineError, match="its build was interrupted; run `index`"):
        Store.open(tmp_path / "killed")

    with start("killed") as resumed:
        said, _ = resumed.communicate()
    assert resumed.returncode == 0
    assert int(said.split()[-1]) == 256 - 64 * len(kept)  # records made the second time
    assert {name: at for name, at in made_at(tmp_path / "killed").items() if name in kept} == kept
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_disk_that_fills_up_leaves_no_half_shard_and_says_what_to_do(elsewhere, tmp_path):
    start, make_world = elsewhere
    with start("out", limit=40_000) as limited:  # a shard takes 66,000 bytes
        _, error = limited.communicate()

    assert limited.returncode == 1
    assert "cannot be written (File too large); free some space or choose another folder, then run it again" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["state.safetensors"]
    assert len(build_store(make_world(), tmp_path / "out", width=1024, shard_records=64)) == 256


def test_too_little_room_is_seen_before_anything_is_computed(task, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage._replace(free=100))

    with pytest.raises(EngineError, match=r"the shards to be made need 1,360 bytes and 100 are free; make room"):
        build(task, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "how", ["a flipped bit", "cut short", "emptied", "a header of another length", "a flipped digest"]
)
def test_a_damaged_shard_is_found_refused_and_made_again(task, tmp_path, how):
    build(task, tmp_path)
    before, times = content(tmp_path), made_at(tmp_path)
    path = tmp_path / "shard-000000000008.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "a flipped bit": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
            "cut short": whole[:-1],
            "emptied": b"",
            "a header of another length": b"\xff" * 8 + whole[8:],
            "a flipped digest": whole.replace(b'start\\": 8', b'start\\": 9'),
        }[how]
    )

    with pytest.raises(EngineError, match=r"damaged.*run `index` again"):
        Store.open(tmp_path)
    said: list[str] = []
    build(task, tmp_path, say=said.append)

    assert said == ["shard-000000000008.safetensors is damaged and is made again"]
    assert content(tmp_path) == before
    again = made_at(tmp_path)
    assert [name for name in times if again[name] != times[name]] == [path.name]


def test_added_records_make_new_shards_only_and_the_same_bytes_as_from_scratch(task, tmp_path):
    build(of_first(task, 12), tmp_path / "grown")  # one full shard and half a one
    times = made_at(tmp_path / "grown")
    made: list[tuple[int, int]] = []

    build(task, tmp_path / "grown", progress=lambda done, total: made.append((done, total)))
    build(task, tmp_path / "scratch")

    assert made[-1] == (12, 12)  # records 8..19: the shard that was not full, and the new one
    assert made_at(tmp_path / "grown")["shard-000000000000.safetensors"] == times["shard-000000000000.safetensors"]
    assert content(tmp_path / "grown") == content(tmp_path / "scratch")


def test_a_finished_store_is_not_touched_again(task, tmp_path):
    build(task, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    build(task, tmp_path)

    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def changed_record(task):
    inputs, labels = (tensor.clone() for tensor in task.train.tensors)
    inputs[3] += 1
    return replace(task, train=TensorRecords(inputs, labels))


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (lambda task: task, {"seed": 1}, r"is of another store \(seed 0, not 1\)"),
        (lambda task: task, {"width": 128}, r"is of another store \(width 64, not 128\)"),
        (lambda task: task, {"shard_records": 4}, r"is of another store \(shard_records 8, not 4\)"),
        (changed_record, {}, r"was made from other records 0\.\.7: records may only be added at the end"),
        (lambda task: of_first(task, 12), {}, r"was made from other records 8\.\.15"),
        (lambda task: of_first(task, 8), {}, r"is of another store or of records that the task, which has 8, lacks"),
        (lambda task: replace(task, loss=lambda m, b: 2 * task.loss(m, b)), {}, "record 0 now has another gradient"),
    ],
)
def test_a_store_of_another_task_or_other_settings_is_refused_and_left_alone(task, tmp_path, change, given, message):
    build(task, tmp_path)
    before = content(tmp_path)

    with pytest.raises(EngineError, match=message):
        build(change(task), tmp_path, **given)

    assert content(tmp_path) == before


def test_a_store_at_another_state_is_refused(task, make_task, tmp_path):
    build(task, tmp_path)
    other = make_task(20, 6, learning_rate=0.2)  # trained by the recipe, since there is no checkpoint

    with pytest.raises(EngineError, match=r"is of another store \(state \w{12}, not \w{12}\)"):
        build(other, tmp_path)


def test_two_builders_do_not_meet_in_one_folder(task, tmp_path):
    with store_module._alone(tmp_path), pytest.raises(EngineError, match="another process is building here"):
        build(task, tmp_path)


def test_queries_of_another_task_are_refused(task, tmp_path):
    store = build(of_first(task, 12), tmp_path)

    with pytest.raises(EngineError, match="holds 12 records, the task has 20; run `index` again"):
        store.query_vectors(task, torch.tensor([0]))
    with pytest.raises(EngineError, match="no gradient store is here"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(EngineError, match="is not a manifest"):
        Store.open(tmp_path)


class Tied(nn.Module):
    """Next tokens (B, 4) -> (B, 7, 4): an output layer that is the embedding, and a mask that is made and not saved."""

    def __init__(self):
        super().__init__()
        self.token, self.frozen, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.ones(4, 4).tril(), persistent=False)
        self.register_buffer("gain", torch.full((1,), 0.5))

    def forward(self, x):
        h = self.token(x)
        return self.head(h + self.gain * self.frozen(self.mask / self.mask.sum(1, keepdim=True) @ h)).transpose(1, 2)


def next_tokens(model, batch):
    return cross_entropy(model(batch[0][:, :-1]), batch[0][:, 1:], reduction="none").mean(1)


@pytest.fixture
def tied_task():
    tokens = TensorRecords(torch.randint(7, (18, 5), generator=torch.Generator().manual_seed(0)))
    recipe = Recipe(
        optimizer="sgd",
        learning_rate=0.5,
        order=epoch_order(18, 6, 2, 0),
        initial_state=initial_state_from_seed(Tied, 0),
    )
    return Task(model=Tied, loss=next_tokens, measurement=next_tokens, train=tokens, queries=tokens, recipe=recipe)


def test_a_tied_weight_and_a_buffer_that_is_not_saved_are_stored_and_searched(tied_task, tmp_path):
    n_step = tied_task.recipe.n_step
    done = train(tied_task, checkpoint_steps=[n_step], checkpoint_dir=tmp_path / "checkpoints")
    own = load_file(done.checkpoints[0][1])
    assert "model.head.weight" not in own and "model.mask" in own
    as_torch_saves = {n: t for n, t in own.items() if n.startswith("model.") and n != "model.mask"}
    save_file(as_torch_saves | {"model.head.weight": own["model.token.weight"].clone()}, tmp_path / "torch.safetensors")
    tasks = {
        "trained": tied_task,
        "own": replace(tied_task, checkpoints=done.checkpoints),
        "own, no recipe": replace(tied_task, checkpoints=done.checkpoints, recipe=None),
        "torch's": replace(tied_task, checkpoints=[(n_step, tmp_path / "torch.safetensors")], recipe=None),
    }

    truth = graddot.score(tied_task, state=done.state).numpy()
    for name, task in tasks.items():
        store = build(task, tmp_path / name)
        found = store.vectors(np.arange(18)) @ store.query_vectors(task, torch.arange(18)).T
        np.testing.assert_allclose(found, truth, atol=0.02 * np.abs(truth).max())
        moved = search(task, Store.open(tmp_path / name), [3], k=1).queries[0]
        assert moved.helpful[0][0] == found[:, 3].argmax()
    assert content(tmp_path / "own") == content(tmp_path / "trained") == content(tmp_path / "torch's")


def test_what_a_killed_build_was_writing_is_cleared_and_other_files_stay(task, tmp_path):
    left = [tmp_path / f"{name}.0123.partial" for name in ("shard-000000000008.safetensors", "state.safetensors")]
    others = tmp_path / "search.json.0123.partial"
    for path in (*left, others):
        path.write_bytes(b"half")

    build(task, tmp_path)

    assert list(tmp_path.glob("*.partial")) == [others]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"/checkpoints/0: lacks 'model\.0\.weight'; it has nothing"),
        ({"model.0.weight": torch.zeros(2, 2)}, r"/checkpoints/0: 'model\.0\.weight' is \(2, 2\) torch\.float32"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(task, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(EngineError, match=message):
        final_state(replace(task, checkpoints=[(1, tmp_path / "other.safetensors")]))
    with pytest.raises(EngineError, match=r"/checkpoints/0: .*none\.safetensors cannot be read: No such file"):
        final_state(replace(task, checkpoints=[(1, tmp_path / "none.safetensors")]))
