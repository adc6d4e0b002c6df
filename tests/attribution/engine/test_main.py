import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from attribution.engine import __main__ as command_line
from attribution.engine.__main__ import main

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
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    x = torch.eye(4)[y] + 0.3 * torch.randn(24, 4, generator=generator)
    recipe = Recipe(
        optimizer="sgd", learning_rate=0.5, order=epoch_order(12, 4, 2, 0), initial_state=initial_state_from_seed(build, 0)
    )
    return Task(
        model=build, loss=loss, measurement=loss, train=TensorRecords(x[:12], y[:12]), queries=TensorRecords(x[12:], y[12:]),
        owner=torch.arange(12) // 6, recipe=recipe,
    )


def make_nothing():
    return 3
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path}/task.py:make_task"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_train_writes_checkpoints_that_verify_accepts(task, tmp_path, capfd):
    out = tmp_path / "out"

    assert main(["train", task, "--out", str(out), "--checkpoint", "2"]) == 0
    assert report(out, "report.json")["checkpoints"] == [
        [2, "step-00000002.safetensors"],
        [6, "step-00000006.safetensors"],
    ]
    final = f"6:{out}/step-00000006.safetensors"
    assert main(["verify", task, "--out", str(out), "--checkpoint", final]) == 0
    assert report(out, "verify.json")["is_bit_equal"] is True
    assert "equal to the bit" in capfd.readouterr().err

    assert main(["verify", task, "--out", str(out), "--checkpoint", final.replace("6:", "5:", 1)]) == 3
    assert report(out, "verify.json")["matches"] is False


@pytest.mark.parametrize(
    ("method", "calibrated"),
    [("graddot", False), ("tracin", False), ("trak", True), ("ekfac", True), ("replay", True)],
)
def test_score_writes_one_number_per_record_and_query(task, tmp_path, method, calibrated):
    assert main(["score", task, "--out", str(tmp_path), "--method", method]) == 0

    scores = np.load(tmp_path / "scores.npy")
    assert (scores.dtype, scores.shape) == (np.dtype("float32"), (12, 12))
    told = report(tmp_path, "report.json")
    assert told["calibrated"] is calibrated
    assert told["settings"]
    assert (told["sha256"], told["checkpoints"]) == (sha256(tmp_path / "scores.npy"), [])
    if method in ("tracin", "trak", "ekfac"):
        assert set(told["settings"]["parameters"]) == {"weight", "bias"}


def test_no_report_stays_beside_scores_that_it_is_not_of(task, tmp_path, monkeypatch):
    command = ["score", task, "--out", str(tmp_path), "--method", "graddot"]
    assert main(command) == 0

    def killed(path, document):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_write_json", killed)
    assert main(command) == 130

    assert (tmp_path / "scores.npy").exists()
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("method", ["graddot", "tracin", "trak", "ekfac"])
def test_score_needs_no_recipe_where_there_is_a_checkpoint(task, tmp_path, method, capfd):
    assert main(["train", task, "--out", str(tmp_path)]) == 0
    bare = tmp_path / "bare.py"
    bare.write_text(
        TASK
        + f"""

def make_bare():
    from dataclasses import replace
    return replace(make_task(), recipe=None, checkpoints=[(6, {str(tmp_path / "step-00000006.safetensors")!r})])


def make_neither():
    from dataclasses import replace
    return replace(make_task(), recipe=None)
"""
    )

    assert main(["score", f"{bare}:make_bare", "--out", str(tmp_path), "--method", method]) == 0
    told = report(tmp_path, "report.json")
    assert told["calibrated"] is False
    assert told["settings"]["run_equivalents"] == 0
    assert len(told["task"]) == 64
    name = "step-00000006.safetensors"
    assert told["checkpoints"] == [[6, name, sha256(tmp_path / name)]]
    assert told["sha256"] == sha256(tmp_path / "scores.npy")
    assert np.isfinite(np.load(tmp_path / "scores.npy")).all()

    assert main(["score", f"{bare}:make_neither", "--out", str(tmp_path / "no"), "--method", method]) == 2
    assert "/checkpoints: give a checkpoint, or the recipe" in capfd.readouterr().err
    assert main(["score", f"{bare}:make_bare", "--out", str(tmp_path / "no"), "--method", "replay"]) == 2
    assert not (tmp_path / "no" / "scores.npy").exists()


