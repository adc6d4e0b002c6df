"""The gradient store: every record's projected gradient at one state of the model, on disk.

A shard holds a range of records as a safetensors file: `vectors` int8 (n, K) and `scales` float32 (n,), with
vector_i ≈ scales_i · vectors_i, scales_i = max |z_i| / 127. Rounding to 8 bits moves an inner product by a hundredth of what the
projection to K numbers already did (`./run bench attribution/projection`), at half the bytes of float16, and no gradient is too
small for it. Its header says to which store and which records it belongs and carries a SHA-256 of all it says and holds.

Shards are written whole or not at all, and `manifest.json` last. Whoever builds again keeps the shards whose checksum and
records agree and makes the others, batch by batch as an uninterrupted build would, so that the bytes are the same. Records
may be added at the end: full shards stay, the last one is made again if it was not full. A store is of one state and one
set of settings; anything else is refused.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from safetensors.torch import save as save_tensors
from torch import Tensor

from attribution.engine.checkpoints import load_checkpoint, read_state
from attribution.engine.errors import EngineError
from attribution.engine.files import write_bytes
from attribution.engine.progress import Interrupted
from attribution.engine.projection import WIDTH, Projector
from attribution.engine.task import Batch, Task
from attribution.engine.training import Program, Progress, State, Tensors, environment, train
from attribution.engine.workers import claimed

FORMAT = 1
SHARD_RECORDS = 8192
HASHED_ROWS = 4096
MANIFEST = "manifest.json"
STATE = "state.safetensors"
PROBE_UNITS = (
    2  # by how many steps of the 8 bits a number made again may differ; another machine's rounding moves it by one
)

Say = Callable[[str], None]
Vectors = NDArray[np.int8]
Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """What the vectors of one store share; two stores with equal settings can be compared number by number."""

    state: str  # SHA-256 of the model's tensors
    width: int
    seed: int
    shard_records: int
    format: int = FORMAT
    precision: str = "float32"  # in which the gradients were computed; only another one is written down

    def to_json(self) -> dict[str, Any]:
        said = asdict(self)
        return said if self.precision != "float32" else {k: v for k, v in said.items() if k != "precision"}

    def differences(self, other: Mapping[str, Any]) -> str:
        mine, other = asdict(self), {"precision": "float32", **other}
        return ", ".join(f"{k} {_short(other.get(k))}, not {_short(v)}" for k, v in mine.items() if other.get(k) != v)


@dataclass(frozen=True)
class Shard:
    """One file: records start..stop-1."""

    file: str
    start: int
    stop: int
    records: str  # SHA-256 of the records themselves
    sha256: str  # of everything the header says and the file holds


class Store:
    """A finished store, memory-mapped: a vector is read from disk when it is asked for."""

    def __init__(self, folder: Path, settings: Settings, shards: list[Shard], digest: str) -> None:
        self.folder, self.settings, self.shards, self.digest = folder, settings, shards, digest
        self._maps = [_map(folder / shard.file) for shard in shards]
        self._starts = np.array([shard.start for shard in shards])

    @classmethod
    def open(cls, folder: Path, *, is_checked: bool = True) -> "Store":
        """Open a finished store.

        Args:
            is_checked: read every shard once and compare its checksum, about a second per gigabyte.

        Raises:
            EngineError: there is none, its build was interrupted, or a shard is not what the manifest says.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            manifest = json.loads(text)
            settings = Settings(**manifest["settings"])
            shards = [Shard(**shard) for shard in manifest["shards"]]
        except FileNotFoundError:
            started = any(folder.glob("shard-*"))
            what = "its build was interrupted" if started else "no gradient store is here"
            raise EngineError(f"{what}; run `index` with this --out", pointer=str(folder)) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise EngineError(f"is not a manifest ({error}); run `index` again", pointer=str(path)) from error
        if settings.format != FORMAT:
            raise EngineError(f"format {settings.format}, this reads {FORMAT}; use a new --out", pointer=str(path))
        for shard in shards:
            header = _header(folder / shard.file)
            if header is None or header["sha256"] != shard.sha256:
                raise EngineError("damaged, or not the manifest's; run `index` again", pointer=str(folder / shard.file))
            if is_checked and not _is_whole(folder / shard.file, header):
                raise EngineError(
                    "its checksum does not match, the file is damaged; run `index` again, which makes this shard anew",
                    pointer=str(folder / shard.file),
                )
        return cls(folder, settings, shards, hashlib.sha256(text.encode()).hexdigest())

    def __len__(self) -> int:
        return self.shards[-1].stop if self.shards else 0

    @property
    def width(self) -> int:
        return self.settings.width

    def blocks(self, rows: int = 8192) -> Iterator[tuple[int, Array]]:
        """All vectors in order, (first record, float32 (n, K)) at a time."""
        for shard, (vectors, scales) in zip(self.shards, self._maps, strict=True):
            for start in range(0, len(vectors), rows):
                part = slice(start, start + rows)
                yield shard.start + start, vectors[part].astype(np.float32) * scales[part, None]

    def vectors(self, records: Array) -> Array:
        """The vectors of some records, float32 (n, K), in the order asked for."""
        found = np.empty((len(records), self.width), np.float32)
        owner = np.searchsorted(self._starts, records, "right") - 1
        for number in np.unique(owner):
            rows = np.flatnonzero(owner == number)
            vectors, scales = self._maps[number]
            local = records[rows] - self._starts[number]
            found[rows] = vectors[local] * scales[local, None]
        return found

    def scores(self, records: Array, query: Array) -> Array:
        """Inner products of some records' vectors with one query's, float32 (n,)."""
        return self.vectors(records) @ query

    def query_vectors(self, task: Task, queries: Tensor) -> Array:
        """The gradients of some queries' measurement, projected as the store's vectors are, float32 (n, K).

        Raises:
            EngineError: the store was made for another task: its number of records, its last checkpoint, its model or
                its loss is another.
        """
        if len(self) != task.n_train:
            raise EngineError(
                f"holds {len(self)} records, the task has {task.n_train}; run `index` again, which adds what is new",
                pointer=str(self.folder),
            )
        state = _of_model(read_state(Program(task), self.folder / STATE, 0, pointer=str(self.folder / STATE)))
        is_same = state_digest(state) == self.settings.state
        if is_same and task.checkpoints:
            is_same = state_digest(final_state(task)) == self.settings.state
        if not is_same:
            raise EngineError("was made at another state of the model; use a new --out", pointer=str(self.folder))
        projector = Projector(task, state, width=self.width, seed=self.settings.seed)
        _probe(task, projector, self.folder / self.shards[0].file, self.shards[0])
        return projector.gradients(task.queries, queries, of_loss=False).numpy()


