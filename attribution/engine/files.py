"""Files that are there whole or not at all."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Hand out a temporary name beside `path`; it gets the real one once all bytes are on the disk.

    A reader never sees a half-written file, whatever stops the writer; what was at `path` before stays until then. No two
    writers share a temporary name, so that neither takes away what the other is writing.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; safetensors' own error is turned into one. It may pass,
            as a refused input does not.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or the new name may reach the disk before the bytes
        partial.replace(path)
        _sync_folder(path.parent)  # or the new name may be forgotten with the power
    except (OSError, SafetensorError) as error:
        number, why = (error.errno, error.strerror or error) if isinstance(error, OSError) else (errno.EIO, error)
        advice = f"cannot be written ({why}); free some space or choose another folder, then run it again"
        raise OSError(number, advice, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an .npy file, whole or not at all."""
    with written_whole(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array(_OnlyWrite(file), array, allow_pickle=False)


class _OnlyWrite:
    """Not a real file to numpy, which would hand it to C's stdio, whose last write fails on a full disk unnoticed."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def arrays_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, shapes, types and bytes: a file's format alone does not notice a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
