"""What a bad file gets: file, row, line, column and remedy."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import Limits
from marketplace.ingest.mapping import ColumnMapping
from tests.marketplace.ingest.conftest import parquet_bytes

MAPPING = {"content": "x*", "label": "y", "rights_holder": "holder"}
HEADER = b"x0,x1,y,holder\n"


def refusal(read, data, mapping=None, **options):
    with pytest.raises(FileRefused) as caught:
        read(data, mapping or MAPPING, filename="digits.csv", **options)
    return caught.value


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\r\n  \n"])
def test_empty_file(read, data):
    error = refusal(read, data)

    assert (error.code, error.pointers) == ("file_empty", {"file": "The file is empty."})
    assert error.message == "digits.csv is empty; choose a CSV or Parquet file with at least one record."


@pytest.mark.parametrize("data", [HEADER, HEADER.strip(), HEADER + b"\n\n"])
def test_header_only(read, data):
    error = refusal(read, data)

    assert error.code == "file_empty"
    assert error.message == "digits.csv has columns and no rows; add at least one record."


def test_ragged_row_70_000_is_named_exactly(read):
    names = [*(f"x{n}" for n in range(64)), "y", "holder", "by"]
    row = ",".join(["1"] * 64 + ["7", "ann", "lea"])
    ragged = ",".join(["1"] * 64 + ["7", "ann"])
    lines = [",".join(names), *[row] * 69_999, ragged, *[row] * 1_000]

    error = refusal(read, "\n".join(lines).encode())

    assert error.code == "row_ragged"
    assert error.message == (
        "digits.csv, row 70,000 (line 70,001) has 66 fields, the header has 67. Add what is missing, or put a cell with a "
        "comma in quotes."
    )
    assert error.pointers == {"rows/70000": "66 fields instead of 67, on line 70001."}


def test_ragged_row_after_cells_with_newlines_and_blank_lines(read):
    data = HEADER + b'1,2,"a\nb",ann\n\n1,2,a,ann\n1,2,a,ann,extra\n'

    error = refusal(read, data)

    assert error.message.startswith("digits.csv, row 3 (line 6) has 5 fields, the header has 4.")


def test_first_row_ragged(read):
    assert refusal(read, HEADER + b"1\n").message.startswith(
        "digits.csv, row 1 (line 2) has 1 field, the header has 4."
    )


@pytest.mark.parametrize("cell", ["nan", "inf", "-Infinity", "1e999", "", "abc", "0x10", "1_000"])
def test_cell_that_is_no_finite_number(read, cell):
    data = HEADER + b"1,2,a,ann\n" * 2 + f"1,{cell},a,ann\n".encode()

    error = refusal(read, data)

    assert error.code == "number_invalid"
    assert error.message.startswith("digits.csv, row 3 (line 4), column 'x1' is ")
    assert "not a finite number" in error.message
    assert list(error.pointers) == ["rows/3/x1"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_vector_with_a_number_that_is_none(read, bad):
    table = pa.table({"pixels": [[1.0, 2.0], [3.0, bad]], "y": ["a", "b"]})

    error = refusal(read, parquet_bytes(table), {"content": "pixels", "label": "y"})

    assert error.message.startswith("digits.csv, row 2, column 'pixels[1]' is ")


def test_vectors_of_two_lengths(read):
    table = pa.table({"pixels": [[1.0, 2.0], [3.0, 4.0], [5.0]], "y": ["a", "b", "c"]})

    error = refusal(read, parquet_bytes(table), {"content": "pixels", "label": "y"})

    assert error.code == "vector_length"
    assert error.message == (
        "digits.csv, row 3, column 'pixels' holds 1 numbers where row 1 holds 2; all vectors have one length."
    )


def test_vector_that_is_missing_or_empty(read):
    missing = pa.table({"pixels": [[1.0], None]})
    empty = pa.table({"pixels": pa.array([[], [1.0]], type=pa.list_(pa.float64()))})

    assert "row 2, column 'pixels' is empty" in refusal(read, parquet_bytes(missing), {"content": "pixels"}).message
    assert (
        "row 1, column 'pixels' holds 0 numbers" in refusal(read, parquet_bytes(empty), {"content": "pixels"}).message
    )


def test_missing_label_and_missing_holder(read):
    label = refusal(read, HEADER + b"1,2,a,ann\n1,2, ,ann\n")
    holder = refusal(read, HEADER + b"1,2,a,ann\n1,2,b,\n")

    assert (label.code, label.message) == (
        "label_missing",
        "digits.csv, row 2 (line 3), column 'y' is empty; every record needs a label: fill it in, or leave the row out.",
    )
    assert (holder.code, holder.message) == (
        "rights_holder_missing",
        "digits.csv, row 2 (line 3), column 'holder' is empty; every record belongs to someone: name its rights holder.",
    )


def test_empty_text(read):
    error = refusal(read, b"text,y\nabc,1\n  ,2\n", {"content": "text", "label": "y"})

    assert error.message == "digits.csv, row 2 (line 3), column 'text' is empty; give every record its text."


def test_missing_column_lists_those_there_are(read):
    table = pa.table({"pixels": [[1.0]], "label": ["a"]})

    error = refusal(read, parquet_bytes(table), {"content": "pixels", "label": "klass"})

    assert error.code == "column_missing"
    assert error.message == "digits.csv has no column 'klass' for label. It has: pixels, label."
    assert error.pointers == {"label": "There is no column 'klass'."}


def test_pattern_without_a_column(read):
    error = refusal(read, HEADER + b"1,2,a,ann\n", {"content": "pixel_*"})

    assert error.message == "digits.csv has no column 'pixel_*' for content. It has: x0, x1, y, holder."


def test_column_names_twice_in_the_file(read):
    assert refusal(read, b"x0,x0,y\n1,2,3\n", {"content": "x0"}).code == "column_twice"
    assert refusal(read, b"x0, x0,y\n1,2,3\n", {"content": "x0"}).code == "column_twice"


def test_column_used_twice(read):
    error = refusal(read, HEADER + b"1,2,3,ann\n", {"content": ["x0", "y"], "label": "y"})

    assert (error.code, error.message) == (
        "column_used_twice",
        "Column 'y' of digits.csv is used for two things; name another for one of them.",
    )


def test_bytes_that_are_not_utf8_are_named_by_offset_and_row(read):
    start = HEADER + b"1,2,a,ann\n" * 3
    data = start + b"1,2,caf\xe9,ann\n"

    error = refusal(read, data)

    assert error.code == "not_utf8"
    assert error.message == (
        f"digits.csv is not UTF-8: byte {len(start) + 7} is 0xe9, row 4 (line 5). Save it as UTF-8."
    )


def test_header_that_is_not_utf8(read):
    assert refusal(read, b"x0,caf\xe9\n1,2\n").message.startswith(
        "digits.csv is not UTF-8: byte 6 is 0xe9, the header (line 1)."
    )


def test_quote_that_nobody_closes(read):
    error = refusal(read, HEADER + b'1,2,a,ann\n1,2,a,"ann\n1,2,a,ann\n')

    assert error.code == "cell_too_long"
    assert error.message.startswith("digits.csv, row 2 (line 3) has a cell of more than")
    assert "a quote that is never closed" in error.message


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PK\x03\x04....", "a zip archive or an Excel workbook"),
        (b"\x1f\x8b\x08....", "compressed with gzip"),
        (b"\x80\x04\x95....", "a pickle"),
        ("x0,y\n1,2\n".encode("utf-16"), "encoded in UTF-16"),
        (b"x0,y\n1,\x00\n", "zero bytes"),
    ],
)
def test_other_formats_are_recognised_by_content(read, data, what):
    error = refusal(read, data)

    assert error.code == "format_unknown"
    assert what in error.message


@pytest.mark.parametrize("damage", ["only the magic", "cut", "garbled footer"])
def test_parquet_that_is_not_one(read, damage):
    whole = parquet_bytes(pa.table({"x0": np.arange(1_000.0), "y": ["a"] * 1_000}))
    data = {
        "only the magic": b"PAR1" + b"x" * 100,
        "cut": whole[: len(whole) // 2],
        "garbled footer": whole[:-60] + bytes(52) + whole[-8:],
    }[damage]

    error = refusal(read, data, {"content": "x0", "label": "y"})

    assert error.code == "parquet_invalid"
    assert error.message.startswith("digits.csv starts like Parquet but cannot be read: ")


def test_parquet_with_garbled_pages(read):
    whole = bytearray(parquet_bytes(pa.table({"x0": np.random.default_rng(0).normal(size=5_000)}), compression="zstd"))
    whole[4:200] = bytes(196)

    assert refusal(read, bytes(whole), {"content": "x0"}).code == "parquet_invalid"


def test_parquet_columns_of_the_wrong_type(read):
    table = pa.table({"at": pa.array([0], type=pa.timestamp("s")), "deep": [[[1.0]]], "blob": [b"x"], "x0": [1.0]})
    data = parquet_bytes(table)

    for mapping, name in (
        ({"content": "at"}, "at"),
        ({"content": "deep"}, "deep"),
        ({"content": "blob"}, "blob"),
        ({"content": ["x0", "blob"]}, "blob"),
        ({"content": "x0", "label": "blob"}, "blob"),
        ({"content": "x0", "kind": "text"}, "x0"),
    ):
        error = refusal(read, data, mapping)
        assert error.code == "column_type"
        assert error.message.startswith(f"Column {name!r} of digits.csv holds ")


def test_parquet_that_is_too_deep(read):
    nested = pa.array([1.0])
    for _ in range(6):
        nested = pa.ListArray.from_arrays(pa.array([0, 1], type=pa.int32()), nested)

    error = refusal(read, parquet_bytes(pa.table({"deep": nested, "x0": [1.0]})), {"content": "x0"})

    assert error.code == "too_deep"


def test_small_parquet_that_unpacks_to_a_lot(read):
    data = parquet_bytes(pa.table({"text": ["a" * 10_000] * 20_000}))  # 200 MB of text in a few kB
    assert len(data) < 100_000

    error = refusal(read, data, {"content": "text"}, limits=replace(Limits(), free_bytes=1 << 20))

    assert error.code == "ratio_too_high"


def test_limits_on_rows_columns_cells_and_names(read):
    few = replace(Limits(), rows=2, columns=4, cell_bytes=100, name_length=10, parties=1)
    rows = HEADER + b"1,2,a,ann\n"

    assert refusal(read, rows + b"1,2,a,ann\n" * 2, limits=few).code == "too_many_rows"
    assert (
        refusal(read, parquet_bytes(pa.table({"x0": [1.0] * 3})), {"content": "x0"}, limits=few).code == "too_many_rows"
    )
    assert refusal(read, b"x0,x1,y,holder,z\n1,2,3,4,5\n", limits=few).code == "too_many_columns"
    assert refusal(read, b"text\n" + b"a" * 101, {"content": "text"}, limits=few).code == "cell_too_long"
    assert refusal(read, HEADER + b"1,2,a," + b"n" * 11, limits=few).code == "name_invalid"
    assert refusal(read, HEADER + b'1,2,a,"a\nn"', limits=few).code == "name_invalid"
    assert refusal(read, rows + b"1,2,a,ben\n", limits=few).code == "too_many_parties"


def test_zero_characters_are_refused(read):
    table = pa.table({"text": ["fine", "a\x00b"]})

    error = refusal(read, parquet_bytes(table), {"content": "text"})

    assert error.message == "digits.csv, row 2, column 'text' has a zero character; remove it."


@pytest.mark.parametrize(
    ("mapping", "field"),
    [
        ({}, "content"),
        ({"content": []}, "content"),
        ({"content": [1]}, "content"),
        ({"content": "x", "label": 3}, "label"),
        ({"content": "x", "kind": "image"}, "kind"),
        ({"content": "x", "preview_rows": 1_000}, "preview_rows"),
        ({"content": "x", "preview_rows": True}, "preview_rows"),
        ({"content": "x", "extra": "y"}, "extra"),
    ],
)
def test_mapping_that_says_something_else(mapping, field):
    with pytest.raises(FileRefused) as caught:
        ColumnMapping.parse(mapping)

    assert caught.value.code == "mapping_invalid"
    assert list(caught.value.pointers) == [field]
