"""What is wrong with a task, a disk or a file is found early, and said with a remedy. See also the tests of each module."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional

from attribution.engine import EngineError, Recipe, TensorRecords, TrainingDiverged, replay_values, train
from attribution.engine.__main__ import main
from attribution.engine.estimators import replay
from attribution.engine.files import arrays_digest, written_whole
from attribution.engine.verification import verify

ROOT = Path(__file__).parents[3]


def per_record(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


# --- losses


class OwnNoise(nn.Module):
    """Draws from Python's generator, which no step seeds."""

    def forward(self, x):
        return x * (1 + 0.1 * random.random())


class BatchStatistics(nn.Module):
    """Normalises over the batch without being a BatchNorm by name."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [(OwnNoise, "the same records, weights and seed"), (BatchStatistics, "another number when record 1 changed")],
)
def test_a_model_that_does_not_repeat_or_mixes_records_is_found_before_the_first_step(make_task, part, message):
    task = make_task(build=lambda: nn.Sequential(nn.Linear(4, 3), part()).double())

    for use in (train, verify, replay.score, lambda task: replay_values(task, torch.ones(1, 10))):
        with pytest.raises(EngineError, match=message) as refused:
            use(task)
        assert refused.value.pointer == "/loss"


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.LayerNorm(3), nn.RReLU()])
def test_randomness_that_a_seed_repeats_is_welcome(make_task, part):
    train(make_task(build=lambda: nn.Sequential(nn.Linear(4, 3), part).double()))


def test_a_measurement_that_averages_or_mixes_queries_is_refused(make_task):
    def mean(model, batch):
        return per_record(model, batch).mean()

    def spread(model, batch):
        return per_record(model, batch).mean().expand(len(batch[0]))

    for measurement, message in ((mean, "not a mean"), (spread, "another number when record 1 changed")):
        with pytest.raises(EngineError, match=message) as refused:
            train(make_task(task={"measurement": measurement}))
        assert refused.value.pointer == "/measurement"


def test_a_loss_that_is_not_finite_from_the_start_is_found_at_the_start(make_task):
    def log(model, batch):
        return per_record(model, batch) + (batch[0].sum(1) * 0 - 1).log()

    for place in ("loss", "measurement"):
        with pytest.raises(EngineError, match="at the initial weights") as refused:
            train(make_task(task={place: log}))
        assert refused.value.pointer == f"/{place}"


def test_a_record_that_makes_the_loss_nan_is_named_by_its_step(make_task):
    task = make_task()
    x, y = task.train[torch.arange(10)]
    step = int((task.recipe.order == 7).nonzero()[0, 0])

    def breaks(model, batch):
        return torch.where((batch[0] == x[7]).all(1), torch.nan, per_record(model, batch))

    with pytest.raises(TrainingDiverged) as refused:
        train(replace(task, loss=breaks))
    assert refused.value.step == step
    assert refused.value.pointer == f"/recipe/order/{step}"


def test_a_measurement_that_explodes_only_later_is_refused_and_not_averaged(make_task):
    task = make_task()

    def explodes(model, batch):
        moved = next(model.parameters()).detach() != task.recipe.initial_state["0.weight"]
        return per_record(model, batch) / (~moved.any())

    with pytest.raises(TrainingDiverged, match="a measurement is not finite"):
        replay_values(replace(task, measurement=explodes), torch.ones(1, 10))


def test_a_derivative_that_explodes_is_refused_with_what_to_use_instead(make_task):
    """Two steps per record of a steep function: the weights stay finite in [−1, 1], the derivative does not."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3]))

        def forward(self, x):
            return torch.sin(1e6 * self.w).expand(len(x))

    task = make_task(
        n_train=10,
        build=Steep,
        options={},
        learning_rate=1e3,
        epochs=8,
        task={"loss": lambda model, batch: model(batch[0]) * 1e-3, "measurement": lambda model, batch: model(batch[0])},
    )
    assert torch.isfinite(replay_values(task, torch.ones(1, 10))).all()

    with pytest.raises(EngineError, match="has exploded"):
        replay.score(task)


# --- the command line


TASK = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from attribution.engine import Recipe, Task, TensorRecords, epoch_order, initial_state_from_seed


def build():
    return nn.Linear(40, 3)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task(rate=0.5, **changed):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.eye(40)[y] + 0.3 * torch.randn(60, 40, generator=generator)
    recipe = Recipe(
        optimizer="sgd", learning_rate=rate, order=epoch_order(30, 10, 2, 0), initial_state=initial_state_from_seed(build, 0)
    )
    task = dict(
        model=build, loss=loss, measurement=loss, train=TensorRecords(x[:30], y[:30]),
        queries=TensorRecords(x[30:], y[30:]), owner=torch.arange(30) // 15, recipe=recipe,
    )
    return Task(**(task | changed))


def exploding():
    return make_task(rate=1e39)


def averaged():
    return make_task(loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]))


def without_queries():
    return make_task(queries=TensorRecords(torch.zeros(0, 40), torch.zeros(0, dtype=torch.int64)))
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path}/task.py:make_task"


