"""Evaluation queries: a stranger's Parquet in, numbers and labels out.

A Parquet is a stranger's binary, so it is read once, when it is handed in, by a process of its own, with limits and without
secrets; what it leaves is safetensors, which holds numbers and nothing that runs. This file is that process's program too,
so it imports no Django.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save_file

MAX_QUERIES = 100_000
MAX_NUMBERS = 20_000_000  # over all queries: 160 MB once read
MEMORY_BYTES = 4 << 30
OUTPUT_BYTES = 1 << 30
SECONDS = 60
ROOT = Path(__file__).resolve().parents[1]


class QueriesRefused(Exception):
    """The file cannot be used as queries; the message says why."""


@dataclass(frozen=True)
class Queries:
    """Evaluation queries: vectors (n_query, length) or texts, each with its true label ("" where there is none)."""

    content: NDArray[np.float64] | list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        is_text = isinstance(self.content, list)
        content = _as_bytes(self.content) if isinstance(self.content, list) else self.content
        save_file({"text" if is_text else "content": content, "labels": _as_bytes(self.labels)}, path)

    @classmethod
    def load(cls, data: bytes) -> "Queries":
        """What `save` has written."""
        found = load(data)
        labels = json.loads(found["labels"].tobytes())
        return cls(json.loads(found["text"].tobytes()) if "text" in found else found["content"], labels)


def normalise_queries(source: Path, target: Path, *, max_numbers: int = MAX_NUMBERS) -> None:
    """Read a Parquet of queries in a process of its own: `content` (list of numbers, or string) and `label` (string).

    Texts may come without labels, for a model that is asked what follows.

    Raises:
        QueriesRefused: names the column or the row that is wrong, or the limit that was hit; `target` is not written.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "attribution.queries", str(source.resolve()), str(target), str(max_numbers)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        target.unlink(missing_ok=True)
        raise QueriesRefused(f"it was not read within {SECONDS} seconds; send fewer queries") from error
    if done.returncode:
        target.unlink(missing_ok=True)
        raise QueriesRefused("it is damaged, or too large once unpacked; write it again, with fewer queries")
    if refused := json.loads(done.stdout)["refused"]:
        raise QueriesRefused(refused)


def read_parquet(path: Path, *, max_numbers: int) -> Queries:
    """Raises QueriesRefused: see `normalise_queries`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise QueriesRefused("this is not a Parquet file; write it with two columns, content and label") from error
    with file:
        names = file.schema_arrow.names
        is_text = "content" in names and _is_string(file.schema_arrow.field("content").type)
        columns = ["content"] if is_text and "label" not in names else ["content", "label"]
        for column in columns:
            if column not in names:
                raise QueriesRefused(f"there is no column {column!r}; the columns are {', '.join(names[:20])}")
        rows = file.metadata.num_rows
        if not 0 < rows <= MAX_QUERIES:
            raise QueriesRefused(f"it has {rows} rows; 1 to {MAX_QUERIES} are possible")
        groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
        numbers = sum(g.column(c).num_values for g in groups for c in range(g.num_columns))
        declared = sum(g.column(c).total_uncompressed_size for g in groups for c in range(g.num_columns))
        if numbers > max_numbers or declared > 10 * max_numbers:
            raise QueriesRefused(f"it holds {numbers} values; at most {max_numbers} are possible. Send fewer queries")
        try:
            table = file.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise QueriesRefused(f"it cannot be read: {error}") from error
    labels = _texts(table["label"], "label") if "label" in columns else [""] * len(table)
    if is_text:
        return Queries(_texts(table["content"], "content"), labels)
    return Queries(_vectors(table["content"]), labels)


def _texts(column: Any, name: str) -> list[str]:
    if not _is_string(column.type):
        raise QueriesRefused(f"column {name!r} is {column.type}; it must be a string")
    texts: list[str] = column.to_pylist()
    for row, text in enumerate(texts):
        if not text:
            raise QueriesRefused(f"row {row} has no {name}")
    return texts


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _vectors(column: Any) -> NDArray[np.float64]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise QueriesRefused(f"column 'content' is {kind}; it must be a list of numbers, or a string")
    if column.null_count:
        raise QueriesRefused("column 'content' has empty rows")
    lengths = pc.list_value_length(column).to_numpy()
    wrong = np.flatnonzero(lengths != lengths[0])
    if len(wrong):
        raise QueriesRefused(f"row {wrong[0]} has {lengths[wrong[0]]} numbers, row 0 has {lengths[0]}")
    flat = pc.list_flatten(column)
    # (n_query, length), a null as NaN; copied, since torch will not share what Arrow keeps read-only
    content = np.array(flat.cast(pa.float64()).to_numpy(), dtype=np.float64).reshape(len(column), -1)
    wrong = np.flatnonzero(~np.isfinite(content).all(1))
    if len(wrong):
        raise QueriesRefused(f"row {wrong[0]} holds a number that is missing or not finite")
    return content


def _as_bytes(texts: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)


def _main(source: str, target: str, max_numbers: str) -> None:
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, OUTPUT_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    refused = ""
    try:
        read_parquet(Path(source), max_numbers=int(max_numbers)).save(Path(target))
    except QueriesRefused as error:
        refused = str(error)
    sys.stdout.write(json.dumps({"refused": refused}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
