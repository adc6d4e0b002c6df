import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marketplace.ingest.limits import Limits
from marketplace.ingest.mapping import ColumnMapping
from marketplace.ingest.normalise import FINGERPRINTS, PARQUET, Report, normalise
from marketplace.ingest.readers import open_reader, sniff

VERSION_KEY, FINGERPRINT_KEY = b"version key", b"fingerprint key"


@dataclass(frozen=True)
class Normalised:
    report: Report
    table: pa.Table
    fingerprints: bytes


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Normalised]:
    """Normalise bytes in this process."""

    def read_bytes(
        data: bytes,
        mapping: Mapping[str, Any],
        *,
        filename: str = "records",
        limits: Limits | None = None,
        preview_rows: int = 20,
    ) -> Normalised:
        path, limits = tmp_path / "input", limits or Limits()
        path.write_bytes(data)
        columns = ColumnMapping.parse(mapping)
        format = sniff(data[:4_096], filename=filename)
        reader = open_reader(path, format, columns, filename=filename, limits=limits)
        report = normalise(
            reader,
            out=tmp_path,
            filename=filename,
            version_key=VERSION_KEY,
            fingerprint_key=FINGERPRINT_KEY,
            limits=limits,
            preview_rows=preview_rows,
        )
        return Normalised(report, pq.read_table(tmp_path / PARQUET), (tmp_path / FINGERPRINTS).read_bytes())

    return read_bytes


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()
