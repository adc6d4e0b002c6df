"""What the demo prints: each step with its seconds and figures, long ones with a progress bar, tables and checks at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console = Console(highlight=False, soft_wrap=True, width=120)  # a log is as wide as its tables


class DemoFailed(RuntimeError):
    """A step did not do what it must; the message says which and how."""


@dataclass
class Steps:
    """The demo's steps as they are done, with the seconds of each."""

    n_step: int
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        number = len(self.seconds) + 1
        console.print(f"\n[bold]{number}/{self.n_step} {title}[/bold]")
        begun = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - begun
        console.print(f"    [dim]{self.seconds[title]:.1f} s[/dim]")

    @property
    def total_seconds(self) -> float:
        return time.monotonic() - self.started


def say(text: str) -> None:
    console.print(f"    {text}")


def wait_for(what: str, poll: Callable[[], Any], *, seconds: float, check: Callable[[], None] = lambda: None) -> Any:
    """Poll until the answer is true.

    Raises:
        DemoFailed: it did not happen in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := poll():
            return answer
        check()
        time.sleep(0.2)
    raise DemoFailed(f"{what} did not happen within {seconds:g} s")


def follow(
    what: str, poll: Callable[[], tuple[int, int, bool]], *, seconds: float, check: Callable[[], None] = lambda: None
) -> None:
    """Draw a bar from `poll() -> (done, total, finished)`; where nobody looks at a terminal, a line every ten seconds.

    Raises:
        DemoFailed: it was not finished in time.
    """
    columns = (
        TextColumn("    {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    deadline = time.monotonic() + seconds
    told = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=None)
        while time.monotonic() < deadline:
            done, total, finished = poll()
            progress.update(bar, completed=done, total=total or None)
            if finished:
                return
            if not console.is_terminal and time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"{what}: {done} of {total or '?'}")
            check()
            time.sleep(0.25)
    raise DemoFailed(f"{what} was not finished within {seconds:g} s")


def show_table(title: str, columns: list[str], rows: list[list[str]], *, left: int = 1) -> None:
    """The first `left` columns are text, the others figures."""
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
