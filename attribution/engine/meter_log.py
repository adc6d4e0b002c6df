"""The meter's log: append-only, one entry per optimizer step, chained by hashes so that its heads can be posted in advance.

    head_k = SHA-256(head_{k−1} ‖ payload_k)        head_{−1} = 32 zero bytes

A frame on disk is `length (uint32) ‖ payload ‖ head`, little-endian, written by one `write`: after `kill -9` a valid prefix
is left, and at most one torn frame, which `LogWriter` cuts off when the run goes on. Binary, not JSON lines: what is hashed is
what lies on the disk, so there is no canonical form to agree on; a float32 keeps its bits; an entry of 64 records takes 0.8 kB
and 10 µs. The header's payload is JSON, so that `head -c 1000` shows what the log is about. Nothing in it can run.

A chain shows an edit, a removal, a change of order and a cut inside a frame by itself. That frames are missing at the end, or
that all of it was computed anew, shows only against heads that were posted while training ran: `verify_log(path, heads=…)`.
"""

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution.engine.errors import EngineError

FORMAT = "residual-meter-1"
HEADER, MEASURED, PASSED, REWOUND, CLOSED = range(5)
LENGTH = struct.Struct("<I")
STEP = struct.Struct("<BQQQddddI")  # kind, entry, step, update, learning rate, probability, measurement, carried, n
MARK = struct.Struct("<BQQ")  # kind, entry, step
DIGEST_BYTES = 32
MAX_PAYLOAD = 2**30


@dataclass(frozen=True)
class Head:
    """What to post: whoever holds it can later show that the log up to this entry was not written afterwards."""

    entry: int
    step: int  # optimizer steps finished
    head: str  # hex


@dataclass(frozen=True)
class Entry:
    """One optimizer step. Influence: (n,) float32, or None where the step was not drawn to be measured."""

    step: int
    update: int  # the optimizer's own count of this step, from 1
    learning_rate: float  # of the first parameter group
    probability: float  # with which the step was drawn
    measurement: float  # mean over the step's queries before the step; NaN if not measured
    carried: float  # what the step would have done to it with an empty batch; NaN if not measured
    records: NDArray[np.int64]
    influence: NDArray[np.float32] | None


@dataclass(frozen=True)
class LogReport:
    """`bad_entry` is None if the chain holds; 0 is the header."""

    n_entry: int  # good ones
    n_step: int
    head: str  # of the last good entry
    is_closed: bool
    bad_entry: int | None
    reason: str
    header: Mapping[str, Any]

    @property
    def is_valid(self) -> bool:
        return self.bad_entry is None


