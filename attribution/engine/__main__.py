"""The engine's command line.

    python -m attribution.engine train|score|shares|index|search|verify|evaluate path/to/task.py:make_task --out DIR

The task file's folder goes on `sys.path`; `make_task()` returns a Task. Results are written whole or not at all. Exit codes:
0 done, or a match; 2 bad input; 3 a mismatch; 130 stopped by Ctrl-C or SIGTERM, and ready to go on.

Every command takes `--device auto|cpu|cuda|cuda:N`, `--precision`, `--memory`, `--quiet` and `--estimate`; `shares`, `index` and `evaluate` also several
devices or `--workers N`.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from attribution.engine.charts import evaluation_svg
from attribution.engine.cost import estimate
from attribution.engine.devices import resolve, resolve_precision
from attribution.engine.errors import EngineError
from attribution.engine.estimators import Estimate, ekfac, graddot, replay, tracin, trak
from attribution.engine.evaluation import (
    CHUNK,
    Evaluation,
    Scored,
    evaluate,
    has_copy,
    retrain_some,
    scores_without_copies,
    self_influence,
)
from attribution.engine.files import write_array, written_whole
from attribution.engine.progress import Interrupted, Stop, Told, Watch, stopped_by_signals
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
from attribution.engine.shares import Plan, RoundResult, SharesResult, merge_rounds, plan_shares, run_round
from attribution.engine.store import SHARD_RECORDS, Store, build_store, make_shards
from attribution.engine.task import Task
from attribution.engine.training import environment, train
from attribution.engine.verification import verify
from attribution.engine.workers import STOPPED, claimed, drop_claims, is_orphan, run_workers

MATCH, BAD_INPUT, MISMATCH = 0, 2, 3
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
METHODS: dict[str, Any] = {"ekfac": ekfac, "graddot": graddot, "replay": replay, "tracin": tracin, "trak": trak}
CI_BUDGET = 2000.0  # what `--ci` may spend before it gives up, unless `--budget` says otherwise
BUDGET = 400.0
SIDES = ("helpful", "harmful")
ENGINE = Path(__file__).resolve().parent

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    given.arguments = list(sys.argv[1:] if arguments is None else arguments)
    given.stop = Stop()
    if given.threads:
        torch.set_num_threads(given.threads)
    with stopped_by_signals(given.stop):
        return _answered(given)


def _answered(given: argparse.Namespace) -> int:
    folder = Path(given.task.rpartition(":")[0]).resolve().parent
    watch = given.watch = Watch(
        given.command, given.out, console, given.stop, quiet=given.quiet, is_worker=given.worker > 0
    )
    if given.worker:
        given.stop = _stop_of_worker(given)
    try:
        devices = resolve(given.device)
        if len(devices) > 1 and given.command not in ("shares", "index", "evaluate"):
            raise EngineError(f"{given.command} is one piece of work; name one device", pointer="/device")
        precision = resolve_precision(given.precision, devices[0])
        task = replace(load_task(given.task), device=devices[0], precision=precision, memory=given.memory)
        given.devices = devices
        _say_what_is_explained(task, given)
        if given.estimate:
            return run_estimate(task, given)
        given.out.mkdir(parents=True, exist_ok=True)
        status = int(given.run(task, given))
        watch.ended("done")
        return status
    except EngineError as error:
        watch.forgotten()
        _say(f"error: {error}")
        return BAD_INPUT
    except Interrupted as interrupted:
        watch.ended("interrupted")
        _say(f"stopped: {interrupted}. Run the same command again to go on.")
        return STOPPED
    except KeyboardInterrupt:
        _say("stopped at once: what was finished before is kept. Run the same command again to go on.")
        return STOPPED
    except OSError as error:
        watch.forgotten()
        where = error.filename or "the output"
        _say(f"error: {where}: {error.strerror or error}")
        return BAD_INPUT
    except Exception as error:
        where = None if given.traceback else _own_frame(error, folder)
        if where is None:
            raise
        _say(f"error: {where}: {_in_words(error)}; --traceback shows the way there")
        return BAD_INPUT


def load_task(reference: str) -> Task:
    """Import `path/to/task.py:make_task` and call it.

    Raises:
        EngineError: there is no such function, or it fails; then with its own last line in the traceback.
    """
    path_text, colon, name = reference.rpartition(":")
    path = Path(path_text).resolve()
    if not colon or not path.is_file():
        raise EngineError(f"{reference!r} is not path/to/task.py:make_task, with a file that exists", pointer="/task")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise EngineError(f"{path.name} is not a Python file", pointer="/task")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise EngineError(f"{error.filename}:{error.lineno}: {error.msg}", pointer="/task") from error
    make: Callable[[], Task] | None = getattr(module, name, None)
    if not callable(make):
        raise EngineError(f"{path.name} has no function {name!r}", pointer="/task")
    task = make()
    if not isinstance(task, Task):
        raise EngineError(f"{name}() gave a {type(task).__name__}, not a Task", pointer="/task")
    return task


def _own_frame(error: BaseException, folder: Path) -> str | None:
    """file:line of the last frame that is the task's own; None if none is, so that the fault is the engine's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_within(frame.filename, folder)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _is_within(filename: str, folder: Path) -> bool:
    path = Path(filename).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.parts and not path.is_relative_to(ENGINE)


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _say_what_is_explained(task: Task, given: argparse.Namespace) -> None:
    if (
        task.recipe is None
        or not task.checkpoints
        or given.worker
        or given.command not in ("score", "index", "evaluate")
    ):
        return
    last, n_step = task.checkpoints[-1][0], task.recipe.n_step
    if last < n_step:
        _say(
            f"the last checkpoint is of step {last:,} of {n_step:,}: gradient methods explain that state; `replay` and retrains go by the "
            "whole recipe. Add the final checkpoint, or leave all of them out, to have both explain the same"
        )