def test_shares_writes_values_that_add_up_and_reuses_its_rounds(task, tmp_path):
    command = ["shares", task, "--out", str(tmp_path), "--budget", "150"]

    assert main(command) == 0
    first = report(tmp_path, "shares.json")
    kept = [(p, p.stat().st_mtime_ns) for p in sorted((tmp_path / "rounds").iterdir())]
    assert main(command) == 0

    assert [(p, p.stat().st_mtime_ns) for p in sorted((tmp_path / "rounds").iterdir())] == kept
    again = report(tmp_path, "shares.json")
    assert again | {"seconds": 0} == first | {"seconds": 0}
    values, replicates = np.load(tmp_path / "values.npy"), np.load(tmp_path / "replicates.npy")
    assert [o["share"] for o in first["owners"]] == pytest.approx(
        [values[:6].sum() / values.sum(), values[6:].sum() / values.sum()]
    )
    assert values.sum() == pytest.approx(first["total"]["value"])
    assert replicates.shape[1] == 2
    assert first["run_equivalents"] == pytest.approx(150, rel=0.1)
    assert not list(tmp_path.rglob("*.partial"))


def test_shares_stops_at_the_width_asked_for(task, tmp_path):
    assert main(["shares", task, "--out", str(tmp_path), "--budget", "200", "--ci", "1.9"]) == 0

    found = report(tmp_path, "shares.json")
    assert found["stopping"]["reached"] is True
    assert found["run_equivalents"] < 150


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no/such/task.py:make_task", "with a file that exists"),
        ("task.py", "with a file that exists"),
        ("{folder}/task.py:missing", "no function 'missing'"),
        ("{folder}/task.py:make_nothing", "gave a int, not a Task"),
    ],
)
def test_a_bad_task_exits_with_2_and_says_why(task, tmp_path, capfd, reference, message):
    assert main(["train", reference.format(folder=tmp_path), "--out", str(tmp_path / "out")]) == 2

    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_without_a_checkpoint_or_with_a_broken_one_exits_with_2(task, tmp_path, capfd):
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04broken")

    assert main(["verify", task, "--out", str(tmp_path)]) == 2
    assert main(["verify", task, "--out", str(tmp_path), "--checkpoint", f"6:{tmp_path}/broken.safetensors"]) == 2

    assert "at least one checkpoint" in capfd.readouterr().err
    assert not (tmp_path / "verify.json").exists()


def test_verify_draws_segments_by_a_seed_that_it_records(task, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["train", task, "--out", str(out), "--checkpoint", "2", "--checkpoint", "4"]) == 0
    given = [part for step in (2, 4, 6) for part in ("--checkpoint", f"{step}:{out}/step-{step:08d}.safetensors")]

    assert main(["verify", task, "--out", str(out), *given, "--segments", "1", "--seed", "5"]) == 0
    draw = report(out, "verify.json")["draw"]
    assert (draw["seed"], draw["n_segment"], len(draw["segments"])) == (5, 3, 1)
    assert draw["miss"][0] == {"false_segments": 1, "more_than_steps": 0, "probability": pytest.approx(2 / 3)}
    assert "missed in 1 of 3 with probability 0.667" in " ".join(capfd.readouterr().err.split())

    assert main(["verify", task, "--out", str(out), *given, "--segments", "1"]) == 0
    fresh = report(out, "verify.json")["draw"]["seed"]
    assert main(["verify", task, "--out", str(out), *given, "--segments", "1"]) == 0
    assert report(out, "verify.json")["draw"]["seed"] != fresh

    files = [f"{out}/step-{step:08d}.safetensors" for step in (4, 2, 6)]
    swapped = [part for step, file in zip((2, 4, 6), files, strict=True) for part in ("--checkpoint", f"{step}:{file}")]
    assert main(["verify", task, "--out", str(out), *swapped, "--segments", "3"]) == 3
    assert main(["verify", task, "--out", str(out), *given[:4], "--segments", "3"]) == 2
    assert main(["verify", task, "--out", str(out), *given, "--seed", "3"]) == 2


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        ("raise KeyError('no such column')", 3, "KeyError: 'no such column'"),
        ("return 1 / 0", 3, "ZeroDivisionError: division by zero"),
        ("return torch.zeros(2) @ torch.zeros(3)", 3, "RuntimeError: inconsistent tensor size"),
    ],
)
def test_an_error_of_the_tasks_own_code_is_said_in_a_line_with_its_place(tmp_path, capfd, code, line, message):
    (tmp_path / "task.py").write_text(f"import torch\ndef make_task():\n    {code}\n")

    assert main(["train", f"{tmp_path}/task.py:make_task", "--out", str(tmp_path / "out")]) == 2

    said = capfd.readouterr().err
    assert f"{tmp_path}/task.py:{line}: {message}" in said
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(Exception, match=message.split(": ")[1][:10]):
        main(["train", f"{tmp_path}/task.py:make_task", "--out", str(tmp_path / "out"), "--traceback"])