class LogWriter:
    """The only writer of a log; takes an exclusive lock for as long as it lives.

    Args:
        header: what the run is; an existing log must have the same.
        first_step: the step that training goes on with; steps logged from there on count as undone. None: the next one.
        heads: a JSON-lines file, or a function, that is told a head every `heads_every` entries and at the end.

    Raises:
        EngineError: another run's log, another writer, a broken chain, a gap between the log and `first_step`.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        *,
        first_step: int | None = None,
        heads: Path | str | Callable[[Head], None] | None = None,
        heads_every: int = 64,
    ) -> None:
        if heads_every < 1:
            raise EngineError(f"{heads_every} is below 1", pointer="/heads_every")
        self.path, self._every = path, heads_every
        self._heads = Path(heads) if isinstance(heads, str) else heads
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise EngineError(f"{path.name} is being written by another process", pointer="/log") from error
        try:
            self._open(header, first_step)
        except BaseException:
            self._file.close()
            raise

    def _open(self, header: Mapping[str, Any], first_step: int | None) -> None:
        wanted = {"format": FORMAT, **header}
        first, torn = b"", ""
        self.n_entry = self._end = self.step = 0
        found: dict[str, Any] = {}
        with self.path.open("rb") as file:  # one frame at a time: a log of a long run does not fit in memory
            for number, payload, head, end, wrong in _frames(file):
                if wrong:
                    torn = wrong
                    if not wrong.startswith("cut off"):
                        raise EngineError(f"entry {number}: {wrong}; a broken log cannot go on", pointer="/log")
                    break
                if number == 0:
                    first, found = payload, _header(payload)
                    self.step = int(found["first_step"])
                else:
                    kind, _, step = MARK.unpack_from(payload)
                    self.step = {REWOUND: step, CLOSED: self.step}.get(kind, step + 1)
                self.head, self._end, self.n_entry = head, end, number + 1
        if torn:
            self._file.truncate(self._end)  # the frame was never whole, so its head was never posted
        if not first:
            self.head = bytes(DIGEST_BYTES)
            self.step = first_step or 0
            wanted["first_step"] = self.step
            self._append(bytes([HEADER]) + _canonical(wanted))
            return
        for name in sorted({*found, *wanted} - {"first_step"}):
            if _plain(found.get(name)) != _plain(wanted.get(name)):
                raise EngineError(
                    f"the log says {found.get(name)!r}, this run {wanted.get(name)!r}; give another run another log",
                    pointer=f"/log/header/{name}",
                )
        if first_step is not None and first_step != self.step:
            if not int(found["first_step"]) <= first_step < self.step:
                raise EngineError(
                    f"training goes on with step {first_step}, the log with {self.step}: go on from a checkpoint that "
                    "the log has reached",
                    pointer="/first_step",
                )
            self.step = first_step
            self._append(MARK.pack(REWOUND, self.n_entry, first_step))

    def append(self, entry: Entry) -> None:
        """Write one step's entry; it is in the operating system's hands when this returns."""
        measured = entry.influence is not None
        payload = STEP.pack(
            MEASURED if measured else PASSED,
            self.n_entry,
            entry.step,
            entry.update,
            entry.learning_rate,
            entry.probability,
            entry.measurement,
            entry.carried,
            len(entry.records),
        )
        payload += entry.records.astype("<i8").tobytes()
        if entry.influence is not None:
            payload += entry.influence.astype("<f4").tobytes()
        self.step = entry.step + 1
        self._append(payload)
        if self.n_entry % self._every == 0 and self._heads is not None:
            os.fsync(
                self._file.fileno()
            )  # a posted head whose entry the power took would make an honest log look cut off
            self._post()

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Mark the end, post the last head, give back the lock. Harmless to call twice."""
        if self._file.closed:
            return
        self._append(MARK.pack(CLOSED, self.n_entry, self.step))
        os.fsync(self._file.fileno())
        self._post()
        self._file.close()

    def _append(self, payload: bytes) -> None:
        head = hashlib.sha256(self.head + payload).digest()
        frame = LENGTH.pack(len(payload)) + payload + head
        try:
            written = self._file.write(frame)
        except OSError as error:
            raise EngineError(f"{self.path.name} cannot be written: {error.strerror}", pointer="/log") from error
        if written != len(frame):  # a full disk takes a part of it
            self._file.truncate(self._end)
            raise EngineError(f"{self.path.name}: no space left; free some, then resume", pointer="/log")
        self._end += len(frame)
        self.head = head
        self.n_entry += 1

    def _post(self) -> None:
        if self._heads is None:
            return
        head = Head(self.n_entry - 1, self.step, self.head.hex())
        if isinstance(self._heads, Path):
            with self._heads.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(head)) + "\n")
        else:
            self._heads(head)


def verify_log(path: Path | str, *, heads: Path | str | Sequence[Head] = ()) -> LogReport:
    """Compute the chain anew and name the first bad entry: edited, removed, out of order or cut off.

    Args:
        heads: those posted while training ran, or the file they were written to. Only they show that entries are missing at the
            end, or that the whole log was written again.

    Raises:
        EngineError: it is no meter log, or the heads cannot be read.
    """
    posted = {head.entry: head for head in _posted(heads)}
    header: dict[str, Any] = {}
    last, n_good, n_step, is_closed = bytes(DIGEST_BYTES), 0, 0, False
    bad, reason = None, ""
    with _reading(path) as file:
        for number, payload, head, _, wrong in _frames(file):
            if not wrong and number in posted and posted[number].head != head.hex():
                wrong = "is not the entry whose head was posted: the log was written again"
            if wrong:
                bad, reason = number, wrong
                break
            if number == 0:
                header = _header(payload)
            n_step += payload[0] in (MEASURED, PASSED)
            is_closed = payload[0] == CLOSED
            last, n_good = head, n_good + 1
    missing = [number for number in posted if number >= n_good]
    if bad is None and missing:
        bad, reason = n_good, f"is missing: the head of entry {max(missing)} was posted, the log ends before it"
    return LogReport(n_good, n_step, last.hex(), is_closed, bad, reason, header)