@pytest.mark.parametrize(
    ("name", "message"),
    [("exploding", "lower the learning rate"), ("averaged", "not a mean"), ("without_queries", "no queries")],
)
@pytest.mark.parametrize(
    "command",
    [["train"], ["score", "--method", "replay"], ["shares"], ["evaluate", "--method", "graddot"], ["verify"]],
    ids=lambda command: command[0],
)
def test_every_command_ends_with_2_and_a_remedy_and_leaves_no_result(task, tmp_path, capfd, command, name, message):
    out = tmp_path / "out"
    if command == ["verify"]:
        assert main(["train", task, "--out", str(tmp_path / "trained")]) == 0
        command = ["verify", "--checkpoint", f"6:{tmp_path}/trained/step-00000006.safetensors"]
    reference = task.replace("make_task", name)

    assert main([command[0], reference, "--out", str(out), *command[1:]]) == 2

    assert message in capfd.readouterr().err
    assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "command", [["train", "--bogus"], ["score", "--method", "magic"], ["shares", "--budget", "-3"], ["divine"]]
)
def test_an_unknown_option_method_or_command_is_refused_before_the_task_is_read(tmp_path, capfd, command):
    with pytest.raises(SystemExit) as stopped:
        main([command[0], "no/such/task.py:make_task", "--out", str(tmp_path / "out"), *command[1:]])

    assert stopped.value.code == 2
    assert "error:" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_of_the_recipe_is_refused_with_those_there_are():
    with pytest.raises(EngineError, match=r"takes \['dampening', 'momentum', 'nesterov', 'weight_decay'\]") as refused:
        Recipe(
            optimizer="sgd",
            options={"lr": 0.1},
            learning_rate=0.1,
            order=torch.zeros(1, 1, dtype=torch.int64),
            initial_state={},
        )
    assert refused.value.pointer == "/recipe/options/lr"


# --- the disk


FULL_DISK = """
import json, resource, sys
from attribution.engine.__main__ import main

task, out = sys.argv[1:]
assert main(["train", task, "--out", out + "/before"]) == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))  # no file may grow beyond
commands = [["train"], ["score", "--method", "graddot"], ["shares", "--budget", "60"], ["evaluate", "--method", "graddot"]]
commands += [["index", "--width", "64"]]
print(json.dumps([main([name, task, "--out", f"{out}/{name}", *rest]) for name, *rest in commands]))
"""


def test_a_full_disk_is_said_by_every_command_and_leaves_nothing_that_looks_whole(task, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, task, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [2, 2, 2, 2, 2]
    assert ran.stderr.count("free some space") == 5
    assert "Traceback" not in ran.stderr
    left = [
        path.name
        for name in ("train", "score", "shares", "evaluate", "index")
        for path in (tmp_path / name).rglob("*.*")
    ]
    assert left == []
    assert (tmp_path / "before" / "report.json").exists()


def test_what_was_there_stays_whole_when_writing_its_successor_fails(tmp_path):
    path = tmp_path / "values"
    path.write_text("whole")

    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error")):
        with pytest.raises(OSError, match="free some space") as failed, written_whole(path) as partial:
            partial.write_text("ha")
            raise error
        assert failed.value.filename == str(path)
    with pytest.raises(KeyboardInterrupt), written_whole(path) as partial:
        partial.write_text("ha")
        raise KeyboardInterrupt

    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_take_away_what_the_other_is_writing(tmp_path):
    path = tmp_path / "values"

    with written_whole(path) as first:
        first.write_text("first")
        with written_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"

    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_name_is_on_the_disk_before_the_writer_goes_on(tmp_path, monkeypatch):
    synced = []

    def noting(handle):
        is_folder = os.path.samestat(os.fstat(handle), tmp_path.stat())
        synced.append((is_folder, (tmp_path / "values").exists()))

    monkeypatch.setattr(os, "fsync", noting)
    with written_whole(tmp_path / "values") as partial:
        partial.write_text("whole")

    assert synced == [(False, False), (True, True)]


def test_a_digest_of_arrays_sees_names_shapes_types_and_every_bit():
    array = np.arange(6, dtype=np.float32)
    flipped = array.copy()
    flipped.view(np.uint8)[5] ^= 1

    digests = {
        arrays_digest(arrays)
        for arrays in (
            {"a": array},
            {"b": array},
            {"a": array.reshape(2, 3)},
            {"a": array.view(np.int32)},
            {"a": flipped},
            {"a": array, "b": array},
        )
    }

    assert len(digests) == 6
    assert arrays_digest({"a": array, "b": flipped}) == arrays_digest({"b": flipped, "a": array.copy()})


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    torch.save({"ends": torch.zeros(2, 30)}, path)


@pytest.mark.parametrize("harm", [cut, flip, empty, pickled])
def test_a_broken_round_of_shares_is_said_and_measured_again(task, tmp_path, capfd, harm):
    command = ["shares", task, "--out", str(tmp_path / "out"), "--budget", "60"]
    assert main(command) == 0
    first = json.loads((tmp_path / "out" / "shares.json").read_text())
    (path, *_) = sorted((tmp_path / "out" / "rounds").iterdir())
    whole = path.read_bytes()
    harm(path)
    path.with_name(path.name + ".partial").write_bytes(whole[:40])  # of a writer that was killed

    assert main(command) == 0

    assert "run the round again" in capfd.readouterr().err
    assert path.read_bytes() == whole
    assert json.loads((tmp_path / "out" / "shares.json").read_text()) | {"seconds": 0} == first | {"seconds": 0}


def test_a_checkpoint_of_another_model_is_refused_by_the_tensor_that_differs(task, tmp_path, capfd):
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    (narrow / "task.py").write_text(TASK.replace("nn.Linear(40, 3)", "nn.Linear(40, 4)"))
    assert main(["train", f"{narrow}/task.py:make_task", "--out", str(narrow)]) == 0

    command = ["verify", task, "--out", str(tmp_path / "out"), "--checkpoint", f"6:{narrow}/step-00000006.safetensors"]
    assert main(command) == 2

    said = capfd.readouterr().err
    assert "(4, 40)" in said and "(3, 40)" in said
    assert not (tmp_path / "out" / "verify.json").exists()


def test_records_that_change_size_or_dtype_are_not_taken_for_tensors():
    with pytest.raises(EngineError, match="one length"):
        TensorRecords(torch.zeros(3, 2), torch.zeros(4))
