"""The parsing process: a task as JSON on stdin, progress and the outcome as JSON lines on stdout.

It is started with an empty environment in a directory of its own, takes its own limits before it opens the file, and
dies with whoever started it. What it says of the file is data; nothing it writes is executed or unpickled.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import Limits
from marketplace.ingest.mapping import ColumnMapping
from marketplace.ingest.normalise import normalise
from marketplace.ingest.readers import open_reader

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
SECONDS_BETWEEN_PROGRESS = 0.25


def main() -> int:
    task = json.load(sys.stdin)
    limits = Limits(**task["limits"])
    _die_with(task["parent"])
    _limit(limits)
    os.chdir(task["out"])
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    try:
        _run(task, limits)
    except FileRefused as refusal:
        _say(refused={"message": refusal.message, "code": refusal.code, "pointers": refusal.pointers})
    except MemoryError:
        _say(
            refused={
                "message": f"{task['filename']} needs more memory than one file may use; split it, or use shorter cells.",
                "code": "out_of_memory",
                "pointers": {},
            }
        )
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        _say(
            refused={
                "message": f"{task['filename']} is larger than {limits.output_bytes:,} bytes once unpacked; split it.",
                "code": "output_too_large",
                "pointers": {},
            }
        )
    return 0


def _run(task: dict[str, Any], limits: Limits) -> None:
    mapping = ColumnMapping.parse(task["mapping"])
    reader = open_reader(Path(task["path"]), task["format"], mapping, filename=task["filename"], limits=limits)
    said_at = 0.0

    def on_batch() -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SECONDS_BETWEEN_PROGRESS:
            said_at = time.monotonic()
            _say(progress=[reader.bytes_read(), reader.size_bytes])

    normalise(
        reader,
        out=Path(task["out"]),
        filename=task["filename"],
        version_key=bytes.fromhex(task["version_key"]),
        fingerprint_key=bytes.fromhex(task["fingerprint_key"]),
        limits=limits,
        preview_rows=mapping.preview_rows,
        on_batch=on_batch,
    )
    _say(done={"peak_bytes": peak_bytes()})


def peak_bytes() -> int:
    """Resident memory of this process at its highest; `getrusage` would count what it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # the keys in its memory are nobody's to read
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before the first call took effect
        os.kill(os.getpid(), signal.SIGKILL)


def _limit(limits: Limits) -> None:
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.output_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    sys.exit(main())
