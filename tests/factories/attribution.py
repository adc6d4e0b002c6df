"""Disclosures and results, declared or with evidence from a real training run."""

import copy
import hashlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from django.core.files.storage import default_storage
from factory.django import DjangoModelFactory
from torch import nn
from torch.nn.functional import cross_entropy

from attribution.artifacts import store_artifact
from attribution.engine import Recipe, Task, TensorRecords, architectures, epoch_order, initial_state_from_seed, train
from attribution.engine.meter_log import Head
from attribution.engine.metered import run_metered
from attribution.models import Artifact, AttributionResult, AttributionRun, MeteredRun, Share
from attribution.services.meters import PostedHead, plan_metered_run, post_heads
from attribution.services.shares import to_ppq
from marketplace import clock
from marketplace.models import Citation, DatasetVersion, Disclosure, License, Party, TrainedModel
from marketplace.services.disclosures import canonical_json, selection_digest
from tests.factories.marketplace import LicenseFactory, PartyFactory, PublishedVersionFactory

CLASSES = ["0", "1"]
Tamper = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class ModelFactory(DjangoModelFactory):
    class Meta:
        model = TrainedModel

    owner = factory.SubFactory(PartyFactory)
    slug = factory.Sequence(lambda n: f"model-{n}")
    name = factory.Sequence(lambda n: f"Model {n}")


