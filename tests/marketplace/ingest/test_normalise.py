"""What a good file becomes, from CSV and from Parquet."""

import hashlib
import hmac
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketplace.ingest import readers, records
from marketplace.ingest.copies import text_fingerprints, vector_fingerprints
from marketplace.ingest.merkle import root
from marketplace.ingest.normalise import FINGERPRINT_ROW
from tests.marketplace.ingest.conftest import FINGERPRINT_KEY, VERSION_KEY, parquet_bytes

MAPPING = {"content": "x*", "label": "y", "rights_holder": "holder", "labeller": "by"}
CSV = b"y,x0,x1,holder,by,unused\n7,1,2.5,ann,lea,p\n8,-0.0,1e3,ben,,q\n7, 1 ,2.5,ann,leo,r\n"


def test_csv_becomes_records_in_the_files_order(read):
    found = read(CSV, MAPPING)

    assert found.table.schema.names == ["digest", "salt", "content", "label", "rights_holder", "labeller"]
    assert found.table["content"].to_pylist() == [[1.0, 2.5], [0.0, 1000.0], [1.0, 2.5]]
    assert found.table["label"].to_pylist() == ["7", "8", "7"]
    assert found.table["rights_holder"].to_pylist() == [0, 1, 0]
    assert found.table["labeller"].to_pylist() == [0, -1, 1]
    assert found.report.rights_holders == ["ann", "ben"]
    assert found.report.rights_holder_counts == [2, 1]
    assert found.report.labellers == ["lea", "leo"]
    assert found.report.labeller_counts == [1, 1]
    assert found.report.features == {
        "content": {"kind": "vector", "length": 2, "minimum": 0.0, "maximum": 1000.0},
        "label": {"classes": ["7", "8"]},
    }
    assert found.report.statistics["label"] == {"7": 2, "8": 1}
    assert found.report.preview[1] == {"content": [0.0, 1000.0], "label": "8"}


def test_digest_is_the_formula_and_root_is_over_the_digests(read):
    found = read(CSV, MAPPING)
    salts, digests = found.table["salt"].to_pylist(), found.table["digest"].to_pylist()

    content = struct.pack("<2d", 0.0, 1000.0)
    header = struct.pack("<cqqii", b"v", len(content), 1, 1, -1)
    assert salts[1] == hmac.digest(VERSION_KEY, (1).to_bytes(8, "big"), "sha256")[:16]
    assert digests[1] == hashlib.sha256(salts[1] + header + content + b"8").digest()
    assert records.recomputed_digests(found.table) == digests
    assert found.report.merkle_root == root(digests).hex()


def test_parquet_with_a_list_column_gives_what_csv_gives(read):
    table = pa.table(
        {
            "pixels": pa.array([[1, 2.5], [0, 1000], [1, 2.5]], type=pa.list_(pa.float32(), 2)),
            "y": pa.array([7.0, 8.0, 7.0]),  # as pandas writes a class that was once missing
            "holder": pa.array(["ann", "ben", "ann"]).dictionary_encode(),
            "by": pa.array(["lea", None, "leo"]),
        }
    )

    from_parquet = read(parquet_bytes(table), MAPPING | {"content": "pixels"})

    from_csv = read(CSV, MAPPING)
    assert from_parquet.table.equals(from_csv.table)
    assert from_parquet.fingerprints == from_csv.fingerprints
    assert from_parquet.report == from_csv.report


def test_parquet_with_a_column_per_number_gives_the_same(read):
    table = pa.table(
        {
            "x0": pa.array([1, 0, 1], type=pa.int8()),
            "x1": pa.array([2.5, 1000, 2.5]),
            "y": pa.array([7, 8, 7]),
            "holder": ["ann", "ben", "ann"],
            "by": ["lea", "", "leo"],
        }
    )

    assert read(parquet_bytes(table), MAPPING).report == read(CSV, MAPPING).report


def test_fingerprints_are_of_the_content_alone(read):
    found = np.frombuffer(read(CSV, MAPPING).fingerprints, dtype=FINGERPRINT_ROW)

    by_definition = vector_fingerprints(FINGERPRINT_KEY, [np.array([1, 2.5]), np.array([0, 1000.0])])
    assert [row["fingerprint"].tobytes() for row in found] == [*by_definition, by_definition[0]]
    assert found["holder"].tolist() == [0, 1, 0]
    assert found["labeller"].tolist() == [0, -1, 1]


def test_text_keeps_its_words_and_its_copies_are_found_by_normal_form(read):
    data = 'text,topic\n"Hello,\nWorld",greeting\n"  hello, world",greeting\nÄhre,plant\n'.encode()

    found = read(data, {"content": "text", "label": "topic"})

    assert found.report.kind == "text"
    assert found.table["content"].to_pylist() == ["Hello,\nWorld", "  hello, world", "Ähre"]
    prints = np.frombuffer(found.fingerprints, dtype=FINGERPRINT_ROW)["fingerprint"]
    assert [row.tobytes() for row in prints] == text_fingerprints(
        FINGERPRINT_KEY, ["hello, world", "hello, world", "ähre"]
    )
    assert records.recomputed_digests(found.table) == found.table["digest"].to_pylist()
    assert found.report.statistics["content"] == {"kind": "text", "shortest": 4, "longest": 14, "mean_length": 10.0}