def build_store(
    task: Task,
    folder: Path,
    *,
    width: int = WIDTH,
    seed: int = 0,
    shard_records: int = SHARD_RECORDS,
    progress: Progress | None = None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    spread: Callable[[list[Path]], None] | None = None,
) -> Store:
    """Project every record's gradient at the task's final state into `folder`; what is there already is kept.

    Args:
        width: numbers per record, K, a power of two.
        shard_records: records per file, and the most that a kill makes worth doing again.
        progress: told (records done in this call, records to do).
        say: told in a sentence which damaged shards are made again.
        stop: asked after every shard.
        spread: handed the paths of the shards to make, may have other processes make them by `make_shards`; what it leaves is made here.

    Raises:
        Interrupted: told to stop; finished shards are kept.
        EngineError: `folder` has a store of another state, of other settings or of other records, or another process
            builds there; or the shards will not fit the disk.
        OSError: a file cannot be written; finished shards stay, and the next call goes on from them.
    """
    if shard_records < 1:
        raise EngineError(f"{shard_records} is not 1 or more", pointer="/shard_records")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for pattern in ("shard-*", STATE, MANIFEST):
            for left in folder.glob(f"{pattern}.*.partial"):  # of a build that was killed
                left.unlink()
        state = final_state(task)
        settings = Settings(state_digest(state), width, seed, shard_records, precision=task.precision)
        projector = Projector(task, state, width=width, seed=seed)
        ranges = [(a, min(a + shard_records, task.n_train)) for a in range(0, task.n_train, shard_records)]
        kept, todo = _survey(task, folder, settings, ranges, say)
        if kept:
            _probe(task, projector, folder / kept[0].file, kept[0])
        if todo:
            (folder / MANIFEST).unlink(missing_ok=True)  # from here until the end nobody may take this for a store
            _check_room(folder, sum(end - start for start, end in todo) * (width + 4))
        if todo or not (folder / STATE).exists():
            write_bytes(folder / STATE, save_tensors({f"model.{n}": t for n, t in state.items()}))
            if spread and todo:
                spread([folder / _name(start) for start, _ in todo])
                kept, todo = _survey(task, folder, settings, ranges, say)
        made: list[Shard] = []
        done, total = 0, sum(end - start for start, end in todo)
        for start, end in todo:
            if stop():
                raise Interrupted(f"{len(kept) + len(made)} of {len(ranges)} shards are kept")
            made.append(_make_shard(task, projector, folder, settings, start, end, _after(progress, done, total)))
            done += end - start
        shards = sorted([*kept, *made], key=lambda shard: shard.start)
        if todo or not (folder / MANIFEST).exists():
            _write_manifest(folder, settings, shards, projector.n_parameters)
    return Store.open(folder, is_checked=False)  # kept shards were checked, the others have just been written


