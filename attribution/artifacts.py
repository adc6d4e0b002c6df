"""Evidence in object storage under its SHA-256: checkpoints, queries, meter logs, rounds, values. Nothing here is ever unpickled.

The bytes of one hash are kept once, whoever hands them in; a row per owner says who did, and when.
"""

import hashlib
import json
import logging
import shutil
import struct
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from django.conf import settings
from django.core.files import File
from django.core.files.storage import default_storage
from safetensors import safe_open

from attribution.errors import ArtifactInvalid, ArtifactMissing
from attribution.models import Artifact
from attribution.queries import Queries, QueriesRefused, normalise_queries
from marketplace.models import Party

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_LOG_BYTES = 256 << 20  # of a meter: read several times while a disclosure is checked
MAX_HEADER_BYTES = 1_000_000  # of a safetensors file: names and shapes of some ten thousand tensors
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
#: safetensors' names for what a training state is made of, and their sizes in bytes
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def store_artifact(*, owner: Party | None, kind: str, stream: Readable) -> Artifact:
    """Keep a stream's bytes under their hash; the same bytes again are the same artifact, also two at once.

    Raises:
        ArtifactInvalid: too large, empty, or not of its kind; nothing is kept.
    """
    if kind not in Artifact.Kind.values:
        raise ArtifactInvalid(f"Choose a kind of {', '.join(Artifact.Kind.values)}.", pointers={"/kind": "unknown"})
    with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
        path = Path(folder) / "bytes"
        sha256, size = _receive(stream, path)
        key = f"artifacts/{sha256[:2]}/{sha256}"
        match kind:
            case Artifact.Kind.STATE:
                read_header(path)
            case Artifact.Kind.METER:
                _check_log(path, size)
            case Artifact.Kind.QUERIES:
                normalised = _normalise(path)
                _put(_normalised(key), normalised, normalised.stat().st_size)
        _put(key, path, size)
    artifact, is_new = Artifact.objects.get_or_create(
        sha256=sha256, kind=kind, owner=owner, defaults={"size_bytes": size, "key": key}
    )
    if is_new:
        logger.info("Stored artifact=%s kind=%s bytes=%s", artifact.pk, kind, size)
    return artifact


def find_artifact(*, owner: Party, kind: str, sha256: str, pointer: str) -> Artifact:
    """The artifact that a document names.

    Raises:
        ArtifactMissing: its owner has not handed in such bytes.
    """
    found = Artifact.objects.filter(owner=owner, kind=kind, sha256=sha256).first()
    if found is None:
        raise ArtifactMissing(
            f"No {kind} artifact of yours has the SHA-256 {sha256[:16]}…; send its bytes to "
            f"POST /api/v1/artifacts/?kind={kind} before you disclose.",
            pointers={pointer: "not handed in"},
        )
    return found


def open_artifact(artifact: Artifact) -> BinaryIO:
    """Its bytes, as a seekable stream that the caller closes."""
    return default_storage.open(artifact.key, "rb")  # type: ignore[return-value]


