"""Several processes on the units of one command: one for each card, or some on the CPU.

The units do not depend on each other, and each lies in a file of its own, so who made which does not show. A worker is the same command with
`--worker`; it goes through the units and takes those that are neither there nor claimed. A claim is a lock that the kernel lets go with the
process, however that ends. When all workers have ended, the command does what is missing itself, so a killed worker costs its unit.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STOPPED = 130
POLL_SECONDS = 0.1


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may make the file at `path`: no other is at it."""
    handle = os.open(path.with_name(f".{path.name}.claim"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield not path.exists()  # it may have been finished since it was looked for
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def drop_claims(folder: Path) -> None:
    """Once no worker is left; a file that is only a lock says nothing."""
    for path in folder.glob(".*.claim"):
        path.unlink(missing_ok=True)


def is_orphan(parent: int) -> bool:
    """Whether the command that started this worker is gone; nobody would take up what it makes."""
    return os.getppid() != parent


def run_workers(
    arguments: Sequence[str],
    devices: Sequence[str],
    *,
    stop: Callable[[], bool],
    say: Callable[[str], None],
    tick: Callable[[], None],
) -> None:
    """Start a worker for each device and wait for all; told to stop, they finish their units.

    Args:
        arguments: of the command.
        devices: a worker for each; the same device may come several times.
        tick: called while waiting.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "attribution.engine", *arguments, "--worker", str(os.getpid()), "--device", device],
            start_new_session=True,  # a Ctrl-C at the terminal reaches the command alone, which passes it on once
        )
        for device in devices
    ]
    told = False
    try:
        while any(worker.poll() is None for worker in started):
            if stop() and not told:
                told = True
                for worker in started:
                    worker.terminate()
            tick()
            time.sleep(POLL_SECONDS)
    except BaseException:
        for worker in started:
            worker.kill()
        raise
    finally:
        for worker in started:
            worker.wait()
    for worker, device in zip(started, devices, strict=True):
        if worker.returncode not in (0, STOPPED):
            say(f"the worker on {device} ended with {worker.returncode}; what it had not finished is done again")
