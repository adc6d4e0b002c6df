"""Tiny pictures of records: a square vector of numbers becomes a grey PNG inside the page (a data: URI)."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence

MAX_SIDE = 64


def thumbnail(values: Sequence[float], *, minimum: float, maximum: float) -> str:
    """A `data:image/png` URI, ink dark on white; empty if the vector is no square of 2 to 64 pixels a side."""
    side = math.isqrt(len(values))
    if side * side != len(values) or not 2 <= side <= MAX_SIDE or not maximum > minimum:
        return ""
    scale = 255 / (maximum - minimum)
    pixels = bytes(255 - max(0, min(255, round((value - minimum) * scale))) for value in values)
    rows = b"".join(b"\x00" + pixels[at : at + side] for at in range(0, len(pixels), side))  # filter type 0 per row
    png = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))  # 8 bits, greyscale
        + _chunk(b"IDAT", zlib.compress(rows, 9))
        + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
