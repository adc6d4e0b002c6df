"""Ingest: records a second and peak memory at 10 MB and 200 MB, as CSV and as Parquet.

    python -m benchmarks.ingest            everything, in a few minutes
    python -m benchmarks.ingest --quick    2 MB and 20 MB

Each file goes through the parsing process that uploads go through, with its limits. The floor, measured in the same run
on the same file, is a process in which Arrow reads the file and writes zstd Parquet: no digests, fingerprints or checks.
Memory must not grow with the file: at most 1.2 times as much for a file twenty times as large.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from marketplace.ingest.process import ENVIRONMENT, ROOT, parsed

MB = 1_000_000
LENGTH = 64  # numbers a record, as in the demo's digits
MAPPING = {"content": "pixel_*", "label": "label", "rights_holder": "holder", "labeller": "labeller"}
MOST_GROWTH = 1.2
BATCH_ROWS = 20_000

FLOOR = """
import sys
import pyarrow as pa, pyarrow.csv as c, pyarrow.parquet as pq
from marketplace.ingest.__main__ import peak_bytes
source, target, format = sys.argv[1:]
pa.set_cpu_count(1)
if format == "csv":
    options = c.ReadOptions(use_threads=False, block_size=1 << 21)
    batches = c.open_csv(source, read_options=options)
    schema = batches.schema
else:
    file = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
    batches, schema = file.iter_batches(batch_size=8192, use_threads=False), file.schema_arrow
with pq.ParquetWriter(target, schema, compression="zstd") as writer:
    for batch in batches:
        writer.write_batch(batch)
print(peak_bytes())
"""


@dataclass(frozen=True)
class Measured:
    """One file through the ingest and through the floor."""

    format: str
    size_bytes: int
    n_records: int
    seconds: float
    peak_bytes: int
    floor_seconds: float
    floor_peak_bytes: int

    @property
    def records_per_second(self) -> float:
        return self.n_records / self.seconds


def write_csv(path: Path, size_bytes: int) -> int:
    """Records until the file has `size_bytes`; returns how many. A record in twenty repeats the first batch."""
    rng = np.random.default_rng(0)
    names = [*(f"pixel_{at}" for at in range(LENGTH)), "label", "holder", "labeller"]
    n_records = 0
    with path.open("wb") as file:
        while file.tell() < size_bytes:
            columns = [pa.array(column) for column in rng.integers(0, 17, (LENGTH, BATCH_ROWS), dtype=np.int64)]
            holders = pa.array([f"holder {at}" for at in rng.integers(0, 10, BATCH_ROWS)])
            labellers = pa.array([f"labeller {at}" for at in rng.integers(0, 5, BATCH_ROWS)])
            labels = pa.array(rng.integers(0, 10, BATCH_ROWS))
            batch = pa.RecordBatch.from_arrays([*columns, labels, holders, labellers], names=names)
            pa_csv.write_csv(batch, file, pa_csv.WriteOptions(include_header=n_records == 0))
            n_records += BATCH_ROWS
    return n_records


def write_parquet(path: Path, size_bytes: int) -> int:
    """The same with a list column of random float32, which do not compress: the file is what is read."""
    rng = np.random.default_rng(0)
    n_records, writer = 0, None
    try:
        while n_records * LENGTH * 4 < size_bytes:
            values = rng.standard_normal(BATCH_ROWS * LENGTH, dtype=np.float32)
            batch = pa.table(
                {
                    "pixels": pa.FixedSizeListArray.from_arrays(pa.array(values), LENGTH),
                    "label": rng.integers(0, 10, BATCH_ROWS),
                    "holder": [f"holder {at}" for at in rng.integers(0, 10, BATCH_ROWS)],
                    "labeller": [f"labeller {at}" for at in rng.integers(0, 5, BATCH_ROWS)],
                }
            )
            writer = writer or pq.ParquetWriter(
                path, batch.schema, compression="zstd", use_dictionary=["holder", "labeller"]
            )
            writer.write_table(batch)
            n_records += BATCH_ROWS
    finally:
        if writer is not None:
            writer.close()
    return n_records


def measure(path: Path, format: str, n_records: int) -> Measured:
    started = time.perf_counter()
    mapping = MAPPING if format == "csv" else MAPPING | {"content": "pixels"}
    with parsed(
        path, format=format, mapping=mapping, filename=path.name, version_key=b"v" * 32, fingerprint_key=b"f" * 32
    ) as result:
        seconds = time.perf_counter() - started
        assert result.report.n_records == n_records
        peak_bytes = result.peak_bytes
    started = time.perf_counter()
    floor = subprocess.run(
        [sys.executable, "-c", FLOOR, str(path), str(path.with_suffix(".floor")), format],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    )
    return Measured(
        format=format,
        size_bytes=path.stat().st_size,
        n_records=n_records,
        seconds=seconds,
        peak_bytes=peak_bytes,
        floor_seconds=time.perf_counter() - started,
        floor_peak_bytes=int(floor.stdout),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 MB and 20 MB instead of 10 MB and 200 MB")
    sizes = (2 * MB, 20 * MB) if parser.parse_args().quick else (10 * MB, 200 * MB)
    table = Table(title=f"Ingest: {LENGTH} numbers, a label, a rights holder and a labeller a record")
    for heading in (
        "file",
        "MB",
        "records",
        "s",
        "records/s",
        "MB/s",
        "peak MB",
        "floor s",
        "floor peak MB",
        "× floor",
    ):
        table.add_column(heading, justify="right")
    growth = {}
    with tempfile.TemporaryDirectory(prefix="residual-bench-") as directory:
        for format, write in (("csv", write_csv), ("parquet", write_parquet)):
            found = []
            for size_bytes in sizes:
                path = Path(directory) / f"records.{format}"
                found.append(measure(path, format, write(path, size_bytes)))
                one = found[-1]
                table.add_row(
                    one.format,
                    f"{one.size_bytes / MB:.1f}",
                    f"{one.n_records:,}",
                    f"{one.seconds:.1f}",
                    f"{one.records_per_second:,.0f}",
                    f"{one.size_bytes / MB / one.seconds:.1f}",
                    f"{one.peak_bytes / MB:.0f}",
                    f"{one.floor_seconds:.1f}",
                    f"{one.floor_peak_bytes / MB:.0f}",
                    f"{one.seconds / one.floor_seconds:.1f}",
                )
            growth[format] = found[1].peak_bytes / found[0].peak_bytes
    console = Console(width=120)
    console.print(table)
    for format, ratio in growth.items():
        verdict = "does not grow" if ratio <= MOST_GROWTH else "GROWS"
        console.print(
            f"{format}: peak memory × {ratio:.2f} for a file {sizes[1] / sizes[0]:.0f} × as large: it {verdict}"
        )
    return 0 if max(growth.values()) <= MOST_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
