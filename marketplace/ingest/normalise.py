"""A reader's batches → the normalised Parquet, the fingerprints and the report; one pass, a batch in memory at a time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marketplace.ingest import records
from marketplace.ingest.copies import FINGERPRINT_BYTES, TEXT, VECTOR, keyed_hash, normalised_text
from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import Limits
from marketplace.ingest.merkle import MerkleTree
from marketplace.ingest.readers import Reader, bad_number, too_many_rows

PARQUET, FINGERPRINTS, REPORT = "records.parquet", "fingerprints.bin", "report.json"
#: A row of the fingerprints' file.
FINGERPRINT_ROW = np.dtype([("fingerprint", f"V{FINGERPRINT_BYTES}"), ("holder", "<i4"), ("labeller", "<i4")])
MAX_CLASSES = 1_000
MAX_CLASS_LENGTH = 200
PREVIEW_CHARACTERS = 1_000
PREVIEW_NUMBERS = 4_096
# Digests and salts are random: neither a dictionary nor statistics help them.
_DICTIONARIES = ["content.list.element", "label", "rights_holder", "labeller"]
_INTEGRAL = r"^([+-]?\d+)\.0+$"


@dataclass
class Contributors:
    """One role's names, numbered as they first appear, and how many records each has."""

    limit: int
    names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        number = self._numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            if number == self.limit:
                raise FileRefused(
                    f"More than {self.limit:,} people or organisations are named; is this the right column?",
                    code="too_many_parties",
                )
            self.names.append(name)
            self.counts.append(0)
        return number

    def count(self, numbers: NDArray[np.int32]) -> None:
        for number, n in zip(*np.unique(numbers[numbers >= 0], return_counts=True), strict=True):
            self.counts[number] += int(n)


@dataclass(frozen=True)
class Report:
    """What a version's rows in the database are made from."""

    kind: str
    n_records: int
    merkle_root: str  # hex
    rights_holders: list[str]  # by number; [""]: the uploader, who named no column
    rights_holder_counts: list[int]
    labellers: list[str]
    labeller_counts: list[int]
    features: dict[str, Any]
    statistics: dict[str, Any]
    preview: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def normalise(
    reader: Reader,
    *,
    out: Path,
    filename: str,
    version_key: bytes,
    fingerprint_key: bytes,
    limits: Limits,
    preview_rows: int = 20,
    on_batch: Callable[[], None] = lambda: None,
) -> Report:
    """Write `records.parquet`, `fingerprints.bin` and `report.json` into `out`.

    Raises:
        FileRefused: with file, row, line and column; what was written so far is of no use.
    """
    kind, label_column = reader.kind, reader.columns.label
    checks = _Checks(reader, filename, limits)
    tree, keyed = MerkleTree(), keyed_hash(fingerprint_key)
    holders, labellers = Contributors(limits.parties), Contributors(limits.parties)
    content_statistics = _TextStatistics() if kind == "text" else _VectorStatistics()
    labels = _LabelStatistics()
    preview: list[dict[str, Any]] = []
    n_records = n_decoded = 0
    schema = records.schema(kind)
    most_decoded = max(limits.free_bytes, limits.ratio * reader.size_bytes)

    with (
        pq.ParquetWriter(
            out / PARQUET, schema, compression="zstd", use_dictionary=_DICTIONARIES, write_statistics=False
        ) as writer,
        (out / FINGERPRINTS).open("wb") as fingerprints,
    ):
        for batch in reader.batches():
            n = batch.num_rows
            if n_records + n > limits.rows:
                raise too_many_rows(filename, limits)
            n_decoded += batch.nbytes
            if n_decoded > most_decoded:
                raise FileRefused(
                    f"{filename} unpacks to more than {limits.ratio} times its size; save it with less compression, or split it.",
                    code="ratio_too_high",
                )
            content = checks.content(batch.column("content"), first_row=n_records)
            label = checks.label(batch, first_row=n_records) if label_column else pa.nulls(n, pa.string())
            holder = (
                checks.numbers(batch, "rights_holder", holders, first_row=n_records)
                if reader.columns.rights_holder
                else np.zeros(n, dtype=np.int32)
            )
            labeller = (
                checks.numbers(batch, "labeller", labellers, first_row=n_records)
                if reader.columns.labeller
                else np.full(n, records.NOBODY, dtype=np.int32)
            )
            if not reader.columns.rights_holder and not n_records:
                holders.number("")

            items = records.content_bytes(content)
            salts = records.salts(version_key, n_records, n_records + n)
            digests = records.digests(salts, items, label.to_pylist(), holder, labeller, kind=kind)
            tree.extend(digests)
            index = np.empty(n, dtype=FINGERPRINT_ROW)
            index["fingerprint"] = np.frombuffer(
                b"".join(_fingerprints(keyed, kind, items, content)), dtype=f"V{FINGERPRINT_BYTES}"
            )
            index["holder"], index["labeller"] = holder, labeller
            fingerprints.write(index.tobytes())
            writer.write_batch(
                pa.RecordBatch.from_arrays(
                    [
                        _fixed(digests, records.DIGEST_BYTES),
                        _fixed(salts, records.SALT_BYTES),
                        content.cast(schema.field("content").type),
                        label,
                        pa.array(holder),
                        pa.array(labeller),
                    ],
                    schema=schema,
                )
            )

            holders.count(holder)
            labellers.count(labeller)
            content_statistics.add(content)
            labels.add(label)
            if missing := max(0, preview_rows - len(preview)):
                preview += _preview_rows(content.slice(0, missing), label.slice(0, missing))
            n_records += n
            on_batch()

    classes = labels.classes()
    report = Report(
        kind=kind,
        n_records=n_records,
        merkle_root=tree.root().hex(),
        rights_holders=holders.names,
        rights_holder_counts=holders.counts,
        labellers=labellers.names,
        labeller_counts=labellers.counts,
        features={"content": content_statistics.feature(), "label": {"classes": classes}},
        statistics={
            "content": content_statistics.as_dict(),
            "label": {name: labels.counts[name] for name in classes},
            "n_rights_holders": len(holders.names),
            "n_labellers": len(labellers.names),
        },
        preview=preview,
    )
    (out / REPORT).write_text(json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return report


def _fingerprints(
    keyed: Callable[[bytes], bytes], kind: str, items: Sequence[memoryview | bytes], content: pa.Array
) -> list[bytes]:
    """As `copies` defines them; the vectors' bytes are already normalised."""
    if kind == "text":
        return [keyed(TEXT + normalised_text(text).encode())[:FINGERPRINT_BYTES] for text in content.to_pylist()]
    return [keyed(VECTOR + bytes(item))[:FINGERPRINT_BYTES] for item in items]


def _fixed(items: Sequence[bytes], size: int) -> pa.Array:
    buffer = pa.py_buffer(b"".join(items))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(items), [None, buffer])


