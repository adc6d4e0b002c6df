"""The engine's command line.

    python -m attribution.engine train|score|shares|verify path/to/task.py:make_task --out DIR

The task file's folder goes on `sys.path`; `make_task()` returns a Task. Results are written whole or not at all. Exit codes:
0 done, or a match; 2 bad input; 3 a mismatch.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attribution.engine.errors import EngineError
from attribution.engine.estimators import graddot, replay
from attribution.engine.shares import RoundResult, SharesResult, merge_rounds, plan_shares, run_round
from attribution.engine.task import Task
from attribution.engine.training import Progress as Told
from attribution.engine.training import environment, train
from attribution.engine.verification import verify

MATCH, BAD_INPUT, MISMATCH = 0, 2, 3
METHODS: dict[str, Any] = {"graddot": graddot, "replay": replay}
CI_BUDGET = 2000.0  # what `--ci` may spend before it gives up, unless `--budget` says otherwise
BUDGET = 400.0

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        task = load_task(given.task)
        given.out.mkdir(parents=True, exist_ok=True)
        return int(given.run(task, given))
    except EngineError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT
    except OSError as error:
        where = error.filename or "the output"
        console.print(f"error: {where}: {error.strerror or error}", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT


def load_task(reference: str) -> Task:
    """Import `path/to/task.py:make_task` and call it."""
    path_text, colon, name = reference.rpartition(":")
    path = Path(path_text).resolve()
    if not colon or not path.is_file():
        raise EngineError(f"{reference!r} is not path/to/task.py:make_task, with a file that exists", pointer="/task")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise EngineError(f"{path.name} is not a Python file", pointer="/task")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[], Task] | None = getattr(module, name, None)
    if not callable(make):
        raise EngineError(f"{path.name} has no function {name!r}", pointer="/task")
    task = make()
    if not isinstance(task, Task):
        raise EngineError(f"{name}() gave a {type(task).__name__}, not a Task", pointer="/task")
    return task


def run_train(task: Task, given: argparse.Namespace) -> int:
    n_step = task.require_recipe().n_step
    steps = sorted({*(given.checkpoint or []), n_step})
    with _timed() as seconds, _bar("train") as told:
        done = train(task, checkpoint_steps=steps, checkpoint_dir=given.out, progress=told)
    _write_json(
        given.out / "report.json",
        {
            "command": "train",
            "checkpoints": [[step, path.name] for step, path in done.checkpoints],
            "first_loss": done.losses[0],
            "last_loss": done.losses[-1],
            "seconds": seconds(),
            "task": task.digest,
            "environment": environment(),
        },
    )
    return MATCH


def run_score(task: Task, given: argparse.Namespace) -> int:
    method = METHODS[given.method]
    with _timed() as seconds, _bar(given.method) as told:
        scores = method.score(task, progress=told).numpy()
    _write_array(given.out / "scores.npy", scores)
    _write_json(
        given.out / "report.json",
        {
            "command": "score",
            "method": given.method,
            "settings": {},
            "calibrated": method.CALIBRATED,
            "shape": list(scores.shape),
            "seconds": seconds(),
            "task": task.digest,
            "environment": environment(),
        },
    )
    return MATCH


def run_shares(task: Task, given: argparse.Namespace) -> int:
    """Rounds are kept in DIR/rounds, so an interrupted command takes up where it was."""
    budget = given.budget or (CI_BUDGET if given.ci else BUDGET)
    folder = given.out / "rounds"
    folder.mkdir(exist_ok=True)
    result: SharesResult | None = None
    with _timed() as seconds:
        with _bar("plan") as told:
            # A width can only stop the work between rounds, so they are short then.
            plan = plan_shares(
                task, budget=budget, seed=given.seed, n_rounds=_short_rounds(budget, given.ci), progress=told
            )
        rounds: list[RoundResult] = []
        with _bar("shares") as told:
            for index in range(len(plan.rounds)):
                rounds.append(_kept_round(task, folder, index, plan, _part(told, index, len(plan.rounds))))
                if given.ci and index + 1 < len(plan.rounds):
                    result = merge_rounds(task, plan, rounds, target_width=given.ci)
                    if result.width <= given.ci:
                        break
                    result = None
        result = result or merge_rounds(task, plan, rounds, target_width=given.ci)
    _write_array(given.out / "values.npy", result.values)
    _write_array(given.out / "replicates.npy", result.replicates)
    report = result.to_json() | {"seconds": seconds(), "seed": given.seed, "task": task.digest}
    _write_json(given.out / "shares.json", report | {"environment": environment()})
    return MATCH


def run_verify(task: Task, given: argparse.Namespace) -> int:
    if given.checkpoint:
        task = replace(task, checkpoints=[_checkpoint(text) for text in given.checkpoint])
    with _bar("verify") as told:
        report = verify(task, progress=told)
    _write_json(given.out / "verify.json", report.to_json())
    console.print(report.summary, markup=False, highlight=False, soft_wrap=True)
    return MATCH if report.matches else MISMATCH


def _kept_round(task: Task, folder: Path, index: int, plan: Any, told: Told) -> RoundResult:
    path = folder / f"round-{index:04d}.safetensors"
    if path.exists():
        kept = RoundResult.load(path)
        if kept.plan_digest == plan.digest and kept.index == index:
            return kept
    result = run_round(task, plan, index, progress=told)
    result.save(path)
    return result


def _short_rounds(budget: float, ci: float | None) -> int | None:
    return max(2, int(budget // 100)) if ci else None


def _checkpoint(text: str) -> tuple[int, Path]:
    step, colon, path = text.partition(":")
    if not colon or not step.isdigit():
        raise EngineError(f"{text!r} is not STEP:PATH", pointer="/checkpoint")
    return int(step), Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attribution.engine", description="Which records made a model what it is."
    )
    commands = parser.add_subparsers(required=True, metavar="train|score|shares|verify")

    def command(name: str, run: Callable[[Task, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("task", metavar="path/to/task.py:make_task")
        sub.add_argument("--out", type=Path, required=True, metavar="DIR")
        sub.add_argument("--threads", type=_positive(int), help="of torch; bits are equal at one count")
        sub.set_defaults(run=run)
        return sub

    sub = command("train", run_train, "Train by the recipe and write checkpoints.")
    sub.add_argument("--checkpoint", type=int, action="append", metavar="STEP", help="also write after so many steps")
    sub = command("score", run_score, "Score every record against every query.")
    sub.add_argument("--method", choices=sorted(METHODS), required=True)
    sub = command("shares", run_shares, "Divide the model's value over records and owners.")
    sub.add_argument("--budget", type=_positive(float), metavar="RUN_EQUIVALENTS")
    sub.add_argument(
        "--ci", type=_positive(float), metavar="WIDTH", help="stop once the widest owner's interval is this narrow"
    )
    sub.add_argument("--seed", type=int, default=0)
    sub = command("verify", run_verify, "Replay the recipe and compare it with the checkpoints.")
    sub.add_argument("--checkpoint", action="append", metavar="STEP:PATH", help="instead of the task's own")
    return parser


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    started = time.perf_counter()
    yield lambda: round(time.perf_counter() - started, 3)


@contextmanager
def _bar(name: str) -> Iterator[Told]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _part(told: Told, index: int, parts: int) -> Told:
    return lambda done, total: told(int(1000 * (index + done / total)), 1000 * parts)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
