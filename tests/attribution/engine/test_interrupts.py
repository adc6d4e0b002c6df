"""Ctrl-C, SIGTERM and kill -9 on real processes: what is finished is whole and kept, and the result is an uninterrupted one's."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attribution.engine.__main__ import main

TASK = """
import os, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from attribution.engine import Recipe, Task, epoch_order, initial_state_from_seed


class Records:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("PACE", "0")))
        return self.x[index], self.y[index]


def build():
    return nn.Linear(4, 3)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task():
    y = torch.arange(24) % 3
    x = torch.eye(4)[y] + 0.3 * torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(
        optimizer="sgd", options={"momentum": 0.9}, learning_rate=0.5, order=epoch_order(12, 4, 2, 0),
        initial_state=initial_state_from_seed(build, 0),
    )
    return Task(
        model=build, loss=loss, measurement=loss, train=Records(x[:12], y[:12]), queries=Records(x[12:], y[12:]),
        owner=torch.arange(12) // 6, recipe=recipe,
    )
"""
# Forked from a server that has imported torch and computed nothing: autograd refuses to run in the fork of a process where it ran.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["attribution.engine.__main__"])


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path}/task.py:make_task"


def run(arguments: list[str], pace: float, said: Path) -> None:
    os.environ["PACE"] = str(pace)
    handle = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)  # pytest's own catch what is said otherwise
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def start(arguments: list[str], said: Path, *, pace: float = 0.0):
    process = SERVER.Process(target=run, args=(arguments, pace, said))
    process.start()
    return process


def finish(process) -> int:
    process.join(120)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def wait_for(condition: Callable[[], object], process) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), "it ended before it could be stopped"
        assert time.monotonic() < until
        time.sleep(0.005)


def stop_once(
    arguments: list[str], when: Callable[[], object], tmp_path: Path, *, pace: float, how: int = signal.SIGINT
) -> str:
    """Start a command, stop it once something is there, and give back what it said."""
    said = tmp_path / "said.txt"
    process = start(arguments, said, pace=pace)
    wait_for(when, process)
    os.kill(process.pid, how)
    assert finish(process) == 130
    assert not list(tmp_path.rglob("*.partial"))
    return said.read_text()


def content(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def report(path: Path, *without: str) -> dict[str, object]:
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", *without)}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_train_goes_on_from_the_step_it_was_stopped_at(task, tmp_path, how):
    plain, out = tmp_path / "plain", tmp_path / "out"
    command = ["train", task, "--checkpoint", "1", "--checkpoint", "3"]
    assert main([*command, "--out", str(plain)]) == 0

    def stopped():
        return (out / "step-00000001.safetensors").exists()

    said = stop_once([*command, "--out", str(out)], stopped, tmp_path, pace=0.15, how=how)
    assert "steps are kept" in said and "Run the same command again" in said
    assert not (out / "report.json").exists()
    assert json.loads((out / "progress.json").read_text())["state"] == "interrupted"
    kept = times(out, "step-00000001*")

    assert main([*command, "--out", str(out)]) == 0
    assert times(out, "step-00000001*") == kept
    assert content(out, "*.safetensors") == content(plain, "*.safetensors")
    assert report(out / "report.json") == report(plain / "report.json")
    assert json.loads((out / "progress.json").read_text())["state"] == "done"


def test_a_second_signal_stops_at_once_and_leaves_nothing_that_passes_for_whole(task, tmp_path):
    plain, out, said = tmp_path / "plain", tmp_path / "out", tmp_path / "said.txt"
    assert main(["train", task, "--out", str(plain)]) == 0
    process = start(["train", task, "--out", str(out)], said, pace=1.5)
    wait_for(lambda: (out / "progress.json").exists(), process)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "once more stops at once" in said.read_text(), process)
    os.kill(process.pid, signal.SIGINT)

    assert finish(process) == 130
    assert "stopped at once" in said.read_text()
    assert not list(out.glob("*.partial")) and not (out / "report.json").exists()
    assert main(["train", task, "--out", str(out)]) == 0
    assert content(out, "*.safetensors") == content(plain, "*.safetensors")


def test_shares_keep_their_finished_rounds(task, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    command = ["shares", task, "--budget", "300", "--ci", "0.0001"]
    assert main([*command, "--out", str(plain)]) == 0
    rounds = out / "rounds"

    def stopped():
        return (rounds / "round-0000.safetensors").exists()

    assert "rounds are kept" in stop_once([*command, "--out", str(out)], stopped, tmp_path, pace=0.003)
    kept = times(rounds, "*.safetensors")
    assert 1 <= len(kept) < 3 and not (out / "shares.json").exists()

    assert main([*command, "--out", str(out)]) == 0
    assert times(rounds, "*.safetensors").items() >= kept.items()
    for pattern in ("*.npy", "rounds/*.safetensors", "plan.json"):
        assert content(out, pattern) == content(plain, pattern)
    assert report(out / "shares.json") == report(plain / "shares.json")


def test_index_keeps_its_finished_shards(task, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    command = ["index", task, "--width", "16", "--shard-records", "2"]
    assert main([*command, "--out", str(plain)]) == 0

    said = stop_once([*command, "--out", str(out)], lambda: list(out.glob("shard-*.safetensors")), tmp_path, pace=0.1)
    assert "shards are kept" in said and not (out / "manifest.json").exists()
    kept = times(out, "shard-*.safetensors")

    assert main([*command, "--out", str(out)]) == 0
    assert times(out, "shard-*.safetensors").items() >= kept.items()
    assert content(out, "shard-*") == content(plain, "shard-*")
    assert content(out, "manifest.json") == content(plain, "manifest.json")


def test_evaluate_keeps_scores_and_retrains(task, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    command = ["evaluate", task, "--method", "graddot", "--subsets", "60", "--leave-out", "0.2"]
    assert main([*command, "--out", str(plain)]) == 0

    def stopped():
        return len(list(out.glob("truth/*/*.safetensors"))) >= 2

    assert "retrains are kept" in stop_once([*command, "--out", str(out)], stopped, tmp_path, pace=0.05)
    kept = times(out, "truth/*/*.safetensors") | times(out, "scores-*.npy")
    assert len(kept) >= 3 and not (out / "evaluation.json").exists()

    assert main([*command, "--out", str(out)]) == 0
    assert (times(out, "truth/*/*.safetensors") | times(out, "scores-*.npy")).items() >= kept.items()
    assert content(out, "truth/*/*.safetensors") == content(plain, "truth/*/*.safetensors")
    ours, theirs = report(out / "evaluation.json", "truth"), report(plain / "evaluation.json", "truth")
    for one in (ours, theirs):
        one["methods"][0].pop("seconds")
    assert ours == theirs


@pytest.mark.parametrize("command", ["verify", "score"])
def test_what_has_no_parts_starts_again(task, tmp_path, command):
    assert main(["train", task, "--out", str(tmp_path / "trained")]) == 0
    given = {
        "verify": ["verify", task, "--checkpoint", f"6:{tmp_path}/trained/step-00000006.safetensors"],
        "score": ["score", task, "--method", "tracin"],
    }[command]
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert main([*given, "--out", str(plain)]) == 0

    said = stop_once([*given, "--out", str(out)], lambda: (out / "progress.json").exists(), tmp_path, pace=0.05)
    assert "starts again" in said
    assert {path.name for path in out.iterdir()} == {"progress.json"}

    assert main([*given, "--out", str(out)]) == 0
    assert content(out, "*.npy") == content(plain, "*.npy")
    assert [p.name for p in out.glob("*.json")] and (out / "progress.json").exists()


def children(process) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def test_workers_give_the_same_bytes_though_one_is_killed(task, tmp_path):
    plain, out, said = tmp_path / "plain", tmp_path / "out", tmp_path / "said.txt"
    command = ["index", task, "--width", "16", "--shard-records", "2", "--threads", "1", "--device", "cpu"]
    assert main([*command, "--out", str(plain)]) == 0

    process = start([*command, "--out", str(out), "--workers", "2"], said, pace=0.1)
    wait_for(lambda: len(children(process)) == 2 and list(out.glob("shard-*.safetensors")), process)
    os.kill(children(process)[0], signal.SIGKILL)

    assert finish(process) == 0
    assert "ended with -9" in said.read_text()
    assert content(out, "shard-*") == content(plain, "shard-*")
    assert content(out, "manifest.json") == content(plain, "manifest.json")
    assert not list(out.glob(".*.claim"))


@pytest.mark.parametrize(
    ("command", "results"),
    [
        (["shares", "--budget", "60", "--ci", "0.0001"], ["*.npy", "rounds/*.safetensors"]),
        (["evaluate", "--method", "graddot", "--subsets", "60"], ["truth/*/*.safetensors", "*.npy", "*.svg"]),
    ],
    ids=["shares", "evaluate"],
)
def test_any_number_of_workers_gives_the_same_bytes(task, tmp_path, command, results):
    name, *options = command
    for workers in (1, 2):
        out = tmp_path / str(workers)
        given = [
            name,
            task,
            *options,
            "--threads",
            "1",
            "--device",
            "cpu",
            "--out",
            str(out),
            "--workers",
            str(workers),
        ]
        assert finish(start(given, tmp_path / f"said-{workers}.txt")) == 0

    for pattern in results:
        assert content(tmp_path / "1", pattern) == content(tmp_path / "2", pattern)
        assert content(tmp_path / "1", pattern)