def entries(path: Path | str) -> Iterator[Entry]:
    """The steps that count, in order: those that a resumed run did again appear once, as they were done last.

    Raises:
        EngineError: the chain is broken; the pointer names the entry.
    """
    for _, entry in numbered_entries(path):
        yield entry


def numbered_entries(path: Path | str) -> Iterator[tuple[int, Entry]]:
    """The same, each with its number in the log."""
    counting = {number for number, _ in _counting(path)}
    with _reading(path) as file:
        for number, payload, _, _, wrong in _frames(file):
            if wrong:
                return
            if number in counting:
                yield number, _entry(payload)


def _counting(path: Path | str) -> list[tuple[int, tuple[float, int]]]:
    """The numbers of the entries that count, with (learning rate, update); a run of a million steps fits in memory."""
    kept: list[tuple[int, int, tuple[float, int]]] = []
    with _reading(path) as file:
        for number, payload, _, _, wrong in _frames(file):
            if wrong.startswith("cut off"):
                break  # a run that was killed, or is being written
            if wrong:
                raise EngineError(f"{wrong}; verify_log says more", pointer=f"/log/{number}")
            if payload[0] in (MEASURED, PASSED):
                _, _, step, update, rate, *_ = STEP.unpack_from(payload)
                kept.append((number, step, (rate, update)))
            elif payload[0] == REWOUND:
                step = MARK.unpack(payload)[2]
                while kept and kept[-1][1] >= step:
                    kept.pop()
    return [(number, pace) for number, _, pace in kept]


def totals(path: Path | str, *, carry: bool = True) -> Tensor:
    """Add up a log: what each record did to the measurement over the run.

    Args:
        carry: count what a gradient does in later steps too, through momentum; see `gains`. Otherwise its own step alone.

    Returns:
        (n_train,) float64, in units of the measurement; positive = helpful: it lowered the measurement. Where steps were drawn with
        a probability, each counts by its inverse, so that the expectation over the draw is that of a run measured throughout.
    """
    gain = gains_of(path)
    if not carry:
        gain = np.ones_like(gain)
    sums = np.zeros(read_header(path)["n_train"])
    for entry, factor in zip(entries(path), gain, strict=True):
        if entry.influence is not None:
            np.add.at(sums, entry.records, entry.influence.astype(np.float64) * (factor / entry.probability))
    return torch.from_numpy(sums)


def gains_of(path: Path | str) -> NDArray[np.float64]:
    """(n_step,): what each of a log's steps counts for, momentum included; see `gains`."""
    return gains([pace for _, pace in _counting(path)], read_header(path)["optimizer"])


def gains(paces: Sequence[tuple[float, int]], optimizer: Mapping[str, Any]) -> NDArray[np.float64]:
    """What a step's gradient does in all of the run's steps, over what it does in its own.

    A gradient enters the momentum of step s and is still there at s + k, shrunk by β^k. With c_k its coefficient in the update of
    step s + k (learning rate and bias correction included), the gain is Σ_k c_k / c_0 over the steps that the run still had.
    Exact if the (preconditioned) gradient of the measurement stays the same for the 1/(1 − β) steps that matter.

    Args:
        paces: (learning rate, the optimizer's count from 1) of every step.
        optimizer: as the log's header has it.
    """
    rate = np.array([rate for rate, _ in paces])
    count = np.array([float(update) for _, update in paces])
    if optimizer["name"] == "sgd":
        beta, dampening = optimizer["momentum"], optimizer["dampening"]
        entering = np.where(count == 1, 1.0, 1.0 - dampening)
        own = rate * (1 + beta * entering) if optimizer["nesterov"] else rate * entering
        later = rate * beta if optimizer["nesterov"] else rate
    else:
        beta = optimizer["betas"][0]
        later = rate / (1 - beta**count)
        entering, own = np.full(len(paces), 1 - beta), later * (1 - beta)
    gain, ahead = np.ones(len(paces)), 0.0
    for s in reversed(range(len(paces))):  # ahead = Σ_{k ≥ 1} β^k · later[s + k]
        if own[s] > 0:
            gain[s] = 1 + entering[s] * ahead / own[s]
        ahead = beta * (ahead + later[s])
    return gain