def _stop_of_worker(given: argparse.Namespace) -> Any:
    """A worker also stops when the command that started it is gone."""
    asked, parent = given.stop, given.worker
    return lambda: asked() or is_orphan(parent)


def _spread(given: argparse.Namespace, folder: Path, n_unit: int, name: str, count: Callable[[], int]) -> None:
    """Have workers do what they can of so many units, whose files `count` counts; nothing where one process was asked for."""
    devices = [str(device) for device in given.devices]
    wanted = min(n_unit, max(given.workers or 1, len(devices)))
    if given.worker or wanted < 2:
        return
    arguments = [*given.arguments, "--quiet", "--threads", str(given.threads or 1)]
    with given.watch.bar(name) as told:
        run_workers(
            arguments,
            list(islice(cycle(devices), wanted)),
            stop=given.stop,
            say=_say,
            tick=lambda: told(min(count(), n_unit), n_unit),
        )
    drop_claims(folder)


def run_estimate(task: Task, given: argparse.Namespace) -> int:
    """Standard output gets one JSON document, the terminal a sentence; nothing is written."""
    options = vars(given) | {"workers": max(given.workers or 1, len(given.devices))}
    found = estimate(task, given.command, options)
    sys.stdout.write(json.dumps(asdict(found) | {"command": given.command}) + "\n")
    _say(f"{given.command}: {found.in_words()}")
    return MATCH


def run_train(task: Task, given: argparse.Namespace) -> int:
    n_step = task.require_recipe().n_step
    steps = sorted({*(given.checkpoint or []), n_step})
    with _timed() as seconds, given.watch.bar("train") as told:
        resume = given.out / "train.resume.safetensors"
        done = train(
            task, checkpoint_steps=steps, checkpoint_dir=given.out, resume=resume, stop=given.stop, progress=told
        )
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
    with _timed() as seconds, given.watch.bar(given.method, is_unit=False) as told:
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
    if given.worker:
        return _some_rounds(task, given, folder)
    result: SharesResult | None = None
    with _timed() as seconds:
        plan = _kept_plan(task, given, budget)
        n_round = len(plan.rounds)
        # A width can stop the work after any round, so workers then get a round each at a time.
        step = max(given.workers or 1, len(given.devices)) if given.ci else n_round
        rounds: list[RoundResult] = []
        for start in range(0, n_round, step):
            end = min(n_round, start + step)
            missing = [index for index in range(start, end) if _read_round(folder, index, plan) is None]
            if missing:
                _write_json(folder / "wanted.json", {"rounds": missing})
                there = [folder / _round_name(index) for index in missing]
                _spread(given, folder, len(missing), "shares", partial(_how_many_exist, there))
            with given.watch.bar("shares") as told:
                for index in range(start, end):
                    kept = _read_round(folder, index, plan)
                    if kept is None and given.stop():
                        raise Interrupted(f"{index} of {n_round} rounds are kept")
                    rounds.append(kept or _new_round(task, folder, index, plan, _part(told, index, n_round)))
                    told(1000 * (index + 1), 1000 * n_round)
                    if given.ci and index + 1 < n_round:
                        result = merge_rounds(task, plan, rounds, target_width=given.ci)
                        if result.width <= given.ci:
                            break
                        result = None
            if result:
                break
        result = result or merge_rounds(task, plan, rounds, target_width=given.ci)
    write_array(given.out / "values.npy", result.values)
    write_array(given.out / "replicates.npy", result.replicates)
    report = result.to_json() | {"seconds": seconds(), "seed": given.seed, "task": task.digest}
    _write_json(given.out / "shares.json", report | {"environment": environment()})
    return MATCH


