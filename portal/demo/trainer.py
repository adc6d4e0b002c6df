"""What Lumen Lab does on its own machine: train on the files it licensed, then write down what it did.

Nothing here sees the database: it reads the downloaded Parquet, uses the engine as a library and writes a checkpoint and
the disclosure document.
"""

import hashlib
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

MODEL_SLUG = "lumen-digits-mlp"
CLASSES = [str(digit) for digit in range(10)]
ARCHITECTURE = {
    "kind": "sequential",
    "layers": [
        {"kind": "linear", "in_features": 64, "out_features": 32},
        {"kind": "gelu"},
        {"kind": "linear", "in_features": 32, "out_features": 10},
    ],
}
TRANSFORM = [{"kind": "scale", "divide_by": 16}]
OPTIONS = {"momentum": 0.9}
LEARNING_RATE = 0.05
BATCH, EPOCHS, ORDER_SEED, INITIAL_SEED, SEED = 64, 10, 1, 7, 0


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
    tables = [pq.read_table(file.path, columns=["digest", "content", "label"]) for file in files]
    features = torch.cat([_features(table) for table in tables])
    targets = torch.cat([_targets(table) for table in tables])
    asked = pq.read_table(queries)
    query_features, query_targets = _features(asked), _targets(asked)

    build = architectures.builder(ARCHITECTURE)
    loss = architectures.per_record("cross_entropy")
    order = epoch_order(len(features), BATCH, EPOCHS, ORDER_SEED)
    task = Task(
        model=build,
        loss=loss,
        measurement=loss,
        train=TensorRecords(features, targets),
        queries=TensorRecords(query_features, query_targets),
        owner=None,
        recipe=Recipe(
            optimizer="sgd",
            options=OPTIONS,
            learning_rate=LEARNING_RATE,
            order=order,
            initial_state=initial_state_from_seed(build, INITIAL_SEED),
            seed=SEED,
        ),
    )
    run = train(task)
    checkpoint = directory / "final.safetensors"
    save_file(run.state.tensors(), checkpoint)

    model = build()
    model.load_state_dict(run.model_state())
    with torch.no_grad():
        accuracy = (model.eval()(query_features).argmax(1) == query_targets).float().mean().item()
    n_step = len(order)
    document = describe(
        files, tables, queries=queries, n_query=len(query_targets), checkpoint=checkpoint, n_step=n_step
    )
    return Trained(checkpoint, document, accuracy, len(features), n_step)


def describe(
    files: list[LicensedFile], tables: list[pa.Table], *, queries: Path, n_query: int, checkpoint: Path, n_step: int
) -> dict[str, Any]:
    """The disclosure document (schema: /schemas/disclosure/1.json)."""
    return {
        "schema_version": 1,
        "model": {
            "slug": MODEL_SLUG,
            "name": "Lumen Digits MLP",
            "summary": "A small network that reads handwritten digits; the demo's model.",
        },
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
        "features": {"transform": TRANSFORM, "classes": CLASSES},
        "architecture": ARCHITECTURE,
        "loss": "cross_entropy",
        "measurement": "cross_entropy",
        "recipe": {
            "optimizer": "sgd",
            "options": OPTIONS,
            "groups": [],
            "learning_rate": LEARNING_RATE,
            "order": {"rule": "epoch_order", "batch": BATCH, "epochs": EPOCHS, "seed": ORDER_SEED},
            "normalizer": "batch",
            "initial_state": {"rule": "seed", "seed": INITIAL_SEED},
            "clip_norm": None,
            "seed": SEED,
        },
        "queries": {"sha256": file_digest(queries), "n_queries": n_query},
        "checkpoints": [{"step": n_step, "sha256": file_digest(checkpoint)}],
    }


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
