"""The engine's command line.

    python -m attribution.engine train|score|shares|index|search|verify|evaluate path/to/task.py:make_task --out DIR

The task file's folder goes on `sys.path`; `make_task()` returns a Task. Results are written whole or not at all. Exit codes:
0 done, or a match; 2 bad input; 3 a mismatch.
"""

import argparse
import hashlib
import importlib.util
import json
import secrets
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
from rich.table import Table

from attribution.engine.charts import evaluation_svg
from attribution.engine.errors import EngineError
from attribution.engine.estimators import Estimate, ekfac, graddot, replay, tracin, trak
from attribution.engine.evaluation import Evaluation, Scored, evaluate, has_copy, scores_without_copies, self_influence
from attribution.engine.files import write_array, written_whole
from attribution.engine.projection import WIDTH
from attribution.engine.search import (
    N_JUDGES,
    RECALL_AT,
    SHORTLIST_FROM,
    Shortlist,
    build_shortlist,
    drop_shortlist,
    open_shortlist,
    players,
    search,
)
from attribution.engine.shares import RoundResult, SharesResult, merge_rounds, plan_shares, run_round
from attribution.engine.store import SHARD_RECORDS, Store, build_store
from attribution.engine.task import Task
from attribution.engine.training import Progress as Told
from attribution.engine.training import environment, train
from attribution.engine.verification import verify

