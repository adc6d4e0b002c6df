"""CSV and Parquet → batches of mapped columns, in memory that does not grow with the file.

Every batch has `content` (list<double> without nulls, or string) and, where mapped, `label`, `rights_holder` and
`labeller` (string). What a file holds beyond the mapped columns is not read. Rows are counted from 1, without the
header; lines from 1, with it.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import MIB, Limits
from marketplace.ingest.mapping import ColumnMapping, ResolvedColumns

BLOCK_BYTES = MIB  # of a CSV file, parsed at a time
MAX_ROW_BYTES = 4 * MIB
SLICE_ROWS = 8_192
SLICE_BYTES = 4 * MIB
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xff\xfe": "encoded in UTF-16",
    b"\xfe\xff": "encoded in UTF-16",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"ARROW1": "an Arrow file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


def sniff(head: bytes, *, filename: str) -> str:
    """ "csv" or "parquet", by what the file's first bytes say; its name says nothing.

    Raises:
        FileRefused: empty, or neither.
    """
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise FileRefused(
            f"{filename} is empty; choose a CSV or Parquet file with at least one record.",
            code="file_empty",
            pointers={"file": "The file is empty."},
        )
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise _unknown_format(filename, f"it is {what}")
    if b"\x00" in head:
        raise _unknown_format(filename, "it has zero bytes, which text never has")
    return "csv"


def _unknown_format(filename: str, why: str) -> FileRefused:
    return FileRefused(
        f"{filename} is neither CSV nor Parquet: {why}. Save it as CSV in UTF-8, or as Parquet.",
        code="format_unknown",
        pointers={"file": "Only CSV (UTF-8) and Parquet can be read."},
    )


class Reader:
    """A file being read once, from its start to its end."""

    columns: ResolvedColumns
    kind: str  # "vector" or "text"
    size_bytes: int

    def batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def bytes_read(self) -> int:
        raise NotImplementedError

    def line_of(self, row: int) -> int | None:
        """The line of a text file that row `row` (from 1) starts on; None where there are no lines."""
        return None


def open_reader(path: Path, format: str, mapping: ColumnMapping, *, filename: str, limits: Limits) -> Reader:
    """Open a file and find its mapped columns.

    Raises:
        FileRefused: the file, its header or the mapping is wrong.
    """
    match format:
        case "csv":
            return CsvReader(path, mapping, filename=filename, limits=limits)
        case "parquet":
            return ParquetReader(path, mapping, filename=filename, limits=limits)
    raise ValueError(f"No reader for format {format!r}")


# --- CSV --------------------------------------------------------------------------------------------------------------
class CsvReader(Reader):
    """Parsed by Arrow in blocks, on one thread. When it refuses a file, a slow second pass finds the row to blame."""

    def __init__(self, path: Path, mapping: ColumnMapping, *, filename: str, limits: Limits) -> None:
        self.path, self.filename, self.limits = path, filename, limits
        self.size_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(MAX_ROW_BYTES)
        csv.field_size_limit(MAX_ROW_BYTES)  # the module's own, 128 KiB, is less than a text may have
        if b"\r" in head and b"\n" not in head:
            raise FileRefused(
                f"{filename} ends its lines with CR alone; save it with LF or CRLF.", code="line_ends_unknown"
            )
        sniff(head, filename=filename)
        self.delimiter = ","  # until the header says otherwise
        self.delimiter, header, self._header_bytes = self._header(head)
        names = [name.strip() for name in header]
        self.columns = mapping.resolve(names, filename=filename, limits=limits)
        self._header_names = header
        self._raw_name = dict(zip(names, header, strict=True))
        self._positions = {name: at for at, name in enumerate(names)}
        self.n_columns = len(header)
        self.kind = mapping.kind or self._guessed_kind(head)
        if self.kind == "text" and len(self.columns.content) != 1:
            raise FileRefused(
                f"Text content is one column; {len(self.columns.content)} are mapped.",
                code="mapping_invalid",
                pointers={"content": "Name one text column."},
            )
        self._consumed = 0

    def bytes_read(self) -> int:
        return self._consumed

    def batches(self) -> Iterator[pa.RecordBatch]:
        content = [self._raw_name[name] for name in self.columns.content]
        named = [self._raw_name[name] for name in self.columns.named]
        types = {name: pa.float64() if self.kind == "vector" else pa.string() for name in content}
        parse = pa_csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)
        convert = pa_csv.ConvertOptions(
            column_types=types | {name: pa.string() for name in named},
            include_columns=content + named,
            null_values=[""],
            strings_can_be_null=True,
        )
        n_rows = 0
        for block in self._blocks():
            if not block.strip(b"\r\n"):
                continue  # Arrow would ask for columns
            try:
                table = pa_csv.read_csv(
                    pa.BufferReader(block),
                    read_options=pa_csv.ReadOptions(
                        use_threads=False, block_size=len(block) + 1, column_names=self._header_names
                    ),
                    parse_options=parse,
                    convert_options=convert,
                )
            except pa.ArrowInvalid as error:
                raise self._diagnosis(str(error)) from None
            n_rows += table.num_rows
            for batch in table.to_batches():
                yield from self._slices(batch, n_content=len(content))
        if not n_rows:
            raise no_rows(self.filename)

    def _blocks(self) -> Iterator[bytes]:
        """Whole rows, about `BLOCK_BYTES` at a time, without the header.

        Arrow's own streaming reads 32 blocks ahead, whatever becomes of the first; this reads none.
        """
        rest = b""
        with self.path.open("rb") as file:
            file.seek(self._header_bytes)
            while chunk := file.read(BLOCK_BYTES):
                self._consumed = file.tell()
                block = rest + chunk
                cut = row_ends(block, self.delimiter).last
                if cut:
                    yield block[:cut]
                rest = block[cut:]
                if len(rest) > MAX_ROW_BYTES:
                    raise self._diagnosis("A row is too long.")
        if row_ends(rest, self.delimiter).is_open:
            for _ in self._rows(strict=True):  # refuses it: Arrow would take what follows the quote for one long cell
                pass
        if rest:
            yield rest

    def _slices(self, batch: pa.RecordBatch, *, n_content: int) -> Iterator[pa.RecordBatch]:
        rows = max(1, min(SLICE_ROWS, SLICE_BYTES // (8 * n_content)))
        names = [
            role for role in ("label", "rights_holder", "labeller") if getattr(self.columns, role)
        ]  # in the order of `named`
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            if self.kind == "text":
                content = part.column(0)
            else:
                content = vectors_of([part.column(at) for at in range(n_content)])
            yield pa.RecordBatch.from_arrays([content, *part.columns[n_content:]], names=["content", *names])

    def line_of(self, row: int) -> int | None:
        for at, line, _ in self._rows():
            if at == row:
                return line
        return None

    def _header(self, head: bytes) -> tuple[str, list[str], int]:
        """The delimiter, the names, and the byte after them. The delimiter is whatever of , ; and tab there is most of."""
        text = head.removeprefix(codecs.BOM_UTF8)
        try:
            # a multi-byte character may be cut at the block's end, not before
            decoded = codecs.getincrementaldecoder("utf-8")().decode(text, final=len(head) == self.size_bytes)
        except UnicodeDecodeError:
            for _ in self._rows():  # refuses it, naming the byte and its row
                pass
            raise
        lines = io.StringIO(decoded, newline="")
        first = decoded.lstrip("\r\n").partition("\n")[0]
        delimiter = max(",;\t", key=lambda mark: (first.count(mark), mark == ","))
        try:
            header = next(cells for cells in csv.reader(lines, delimiter=delimiter) if cells)
        except csv.Error as error:
            raise FileRefused(f"The header of {self.filename} cannot be read: {error}.", code="csv_invalid") from None
        return delimiter, header, len(head) - len(text) + len(decoded[: lines.tell()].encode())

    def _guessed_kind(self, head: bytes) -> str:
        """Many columns are a vector; one is, if all its cells in the first block are numbers."""
        if len(self.columns.content) > 1:
            return "vector"
        at = self._positions[self.columns.content[0]]
        complete = head[: head.rfind(b"\n") + 1] if len(head) < self.size_bytes else head
        rows = csv.reader(
            io.StringIO(complete.removeprefix(codecs.BOM_UTF8).decode(errors="replace"), newline=""),
            delimiter=self.delimiter,
        )
        cells = [row[at] for number, row in enumerate(filter(None, rows)) if number and len(row) > at]
        return "vector" if cells and all(_NUMBER.fullmatch(cell.lstrip()) for cell in cells[:1_000]) else "text"

    # --- the second pass ---
    def _rows(self, *, strict: bool = False) -> Iterator[tuple[int, int, list[str]]]:
        """(row, line, cells) by Python's own parser; row 0 is the header.

        Raises:
            FileRefused: not UTF-8, a cell too long, or a quote that nobody closes.
        """
        row, line = -1, 1
        with self.path.open("rb") as file:
            csv.field_size_limit(self.limits.cell_bytes)
            lines = _DecodedLines(file, longest=2 * MAX_ROW_BYTES)
            reader = csv.reader(lines, delimiter=self.delimiter, strict=strict)
            try:
                for cells in reader:
                    if cells:  # blank lines are nothing
                        row += 1
                        yield row, line, cells
                    line = reader.line_num + 1
            except UnicodeDecodeError as error:
                raise FileRefused(
                    f"{self.filename} is not UTF-8: byte {lines.offset + error.start:,} is {error.object[error.start]:#04x}, "
                    f"{_row_name(row + 1)} (line {lines.number:,}). Save it as UTF-8.",
                    code="not_utf8",
                    pointers={"file": f"Not UTF-8 at byte {lines.offset + error.start}, line {lines.number}."},
                ) from None
            except csv.Error as error:
                if strict and "end of data" not in str(error):
                    return  # not to the letter of RFC 4180, and still unambiguous
                raise FileRefused(
                    f"{self.filename}, {_row_name(row + 1)} (line {line:,}) has a cell of more than {self.limits.cell_bytes:,} characters"
                    f" or a quote that is never closed; shorten the cell or close the quote.",
                    code="cell_too_long",
                    pointers={"file": f"A cell too long or an unclosed quote on line {line}."},
                ) from None

    def _diagnosis(self, said: str) -> FileRefused:
        """What Arrow refused, told with row, line and column."""
        try:
            numeric = {self._positions[name]: name for name in self.columns.content} if self.kind == "vector" else {}
            row = 0
            for row, line, cells in self._rows():
                if not row:
                    continue
                if len(cells) != self.n_columns:
                    return FileRefused(
                        f"{self.filename}, row {row:,} (line {line:,}) has {_fields(len(cells))}, the header has {self.n_columns}. "
                        f"Add what is missing, or put a cell with a {_DELIMITERS[self.delimiter]} in quotes.",
                        code="row_ragged",
                        pointers={f"rows/{row}": f"{_fields(len(cells))} instead of {self.n_columns}, on line {line}."},
                    )
                if sum(map(len, cells)) > MAX_ROW_BYTES:
                    return FileRefused(
                        f"{self.filename}, row {row:,} (line {line:,}) is longer than {MAX_ROW_BYTES:,} bytes; shorten its cells.",
                        code="row_too_long",
                    )
                for at, name in numeric.items():
                    if not _is_number(cells[at]):
                        return bad_number(self.filename, row, line, name, cells[at])
            if not row:
                return no_rows(self.filename)
        except FileRefused as refusal:
            return refusal
        return FileRefused(f"{self.filename} cannot be read as CSV: {said.splitlines()[0][:300]}", code="csv_invalid")


@dataclass(frozen=True)
class RowEnds:
    last: int  # the byte after the last complete row; 0 if none is complete
    is_open: bool  # the block ends inside a quoted cell


def row_ends(block: bytes, delimiter: str) -> RowEnds:
    """Where rows end in a block that starts with one: at newlines outside of quoted cells.

    A quote opens a cell only where the cell starts; anywhere else it is a character like any other.
    """
    at = block.rfind(b"\n")
    if b'"' not in block:
        return RowEnds(at + 1, is_open=False)
    cells = list(_QUOTED[delimiter].finditer(block))
    for cell in reversed(cells):
        if at >= cell.end():
            break
        if at > cell.start():
            at = block.rfind(b"\n", 0, cell.start())
    return RowEnds(at + 1, is_open=bool(cells) and not cells[-1][1])


_QUOTED = {
    delimiter: re.compile(rb'(?:(?<=[\n%s])|\A)"(?:[^"]|"")*+("|\Z)' % re.escape(delimiter.encode()))
    for delimiter in ",;\t"
}
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


class _DecodedLines:
    """The lines of a UTF-8 file, and where the one being decoded starts."""

    def __init__(self, file: BinaryIO, *, longest: int) -> None:
        self.file, self.longest = file, longest
        self.offset = self.number = 0
        self._next = 0

    def __iter__(self) -> "_DecodedLines":
        return self

    def __next__(self) -> str:
        raw = self.file.readline(self.longest)
        if not raw:
            raise StopIteration
        self.offset, self._next = self._next, self._next + len(raw)
        self.number += 1
        if self.number == 1 and raw.startswith(codecs.BOM_UTF8):
            return raw[3:].decode()
        return raw.decode()


def _row_name(row: int) -> str:
    return f"row {row:,}" if row else "the header"


def _fields(n: int) -> str:
    return f"{n} field" if n == 1 else f"{n} fields"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def bad_number(filename: str, row: int, line: int | None, column: str, cell: str) -> FileRefused:
    where = f"{filename}, row {row:,}" + (f" (line {line:,})" if line else "")
    shown = repr(cell[:40]) if cell else "empty"
    return FileRefused(
        f"{where}, column {column!r} is {shown}, not a finite number; correct it or leave the row out.",
        code="number_invalid",
        pointers={f"rows/{row}/{column}": f"{shown} is not a finite number."},
    )


# --- Parquet ----------------------------------------------------------------------------------------------------------
class ParquetReader(Reader):
    """Read page by page; nothing is mapped or read ahead, so a row group may be as large as the file."""

    def __init__(self, path: Path, mapping: ColumnMapping, *, filename: str, limits: Limits) -> None:
        self.path, self.filename, self.limits = path, filename, limits
        self.size_bytes = path.stat().st_size
        try:
            self.file = pq.ParquetFile(
                str(path),
                memory_map=False,
                pre_buffer=False,
                buffer_size=MIB,
                thrift_string_size_limit=64 * MIB,
                thrift_container_size_limit=1_000_000,
            )
            arrow_schema = self.file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise FileRefused(
                f"{filename} starts like Parquet but cannot be read: {_first_line(error)} Export it again.",
                code="parquet_invalid",
                pointers={"file": "The file is damaged or not Parquet."},
            ) from None
        metadata = self.file.metadata
        if metadata.num_rows > limits.rows:
            raise too_many_rows(filename, limits)
        if not metadata.num_rows:
            raise no_rows(filename)
        if (depth := max((_depth(field.type) for field in arrow_schema), default=0)) > limits.schema_depth:
            raise FileRefused(
                f"{filename} nests lists and structs {depth} deep; the most is {limits.schema_depth}. Flatten its columns.",
                code="too_deep",
            )
        self.columns = mapping.resolve(arrow_schema.names, filename=filename, limits=limits)
        self.kind = self._kind(arrow_schema, mapping)
        for name in self.columns.named:
            if not _is_nameable(arrow_schema.field(name).type):
                raise _wrong_type(filename, name, arrow_schema.field(name).type, "text or whole numbers")
        self.n_rows = metadata.num_rows
        self._rows_read = 0
        self._row_bytes = max(1, self._declared_bytes() // self.n_rows)

    def bytes_read(self) -> int:
        return self.size_bytes * self._rows_read // self.n_rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        wanted = [*self.columns.content, *self.columns.named]
        roles = [role for role in ("label", "rights_holder", "labeller") if getattr(self.columns, role)]
        rows = max(1, min(SLICE_ROWS, SLICE_BYTES // self._row_bytes))
        try:
            for batch in self.file.iter_batches(batch_size=rows, columns=wanted, use_threads=False):
                self._rows_read += batch.num_rows
                if batch.num_rows:
                    yield pa.RecordBatch.from_arrays(
                        [
                            self._content([batch.column(name) for name in self.columns.content]),
                            *(as_text(batch.column(name)) for name in self.columns.named),
                        ],
                        names=["content", *roles],
                    )
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, MemoryError):
                raise
            raise FileRefused(
                f"{self.filename} is damaged after row {self._rows_read:,}: {_first_line(error)} Export it again.",
                code="parquet_invalid",
                pointers={"file": "The file is damaged."},
            ) from None

    def _content(self, columns: list[pa.Array]) -> pa.Array:
        if self.kind == "text":
            return columns[0].cast(pa.string())
        if len(columns) > 1 or not _is_list(columns[0].type):
            return vectors_of([column.cast(pa.float64(), safe=False) for column in columns])
        # ints above 2**53 lose digits as float64, which is what every model would do to them
        return columns[0].cast(pa.list_(pa.field("item", pa.float64())), safe=False)

    def _kind(self, schema: pa.Schema, mapping: ColumnMapping) -> str:
        types = {name: schema.field(name).type for name in self.columns.content}
        first, only = next(iter(types.items()))
        if len(types) == 1 and _is_string(only):
            kind = "text"
        elif len(types) == 1 and _is_list(only) and _is_numeric(only.value_type):
            kind = "vector"
        else:
            for name, type_ in types.items():
                if not _is_numeric(type_):
                    raise _wrong_type(self.filename, name, type_, "numbers, a list of numbers, or one column of text")
            kind = "vector"
        if mapping.kind not in ("", kind):
            raise _wrong_type(self.filename, first, only, "text" if mapping.kind == "text" else "numbers")
        return kind

    def _declared_bytes(self) -> int:
        """Decoded bytes of the mapped columns, as the file says; what it decodes to is counted as well."""
        metadata, total = self.file.metadata, 0
        mapped = {*self.columns.content, *self.columns.named}
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for at in range(row_group.num_columns):
                column = row_group.column(at)
                if column.path_in_schema in mapped or column.path_in_schema.partition(".")[0] in mapped:
                    total += max(0, column.total_uncompressed_size)
        return total


def no_rows(filename: str) -> FileRefused:
    return FileRefused(
        f"{filename} has columns and no rows; add at least one record.",
        code="file_empty",
        pointers={"file": "The file has no rows."},
    )


def too_many_rows(filename: str, limits: Limits) -> FileRefused:
    return FileRefused(
        f"{filename} has more than {limits.rows:,} rows; split it into several datasets.", code="too_many_rows"
    )


def vectors_of(columns: Sequence[pa.Array]) -> pa.Array:
    """One list per row, a number per column; a null becomes NaN, which the caller refuses by row and column."""
    n_rows = len(columns[0])
    values = np.empty((n_rows, len(columns)), dtype=np.float64)  # (rows, d)
    for at, column in enumerate(columns):
        values[:, at] = column.to_numpy(zero_copy_only=False)
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int64) * len(columns), type=pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def as_text(column: pa.Array) -> pa.Array:
    """Names and labels as text; whole numbers without a decimal point."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.string())


def _wrong_type(filename: str, column: str, type_: pa.DataType, wanted: str) -> FileRefused:
    return FileRefused(
        f"Column {column!r} of {filename} holds {str(type_)[:80]}; it must be {wanted}.",
        code="column_type",
        pointers={"content": f"Column {column!r} holds {str(type_)[:80]}."},
    )


def _depth(type_: pa.DataType) -> int:
    """Lists and structs inside each other; a column of plain values has 0."""
    deepest, waiting = 0, [(type_, 0)]
    while waiting:
        here, depth = waiting.pop()
        deepest = max(deepest, depth)
        waiting += [(here.field(at).type, depth + 1) for at in range(here.num_fields)]
    return deepest


def _is_string(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def _is_numeric(type_: pa.DataType) -> bool:
    return pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)


def _is_nameable(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return _is_string(type_) or _is_numeric(type_)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300].rstrip(".") + "." if str(error) else type(error).__name__ + "."