def test_a_task_that_is_no_python_is_refused_with_its_line(tmp_path, capfd):
    (tmp_path / "task.py").write_text("def make_task(:\n")

    assert main(["train", f"{tmp_path}/task.py:make_task", "--out", str(tmp_path / "out")]) == 2
    assert "task.py:1: " in capfd.readouterr().err


def test_json_holds_no_nan_but_null_and_where_it_was(tmp_path):
    command_line._write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.0, float("-inf")], "c": 2.5})

    assert report(tmp_path, "a.json") == {
        "a": None,
        "b": [1.0, None],
        "c": 2.5,
        "not_finite": {"/a": "nan", "/b/1": "-inf"},
    }


@pytest.mark.parametrize(
    ("text", "wanted"), [("8000000000", 8 * 10**9), ("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("64mib", 2**26)]
)
def test_memory_is_bytes_with_or_without_a_unit(text, wanted):
    assert command_line._bytes(text) == wanted


@pytest.mark.parametrize(
    "option", [["--memory", "lots"], ["--memory", "0"], ["--memory", "8 ells"], ["--precision", "float8"]]
)
def test_an_option_that_means_nothing_is_refused(task, tmp_path, option):
    with pytest.raises(SystemExit) as refused:
        main(["shares", task, "--out", str(tmp_path), *option])
    assert refused.value.code == 2


def test_memory_bounds_what_replays_hold_and_says_what_would_do(task, tmp_path, capfd):
    command = ["score", task, "--out", str(tmp_path / "out"), "--method", "replay"]
    assert main(command) == 0
    free = np.load(tmp_path / "out" / "scores.npy")

    assert main([*command, "--memory", "100"]) == 2
    assert "/memory" in capfd.readouterr().err
    assert main([*command, "--memory", "1MB"]) == 0
    assert np.array_equal(np.load(tmp_path / "out" / "scores.npy"), free)


def test_several_devices_are_for_what_has_parts(task, tmp_path, capfd):
    assert main(["train", task, "--out", str(tmp_path), "--device", "cuda:0,cuda:1"]) == 2
    assert "/device" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", []),
        ("score", ["--method", "ekfac"]),
        ("score", ["--method", "replay"]),
        ("shares", ["--budget", "100"]),
        ("index", []),
        ("evaluate", ["--method", "graddot"]),
    ],
)
def test_an_estimate_says_what_it_takes_and_does_nothing(task, tmp_path, capfd, monkeypatch, name, options):
    monkeypatch.setattr("attribution.engine.cost.MEASURED_SECONDS", 0.01)

    assert main([name, task, "--out", str(tmp_path / "out"), "--estimate", *options]) == 0

    out, err = capfd.readouterr()
    said = json.loads(out)
    assert said["command"] == name
    assert said["seconds"] > 0 and said["memory"] > 2**20 and said["disk"] > 0 and said["units"]
    assert "of memory" in err
    assert not (tmp_path / "out").exists()


def test_nobody_is_no_member_of_a_group(task, tmp_path):
    (tmp_path / "labelled.py").write_text(
        TASK
        + """

def make_labelled():
    from dataclasses import replace
    return replace(make_task(), groups={"labeller": torch.arange(12) // 4 - 1})
"""
    )

    assert main(["shares", f"{tmp_path}/labelled.py:make_labelled", "--out", str(tmp_path), "--budget", "60"]) == 0

    told = report(tmp_path, "shares.json")
    assert [o["owner"] for o in told["groups"]["labeller"]] == [0, 1]
    assert told["nobody"]["labeller"]["n_records"] == 4
    assert sum(o["share"] for o in [*told["groups"]["labeller"], told["nobody"]["labeller"]]) == pytest.approx(1)


def test_a_checkpoint_before_the_end_is_said_to_be_what_is_explained(task, tmp_path, capfd):
    assert main(["train", task, "--out", str(tmp_path), "--checkpoint", "2"]) == 0
    (tmp_path / "early.py").write_text(
        TASK
        + f"""

def make_early():
    from dataclasses import replace
    return replace(make_task(), checkpoints=[(2, {str(tmp_path / "step-00000002.safetensors")!r})])
"""
    )

    assert main(["score", f"{tmp_path}/early.py:make_early", "--out", str(tmp_path), "--method", "graddot"]) == 0
    assert "the last checkpoint is of step 2 of 6" in capfd.readouterr().err
