import base64
import struct
import zlib

import pytest

from marketplace.web.thumbnails import thumbnail


def decoded(uri: str) -> list[list[int]]:
    """The rows of an 8-bit grey PNG whose chunks are whole."""
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data = png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + data),)
        chunks[kind] = data
        at += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 0)
    raw = zlib.decompress(chunks[b"IDAT"])
    return [list(raw[row * (width + 1) + 1 : (row + 1) * (width + 1)]) for row in range(height)]


def test_thumbnail_draws_the_largest_value_black_and_the_smallest_white():
    assert decoded(thumbnail([0.0, 16.0, 8.0, 4.0], minimum=0, maximum=16)) == [[255, 0], [127, 191]]


def test_thumbnail_clips_what_lies_outside_the_range():
    assert decoded(thumbnail([-5.0, 99.0, 0.0, 1.0], minimum=0, maximum=1)) == [[255, 0], [255, 0]]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0], [0.0] * (65 * 65)])
def test_thumbnail_is_nothing_for_what_is_no_small_square(values):
    assert thumbnail(values, minimum=0, maximum=1) == ""


def test_thumbnail_is_nothing_where_all_values_are_one():
    assert thumbnail([3.0] * 4, minimum=3, maximum=3) == ""
