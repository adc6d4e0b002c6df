"""Versions made by the real ingest, for tests that need more than rows."""

import csv
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.core.files.base import ContentFile

from marketplace.ingest.limits import Limits
from marketplace.ingest.mapping import ColumnMapping
from marketplace.ingest.normalise import FINGERPRINTS, PARQUET, normalise
from marketplace.ingest.process import Parsed
from marketplace.ingest.readers import open_reader
from marketplace.models import Dataset, DatasetVersion, Party, Upload
from marketplace.services.versions import create_dataset, publish_version, start_upload
from marketplace.tasks import ingest_upload


@contextmanager
def parsed_here(
    path: Path,
    *,
    format: str,
    mapping: dict[str, Any],
    filename: str,
    version_key: bytes,
    fingerprint_key: bytes,
    **options: Any,
) -> Iterator[Parsed]:
    """What `process.parsed` does, without the half second that a process takes to start."""
    limits, columns = Limits(), ColumnMapping.parse(mapping)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        report = normalise(
            open_reader(path, format, columns, filename=filename, limits=limits),
            out=out,
            filename=filename,
            version_key=version_key,
            fingerprint_key=fingerprint_key,
            limits=limits,
        )
        yield Parsed(out / PARQUET, out / FINGERPRINTS, report, peak_bytes=0)


HEADER = ("x0", "x1", "y", "holder", "by")
MAPPING = {"content": "x*", "label": "y", "rights_holder": "holder", "labeller": "by"}


def as_csv(rows: Sequence[Sequence[Any]], header: Sequence[str] = HEADER) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def queued(
    party: Party,
    data: bytes,
    *,
    dataset: Dataset | None = None,
    filename: str = "records.csv",
    mapping: Mapping[str, Any] | None = None,
) -> Upload:
    dataset = dataset or create_dataset(owner=party, user=party.user, title="Numbers")
    return start_upload(
        dataset=dataset,
        user=party.user,
        party=party,
        file=ContentFile(data),
        filename=filename,
        mapping=MAPPING if mapping is None else mapping,
    )


def uploaded(party: Party, data: bytes, **options: Any) -> Upload:
    """Queued, and read by the task, whatever came of it."""
    upload = queued(party, data, **options)
    ingest_upload(upload.pk)
    return Upload.objects.select_related("version__dataset__owner").get(pk=upload.pk)


def published(
    party: Party, rows: Sequence[Sequence[Any]], *, header: Sequence[str] = HEADER, **options: Any
) -> DatasetVersion:
    upload = uploaded(party, as_csv(rows, header), **options)
    assert upload.status == Upload.Status.DONE, upload.error_message
    return publish_version(version=upload.version, user=party.user, signed_name=party.name)
