"""How far a long command is, for people and for programs, and how it stops.

A command is made of units (a round of shares, a shard of the store, a chunk of retrains), each written whole or not at all and never done
again. The first Ctrl-C or SIGTERM lets the unit at hand finish; then `Interrupted` ends the command, and the same command goes on from there.
The second one stops at once, which costs the unit at hand and nothing else.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Told = Callable[[int, int], None]  # (done, in all)

FILE = "progress.json"
EVERY_SECONDS = 1.0


class Interrupted(Exception):
    """Stopped because it was asked for; the message says what is kept."""


class Stop:
    """Whether the command was asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    def __call__(self) -> bool:
        return self.is_requested


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks, the second raises KeyboardInterrupt."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_requested:
            raise KeyboardInterrupt
        stop.is_requested = True
        # Not through the console: a signal may arrive while it holds its lock.
        os.write(2, b"\nstopping after the unit at hand; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch:
    """Bars on a terminal, and `progress.json` in the output folder for whoever is not sitting at it.

    The file holds command, state ("running", "done" or "interrupted"), stage, done and total in the stage's own units, and the seconds that
    passed and that are probably left of the stage (null before its first unit).
    """

    def __init__(
        self, command: str, folder: Path, console: Console, stop: Stop, *, quiet: bool = False, is_worker: bool = False
    ) -> None:
        self.command, self.folder, self.stop = command, folder, stop
        self._console = console
        self._quiet = quiet or not console.is_terminal
        self._is_worker = is_worker  # the command that started it tells of all of them
        self._started, self._written = time.monotonic(), 0.0
        self._stage: tuple[str, int, int, float | None] = ("", 0, 0, None)

    @contextmanager
    def bar(self, name: str, *, is_unit: bool = True) -> Iterator[Told]:
        """Tell it (done, in all).

        Args:
            is_unit: finish it, whatever is asked; else it stops at the next thing it is told, with nothing to keep.
        """
        started, first = time.monotonic(), -1
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=self._quiet,
        ) as progress:
            task = progress.add_task(name, total=None)

            def told(done: int, total: int) -> None:
                nonlocal first
                progress.update(task, completed=done, total=total)
                first = done if first < 0 else first  # what was kept from before took no time now
                passed = time.monotonic() - started
                left = passed * (total - done) / (done - first) if done > first else None
                self._stage = (name, done, total, left)
                self._write("running")
                if self.stop() and not is_unit and done < total:
                    raise Interrupted(f"{name} has no parts that could be kept; it starts again")

            yield told

    def ended(self, state: str) -> None:
        if self._written or state != "done":
            self._written = 0.0
            self._write(state)

    def forgotten(self) -> None:
        """The command was refused: it is neither running nor done."""
        if self._written and not self._is_worker:
            (self.folder / FILE).unlink(missing_ok=True)

    def _write(self, state: str) -> None:
        now = time.monotonic()
        if self._is_worker:
            return
        if now - self._written < EVERY_SECONDS and self._written:
            return
        self._written = now
        stage, done, total, left = self._stage
        text = json.dumps(
            {
                "command": self.command,
                "state": state,
                "stage": stage,
                "done": done,
                "total": total,
                "seconds": round(now - self._started, 1),
                "seconds_left": None if left is None or state != "running" else round(left, 1),
                "pid": os.getpid(),
            }
        )
        partial = self.folder / f".{FILE}.{os.getpid()}"  # no fsync: it is out of date in a second
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.folder / FILE)
        except OSError:  # a full disk is the result's to report
            partial.unlink(missing_ok=True)
