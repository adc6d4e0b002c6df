from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from marketplace.ingest.errors import FileRefused
from marketplace.web.peek import column_names


def named(name: str, data: bytes) -> SimpleUploadedFile:
    return SimpleUploadedFile(name, data)


def parquet(**columns: list) -> bytes:
    sink = BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        (b"text,label\nhello,a\n", ["text", "label"]),
        (b"\xef\xbb\xbftext;label\r\nhello;a\r\n", ["text", "label"]),
        (b'"a, b"\tc\td\n1\t2\t3\n', ["a, b", "c", "d"]),
        ("größe,weiß\n1,2\n".encode(), ["größe", "weiß"]),
    ],
)
def test_column_names_of_csv(data, columns):
    assert column_names(named("a.csv", data), filename="a.csv") == columns


def test_column_names_of_parquet_are_the_top_level_ones():
    data = parquet(pixels=[[1.0, 2.0]], label=["a"])

    assert column_names(named("a.parquet", data), filename="a.parquet") == ["pixels", "label"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"PAR1 and then nothing of the kind", "cannot be read as one"),
        (b"caf\xe9,label\n", "not UTF-8"),
        (b"\x80\x04\x95", "pickle"),
        (b",".join(b"%d" % n for n in range(10_001)) + b"\n", "10,001 columns"),
    ],
)
def test_column_names_refuses_by_name(data, message):
    with pytest.raises(FileRefused, match=message) as refused:
        column_names(named("bad.csv", data), filename="bad.csv")

    assert "bad.csv" in refused.value.message
