"""Bytes under their hash: kept whole, once, and only if they are what they are said to be."""

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from attribution import queries
from attribution.artifacts import local_path, open_artifact, read_header, read_queries, store_artifact
from attribution.errors import ArtifactInvalid
from attribution.models import Artifact
from attribution.queries import QueriesRefused, normalise_queries
from tests.factories.attribution import queries_file

STATE = save({"model.0.weight": torch.ones(3, 2), "model.0.bias": torch.zeros(3)})


def _files(media: Path) -> list[str]:
    return [path.name for path in media.rglob("*") if path.is_file()]


def test_the_same_bytes_are_kept_once_and_registered_once_per_owner(alice, bob, media):
    first = store_artifact(owner=alice, kind="state", stream=io.BytesIO(STATE))
    again = store_artifact(owner=alice, kind="state", stream=io.BytesIO(STATE))
    theirs = store_artifact(owner=bob, kind="state", stream=io.BytesIO(STATE))

    assert again == first
    assert (theirs != first, theirs.sha256, theirs.size_bytes) == (True, first.sha256, len(STATE))
    assert _files(media) == [first.sha256]
    with open_artifact(theirs) as stream, local_path(theirs) as path:
        assert stream.read() == path.read_bytes() == STATE


def test_a_half_written_file_under_the_key_is_written_again(alice, media):
    artifact = store_artifact(owner=alice, kind="state", stream=io.BytesIO(STATE))
    (media / artifact.key).write_bytes(STATE[:100])

    store_artifact(owner=None, kind="round", stream=io.BytesIO(STATE))

    assert (media / artifact.key).read_bytes() == STATE


@pytest.mark.parametrize("size", [0, 2_001], ids=["empty", "too large"])
def test_a_body_of_no_usable_size_leaves_no_trace(size, alice, media, settings):
    settings.MAX_ARTIFACT_BYTES = 2_000

    with pytest.raises(ArtifactInvalid, match="empty" if size == 0 else "at most 2000 bytes"):
        store_artifact(owner=alice, kind="state", stream=io.BytesIO(bytes(size)))

    assert (Artifact.objects.count(), _files(media)) == (0, [])


