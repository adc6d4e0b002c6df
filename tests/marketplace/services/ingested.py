"""Versions made by the real ingest, for tests that need more than rows."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from django.core.files.base import ContentFile

from marketplace.models import Dataset, DatasetVersion, Party, Upload
from marketplace.services.versions import create_dataset, publish_version, start_upload
from marketplace.tasks import ingest_upload

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


def published(party: Party, rows: Sequence[Sequence[Any]], **options: Any) -> DatasetVersion:
    upload = uploaded(party, as_csv(rows), **options)
    assert upload.status == Upload.Status.DONE, upload.error_message
    return publish_version(version=upload.version, user=party.user, signed_name=party.name)