MATCH, BAD_INPUT, MISMATCH = 0, 2, 3
METHODS: dict[str, Any] = {"ekfac": ekfac, "graddot": graddot, "replay": replay, "tracin": tracin, "trak": trak}
CI_BUDGET = 2000.0  # what `--ci` may spend before it gives up, unless `--budget` says otherwise
BUDGET = 400.0
SIDES = ("helpful", "harmful")

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
    """The report comes last and names, by SHA-256, the scores.npy it is of and the task's checkpoints."""
    method = METHODS[given.method]
    with _timed() as seconds, _bar(given.method) as told:
        found: Estimate = method.estimate(task, progress=told)
    scores = found.scores.numpy()
    (given.out / "report.json").unlink(missing_ok=True)  # or a kill would leave it beside scores that it is not of
    write_array(given.out / "scores.npy", scores)
    _write_json(
        given.out / "report.json",
        {
            "command": "score",
            "method": given.method,
            "settings": found.settings,
            "calibrated": found.is_calibrated,
            "shape": list(scores.shape),
            "sha256": _file_digest(given.out / "scores.npy"),
            "checkpoints": [[step, Path(path).name, _file_digest(Path(path))] for step, path in task.checkpoints],
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
    write_array(given.out / "values.npy", result.values)
    write_array(given.out / "replicates.npy", result.replicates)
    report = result.to_json() | {"seconds": seconds(), "seed": given.seed, "task": task.digest}
    _write_json(given.out / "shares.json", report | {"environment": environment()})
    return MATCH


def run_index(task: Task, given: argparse.Namespace) -> int:
    """Finished shards are kept in DIR, so an interrupted command takes up where it was."""
    with _timed() as seconds:
        with _bar("index") as told:
            store = build_store(
                task,
                given.out,
                width=given.width,
                seed=given.seed,
                shard_records=given.shard_records,
                progress=told,
                say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            )
        playing, shortlist = players(task), _kept_shortlist(store, given.kind)
        n_playing = len(store) if playing is None else len(playing)
        if shortlist is None and n_playing >= SHORTLIST_FROM and task.n_query > 1:
            with _bar("shortlist") as told:
                queries = store.query_vectors(task, torch.arange(min(task.n_query, N_JUDGES)))
                shortlist = build_shortlist(store, queries, kind=given.kind or "sq8", players=playing, progress=told)
    found = f", shortlist with recall@100 {shortlist.recall:.3f}" if shortlist else ""
    console.print(
        f"{len(store):,} records x {store.width} in {len(store.shards)} shards{found}, {seconds():.1f} s",
        highlight=False,
    )
    return MATCH


def run_search(task: Task, given: argparse.Namespace) -> int:
    store = Store.open(given.out)
    with _timed() as seconds:
        answer = search(task, store, given.query, k=given.k, is_exact=given.exact)
    pairs = [
        {"query": q.query} | {side: [{"record": i, "score": s} for i, s in getattr(q, side)] for side in SIDES}
        for q in answer.queries
    ]
    _write_json(
        given.out / "search.json",
        {
            "command": "search",
            "way": answer.way,
            "recall": answer.recall,
            "k": given.k,
            "calibrated": False,
            "queries": pairs,
            "seconds": seconds(),
            "store": store.digest,
            "environment": environment(),
        },
    )
    return MATCH


def run_verify(task: Task, given: argparse.Namespace) -> int:
    if given.checkpoint:
        task = replace(task, checkpoints=[_checkpoint(text) for text in given.checkpoint])
    if given.seed is not None and given.segments is None:
        raise EngineError("a whole replay draws nothing; say how many segments: --segments K", pointer="/seed")
    seed = secrets.randbits(63) if given.seed is None else given.seed  # fresh, so that nobody could have known it
    with _bar("verify") as told:
        report = verify(task, segments=given.segments, seed=seed, progress=told)
    _write_json(given.out / "verify.json", report.to_json())
    for line in (report.summary, *report.caveats):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return MATCH if report.matches else MISMATCH


def run_evaluate(task: Task, given: argparse.Namespace) -> int:
    """Scores go to DIR/scores-METHOD.npy, retrains to DIR/truth, from where the next evaluation of this task has them."""
    task.require_recipe()
    mislabelled = _array(given.mislabelled, "/mislabelled") if given.mislabelled else None
    copies = _copies(task, given.copies)
    files = [_named_scores(text) for text in given.scores or []]
    methods = list(dict.fromkeys(given.method or ([] if files else METHODS)))
    for name, _ in files:
        if name in METHODS or [n for n, _ in files].count(name) > 1:
            raise EngineError(f"{name!r} is taken; give the file another name", pointer="/scores")
    with _timed() as seconds:
        scored: list[Scored] = []
        skipped: dict[str, str] = {}
        for name in methods:
            try:
                scored.append(_scored(task, name, given, copies is not None))
            except EngineError as error:  # where one method has no answer, the others still have theirs
                if len(skipped) + 1 == len(methods) and not files:
                    raise
                skipped[name] = str(error)
                console.print(f"without {name}: {error}", markup=False, highlight=False, soft_wrap=True)
        scored += [Scored(name, array, without_copies=_as_matrix(array, copies)) for name, array in files]
        with _bar("retrain") as told:
            result = evaluate(
                task,
                scored,
                folder=given.out / "truth",
                kept=list(dict.fromkeys(given.kept)),
                n_subsets=given.subsets,
                seed=given.seed,
                leave_out=sorted(set(given.leave_out)),
                exact=given.exact,
                mislabelled=mislabelled,
                copies=copies,
                progress=told,
            )
    report = {"command": "evaluate", "skipped": skipped} | result.to_json()
    report |= {"seconds": seconds(), "task": task.digest}
    _write_json(given.out / "evaluation.json", report | {"environment": environment()})
    with written_whole(given.out / "evaluation.svg") as partial:
        partial.write_text(evaluation_svg(result), encoding="utf-8")
    console.print(_evaluation_table(result))
    return MATCH


def _scored(task: Task, name: str, given: argparse.Namespace, copies: bool) -> Scored:
    method = METHODS[name]
    with _timed() as seconds, _bar(name) as told:
        found: Estimate = method.estimate(task, progress=told)
        took = seconds()
    scores = found.scores.cpu().numpy()
    write_array(given.out / f"scores-{name}.npy", scores)
    own = unmarked = None
    if given.mislabelled and given.self_influence:
        with _bar(f"{name}, of a record on itself") as told:
            own = self_influence(task, method, progress=told)
    if copies:
        with _bar(f"{name}, copies unmarked") as told:
            unmarked = scores_without_copies(task, method, progress=told)
    return Scored(name, scores, found.is_calibrated, took, own, unmarked)


def _named_scores(text: str) -> tuple[str, np.ndarray[Any, Any]]:
    name, equals, path = text.partition("=")
    if not equals or not name:
        raise EngineError(f"{text!r} is not NAME=PATH.npy", pointer="/scores")
    array = _array(Path(path), f"/scores/{name}")
    if array.dtype.kind != "f":
        raise EngineError(f"holds {array.dtype}, not floating-point scores", pointer=f"/scores/{name}")
    return name, array


def _array(path: Path, pointer: str) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise EngineError(f"{path} does not exist", pointer=pointer) from error
    except (ValueError, OSError, EOFError) as error:
        raise EngineError(
            f"{path} is not a whole .npy file ({error}); write it by numpy.save", pointer=pointer
        ) from error
    if not isinstance(array, np.ndarray):
        raise EngineError(f"{path} holds several arrays; write one by numpy.save", pointer=pointer)
    return array


def _copies(task: Task, wanted: str | None) -> np.ndarray[Any, Any] | None:
    if wanted is None:
        return None
    if wanted:
        return has_copy(_array(Path(wanted), "/copies"), task.n_train)
    if task.copy_of is None:
        raise EngineError("the task names no copies; give --copies PATH.npy, or leave it out", pointer="/copies")
    return has_copy(task.copy_of.numpy(), task.n_train)


def _as_matrix(array: np.ndarray[Any, Any], copies: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
    """A file's scores show copies only where they differ by query."""
    return array if copies is not None and array.ndim == 2 and array.shape[1] > 1 else None


def _evaluation_table(result: Evaluation) -> Table:
    """A column per method, a row per figure; what was not asked for has no row."""
    table = Table(
        title=f"Against retrains of {result.n_player} records; measurement {result.measurement:.4g} with all of them, "
        f"{result.measurement_without:.4g} with none"
    )
    methods = result.methods
    table.caption = (
        "LDS and AUC: more is better; TV: share error, less is better; without the top: more, than at random"
    )
    table.add_column("", no_wrap=True)
    for method in methods:
        table.add_column(method.name, justify="right", overflow="fold")
    table.add_column("baseline", justify="right")  # counting, or chance
    for number, kept in enumerate(result.settings["kept"]):
        row = [method.lds[number] for method in methods]
        table.add_row(f"LDS, {100 * kept:g} % kept", *(f"{x.lds:.3f} ± {(x.high - x.low) / 2:.3f}" for x in row), "0")
    if result.by_count:
        for name, what in (("owners", "owners"), ("records", "records"), ("blended", "owners, best blend")):
            errors = [_cell(getattr(method.share_error, name)) for method in methods]
            table.add_row(f"TV of {what}", *errors, _cell(getattr(result.by_count, name)))
    for number, point in enumerate(result.random):
        measured = [f"{method.leave_out[number].measurement:.4g}" for method in methods]
        table.add_row(f"without the top {100 * point.fraction:g} %", *measured, f"{point.measurement:.4g}")
    for name in sorted({name for method in methods for name in method.mislabelled_auc or ()}):
        found = [_cell((method.mislabelled_auc or {}).get(name)) for method in methods]
        table.add_row(f"AUC, wrong labels, {name.replace('_', '-')}", *found, "0.5")
    if any(method.copies_auc is not None for method in methods):
        table.add_row("AUC, copies", *(_cell(method.copies_auc) for method in methods), "0.5")
    table.add_row("seconds", *("" if method.seconds is None else f"{method.seconds:.1f}" for method in methods), "")
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _kept_shortlist(store: Store, kind: str | None) -> Shortlist | None:
    """The shortlist that is there, if it is whole and of the kind asked for."""
    try:
        kept = open_shortlist(store)
    except EngineError as error:  # it is made from the store, and can be made again
        console.print(f"again: {error}", markup=False, highlight=False, soft_wrap=True)
        drop_shortlist(store)
        return None
    return kept if kept is None or kind in (None, kept.report.get("kind")) else None


def _kept_round(task: Task, folder: Path, index: int, plan: Any, told: Told) -> RoundResult:
    path = folder / f"round-{index:04d}.safetensors"
    if path.exists():
        try:
            kept = RoundResult.load(path)
            if kept.plan_digest == plan.digest and kept.index == index:
                return kept
        except EngineError as error:  # it is only a saving of time; measured again, it has the same bytes
            console.print(f"again: {error}", markup=False, highlight=False, soft_wrap=True)
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
    commands = parser.add_subparsers(required=True, metavar="train|score|shares|index|search|verify|evaluate")

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
    sub = command("index", run_index, "Project every record's gradient into a store that `search` asks.")
    sub.add_argument("--width", type=_positive(int), default=WIDTH, help="numbers per record, a power of two")
    sub.add_argument("--seed", type=int, default=0, help="of the projection")
    sub.add_argument(
        "--shard-records", type=_positive(int), default=SHARD_RECORDS, help="per file: what a kill costs at most"
    )
    sub.add_argument(
        "--kind", choices=["sq8", "pq"], help="of the shortlist, for stores that need one: the one there is, or sq8"
    )
    sub = command("search", run_search, "Say which records moved an output.")
    sub.add_argument("--query", type=int, nargs="+", required=True, metavar="N")
    sub.add_argument("--k", type=_positive(int), default=RECALL_AT, help="records on either side")
    sub.add_argument("--exact", action="store_true", help="read the whole store, though there may be a shortlist")
    sub = command("verify", run_verify, "Replay the recipe and compare it with the checkpoints.")
    sub.add_argument("--checkpoint", action="append", metavar="STEP:PATH", help="instead of the task's own")
    sub.add_argument(
        "--segments",
        type=_positive(int),
        metavar="K",
        help="replay K random segments between checkpoints, not everything",
    )
    sub.add_argument("--seed", type=int, help="of the draw of segments; fresh by default, and recorded")
    sub = command("evaluate", run_evaluate, "Measure how well methods predict retraining, side by side.")
    sub.add_argument("--method", choices=sorted(METHODS), action="append", help="all of them, unless some are named")
    sub.add_argument(
        "--scores",
        action="append",
        metavar="NAME=PATH.npy",
        help="of any other tool: (n_train, n_query), or (n_train,)",
    )
    sub.add_argument("--subsets", type=_positive(int), default=100, help="to retrain for each fraction kept")
    sub.add_argument(
        "--kept", type=float, nargs="+", default=[0.5], metavar="FRACTION", help="of the records in a subset"
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--leave-out",
        type=float,
        nargs="*",
        default=[0.05, 0.1, 0.2, 0.4],
        metavar="FRACTION",
        help="of the top-scored",
    )
    sub.add_argument("--exact", action="store_true", help="also retrain all subsets, of at most twelve records")
    sub.add_argument(
        "--mislabelled", type=Path, metavar="PATH.npy", help="(n_train,): 1 where the label is known wrong"
    )
    sub.add_argument(
        "--self-influence", action="store_true", help="also rank wrong labels by it: scores n_train queries"
    )
    sub.add_argument(
        "--copies",
        nargs="?",
        const="",
        metavar="PATH.npy",
        help="are copies alike in score? (n_train,): each record's representative; the task's own, unless given",
    )
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


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