def _with_header(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Exploit:
    """What must never run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pwned").write_text, ("x",))


def _torch_pickle() -> bytes:
    sink = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, sink)
    return sink.getvalue()


BAD_STATES = {
    "a pickle": (pickle.dumps(Exploit()), "Python pickle"),
    "torch.save's zip": (_torch_pickle(), "Python pickle"),
    "five bytes": (b"12345", "ends before its header"),
    "an endless header": (struct.pack("<Q", 1 << 62) + b"{}", "announces a header"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "not JSON"),
    "deep JSON": (struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995, "not JSON"),
    "a list": (_with_header([1]), "not a JSON object"),
    "no tensor": (_with_header({"__metadata__": {"a": "b"}}), "0 bytes of tensors"),
    "an object dtype": (_with_header({"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)), "is O"),
    "a lying shape": (_with_header({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, bytes(8)), "8 bytes"),
    "a negative side": (
        _with_header({"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, bytes(8)),
        "no dtype",
    ),
    "an overlap": (
        _with_header(
            {
                "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            bytes(12),
        ),
        "gap or overlap",
    ),
    "a cut tail": (STATE[:-4], "describes"),
    "a smuggled tail": (STATE + b"payload!", "describes"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_what_is_no_safetensors_file_is_named_and_leaves_no_trace(name, alice, media):
    data, reason = BAD_STATES[name]

    with pytest.raises(ArtifactInvalid, match=reason) as refusal:
        store_artifact(owner=alice, kind="state", stream=io.BytesIO(data))

    assert list(refusal.value.pointers) == ["/body"]
    assert (Artifact.objects.count(), _files(media), Path("pwned").exists()) == (0, [], False)


def test_a_header_that_begins_as_a_pickle_does_is_read(tmp_path):
    """A length of 640 = 0x0280 writes the bytes 80 02."""
    for padding in range(640):
        data = save({"w": torch.ones(1)}, metadata={"pad": "x" * padding})
        if data[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no padding gives a header of 640 bytes")
    path = tmp_path / "state"
    path.write_bytes(data)

    assert read_header(path) == {"w": ("F32", [1])}


def test_queries_are_read_as_they_were_written(alice):
    stream = queries_file(np.array([[0.5, 1.0], [2.0, -3.0]]), ["1", "ö"])

    found = read_queries(store_artifact(owner=alice, kind="queries", stream=stream))

    assert found.labels == ["1", "ö"]
    assert found.content.tolist() == [[0.5, 1.0], [2.0, -3.0]]


def test_text_queries_are_read_as_they_were_written(alice):
    stream = queries_file(pa.array(["a long day", "ein schöner Tag"]), ["1", "0"])

    found = read_queries(store_artifact(owner=alice, kind="queries", stream=stream))

    assert (found.content, found.labels) == (["a long day", "ein schöner Tag"], ["1", "0"])


FLOATS = pa.list_(pa.float64())
BAD_QUERIES = {
    "not Parquet": (io.BytesIO(b"content,label\n1,2\n"), "not a Parquet file"),
    "a cut file": (io.BytesIO(queries_file(pa.array([[1.0]], FLOATS), ["1"]).read()[:-9]), "not a Parquet file"),
    "no rows": (queries_file(pa.array([], FLOATS), []), "0 rows"),
    "two lengths": (queries_file(pa.array([[1.0, 2.0], [1.0]], FLOATS), ["1", "0"]), "row 1 has 1 numbers"),
    "no number": (queries_file(pa.array([[1.0], [float("nan")]], FLOATS), ["1", "0"]), "row 1 holds a number"),
    "a missing number": (queries_file(pa.array([[None], [1.0]], FLOATS), ["1", "0"]), "row 0 holds a number"),
    "an empty row": (queries_file(pa.array([[1.0], None], FLOATS), ["1", "0"]), "empty rows"),
    "no label": (queries_file(pa.array([[1.0], [2.0]], FLOATS), ["1", None]), "row 1 has no label"),
    "booleans": (queries_file(pa.array([[True]]), ["1"]), "must be a list of numbers"),
}


@pytest.mark.parametrize("name", BAD_QUERIES)
def test_unusable_queries_are_named_and_leave_no_trace(name, alice, media):
    stream, reason = BAD_QUERIES[name]
    stream.seek(0)

    with pytest.raises(ArtifactInvalid, match=reason):
        store_artifact(owner=alice, kind="queries", stream=stream)

    assert (Artifact.objects.count(), _files(media)) == (0, [])


def test_queries_without_a_column_say_which_columns_there_are(alice):
    sink = queries_file(pa.array([[1.0]], FLOATS), ["1"], extra=pa.array([1]))
    import pyarrow.parquet as pq

    table = pq.read_table(sink).drop_columns(["content"])
    without = io.BytesIO()
    pq.write_table(table, without)
    without.seek(0)

    with pytest.raises(ArtifactInvalid, match="no column 'content'; the columns are label, extra"):
        store_artifact(owner=alice, kind="queries", stream=without)


def test_a_small_file_of_many_values_is_not_read(tmp_path):
    bomb = tmp_path / "bomb"
    bomb.write_bytes(queries_file(np.zeros((10, 2_000)), ["1"] * 10).read())

    with pytest.raises(QueriesRefused, match="at most 1000"):
        normalise_queries(bomb, tmp_path / "out", max_numbers=1_000)

    assert not (tmp_path / "out").exists()


def test_a_reader_that_does_not_end_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "SECONDS", 1)
    os.mkfifo(tmp_path / "never")

    with pytest.raises(QueriesRefused, match="not read within 1 seconds"):
        normalise_queries(tmp_path / "never", tmp_path / "out")


def test_a_reader_that_dies_is_a_refusal(tmp_path):
    path = tmp_path / "queries"
    path.write_bytes(queries_file(np.zeros((10, 20)), ["1"] * 10).read())

    with pytest.raises(QueriesRefused, match="damaged, or too large"):
        normalise_queries(path, tmp_path / "no" / "such" / "folder")