@contextmanager
def local_path(artifact: Artifact) -> Iterator[Path]:
    """A file that the engine may read: the stored one itself, or a copy that lives as long as the context."""
    try:
        stored = Path(default_storage.path(artifact.key))
    except NotImplementedError:  # object storage has no paths
        stored = None
    if stored is not None:
        yield stored
        return
    with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
        path = Path(folder) / artifact.sha256
        with open_artifact(artifact) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
        yield path


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of a safetensors file, every offset checked against the file's size.

    Raises:
        ArtifactInvalid: it is something else, or the header does not describe the bytes that follow.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start, brace = file.read(8), file.read(1)
        # A header of 640 bytes begins as a pickle does, so the brace that opens a header is looked for too.
        if brace != b"{" and (start[:2] in PICKLES or start[:4] == b"PK\x03\x04"):
            raise _not_a_state(
                "this is a Python pickle (as torch.save writes it), which is never opened here: it could run "
                "anything. Save the state with safetensors.torch.save_file"
            )
        if len(start) < 8:
            raise _not_a_state("the file ends before its header")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise _not_a_state(
                f"it announces a header of {length} bytes; {min(MAX_HEADER_BYTES, size - 8)} are possible"
            )
        try:
            header = json.loads(brace + file.read(length - 1)) if length else None
        except (ValueError, RecursionError) as error:
            raise _not_a_state("its header is not JSON") from error
    if not isinstance(header, dict):
        raise _not_a_state("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, span = _entry(name, entry)
        tensors[name] = (dtype, shape)
        spans.append(span)
    end = 0
    for start_at, stop_at in sorted(spans):
        if start_at != end:
            raise _not_a_state(f"its tensors leave a gap or overlap at byte {start_at}")
        end = stop_at
    if not tensors or end != size - 8 - length:
        raise _not_a_state(f"its header describes {end} bytes of tensors, {size - 8 - length} follow")
    return tensors


def find_not_finite(path: Path) -> str:
    """The first tensor of a safetensors file, by name, that holds NaN or infinity; empty if none does."""
    with safe_open(path, "np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
                return str(name)
    return ""


def read_queries(artifact: Artifact) -> Queries:
    """What a file of queries held when it was handed in."""
    with default_storage.open(_normalised(artifact.key)) as file:
        return Queries.load(file.read())


def normalised_key(artifact: Artifact) -> str:
    """Where the queries lie that `read_queries` reads."""
    return _normalised(artifact.key)


def _normalised(key: str) -> str:
    return f"{key}.safetensors"


def _entry(name: str, entry: Any) -> tuple[str, list[int], tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if all(
            type(side) is int and side >= 0 for side in shape
        ):
            size = 1
            for side in shape:
                size *= side
            if dtype not in DTYPE_BYTES:
                raise _not_a_state(f"tensor {name!r} is {dtype}; possible are {', '.join(DTYPE_BYTES)}")
            if not 0 <= start <= stop or stop - start != size * DTYPE_BYTES[dtype]:
                raise _not_a_state(f"tensor {name!r} has {stop - start} bytes for shape {shape} of {dtype}")
            return dtype, shape, (start, stop)
    raise _not_a_state(f"tensor {name!r} has no dtype, shape and data_offsets")


def _receive(stream: Readable, path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
            if size > settings.MAX_ARTIFACT_BYTES:
                raise ArtifactInvalid(
                    f"An artifact has at most {settings.MAX_ARTIFACT_BYTES} bytes.", pointers={"/body": "too large"}
                )
            digest.update(chunk)
            file.write(chunk)
    if not size:
        raise ArtifactInvalid("The body is empty; send the file's bytes as they are.", pointers={"/body": "empty"})
    return digest.hexdigest(), size


def _put(key: str, path: Path, size: int) -> None:
    """Put a file under its key whole or not at all: whoever finds the key finds all of its bytes."""
    if default_storage.exists(key) and default_storage.size(key) == size:
        return
    try:
        target = Path(default_storage.path(key))
    except NotImplementedError:  # in object storage a put is whole or nothing
        with path.open("rb") as file:
            stored = default_storage.save(key, File(file))
        if stored != key:  # someone else was first; the bytes are the same
            default_storage.delete(stored)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    shutil.copyfile(path, partial)
    partial.replace(target)


def _not_a_state(reason: str) -> ArtifactInvalid:
    return ArtifactInvalid(f"Not a usable safetensors file: {reason}.", pointers={"/body": reason})


def _check_log(path: Path, size: int) -> None:
    """A meter's log whose chain holds from its header to its close."""
    from attribution.engine import EngineError
    from attribution.engine.meter_log import verify_log

    if size > MAX_LOG_BYTES:
        raise ArtifactInvalid(
            f"A meter log has at most {MAX_LOG_BYTES:,} bytes, this one {size:,}; train in fewer or larger batches.",
            pointers={"/body": "too large"},
        )
    try:
        report = verify_log(path)
    except EngineError as error:
        raise ArtifactInvalid(
            f"Not a usable meter log: it {error.reason}.", pointers={"/body": error.reason}
        ) from error
    if report.bad_entry is not None or not report.is_closed:
        at = report.n_entry if report.bad_entry is None else report.bad_entry
        reason = report.reason or "is missing: the log was not closed"
        raise ArtifactInvalid(
            f"Not a usable meter log: entry {at} {reason}.", pointers={"/body": f"entry {at}: {reason}"}
        )


def _normalise(path: Path) -> Path:
    target = path.with_name("normalised")
    try:
        normalise_queries(path, target)
    except QueriesRefused as error:
        raise ArtifactInvalid(f"Not usable as queries: {error}.", pointers={"/body": str(error)}) from error
    return target
