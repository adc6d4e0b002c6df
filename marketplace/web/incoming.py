"""An uploaded file between the two steps of its form: kept in object storage until its columns are mapped, a day at most."""

import json
import logging
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.core.files.base import ContentFile, File
from django.core.files.storage import default_storage
from django.http import Http404
from django.utils import timezone

from marketplace.models import Dataset
from marketplace.web.peek import column_names

logger = logging.getLogger(__name__)

FOLDER = "incoming"
LIFE = timedelta(days=1)


@dataclass(frozen=True)
class Incoming:
    """A file whose columns are known and not yet mapped."""

    id: uuid.UUID
    filename: str
    size_bytes: int
    columns: list[str]

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.id}"

    def open(self) -> File:
        return default_storage.open(self.key)

    def delete(self) -> None:
        for key in (self.key, f"{self.key}.json"):
            default_storage.delete(key)


def receive(*, dataset: Dataset, file: Any) -> Incoming:
    """Keep an upload and read its columns.

    Raises:
        FileRefused: it is empty, or neither CSV nor Parquet.
    """
    columns = column_names(file, filename=file.name)
    _forget_old_ones()
    incoming = Incoming(id=uuid.uuid4(), filename=file.name, size_bytes=file.size, columns=columns)
    file.seek(0)
    default_storage.save(incoming.key, file)
    about = {"dataset": dataset.pk, "filename": file.name, "size_bytes": file.size, "columns": columns}
    default_storage.save(f"{incoming.key}.json", ContentFile(json.dumps(about).encode()))
    return incoming


def get_incoming(*, dataset: Dataset, id: uuid.UUID) -> Incoming:
    """The file, if it was sent for this dataset and is still there; 404 otherwise."""
    try:
        with default_storage.open(f"{FOLDER}/{id}.json") as stored:
            about = json.loads(stored.read())
    except FileNotFoundError:
        raise Http404("This file has been read already, or waited for more than a day. Upload it again.") from None
    if about.pop("dataset") != dataset.pk:
        raise Http404("There is no such upload")
    return Incoming(id=id, **about)


def _forget_old_ones() -> None:
    try:
        _, names = default_storage.listdir(FOLDER)
    except FileNotFoundError:
        return
    for name in names:
        try:
            if default_storage.get_modified_time(f"{FOLDER}/{name}") < timezone.now() - LIFE:
                default_storage.delete(f"{FOLDER}/{name}")
        except FileNotFoundError:
            logger.info("Somebody else took incoming=%s", name)