def _some_rounds(task: Task, given: argparse.Namespace, folder: Path) -> int:
    plan = Plan.from_json(json.loads((given.out / "plan.json").read_text(encoding="utf-8"))["plan"])
    for index in json.loads((folder / "wanted.json").read_text(encoding="utf-8"))["rounds"]:
        if given.stop():
            raise Interrupted("finished rounds are kept")
        path = folder / _round_name(index)
        if not path.exists():
            with claimed(path) as is_mine:
                if is_mine:
                    _new_round(task, folder, index, plan, None)
    return MATCH


def _how_many_exist(paths: list[Path]) -> int:
    return sum(path.exists() for path in paths)


def _kept_plan(task: Task, given: argparse.Namespace, budget: float) -> Plan:
    """DIR/plan.json, if it is what would be planned; making one trains once."""
    # A width can only stop the work between rounds, so they are short then.
    asked = {"task": task.digest, "budget": budget, "seed": given.seed, "rounds": _short_rounds(budget, given.ci)}
    path = given.out / "plan.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return Plan.from_json(kept["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with given.watch.bar("plan", is_unit=False) as told:
        plan = plan_shares(task, budget=budget, seed=given.seed, n_rounds=asked["rounds"], progress=told)
    _write_json(path, {"asked": asked, "plan": plan.to_json()})
    return plan


