"""What Lumen Lab does on its own machine: train on the files it licensed, then write down what it did.

Nothing here sees the database: it reads the downloaded Parquet, uses the engine as a library and writes checkpoints and
the disclosure document. Three trainings, one for each grade that measures: an MLP whose recipe is told (replayed), the same MLP
with the meter on (metered), and a linear model of which checkpoints alone are shown (estimated).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from attribution.engine import Recipe, Task, TensorRecords, architectures, epoch_order, initial_state_from_seed, train
from attribution.engine.meter_log import Head
from attribution.engine.metered import run_metered

MODEL_SLUG = "lumen-digits-mlp"
METERED_SLUG, ESTIMATED_SLUG = "lumen-digits-metered", "lumen-digits-linear"
CLASSES = [str(digit) for digit in range(10)]
ARCHITECTURE = {
    "kind": "sequential",
    "layers": [
        {"kind": "linear", "in_features": 64, "out_features": 32},
        {"kind": "gelu"},
        {"kind": "linear", "in_features": 32, "out_features": 10},
    ],
}
LINEAR = {"kind": "sequential", "layers": [{"kind": "linear", "in_features": 64, "out_features": 10}]}
TRANSFORM = [{"kind": "scale", "divide_by": 16}]
OPTIONS = {"momentum": 0.9}
LEARNING_RATE = 0.05
BATCH, EPOCHS, ORDER_SEED, INITIAL_SEED, SEED = 64, 10, 1, 7, 0
METER_EVERY, N_SEGMENT = 2, 8


@dataclass(frozen=True)
class LicensedFile:
    """One download: the license it came under, and the file."""

    license_id: str
    merkle_root: str
    path: Path


@dataclass(frozen=True)
class Trained:
    """The final checkpoint, the document that discloses it, and how well the model does on the queries."""

    checkpoint: Path
    document: dict[str, Any]
    accuracy: float
    n_record: int
    n_step: int


def train_and_describe(files: list[LicensedFile], queries: Path, directory: Path) -> Trained:
    """Train on every record of the files, in the order of the citations, and describe the training."""
    tables = _tables(files)
    task = _task(tables, queries, ARCHITECTURE)
    run = train(task)
    checkpoint = directory / "final.safetensors"
    save_file(run.state.tensors(), checkpoint)

    model = task.model()
    model.load_state_dict(run.model_state())
    query_features, query_targets = task.queries[torch.arange(task.n_query)]
    with torch.no_grad():
        accuracy = (model.eval()(query_features).argmax(1) == query_targets).float().mean().item()
    n_step = task.require_recipe().n_step
    model_page = {
        "slug": MODEL_SLUG,
        "name": "Lumen Digits MLP",
        "summary": "A small network that reads handwritten digits; the demo's model.",
    }
    document = declare(model_page, files, tables) | describe(task, queries, ARCHITECTURE, [(n_step, checkpoint)])
    document["recipe"] = recipe()
    return Trained(checkpoint, document, accuracy, task.n_train, n_step)


def train_metered(
    files: list[LicensedFile], queries: Path, directory: Path, *, run_id: str, post: Callable[[Head], None]
) -> tuple[dict[str, Any], list[Path], Path]:
    """The same training with the meter on, its heads posted as they come; the document, the checkpoints and the log."""
    tables = _tables(files)
    task = _task(tables, queries, ARCHITECTURE)
    n_step, log = task.require_recipe().n_step, directory / "run.meter"
    log.unlink(missing_ok=True)  # of a demo that was stopped
    checkpoints = run_metered(
        task,
        log=log,
        every=METER_EVERY,
        heads=post,
        heads_every=n_step // 16,
        checkpoint_steps=[n_step * k // N_SEGMENT for k in range(1, N_SEGMENT + 1)],
        checkpoint_dir=directory,
    )
    model_page = {
        "slug": METERED_SLUG,
        "name": "Lumen Digits, metered",
        "summary": "The same network, trained with the in-run meter on.",
    }
    document = declare(model_page, files, tables) | describe(task, queries, ARCHITECTURE, checkpoints)
    document |= {"recipe": recipe(), "meter": {"run": run_id, "log_sha256": file_digest(log)}}
    return document, [path for _, path in checkpoints], log


def train_unexplained(files: list[LicensedFile], queries: Path, directory: Path) -> tuple[dict[str, Any], list[Path]]:
    """A linear model whose recipe the lab keeps to itself; the document, and checkpoints from an eighth of the training on."""
    tables = _tables(files)
    task = _task(tables, queries, LINEAR)
    n_step = task.require_recipe().n_step
    run = train(task, checkpoint_steps=[n_step // 8, n_step // 4, n_step // 2, n_step], checkpoint_dir=directory)
    model_page = {
        "slug": ESTIMATED_SLUG,
        "name": "Lumen Digits, linear",
        "summary": "A linear model of the same digits, of which checkpoints are shown and no recipe.",
    }
    document = declare(model_page, files, tables) | describe(task, queries, LINEAR, run.checkpoints)
    return document, [path for _, path in run.checkpoints]


def declare(model_page: dict[str, str], files: list[LicensedFile], tables: list[pa.Table]) -> dict[str, Any]:
    """What any disclosure says (schema: /schemas/disclosure/1.json)."""
    return {
        "schema_version": 1,
        "model": model_page,
        "training_data": [
            {
                "license": file.license_id,
                "merkle_root": file.merkle_root,
                "n_records": len(table),
                "selection": "all",
                "selection_sha256": selection_digest(table["digest"]),
            }
            for file, table in zip(files, tables, strict=True)
        ],
    }


def describe(
    task: Task, queries: Path, architecture: dict[str, Any], checkpoints: Sequence[tuple[int, Path]]
) -> dict[str, Any]:
    """The evidence that every grade beyond declared has."""
    return {
        "features": {"transform": TRANSFORM, "classes": CLASSES},
        "architecture": architecture,
        "loss": "cross_entropy",
        "measurement": "cross_entropy",
        "queries": {"sha256": file_digest(queries), "n_queries": task.n_query},
        "checkpoints": [{"step": step, "sha256": file_digest(path)} for step, path in checkpoints],
    }


def recipe() -> dict[str, Any]:
    return {
        "optimizer": "sgd",
        "options": OPTIONS,
        "groups": [],
        "learning_rate": LEARNING_RATE,
        "order": {"rule": "epoch_order", "batch": BATCH, "epochs": EPOCHS, "seed": ORDER_SEED},
        "normalizer": "batch",
        "initial_state": {"rule": "seed", "seed": INITIAL_SEED},
        "clip_norm": None,
        "seed": SEED,
    }


def _tables(files: list[LicensedFile]) -> list[pa.Table]:
    return [pq.read_table(file.path, columns=["digest", "content", "label"]) for file in files]


def _task(tables: list[pa.Table], queries: Path, architecture: dict[str, Any]) -> Task:
    features = torch.cat([_features(table) for table in tables])
    targets = torch.cat([_targets(table) for table in tables])
    asked = pq.read_table(queries)
    build = architectures.builder(architecture)
    loss = architectures.per_record("cross_entropy")
    return Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(features, targets),
        queries=TensorRecords(_features(asked), _targets(asked)),
        owner=None,
        recipe=Recipe(
            optimizer="sgd",
            options=OPTIONS,
            learning_rate=LEARNING_RATE,
            order=epoch_order(len(features), BATCH, EPOCHS, ORDER_SEED),
            initial_state=initial_state_from_seed(build, INITIAL_SEED),
            seed=SEED,
        ),
    )


def selection_digest(digests: pa.ChunkedArray) -> str:
    """SHA-256 over the records' 32-byte digests, one after the other in row order."""
    return hashlib.sha256(b"".join(digests.to_pylist())).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _features(table: pa.Table) -> torch.Tensor:
    content: NDArray[np.float64] = pc.list_flatten(table["content"].combine_chunks()).to_numpy()
    return architectures.transform(TRANSFORM, torch.from_numpy(content.reshape(len(table), -1).copy()))


def _targets(table: pa.Table) -> torch.Tensor:
    return torch.from_numpy(pc.index_in(table["label"].combine_chunks(), pa.array(CLASSES)).to_numpy().astype(np.int64))
