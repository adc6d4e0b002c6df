"""The normalised form of a version: one Parquet file (zstd), a record a row, its position the record's number.

    salt_i   = HMAC-SHA256(version key, i as 8 bytes)[:16]       the same on every re-run, so that the root is too
    digest_i = SHA-256(salt_i ‖ header_i ‖ content_i ‖ label_i)
    header_i = kind (1 byte), bytes of content, bytes of label or −1 (int64), holder, labeller (int32)

All integers and floats are little endian; the header's lengths make the encoding injective, and the salt keeps a digest
from telling which record it is of. Whoever has the file can recompute every digest from its row.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marketplace.ingest.copies import keyed_hash

SALT_BYTES, DIGEST_BYTES = 16, 32
NOBODY = -1  # the labeller of a record that nobody labelled
_HEADER = np.dtype([("kind", "S1"), ("content", "<i8"), ("label", "<i8"), ("holder", "<i4"), ("labeller", "<i4")])


def schema(kind: str) -> pa.Schema:
    """Of the normalised Parquet; `kind` is "vector" or "text"."""
    content = pa.string() if kind == "text" else pa.list_(pa.field("item", pa.float64(), nullable=False))
    return pa.schema(
        [
            pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
            pa.field("salt", pa.binary(SALT_BYTES), nullable=False),
            pa.field("content", content, nullable=False),
            pa.field("label", pa.string()),
            pa.field("rights_holder", pa.int32(), nullable=False),
            pa.field("labeller", pa.int32(), nullable=False),
        ],
        metadata={"residual.format": "1"},
    )


def salts(version_key: bytes, start: int, stop: int) -> list[bytes]:
    keyed = keyed_hash(version_key)
    return [keyed(row.to_bytes(8, "big"))[:SALT_BYTES] for row in range(start, stop)]


def content_bytes(content: pa.Array) -> list[memoryview | bytes]:
    """Each record's content as the digest covers it: float64 or UTF-8."""
    if pa.types.is_string(content.type):
        return [text.encode() for text in content.to_pylist()]
    values = memoryview(np.ascontiguousarray(content.flatten().to_numpy(), dtype="<f8").tobytes())
    ends = np.cumsum(pc.list_value_length(content).to_numpy(), dtype=np.int64) * 8
    starts = np.concatenate([[0], ends[:-1]])
    return [values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def digests(
    salts: Sequence[bytes],
    content: Sequence[memoryview | bytes],
    labels: Sequence[str | None],
    holders: NDArray[np.int32],
    labellers: NDArray[np.int32],
    *,
    kind: str,
) -> list[bytes]:
    """One 32-byte digest per record; see the module's formula."""
    encoded = [None if label is None else label.encode() for label in labels]
    header = np.zeros(len(salts), dtype=_HEADER)
    header["kind"] = kind[:1].encode()
    header["content"] = [len(item) for item in content]
    header["label"] = [-1 if label is None else len(label) for label in encoded]
    header["holder"], header["labeller"] = holders, labellers
    heads, size = header.tobytes(), _HEADER.itemsize
    return [
        sha256(b"".join((salt, heads[at : at + size], item, label or b""))).digest()
        for salt, at, item, label in zip(salts, range(0, len(heads), size), content, encoded, strict=True)
    ]


def recomputed_digests(batch: pa.RecordBatch | pa.Table) -> list[bytes]:
    """The digests that rows of a normalised file must have, from everything else in them."""
    table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
    if not table.num_rows:
        return []
    content = table["content"].combine_chunks()
    content = content.combine_chunks() if isinstance(content, pa.ChunkedArray) else content
    return digests(
        cast(list[bytes], table["salt"].to_pylist()),
        content_bytes(content),
        table["label"].to_pylist(),
        table["rights_holder"].to_numpy(),
        table["labeller"].to_numpy(),
        kind="text" if pa.types.is_string(content.type) else "vector",
    )