def test_text_from_parquet_is_text_from_csv(read):
    table = pa.table({"body": pa.array(["a b", "c"], type=pa.large_string()), "topic": ["x", "y"]})

    found = read(parquet_bytes(table), {"content": "body", "label": "topic"})

    assert found.report == read(b"text,topic\na b,x\nc,y\n", {"content": "text", "label": "topic"}).report


def test_without_a_holders_column_all_is_the_uploaders(read):
    found = read(b"a,b,y\n1,2,0\n3,4,1\n", {"content": ["a", "b"], "label": "y"})

    assert (found.report.rights_holders, found.report.rights_holder_counts) == ([""], [2])
    assert (found.report.labellers, found.report.labeller_counts) == ([], [])
    assert found.table["labeller"].to_pylist() == [-1, -1]


def test_without_a_label_there_are_no_classes(read):
    found = read(b"a\n1\n2\n", {"content": "a"})

    assert found.table["label"].to_pylist() == [None, None]
    assert found.report.features["label"] == {"classes": []}
    assert records.recomputed_digests(found.table) == found.table["digest"].to_pylist()


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + CSV,
        CSV.replace(b"\n", b"\r\n"),
        CSV.replace(b",", b";"),
        CSV.replace(b",", b"\t"),
        CSV.replace(b"\n", b"\n\n"),
        CSV.removesuffix(b"\n"),
        CSV.replace(b"7,1,2.5,ann", b'"7","1",2.50," ann "'),
        CSV.replace(b"7,", b"7.0,"),
    ],
    ids=["bom", "crlf", "semicolons", "tabs", "blank lines", "no last newline", "quotes and spaces", "decimal labels"],
)
def test_dialects_of_csv_say_the_same(read, data):
    assert read(data, MAPPING).report == read(CSV, MAPPING).report


def test_pattern_takes_the_files_order_and_leaves_out_what_is_mapped_otherwise(read):
    found = read(b"x10,x2,xlabel\n1,2,a\n", {"content": "x*", "label": "xlabel"})

    assert found.table["content"].to_pylist() == [[1.0, 2.0]]


def test_one_column_of_numbers_is_a_vector_unless_said_otherwise(read):
    assert read(b"a\n1\n2.5\n", {"content": "a"}).report.kind == "vector"
    assert read(b"a\n1\n2.5\n", {"content": "a", "kind": "text"}).report.kind == "text"
    assert read(b"a\n1\nx\n", {"content": "a"}).report.kind == "text"


def test_preview_is_as_long_as_the_uploader_chose_and_its_cells_are_cut(read):
    data = b"text\n" + b"a" * 5_000 + b"\nb\nc\n"

    assert read(data, {"content": "text"}, preview_rows=0).report.preview == []
    assert read(data, {"content": "text"}, preview_rows=2).report.preview == [
        {"content": "a" * 1_000, "label": None},
        {"content": "b", "label": None},
    ]


def test_many_labels_are_no_classes(read):
    data = b"a,y\n" + b"".join(b"1,label %d\n" % n for n in range(1_001))

    found = read(data, {"content": "a", "label": "y"})

    assert found.report.features["label"] == {"classes": []}
    assert found.report.n_records == 1_001


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slice_rows=st.integers(1, 40), block_bytes=st.integers(200, 3_000), seed=st.integers(0, 1_000))
def test_root_does_not_depend_on_how_the_file_is_cut(read, slice_rows, block_bytes, seed):
    rng = np.random.default_rng(seed)
    rows = [f"{a},{b},{a % 3},h{b % 4},l{a % 2}" for a, b in rng.integers(0, 9, (60, 2))]
    data = "\n".join(["x0,x1,y,holder,by", *rows]).encode()
    whole = read(data, MAPPING)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SLICE_ROWS", slice_rows)
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        cut = read(data, MAPPING)

    assert cut.report == whole.report
    assert cut.fingerprints == whole.fingerprints
    assert cut.table.equals(whole.table)


def test_parquet_rows_keep_their_order_over_row_groups_and_slices(read, monkeypatch):
    monkeypatch.setattr(readers, "SLICE_ROWS", 7)
    table = pa.table({"v": [[float(n), float(-n)] for n in range(100)], "y": [str(n % 3) for n in range(100)]})

    found = read(parquet_bytes(table, row_group_size=30), {"content": "v", "label": "y"})

    assert found.table["content"].to_pylist() == [[float(n), 0.0 - n] for n in range(100)]
    assert found.table["salt"].to_pylist() == records.salts(VERSION_KEY, 0, 100)


def test_a_text_of_half_a_megabyte_is_read(read):
    found = read(b"text\n" + b"a" * 500_000 + b"\nb\n", {"content": "text"})

    assert found.report.n_records == 2
