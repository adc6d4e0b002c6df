"""Which columns a file has, for the form that maps them, without reading the file.

A Parquet footer is a stranger's binary: it is read by a process of its own, with limits and without secrets, and this
file is that process's program too; so it imports no Django.
"""

import csv
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import GIB, MIB, Limits
from marketplace.ingest.readers import sniff

HEADER_BYTES = MIB
SECONDS = 10
ROOT = Path(__file__).resolve().parents[2]


def column_names(file: Any, *, filename: str) -> list[str]:
    """The names in the header of an uploaded CSV or Parquet file.

    Raises:
        FileRefused: it is empty, neither CSV nor Parquet, or has no readable header.
    """
    file.seek(0)
    head = file.read(HEADER_BYTES)
    format = sniff(head[:4096], filename=filename)
    names = _csv_names(head, filename) if format == "csv" else _parquet_names(file, filename)
    limit = Limits().columns
    if len(names) > limit:
        raise _refused(
            f"{filename} has {len(names):,} columns; the most is {limit:,}. Keep numeric content in one list column."
        )
    return names


def _csv_names(head: bytes, filename: str) -> list[str]:
    line = head.split(b"\n", 1)[0] + b"\n"
    if len(line) > HEADER_BYTES:
        raise _refused(
            f"{filename} has no line end in its first {HEADER_BYTES:,} bytes; its first line must name the columns."
        )
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _refused(f"The header of {filename} is not UTF-8. Save the file as CSV in UTF-8.") from None
    delimiter = max(",;\t", key=text.count)  # as the reader will
    names = [name.strip() for name in next(csv.reader(io.StringIO(text), delimiter=delimiter), [])]
    if not any(names):
        raise _refused(f"{filename} has no header; its first line must name the columns.")
    return names


def _parquet_names(file: Any, filename: str) -> list[str]:
    with ExitStack() as stack:
        readable: IO[bytes]
        if hasattr(file, "temporary_file_path"):
            readable = stack.enter_context(Path(file.temporary_file_path()).open("rb"))
        else:
            readable = stack.enter_context(tempfile.TemporaryFile())
            file.seek(0)
            shutil.copyfileobj(file, readable)
            readable.flush()
            readable.seek(0)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "marketplace.web.peek"],
                stdin=readable,
                capture_output=True,
                cwd=ROOT,
                env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            done = None
    if done is None or done.returncode != 0:
        raise _refused(f"{filename} begins like a Parquet file but cannot be read as one. Write it again and retry.")
    names: list[str] = json.loads(done.stdout)
    return names


def _refused(message: str) -> FileRefused:
    return FileRefused(message, code="header_unreadable", pointers={"file": message})


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pyarrow.parquet as pq

    sys.stdout.write(json.dumps(pq.read_schema(sys.stdin.buffer).names))


if __name__ == "__main__":
    _main()