class DisclosureFactory(DjangoModelFactory):
    """A recorded disclosure, its jobs not yet requested.

    Args:
        licenses: one citation of the whole version each; by default one new license of the model's owner.
        document: by default the declaration of those citations.
    """

    class Meta:
        model = Disclosure

    model = factory.SubFactory(ModelFactory)

    @classmethod
    def _create(
        cls,
        model_class: type[Disclosure],
        *args: Any,
        licenses: Sequence[License] | None = None,
        document: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Disclosure:
        trained: TrainedModel = fields.pop("model")
        licenses = licenses or [LicenseFactory(licensee=trained.owner)]
        document = document or declaration(licenses=licenses, slug=trained.slug, name=trained.name)
        disclosure = Disclosure.objects.create(
            **{
                "model": trained,
                "number": trained.disclosures.count() + 1,
                "document": document,
                "document_sha256": hashlib.sha256(
                    canonical_json(document) + bytes(str(trained.pk), "ascii")
                ).hexdigest(),
                "disclosed_at": clock.now(),
            }
            | fields
        )
        for position, (license, spec) in enumerate(zip(licenses, document["training_data"], strict=True)):
            Citation.objects.create(
                disclosure=disclosure,
                position=position,
                version=license.version,
                license=license,
                n_records=spec["n_records"],
                selection_sha256=spec["selection_sha256"],
            )
        return disclosure


class PublishedResultFactory(DjangoModelFactory):
    """A published result whose paid shares follow given weights.

    Args:
        shares: party → weight within `version`, or version → party → weight; scaled to sum to 10^15.
        labellers: the same for the labeller partition; by default as `shares`, as if nobody had labelled anything.
        disclosure: by default a new declaration that cites those versions, under `license` if it is given.
    """

    class Meta:
        model = AttributionResult

    @classmethod
    def _create(
        cls,
        model_class: type[AttributionResult],
        *args: Any,
        shares: Mapping[Any, Any] | None = None,
        labellers: Mapping[Any, Any] | None = None,
        version: DatasetVersion | None = None,
        disclosure: Disclosure | None = None,
        license: License | None = None,
        **fields: Any,
    ) -> AttributionResult:
        if version is None:
            named = license.version if license else disclosure and disclosure.citations.get(position=0).version
            version = named or PublishedVersionFactory()
        by_version = _by_version(shares or {version.dataset.owner: 1}, version)
        if disclosure is None:
            licenses = [license] if license else [LicenseFactory(version=one) for one in by_version]
            owner = licenses[0].licensee
            disclosure = DisclosureFactory(model=ModelFactory(owner=owner), licenses=licenses)
        grade = fields.get("grade", AttributionResult.Grade.REPLAYED)
        run, _ = AttributionRun.objects.get_or_create(
            disclosure=disclosure, grade=grade, budget=disclosure.results.count(), defaults={"status": "done"}
        )
        result = AttributionResult.objects.create(
            **{
                "disclosure": disclosure,
                "model": disclosure.model,
                "run": run,
                "number": disclosure.model.results.count() + 1,
                "grade": grade,
                "paid_by": "influence" if grade == AttributionResult.Grade.REPLAYED else "count",
            }
            | {name: value for name, value in fields.items() if name != "published_at"}
        )
        for partition, weights in (
            (Share.Partition.RIGHTS_HOLDER, by_version),
            (Share.Partition.LABELLER, _by_version(labellers, version) if labellers else by_version),
        ):
            places = [(one, party) for one, parties in weights.items() for party in parties]
            paid = to_ppq({n: weights[one][party] for n, (one, party) in enumerate(places)})
            for n, (one, party) in enumerate(places):
                Share.objects.create(
                    result=result,
                    version=one,
                    party=party,
                    partition=partition,
                    n_records=1,
                    count_ppq=paid[n],
                    paid_ppq=paid[n],
                    raw=paid[n] / 1e15,
                    low=paid[n] / 1e15 - 0.01,
                    high=paid[n] / 1e15 + 0.01,
                )
        result.status = AttributionResult.Status.PUBLISHED
        result.published_at = fields.get("published_at") or clock.now()
        result.save()
        return result


def declaration(
    *,
    licenses: Sequence[License],
    slug: str = "small-model",
    name: str = "Small model",
    selections: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """The three fields without evidence."""
    selections = selections or ["all"] * len(licenses)
    return {
        "schema_version": 1,
        "model": {"slug": slug, "name": name, "summary": "Trained for a test."},
        "training_data": [
            {
                "license": str(license.public_id),
                "merkle_root": license.version.merkle_root,
                "n_records": len(selected_rows(license.version, selection)),
                "selection": selection,
                "selection_sha256": selection_digest(version=license.version, selection=selection),
            }
            for license, selection in zip(licenses, selections, strict=True)
        ],
    }


def trained_document(
    *,
    licenses: Sequence[License],
    slug: str = "small-model",
    selections: Sequence[Any] | None = None,
    trained_on: Sequence[Any] | None = None,
    tamper: Tamper | None = None,
    alter_state: Callable[[dict[str, torch.Tensor]], None] | None = None,
    n_queries: int = 24,
    epochs: int = 2,
    batch: int = 16,
    checkpoint_steps: Sequence[int] | None = None,
    meter: "Metering | None" = None,
) -> dict[str, Any]:
    """Train a small MLP with the engine's loop on the licensed bytes, hand in its evidence, and describe it.

    An honest trainer, unless told to train on other selections than they cite, on tampered (content, targets), or to
    alter the state they hand in.
    """
    owner = licenses[0].licensee
    read = [
        _read(license.version, selection)
        for license, selection in zip(licenses, trained_on or selections or ["all"] * len(licenses), strict=True)
    ]
    content, targets = (np.concatenate(parts) for parts in zip(*read, strict=True))
    if tamper:
        content, targets = tamper(content, targets)
    width = content.shape[1]
    asked, answers = two_clouds(n_queries, width, seed=99)
    task = Task(
        model=lambda: nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, len(CLASSES))),
        loss=_loss,
        measurement=_loss,
        train=TensorRecords(_scaled(content), torch.from_numpy(targets)),
        queries=TensorRecords(_scaled(asked), torch.tensor([CLASSES.index(label) for label in answers])),
        recipe=Recipe(
            optimizer="sgd",
            options={"momentum": 0.9},
            learning_rate=0.1,
            order=epoch_order(len(content), batch, epochs, 1),
            initial_state=initial_state_from_seed(
                lambda: nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, len(CLASSES))), 7
            ),
        ),
    )
    n_step = task.require_recipe().n_step
    checkpoints = []
    queries = store_artifact(owner=owner, kind=Artifact.Kind.QUERIES, stream=queries_file(asked, answers))
    metered: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = list(checkpoint_steps or [n_step // 2, n_step])
        if meter is None:
            kept = train(task, checkpoint_steps=steps, checkpoint_dir=Path(folder)).checkpoints
        else:
            kept, metered = meter.run(
                task, owner=owner, queries_sha256=queries.sha256, steps=steps, folder=Path(folder)
            )
        for step, path in kept:
            data = path.read_bytes()
            if alter_state and step == n_step:
                data = _altered(path, alter_state)
            artifact = store_artifact(owner=owner, kind=Artifact.Kind.STATE, stream=io.BytesIO(data))
            checkpoints.append({"step": step, "sha256": artifact.sha256})
    return (
        metered
        | declaration(licenses=licenses, slug=slug, selections=selections)
        | {
            "features": {"transform": [{"kind": "scale", "divide_by": 4}], "classes": CLASSES},
            "architecture": {
                "kind": "sequential",
                "layers": [
                    {"kind": "linear", "in_features": width, "out_features": 8},
                    {"kind": "gelu"},
                    {"kind": "linear", "in_features": 8, "out_features": len(CLASSES)},
                ],
            },
            "loss": "cross_entropy",
            "measurement": "cross_entropy",
            "recipe": {
                "optimizer": "sgd",
                "options": {"momentum": 0.9},
                "groups": [],
                "learning_rate": 0.1,
                "order": {"rule": "epoch_order", "batch": batch, "epochs": epochs, "seed": 1},
                "normalizer": "batch",
                "initial_state": {"rule": "seed", "seed": 7},
                "clip_norm": None,
                "seed": 0,
            },
            "queries": {"sha256": queries.sha256, "n_queries": n_queries},
            "checkpoints": checkpoints,
        }
    )


def estimated_document(*, licenses: Sequence[License], **options: Any) -> dict[str, Any]:
    """As `trained_document`, with four checkpoints of the training and without its recipe."""
    steps = {"checkpoint_steps": [2, 4, 8, 16], "epochs": 4}
    document = trained_document(licenses=licenses, **steps | options)
    return {name: part for name, part in document.items() if name != "recipe"}


@dataclass
class Metering:
    """How a trainer meters; an honest one, unless told to alter the log or the heads.

    Args:
        alter_log: changes the log's bytes before they are handed in.
        post: called with (run, head) as each head is due; by default posts it.
        alter_task: what is metered in place of the disclosed training.
    """

    slug: str = "night-shift"
    every: int = 1
    heads_every: int = 1
    alter_log: Callable[[Path], None] | None = None
    post: Callable[[MeteredRun, Head], None] | None = None
    alter_task: Callable[[Task], Task] | None = None
    planned_queries: str | None = None

    def run(
        self, task: Task, *, owner: Party, queries_sha256: str, steps: Sequence[int], folder: Path
    ) -> tuple[list[tuple[int, Path]], dict[str, Any]]:
        run = plan_metered_run(owner=owner, slug=self.slug, queries_sha256=self.planned_queries or queries_sha256)
        post = self.post or _post_head
        log = folder / "run.meter"
        kept = run_metered(
            self.alter_task(task) if self.alter_task else task,
            log=log,
            every=self.every,
            heads=lambda head: post(run, head),
            heads_every=self.heads_every,
            checkpoint_steps=steps,
            checkpoint_dir=folder,
        )
        if self.alter_log:
            self.alter_log(log)
        with log.open("rb") as stream:
            artifact = store_artifact(owner=owner, kind=Artifact.Kind.METER, stream=stream)
        return kept, {"meter": {"run": str(run.public_id), "log_sha256": artifact.sha256}}


def _post_head(run: MeteredRun, head: Head) -> None:
    post_heads(run=run, heads=[PostedHead(head.entry, head.step, head.head)])


def metered_document(*, licenses: Sequence[License], meter: Metering | None = None, **options: Any) -> dict[str, Any]:
    """As `trained_document`, trained with the meter on and its heads posted meanwhile.

    In a test all of that is one transaction, and so one moment, to the database: see `at_their_own_moments`.
    """
    steps = {"checkpoint_steps": [4, 8, 12, 16], "epochs": 4}
    return trained_document(licenses=licenses, meter=meter or Metering(), **steps | options)


def two_clouds(n: int, width: int = 6, *, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Two overlapping Gaussian classes, in turn: (n, width) vectors and their labels."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % 2
    return np.round(rng.normal(size=(n, width)) + 1.5 * (2 * targets - 1)[:, None], 6), [CLASSES[t] for t in targets]


def queries_file(content: Any, labels: Sequence[Any] | None, **columns: Any) -> io.BytesIO:
    if isinstance(content, np.ndarray):
        content = pa.array(content.tolist(), pa.list_(pa.float64()))
    sink = io.BytesIO()
    labelled = {} if labels is None else {"label": pa.array(labels, pa.string())}
    pq.write_table(pa.table({"content": content} | labelled | columns), sink)
    sink.seek(0)
    return sink


def published_clouds(
    parties: Mapping[Party, int], *, seed: int = 0, labels: Sequence[str] | None = None, **fields: Any
) -> DatasetVersion:
    """A published version of two clouds, spread over rights holders in file order."""
    content, truth = two_clouds(sum(parties.values()), seed=seed)
    content = fields.pop("content", content.tolist())
    return PublishedVersionFactory(contributions=parties, content=content, labels=list(labels or truth), **fields)


def selected_rows(version: DatasetVersion, selection: Any) -> list[int]:
    if selection == "all":
        return list(range(version.n_records))
    return [row for start, stop in selection for row in range(start, stop)]


def _by_version(shares: Mapping[Any, Any], version: DatasetVersion) -> dict[DatasetVersion, dict[Party, float]]:
    if all(isinstance(key, Party) for key in shares):
        return {version: dict(shares)}
    return {one: dict(parties) for one, parties in shares.items()}


def _read(version: DatasetVersion, selection: Any) -> tuple[np.ndarray, np.ndarray]:
    with default_storage.open(version.parquet_key, "rb") as stored:
        table = pq.read_table(stored, columns=["content", "label"]).take(pa.array(selected_rows(version, selection)))
    content = pc.list_flatten(table["content"]).to_numpy().reshape(len(table), -1)
    return content, np.array([CLASSES.index(label) for label in table["label"].to_pylist()])


def _scaled(content: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(content).div(4).float()


def _loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def _altered(path: Path, alter: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    from safetensors.torch import load_file, save

    state = load_file(path)
    alter(state)
    return bytes(save(state))


#: Three ways to model a text, as a document says them: hashed n-grams, embedded bytes, and a small GPT.
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "ngrams": {
        "features": {
            "transform": [{"kind": "hashed_ngrams", "shortest": 1, "longest": 3, "buckets": 64}],
            "classes": CLASSES,
        },
        "architecture": {"kind": "sequential", "layers": [{"kind": "linear", "in_features": 64, "out_features": 2}]},
        "loss": "cross_entropy",
        "measurement": "cross_entropy",
        "recipe": {"optimizer": "sgd", "options": {"momentum": 0.9}, "learning_rate": 0.5},
    },
    "bytes": {
        "features": {"transform": [{"kind": "bytes", "length": 24}], "classes": CLASSES},
        "architecture": {
            "kind": "sequential",
            "layers": [
                {"kind": "mean_embedding", "num_embeddings": 257, "embedding_dim": 8},
                {"kind": "gelu"},
                {"kind": "linear", "in_features": 8, "out_features": 2},
            ],
        },
        "loss": "cross_entropy",
        "measurement": "cross_entropy",
        "recipe": {"optimizer": "adamw", "options": {"weight_decay": 0.01}, "learning_rate": 0.02},
    },
    "gpt": {
        "features": {"transform": [{"kind": "bytes", "length": 16}]},
        "architecture": {"kind": "gpt", "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2},
        "loss": "next_byte",
        "measurement": "next_byte",
        "recipe": {"optimizer": "adamw", "options": {"weight_decay": 0.01}, "learning_rate": 0.01},
    },
}


def two_moods(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """n different short texts, sad and glad in turn, and their labels; some are longer than the models look."""
    rng = np.random.default_rng(seed)
    sad, glad = ["grey", "cold", "loss", "grief", "rain", "alone"], ["sunny", "warm", "win", "joy", "dance", "friends"]
    texts = [f"{' '.join(rng.choice((sad, glad)[i % 2], 3))} №{seed}.{i}" for i in range(n)]
    return texts, [CLASSES[i % 2] for i in range(n)]


def published_texts(parties: Mapping[Party, int], *, seed: int = 0, **fields: Any) -> DatasetVersion:
    texts, labels = two_moods(sum(parties.values()), seed=seed)
    return PublishedVersionFactory(contributions=parties, content=texts, **{"labels": labels} | fields)


def text_document(
    *,
    licenses: Sequence[License],
    model: str = "ngrams",
    slug: str = "text-model",
    epochs: int = 2,
    alter: Callable[[list[str]], None] | None = None,
    classes: Sequence[str] | None = None,
    queries: tuple[list[str], list[str]] | None = None,
    **about_queries: Any,
) -> dict[str, Any]:
    """As `trained_document`, for one of TEXT_MODELS; `alter` changes what is trained on, not what is said.

    Args:
        classes, queries: instead of two moods and a dozen more of them.
    """
    owner, spec = licenses[0].licensee, copy.deepcopy(TEXT_MODELS[model])
    if classes:
        spec["features"]["classes"] = list(classes)
        spec["architecture"]["layers"][-1]["out_features"] = len(classes)
    texts, labels = (
        [value for license in licenses for value in _column(license.version, name)] for name in ("content", "label")
    )
    if alter:
        alter(texts)
    asked, answers = queries or two_moods(12, seed=99)
    classes, recipe = spec["features"].get("classes"), spec["recipe"]
    train_on, ask = (architectures.transform(spec["features"]["transform"], part) for part in (texts, asked))
    targets = [
        [torch.tensor([classes.index(label) for label in part])] if classes else [] for part in (labels, answers)
    ]
    build = architectures.builder(spec["architecture"])
    task = Task(
        model=build,
        loss=architectures.per_record(spec["loss"]),
        measurement=architectures.per_record(spec["measurement"]),
        train=TensorRecords(train_on, *targets[0]),
        queries=TensorRecords(ask, *targets[1]),
        recipe=Recipe(
            optimizer=recipe["optimizer"],
            options=recipe["options"],
            learning_rate=recipe["learning_rate"],
            order=epoch_order(len(texts), 16, epochs, 1),
            initial_state=initial_state_from_seed(build, 7),
        ),
    )
    n_step = task.require_recipe().n_step
    with tempfile.TemporaryDirectory() as folder:
        run = train(task, checkpoint_steps=[n_step], checkpoint_dir=Path(folder))
        with run.checkpoints[-1][1].open("rb") as stream:
            state = store_artifact(owner=owner, kind=Artifact.Kind.STATE, stream=stream)
    stored = store_artifact(
        owner=owner, kind=Artifact.Kind.QUERIES, stream=queries_file(asked, answers if classes else None)
    )
    return (
        declaration(licenses=licenses, slug=slug)
        | {name: spec[name] for name in ("features", "architecture", "loss", "measurement")}
        | {
            "recipe": recipe
            | {
                "order": {"rule": "epoch_order", "batch": 16, "epochs": epochs, "seed": 1},
                "initial_state": {"rule": "seed", "seed": 7},
            },
            "queries": {"sha256": stored.sha256, "n_queries": len(asked)} | about_queries,
            "checkpoints": [{"step": n_step, "sha256": state.sha256}],
        }
    )


def _column(version: DatasetVersion, name: str) -> list[Any]:
    with default_storage.open(version.parquet_key, "rb") as stored:
        return pq.read_table(stored, columns=[name])[name].to_pylist()