def read_header(path: Path | str) -> dict[str, Any]:
    with _reading(path) as file:
        for _, payload, _, _, wrong in _frames(file):
            if wrong:
                raise EngineError(wrong, pointer="/log/0")
            return _header(payload)
    raise EngineError("is empty", pointer="/log/0")


def _reading(path: Path | str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise EngineError(f"cannot be read: {error.strerror}", pointer="/log") from error


def _frames(file: BinaryIO) -> Iterator[tuple[int, bytes, bytes, int, str]]:
    """(number, payload, head, end in the file, what is wrong); stops after the first wrong one."""
    last, number, end = bytes(DIGEST_BYTES), 0, 0
    while raw := file.read(LENGTH.size):
        size = LENGTH.unpack(raw)[0] if len(raw) == LENGTH.size else 0
        if number == 0 and (len(raw) < LENGTH.size or not 0 < size <= MAX_PAYLOAD):
            raise EngineError("is not a meter log", pointer="/log")
        rest = file.read(size + DIGEST_BYTES) if 0 < size <= MAX_PAYLOAD else b""
        if len(rest) != size + DIGEST_BYTES:
            yield number, b"", b"", end, "cut off: the file ends inside it, or its length was edited"
            return
        payload, head = rest[:size], rest[size:]
        wrong = ""
        if number == 0 and (payload[0] != HEADER or not payload[1:2] == b"{"):
            raise EngineError("is not a meter log", pointer="/log")
        if number and (payload[0] not in (MEASURED, PASSED, REWOUND, CLOSED) or size < MARK.size):
            wrong = "edited: its kind is unknown"
        elif number and (claimed := MARK.unpack_from(payload)[1]) != number:
            wrong = f"removed or out of order: entry {claimed} stands in its place"
        elif hashlib.sha256(last + payload).digest() != head:
            wrong = "edited: its bytes do not give its head"
        elif number and not _is_whole(payload):
            wrong = "malformed: its length does not fit its records"
        end += LENGTH.size + size + DIGEST_BYTES
        yield number, payload, head, end, wrong
        if wrong:
            return
        last, number = head, number + 1


def _is_whole(payload: bytes) -> bool:
    if payload[0] in (REWOUND, CLOSED):
        return len(payload) == MARK.size
    if len(payload) < STEP.size:
        return False
    n = STEP.unpack_from(payload)[-1]
    return len(payload) == STEP.size + n * (12 if payload[0] == MEASURED else 8)


def _entry(payload: bytes) -> Entry:
    kind, _, step, update, rate, probability, measurement, carried, n = STEP.unpack_from(payload)
    records = np.frombuffer(payload, "<i8", n, STEP.size)
    influence = np.frombuffer(payload, "<f4", n, STEP.size + 8 * n) if kind == MEASURED else None
    return Entry(step, update, rate, probability, measurement, carried, records, influence)


def _header(payload: bytes) -> dict[str, Any]:
    try:
        header = json.loads(payload[1:])
    except (ValueError, RecursionError) as error:
        raise EngineError("its header is no JSON", pointer="/log/0") from error
    if header.get("format") != FORMAT:
        raise EngineError(f"format {header.get('format')!r}; this reads {FORMAT!r}", pointer="/log/0/format")
    return header


def _canonical(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _posted(heads: Path | str | Sequence[Head]) -> Sequence[Head]:
    if not isinstance(heads, Path | str):
        return heads
    try:
        lines = Path(heads).read_text(encoding="utf-8").splitlines()
        return [Head(**json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(f"{heads} holds no heads: {error}", pointer="/heads") from error