def _preview_rows(content: pa.Array, label: pa.Array) -> list[dict[str, Any]]:
    return [
        {
            "content": item[:PREVIEW_CHARACTERS] if isinstance(item, str) else item[:PREVIEW_NUMBERS],
            "label": name if name is None else name[:PREVIEW_CHARACTERS],
        }
        for item, name in zip(content.to_pylist(), label.to_pylist(), strict=True)
    ]


class _Checks:
    """Every value is looked at once, a column at a time; a refusal names the first row that is wrong."""

    def __init__(self, reader: Reader, filename: str, limits: Limits) -> None:
        self.reader, self.filename, self.limits = reader, filename, limits
        self.length: int | None = None  # of every vector, set by the first

    def content(self, column: pa.Array, *, first_row: int) -> pa.Array:
        return self._texts(column, first_row) if self.reader.kind == "text" else self._vectors(column, first_row)

    def label(self, batch: pa.RecordBatch, *, first_row: int) -> pa.Array:
        name = self.reader.columns.label
        text = pc.utf8_normalize(pc.utf8_trim_whitespace(batch.column("label")), form="NFC")
        text = pc.replace_substring_regex(text, pattern=_INTEGRAL, replacement=r"\1")
        self._refuse_where(
            pc.or_(pc.is_null(text), pc.equal(pc.fill_null(text, ""), "")),
            first_row,
            name,
            "is empty; every record needs a label: fill it in, or leave the row out",
            "label_missing",
        )
        self._refuse_texts(text, first_row, name)
        return text

    def numbers(
        self, batch: pa.RecordBatch, role: str, contributors: Contributors, *, first_row: int
    ) -> NDArray[np.int32]:
        """The contributor's number of each row; −1 where nobody is named, which only a labeller may be."""
        name = getattr(self.reader.columns, role)
        text = pc.utf8_normalize(pc.utf8_trim_whitespace(batch.column(role)), form="NFC")
        text = pc.fill_null(pc.replace_substring_regex(text, pattern=_INTEGRAL, replacement=r"\1"), "")
        if role == "rights_holder":
            self._refuse_where(
                pc.equal(text, ""),
                first_row,
                name,
                "is empty; every record belongs to someone: name its rights holder",
                "rights_holder_missing",
            )
        encoded = text.dictionary_encode()
        known = np.empty(len(encoded.dictionary), dtype=np.int32)
        for at, value in enumerate(encoded.dictionary.to_pylist()):
            if value and (len(value) > self.limits.name_length or any(category(mark) == "Cc" for mark in value)):
                self._refuse_where(
                    pc.equal(text, value),
                    first_row,
                    name,
                    f"is no name; use at most {self.limits.name_length} characters on one line",
                    "name_invalid",
                )
            known[at] = contributors.number(" ".join(value.split())) if value else records.NOBODY
        return known[encoded.indices.to_numpy()]

    def _vectors(self, column: pa.Array, first_row: int) -> pa.Array:
        name = self.reader.columns.content[0]
        self._refuse_where(
            pc.is_null(column), first_row, name, "is empty; give every record its numbers", "content_missing"
        )
        lengths = pc.list_value_length(column).to_numpy()
        if self.length is None:
            self.length = int(lengths[0])
            if not 0 < self.length <= self.limits.vector_length:
                raise FileRefused(
                    f"{self.filename}, row 1, column {name!r} holds {self.length:,} numbers; give 1 to {self.limits.vector_length:,}.",
                    code="vector_length",
                )
        if (wrong := np.flatnonzero(lengths != self.length)).size:
            at = int(wrong[0])
            raise self._refusal(
                first_row + at + 1,
                name,
                f"holds {int(lengths[at])} numbers where row 1 holds {self.length}; all vectors have one length",
                "vector_length",
            )
        flat = column.flatten()
        values = flat.to_numpy(zero_copy_only=False) + 0.0  # −0.0 + 0.0 is +0.0: equal numbers have equal bytes
        if (wrong := np.flatnonzero(~np.isfinite(values))).size:
            row, at = divmod(int(wrong[0]), self.length)
            of = self.reader.columns.content
            number = first_row + row + 1
            column_name = of[at] if len(of) > 1 else (f"{name}[{at}]" if self.length > 1 else name)
            cell = "" if len(of) > 1 and np.isnan(values[wrong[0]]) else str(values[wrong[0]])
            raise bad_number(self.filename, number, self.reader.line_of(number), column_name, cell)
        offsets = pa.array(np.arange(len(column) + 1, dtype=np.int64) * self.length, type=pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    def _texts(self, column: pa.Array, first_row: int) -> pa.Array:
        name = self.reader.columns.content[0]
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
        self._refuse_where(blank, first_row, name, "is empty; give every record its text", "content_missing")
        self._refuse_texts(column, first_row, name)
        return column

    def _refuse_texts(self, column: pa.Array, first_row: int, name: str) -> None:
        most = self.limits.cell_bytes
        self._refuse_where(
            pc.greater(pc.binary_length(column), most),
            first_row,
            name,
            f"is longer than {most:,} bytes",
            "cell_too_long",
        )
        self._refuse_where(
            pc.match_substring(column, "\x00"), first_row, name, "has a zero character; remove it", "zero_character"
        )

    def _refuse_where(self, wrong: pa.Array, first_row: int, column: str, what: str, code: str) -> None:
        at = pc.index(wrong, True).as_py()
        if at >= 0:
            raise self._refusal(first_row + at + 1, column, what, code)

    def _refusal(self, row: int, column: str, what: str, code: str) -> FileRefused:
        line = self.reader.line_of(row)
        where = f"{self.filename}, row {row:,}" + (f" (line {line:,})" if line else "")
        return FileRefused(
            f"{where}, column {column!r} {what}.",
            code=code,
            pointers={f"rows/{row}/{column}": what[:1].upper() + what[1:]},
        )


class _VectorStatistics:
    def __init__(self) -> None:
        self.length = self.n = 0
        self.minimum, self.maximum, self.total = np.inf, -np.inf, 0.0

    def add(self, content: pa.Array) -> None:
        values = content.flatten().to_numpy()
        self.length = len(values) // len(content)
        self.n += len(values)
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        with np.errstate(over="ignore"):
            self.total += float(values.sum())

    def feature(self) -> dict[str, Any]:
        return {"kind": "vector", "length": self.length, "minimum": self.minimum, "maximum": self.maximum}

    def as_dict(self) -> dict[str, Any]:
        mean = self.total / max(1, self.n)
        return self.feature() | {"mean": mean if np.isfinite(mean) else None}


class _TextStatistics:
    def __init__(self) -> None:
        self.n = self.total = 0
        self.shortest: int | None = None
        self.longest = 0

    def add(self, content: pa.Array) -> None:
        lengths = pc.utf8_length(content).to_numpy()
        self.n += len(lengths)
        self.total += int(lengths.sum())
        shortest = int(lengths.min())
        self.shortest = shortest if self.shortest is None else min(self.shortest, shortest)
        self.longest = max(self.longest, int(lengths.max()))

    def feature(self) -> dict[str, Any]:
        return {"kind": "text"}

    def as_dict(self) -> dict[str, Any]:
        """Lengths in characters."""
        return {
            "kind": "text",
            "shortest": self.shortest or 0,
            "longest": self.longest,
            "mean_length": self.total / max(1, self.n),
        }


class _LabelStatistics:
    """Counts per class, for as long as they are few enough to be classes."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.are_classes = True

    def add(self, labels: pa.Array) -> None:
        if not self.are_classes:
            return
        for counted in pc.value_counts(labels).to_pylist():
            name = counted["values"]
            if name is not None:
                self.counts[name] = self.counts.get(name, 0) + counted["counts"]
                self.are_classes &= len(name) <= MAX_CLASS_LENGTH
        self.are_classes &= len(self.counts) <= MAX_CLASSES
        if not self.are_classes:
            self.counts = {}

    def classes(self) -> list[str]:
        """Sorted, whole numbers by value; none where labels are too many or too long to be classes."""
        try:
            return sorted(self.counts, key=int)
        except ValueError:
            return sorted(self.counts)
