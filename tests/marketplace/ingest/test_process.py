"""The parsing process: what it is given, what it may use, and how it ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from marketplace.ingest import process
from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import MIB, Limits
from marketplace.ingest.process import ParserCrashed, parsed
from tests.marketplace.ingest.conftest import FINGERPRINT_KEY, VERSION_KEY, parquet_bytes

MAPPING = {"content": "x*", "label": "y"}


def run(path: Path, mapping=MAPPING, *, format="csv", limits=None, **options):
    return parsed(
        path,
        format=format,
        mapping=mapping,
        filename="digits.csv",
        version_key=VERSION_KEY,
        fingerprint_key=FINGERPRINT_KEY,
        limits=limits,
        **options,
    )


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("x0,x1,y\n" + "1,2,a\n" * 20_000)
    return path


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    """Temporary files of this test's own."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def test_process_gives_what_this_process_would_and_leaves_nothing(numbers, read, temporary_files):
    progress = []
    with run(numbers, on_progress=lambda done, total: progress.append((done, total))) as result:
        here = read(numbers.read_bytes(), MAPPING, filename="digits.csv")
        assert result.report == here.report
        assert result.fingerprints.read_bytes() == here.fingerprints
        assert result.peak_bytes > 10 * MIB

    assert progress
    assert all(0 <= done <= total == numbers.stat().st_size for done, total in progress)
    assert list(temporary_files.iterdir()) == []


def test_refusal_crosses_the_process_whole(tmp_path, temporary_files):
    path = tmp_path / "bad.csv"
    path.write_text("x0,y\n1,a\n2\n")

    with pytest.raises(FileRefused) as caught, run(path):
        raise AssertionError("it was read")

    assert caught.value.code == "row_ragged"
    assert caught.value.message.startswith("digits.csv, row 2 (line 3) has 1 field")
    assert caught.value.pointers == {"rows/2": "1 field instead of 2, on line 3."}
    assert list(temporary_files.iterdir()) == []


def test_process_has_no_environment_of_ours(numbers, monkeypatch, tmp_path):
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    seen = []

    def look(done, total):
        child = next(int(pid) for pid in _children())
        seen.append(Path(f"/proc/{child}/environ").read_bytes())

    with run(numbers, on_progress=look):
        pass

    assert seen
    assert not any(b"secret" in environ or b"DATABASE" in environ or b"PATH=" in environ for environ in seen)


def test_too_much_memory_is_a_clear_error(tmp_path):
    path = tmp_path / "wide.parquet"
    path.write_bytes(parquet_bytes(pa.table({"text": ["a" * 1_000_000] * 400})))
    limits = replace(Limits(), memory_bytes=300 * MIB, free_bytes=1 << 40)

    with pytest.raises(FileRefused) as caught, run(path, {"content": "text"}, format="parquet", limits=limits):
        raise AssertionError("it was read")

    assert caught.value.code in ("out_of_memory", "parser_killed")
    assert "memory" in caught.value.message
    assert "split it" in caught.value.message


def test_too_much_time_is_a_clear_error(numbers):
    limits = replace(Limits(), wall_seconds=2)

    def hang(done, total):
        os.kill(next(_children()), signal.SIGSTOP)

    with pytest.raises(FileRefused) as caught, run(numbers, limits=limits, on_progress=hang):
        raise AssertionError("it was read")

    assert (caught.value.code, caught.value.message) == (
        "timed_out",
        "digits.csv was not read within 2 seconds; split it into smaller files.",
    )


def test_too_much_output_is_a_clear_error(numbers):
    with pytest.raises(FileRefused) as caught, run(numbers, limits=replace(Limits(), output_bytes=100_000)):
        raise AssertionError("it was read")

    assert caught.value.code == "output_too_large"


def test_killed_process_is_a_clear_error(numbers):
    def kill(done, total):
        os.kill(next(_children()), signal.SIGKILL)

    with pytest.raises(FileRefused) as caught, run(numbers, on_progress=kill):
        raise AssertionError("it was read")

    assert caught.value.code == "parser_killed"
    assert "SIGKILL" in caught.value.message


def test_mistake_of_ours_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(ParserCrashed) as caught, run(tmp_path / "secret name.csv"):
        raise AssertionError("it was read")

    assert str(caught.value).startswith("status 1: FileNotFoundError < File ")
    assert "secret name" not in str(caught.value)


def test_listener_that_fails_ends_the_process(numbers):
    with pytest.raises(ZeroDivisionError), run(numbers, on_progress=lambda done, total: 1 // 0):
        raise AssertionError("it was read")

    assert list(_children()) == []


def test_what_a_killed_worker_left_is_removed_by_the_next_attempt(numbers, temporary_files):
    (temporary_files / "residual-upload-7-abc").mkdir()
    (temporary_files / "residual-upload-70-abc").mkdir()

    with run(numbers, name="upload-7"):
        pass

    assert [path.name for path in temporary_files.iterdir()] == ["residual-upload-70-abc"]


def test_process_dies_with_whoever_started_it(tmp_path):
    """kill -9 of the worker alone, not of its group: nothing goes on reading."""
    path = tmp_path / "endless.csv"
    path.write_text("x0,x1,y\n" + "1,2,a\n" * 1_500_000)
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from marketplace.ingest.process import parsed\n"
            "say = lambda done, total: print(done, flush=True)\n"
            f"parsed(Path({str(path)!r}), format='csv', mapping={MAPPING!r}, filename='f', version_key=b'v',"
            " fingerprint_key=b'f', on_progress=say).__enter__()",
        ],
        cwd=process.ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        worker.stdout.readline()
        child = next(_children(worker.pid))
        worker.kill()
        worker.wait()
        deadline = time.monotonic() + 5
        while _is_running(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _is_running(child)
    finally:
        worker.kill()
        worker.wait()
        if worker.stdout is not None:
            worker.stdout.close()


def _children(of: int | None = None):
    """Pids of a process's children that run the parser."""
    for task in Path(f"/proc/{of or os.getpid()}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"marketplace.ingest" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield int(pid)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