def run_index(task: Task, given: argparse.Namespace) -> int:
    """Finished shards are kept in DIR, so an interrupted command takes up where it was."""
    how = {"width": given.width, "seed": given.seed, "shard_records": given.shard_records}
    if given.worker:
        make_shards(task, given.out, **how, stop=given.stop)
        return MATCH

    def spread(paths: list[Path]) -> None:
        _spread(given, given.out, len(paths), "index", lambda: sum(path.exists() for path in paths))

    with _timed() as seconds:
        with given.watch.bar("index") as told:
            store = build_store(
                task,
                given.out,
                **how,
                progress=told,
                say=_say,
                stop=given.stop,
                spread=spread,
            )
        playing, shortlist = players(task), _kept_shortlist(store, given.kind)
        n_playing = len(store) if playing is None else len(playing)
        if shortlist is None and n_playing >= SHORTLIST_FROM and task.n_query > 1:
            with given.watch.bar("shortlist", is_unit=False) as told:
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
    with given.watch.bar("verify", is_unit=False) as told:
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
                _say(f"without {name}: {error}")
        scored += [Scored(name, array, without_copies=_as_matrix(array, copies)) for name, array in files]
        how = {
            "folder": given.out / "truth",
            "kept": list(dict.fromkeys(given.kept)),
            "n_subsets": given.subsets,
            "seed": given.seed,
            "leave_out": sorted(set(given.leave_out)),
            "exact": given.exact,
            "stop": given.stop,
        }
        if given.worker:
            retrain_some(task, scored, **how)
            return MATCH
        truth = given.out / "truth" / task.digest[:16]

        def spread() -> None:
            chunks = len(how["kept"]) * -(-given.subsets // CHUNK) + len(scored) + 2
            before = len(list(truth.glob("*.safetensors")))
            _spread(given, truth, chunks, "retrain", lambda: len(list(truth.glob("*.safetensors"))) - before)

        with given.watch.bar("retrain") as told:
            result = evaluate(task, scored, **how, mislabelled=mislabelled, copies=copies, progress=told, spread=spread)
    report = {"command": "evaluate", "skipped": skipped} | result.to_json()
    report |= {"seconds": seconds(), "task": task.digest}
    _write_json(given.out / "evaluation.json", report | {"environment": environment()})
    with written_whole(given.out / "evaluation.svg") as partial:
        partial.write_text(evaluation_svg(result), encoding="utf-8")
    console.print(_evaluation_table(result))
    return MATCH


def _scored(task: Task, name: str, given: argparse.Namespace, copies: bool) -> Scored:
    """A method's scores, kept in DIR/scores-METHOD.npy with a note of what they are of."""
    method = METHODS[name]
    kept = _kept_scores(task, name, given.out)
    if kept is None:
        with _timed() as seconds, given.watch.bar(name, is_unit=False) as told:
            found: Estimate = method.estimate(task, progress=told)
            took = seconds()
        scores = found.scores.cpu().numpy()
        write_array(given.out / f"scores-{name}.npy", scores)
        said = {"task": task.digest, "precision": task.precision, "calibrated": found.is_calibrated, "seconds": took}
        said |= {"sha256": _file_digest(given.out / f"scores-{name}.npy"), "settings": found.settings}
        _write_json(given.out / f"scores-{name}.json", said)
        kept = scores, found.is_calibrated, took
    own = unmarked = None
    if given.mislabelled and given.self_influence and not given.worker:
        with given.watch.bar(f"{name}, of a record on itself", is_unit=False) as told:
            own = self_influence(task, method, progress=told)
    if copies and not given.worker:
        with given.watch.bar(f"{name}, copies unmarked", is_unit=False) as told:
            unmarked = scores_without_copies(task, method, progress=told)
    return Scored(name, kept[0], kept[1], kept[2], own, unmarked)


def _kept_scores(task: Task, name: str, folder: Path) -> tuple[np.ndarray[Any, Any], bool, float] | None:
    """Scores of an earlier call, if they are whole and of this task."""
    path = folder / f"scores-{name}.npy"
    try:
        said = json.loads((folder / f"scores-{name}.json").read_text(encoding="utf-8"))
        is_same = (said["task"], said["precision"], said["sha256"]) == (task.digest, task.precision, _file_digest(path))
        return (
            (np.load(path, allow_pickle=False), bool(said["calibrated"]), float(said["seconds"])) if is_same else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        _say(f"again: {error}")
        drop_shortlist(store)
        return None
    return kept if kept is None or kind in (None, kept.report.get("kind")) else None


def _round_name(index: int) -> str:
    return f"round-{index:04d}.safetensors"


def _read_round(folder: Path, index: int, plan: Plan) -> RoundResult | None:
    path = folder / _round_name(index)
    if not path.exists():
        return None
    try:
        kept = RoundResult.load(path)
    except EngineError as error:  # it is only a saving of time; measured again, it has the same bytes
        _say(f"again: {error}")
        path.unlink()
        return None
    if kept.plan_digest == plan.digest and kept.index == index:
        return kept
    path.unlink()  # of another plan; a worker must not take it for this one's
    return None


def _new_round(task: Task, folder: Path, index: int, plan: Plan, told: Told | None) -> RoundResult:
    result = run_round(task, plan, index, progress=told)
    result.save(folder / _round_name(index))
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
        sub.add_argument(
            "--device", default="auto", metavar="auto|cpu|cuda|cuda:N", help="auto: CUDA where there is one"
        )
        sub.add_argument(
            "--precision",
            default="auto",
            choices=["auto", "float32", "bf16"],
            help="of gradients; replays keep the model's",
        )
        sub.add_argument(
            "--memory", type=_bytes, metavar="BYTES|8GB", help="that replays and metagradients may hold at once"
        )
        sub.add_argument("--estimate", "--dry-run", action="store_true", help="say what it takes, and do nothing")
        sub.add_argument(
            "--quiet", action="store_true", help="no progress bars; DIR/progress.json is written all the same"
        )
        sub.add_argument("--traceback", action="store_true", help="show where an error in the task's code came from")
        sub.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
        if name in ("shares", "index", "evaluate"):
            sub.add_argument(
                "--workers", type=_positive(int), help="processes on a device; several devices have one each"
            )
        else:
            sub.set_defaults(workers=None)
        sub.set_defaults(run=run, command=name)
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


def _bytes(text: str) -> int:
    """8000000000, 8GB or 7.5GiB."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    if not match or unit is None or not (number := int(float(match[1]) * unit)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 8GB or 512MiB")
    return number


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


def _part(told: Told, index: int, parts: int) -> Told:
    return lambda done, total: told(int(1000 * (index + done / total)), 1000 * parts)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """JSON has no NaN: such a number becomes null, and `not_finite` says where and what it was."""
    found: dict[str, str] = {}
    document = _finite(document, "", found)
    if found:
        document["not_finite"] = found
    with written_whole(path) as partial:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any, where: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[where] = str(value)
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}/{key}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{where}/{number}", found) for number, item in enumerate(value)]
    return value


if __name__ == "__main__":
    sys.exit(main())
