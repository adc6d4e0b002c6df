"""Start the parsing process and listen to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import Limits
from marketplace.ingest.normalise import FINGERPRINTS, PARQUET, REPORT, Report

ROOT = Path(__file__).resolve().parents[2]
#: All that the process is told by its environment. The C library otherwise raises its threshold for handing large buffers
#: back as it goes, and the peak would creep up with the length of the file.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}


class ParserCrashed(RuntimeError):
    """The parsing process ended by an error of ours; the work may be tried again."""


@dataclass(frozen=True)
class Parsed:
    """What the process left in its directory, which lasts as long as the `with` block."""

    parquet: Path
    fingerprints: Path  # rows of normalise.FINGERPRINT_ROW
    report: Report
    peak_bytes: int  # resident memory of the process at its highest


@contextmanager
def parsed(
    path: Path,
    *,
    format: str,
    mapping: dict[str, Any],
    filename: str,
    version_key: bytes,
    fingerprint_key: bytes,
    limits: Limits | None = None,
    name: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Parsed]:
    """Parse a file in a process of its own, with limits on memory, time and output.

    Args:
        name: unique to this work; what a worker that was killed at it left in its temporary directory is removed first.
        on_progress: called with bytes read and bytes in all, a few times a second; what it raises ends the process.

    Raises:
        FileRefused: the file is wrong, or the process hit a limit.
        ParserCrashed: it failed otherwise.
    """
    limits = limits or Limits()
    if name:
        for stale in Path(tempfile.gettempdir()).glob(f"residual-{name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"residual-{name}-") as directory:
        task = {
            "path": str(path.resolve()),
            "format": format,
            "mapping": mapping,
            "filename": filename,
            "out": directory,
            "version_key": version_key.hex(),
            "fingerprint_key": fingerprint_key.hex(),
            "limits": asdict(limits),
            "parent": os.getpid(),
        }
        peak_bytes = _listen(task, Path(directory), limits, on_progress)
        report = Report(**json.loads((Path(directory) / REPORT).read_text(encoding="utf-8")))
        yield Parsed(Path(directory) / PARQUET, Path(directory) / FINGERPRINTS, report, peak_bytes)


def _listen(task: dict[str, Any], directory: Path, limits: Limits, on_progress: Callable[[int, int], None]) -> int:
    with (directory / "stderr").open("w+b") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-E", "-s", "-B", "-m", "marketplace.ingest"],
            cwd=ROOT,
            env=ENVIRONMENT | {"TMPDIR": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            process.kill()

        clock = threading.Timer(limits.wall_seconds, end)
        clock.daemon = True
        clock.start()
        peak_bytes: int | None = None
        try:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(task).encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it is dead already; its exit status says of what
            for line in process.stdout:
                said = json.loads(line)
                if "progress" in said:
                    on_progress(*said["progress"])
                elif "refused" in said:
                    raise FileRefused(**said["refused"])
                else:
                    peak_bytes = said["done"]["peak_bytes"]
            status = process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if status == 0 and peak_bytes is not None:
            return peak_bytes
        if status < 0:
            raise _stopped(task["filename"], -status, limits, timed_out=timed_out.is_set())
        stderr.seek(max(0, stderr.tell() - 4_000))
        raise ParserCrashed(f"status {status}: {_last_frames(stderr.read().decode(errors='replace'))}")


def _stopped(filename: str, number: int, limits: Limits, *, timed_out: bool) -> FileRefused:
    if timed_out or number == signal.SIGXCPU:
        return FileRefused(
            f"{filename} was not read within {limits.wall_seconds:,} seconds; split it into smaller files.",
            code="timed_out",
        )
    name = signal.Signals(number).name
    if number in (signal.SIGKILL, signal.SIGABRT, signal.SIGBUS):
        return FileRefused(
            f"Reading {filename} was stopped ({name}), most likely for using too much memory; split it and try again.",
            code="parser_killed",
        )
    return FileRefused(
        f"Reading {filename} was stopped ({name}): the file is damaged in a way its reader does not survive. Export it again.",
        code="parser_killed",
    )


def _last_frames(traceback: str) -> str:
    """Where it failed and the error's type, without its message, which may quote a record."""
    lines = [line.strip() for line in traceback.splitlines()]
    frames = [line for line in lines if line.startswith("File ")]
    return " < ".join([lines[-1].partition(":")[0] if lines else "", *reversed(frames[-3:])])