def build_shard(
    task: Task,
    folder: Path,
    number: int,
    *,
    width: int = WIDTH,
    seed: int = 0,
    shard_records: int = SHARD_RECORDS,
    progress: Progress | None = None,
) -> Path:
    """Make one shard of a store by itself; `build_store` makes a store of a folder that holds all of them.

    Raises:
        EngineError, OSError: see `build_store`.
    """
    start = number * shard_records
    if not 0 <= start < task.n_train:
        raise EngineError(f"{number} begins at record {start}, the task has {task.n_train}", pointer="/number")
    end = min(start + shard_records, task.n_train)
    _check_room(folder, (end - start) * (width + 4))
    state = final_state(task)
    settings = Settings(state_digest(state), width, seed, shard_records, precision=task.precision)
    projector = Projector(task, state, width=width, seed=seed)
    made = _make_shard(task, projector, folder, settings, start, end, _after(progress, 0, end - start))
    return folder / made.file


def make_shards(
    task: Task,
    folder: Path,
    *,
    width: int = WIDTH,
    seed: int = 0,
    shard_records: int = SHARD_RECORDS,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Make the missing shards that no other process is making, for the `build_store` that holds the folder and wrote the state there."""
    program = Program(task)
    state = _of_model(read_state(program, folder / STATE, 0, pointer=str(folder / STATE)))
    settings = Settings(state_digest(state), width, seed, shard_records, precision=task.precision)
    projector = Projector(task, state, width=width, seed=seed)
    for start in range(0, task.n_train, shard_records):
        if stop():
            return
        end, path = min(start + shard_records, task.n_train), folder / _name(start)
        header = _header(path)
        if header is not None and header["stop"] == end:
            continue
        with claimed(path) as is_mine:
            if is_mine:
                _make_shard(task, projector, folder, settings, start, end, lambda _: None)


def final_state(task: Task) -> Tensors:
    """The model's state after the last step: the task's last checkpoint, or else trained by the recipe.

    Every parameter and every buffer once, by the first of its names.

    Raises:
        EngineError: a checkpoint that cannot be read or is of another model.
    """
    if not task.checkpoints:
        return _of_model(train(task).state)
    number = len(task.checkpoints) - 1
    return _of_model(load_checkpoint(Program(task), number))


def _of_model(state: State) -> Tensors:
    """Every parameter and buffer once, by the model's own names, whichever of a tied weight's names a file had."""
    return {name.removeprefix("model."): t for name, t in state.tensors().items() if name.startswith("model.")}


def compressed(z: Array) -> tuple[Vectors, Array]:
    """int8 (n, K) and float32 (n,): z_i ≈ scale_i · vector_i, to half a 127th of the largest |z_i|."""
    scales = (np.abs(z).max(1) / 127).astype(np.float32)
    return np.rint(z / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8), scales


def _survey(
    task: Task, folder: Path, settings: Settings, ranges: list[tuple[int, int]], say: Say
) -> tuple[list[Shard], list[tuple[int, int]]]:
    """Which shards are there and whole, and which ranges are to be made; refuses before anything is written."""
    kept, todo, there = [], [], {path.name for path in folder.glob("shard-*.safetensors")}
    for start, stop in ranges:
        name = _name(start)
        if name not in there:
            todo.append((start, stop))
            continue
        there.discard(name)
        path = folder / name
        header = _header(path)
        if header is None or not _is_whole(path, header):
            say(f"{name} is damaged and is made again")
            todo.append((start, stop))
            continue
        if differences := settings.differences(header["settings"]):
            raise EngineError(
                f"is of another store ({differences}); use a new --out, or the task and settings it was made with (a state "
                "that is trained anew has its own bits on another thread count: name a checkpoint)",
                pointer=str(path),
            )
        until = header["stop"]
        if until > stop or _records_digest(task, start, until) != header["records"]:
            raise EngineError(
                f"was made from other records {start}..{until - 1}: records may only be added at the end; use a new --out",
                pointer=str(path),
            )
        if until < stop:
            todo.append((start, stop))
        else:
            kept.append(Shard(name, start, stop, header["records"], header["sha256"]))
    if there:
        last = sorted(there)[-1]
        raise EngineError(
            f"is of another store or of records that the task, which has {task.n_train}, lacks; use a new --out",
            pointer=str(folder / last),
        )
    return kept, todo


def _probe(task: Task, projector: Projector, path: Path, shard: Shard) -> None:
    """Make a shard's first vector again: a loss or a model that has changed in code alone shows only here."""
    index = torch.tensor([shard.start])
    fresh = projector.gradients(task.train, index, of_loss=True).numpy()[0]
    vectors, scales = _map(path)
    held = vectors[0] * scales[0]
    if np.abs(fresh - held).max() > PROBE_UNITS * scales[0]:
        raise EngineError(
            f"record {shard.start} now has another gradient: the loss or the model's code has changed; use a new --out",
            pointer=str(path),
        )


def _make_shard(
    task: Task,
    projector: Projector,
    folder: Path,
    settings: Settings,
    start: int,
    stop: int,
    told: Callable[[int], None],
) -> Shard:
    vectors, scales = np.empty((stop - start, settings.width), np.int8), np.empty(stop - start, np.float32)
    digest, rows = hashlib.sha256(), projector.rows(of_loss=True)
    for at in range(start, stop, rows):
        index = torch.arange(at, min(at + rows, stop))
        batch = task.train[index]
        _hash_records(digest, batch)
        part = slice(at - start, at - start + len(index))
        vectors[part], scales[part] = compressed(projector.of_batch(batch, index, of_loss=True).numpy())
        told(at - start + len(index))
    return _keep_shard(folder, settings, start, stop, digest.hexdigest(), vectors, scales)


def _keep_shard(
    folder: Path, settings: Settings, start: int, stop: int, records: str, vectors: Vectors, scales: Array
) -> Shard:
    said = {"settings": settings.to_json(), "start": start, "stop": stop, "records": records}
    sha256 = _content_digest(said, vectors, scales)
    # One metadata key: the order of several is not fixed by the format's writer.
    header = json.dumps(said | {"sha256": sha256}, sort_keys=True)
    write_bytes(folder / _name(start), save({"vectors": vectors, "scales": scales}, metadata={"residual": header}))
    return Shard(_name(start), start, stop, records, sha256)


def _write_manifest(folder: Path, settings: Settings, shards: list[Shard], n_parameters: int) -> None:
    manifest = {
        "settings": settings.to_json(),
        "n_train": shards[-1].stop,
        "n_parameters": n_parameters,
        "shards": [asdict(shard) for shard in shards],
        "environment": environment(),
    }
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EngineError(
            f"the shards to be made need {needed:,} bytes and {free:,} are free; make room or use another --out",
            pointer=str(folder),
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second builder; the kernel lets go with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise EngineError("another process is building here; wait for it", pointer=str(folder)) from None
    finally:
        os.close(handle)


def _name(start: int) -> str:
    return f"shard-{start:012d}.safetensors"


def _layout(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the numbers begin, and the JSON before them (safetensors: eight bytes of length, then that)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 2**20:
            raise ValueError(f"a header of {length} bytes")
        return 8 + length, json.loads(file.read(length))


def _header(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself; None if it is missing, cut short or no shard."""
    try:
        begin, layout = _layout(path)
        said = json.loads(layout["__metadata__"]["residual"])
        end = max(layout[name]["data_offsets"][1] for name in ("vectors", "scales"))
        n = said["stop"] - said["start"]
        is_sound = (
            set(said) == {"settings", "start", "stop", "records", "sha256"}
            and (layout["vectors"]["dtype"], layout["vectors"]["shape"]) == ("I8", [n, said["settings"]["width"]])
            and (layout["scales"]["dtype"], layout["scales"]["shape"]) == ("F32", [n])
            and path.stat().st_size == begin + end
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return said if is_sound else None


def _map(path: Path) -> tuple[Vectors, Array]:
    begin, layout = _layout(path)
    vectors, scales = layout["vectors"], layout["scales"]
    mapped: Vectors = np.memmap(
        path, np.int8, "r", begin + vectors["data_offsets"][0], (vectors["shape"][0], vectors["shape"][1])
    )
    return mapped, np.array(np.memmap(path, np.float32, "r", begin + scales["data_offsets"][0], scales["shape"][0]))


def _is_whole(path: Path, header: Mapping[str, Any]) -> bool:
    said = {name: value for name, value in header.items() if name != "sha256"}
    return _content_digest(said, *_map(path)) == header["sha256"]


def _content_digest(said: Mapping[str, Any], vectors: Vectors, scales: Array) -> str:
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(vectors).data)
    digest.update(np.ascontiguousarray(scales).data)
    return digest.hexdigest()


def _records_digest(task: Task, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    for at in range(start, stop, HASHED_ROWS):
        _hash_records(digest, task.train[torch.arange(at, min(at + HASHED_ROWS, stop))])
    return digest.hexdigest()


def _hash_records(digest: Any, batch: Batch) -> None:
    parts = [tensor.detach().cpu().reshape(len(tensor), -1).contiguous() for tensor in batch]
    rows = [part.view(torch.uint8).numpy() for part in parts if part.shape[1]]
    digest.update(np.concatenate(rows, 1).tobytes())  # record after record: the digest does not depend on the batches


def state_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _after(progress: Progress | None, done: int, total: int) -> Callable[[int], None]:
    return lambda n: progress(done + n, total) if progress else None


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
