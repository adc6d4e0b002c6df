"""From a disclosure to an engine `Task`, without running anyone's code.

Training record k is the k-th selected record: citations in document order, rows ascending. Who is paid for it, and which
records are copies of each other, is read here once, so that money, measurement and counting speak of the same players.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from django.core.files.storage import default_storage
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.artifacts import find_artifact, find_not_finite, local_path, read_header, read_queries
from attribution.engine import EngineError, Recipe, Task, TensorRecords, architectures, epoch_order
from attribution.engine.estimated import check_cost
from attribution.engine.task import initial_state_from_seed
from attribution.engine.training import Program
from attribution.errors import EvidenceInvalid
from attribution.grades import Grade, disclosed_grade
from attribution.models import Artifact
from attribution.queries import Queries
from marketplace.ingest.copies import text_fingerprints, vector_fingerprints
from marketplace.models import Citation, Contribution, DatasetVersion, Disclosure, RecordCopy, RecordFingerprint
from marketplace.services.versions import fingerprint_key

Ints = NDArray[np.int64]
Content = NDArray[np.float64] | list[str]  # (n, length), or n texts

NOBODY = -1
MAX_REPLAYED = 1_000_000  # records; their columns are held at once
MAX_STEPS = 200_000
MAX_SLOTS = 50_000_000  # steps · batch: 400 MB of order
LOOKED_AT = 256  # records at once, where no recipe says how many
FINGERPRINTS_AT_ONCE = 5_000
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}  # torch's → safetensors' names


@dataclass(frozen=True, order=True)
class Payee:
    """One party within one cited version: an owner, to the engine."""

    version_id: int
    party_id: int


@dataclass(frozen=True)
class TrainingRecords:
    """The selected records in training order, and whose they are for money."""

    versions: tuple[DatasetVersion, ...]  # by citation
    citation: Ints  # (n_train,): which citation a record comes from
    row: Ints  # (n_train,): its row in that version
    copy_of: Ints  # (n_train,): the first registrant among the selected, or the record itself
    owner: Ints  # (n_train,): index into `owners`; a copy's is its original's rights holder
    owners: tuple[Payee, ...]
    labeller: Ints  # (n_train,): index into `labellers`; a record that nobody labelled is its rights holder's here too
    labellers: tuple[Payee, ...]

    def __len__(self) -> int:
        return len(self.row)

    def distinct_counts(self, ids: Ints) -> dict[int, int]:
        """Id → how many records that repeat no other selected one."""
        distinct = ids[self.copy_of == np.arange(len(self))]
        return {int(key): int(n) for key, n in zip(*np.unique(distinct, return_counts=True), strict=True)}


def check_evidence(disclosure: Disclosure) -> None:
    """Refuse, before it is published, a disclosure from which no task can be built; reads labels, not contents.

    Raises:
        EvidenceInvalid, ArtifactMissing, ArtifactInvalid: with a pointer into the document.
    """
    document = disclosure.document
    if disclosed_grade(document) == Grade.DECLARED:
        return
    recipe: Mapping[str, Any] | None = document.get("recipe")
    n_cited = sum(citation.n_records for citation in disclosure.citations.all())
    if n_cited > MAX_REPLAYED:
        raise EvidenceInvalid(
            f"It cites {n_cited:,} records; at most {MAX_REPLAYED:,} can be replayed or looked at. Disclose it without evidence, or cite less.",
            pointers={"/training_data": f"{n_cited:,} records"},
        )
    records = read_records(disclosure)
    _check_parts(document)
    sample = _task(disclosure, records, rows=2)
    content = sample.train[torch.arange(1)][0]
    with pointing("/architecture"):
        batch = recipe["order"]["batch"] if recipe else LOOKED_AT
        architectures.check_tokens(document["architecture"], document["features"]["transform"])
        architectures.check_activations(
            sample.model, content.shape[1:], batch=min(batch, len(records)), dtype=content.dtype
        )
    _probe(sample, _outputs(document, content))
    if recipe:
        _order(recipe, len(records))
    with pointing(""):
        if not recipe:
            check_cost(sample, n_train=len(records))
        expected = Program(sample).blank(1).tensors()
    n_step = _n_step(recipe, len(records)) if recipe else document["checkpoints"][-1]["step"]
    _check_checkpoints(disclosure, n_step=n_step, expected=expected)
    queries, _ = _queries(disclosure)
    _check_disjoint(disclosure, records, queries)


def build_task(
    disclosure: Disclosure,
    records: TrainingRecords | None = None,
    checkpoints: Sequence[tuple[int, Any]] = (),
) -> Task:
    """The whole task, contents included; its checkpoints are those given, see `checkpoint_paths`."""
    return _task(disclosure, records or read_records(disclosure), checkpoints=checkpoints)


def sample_task(disclosure: Disclosure, records: TrainingRecords) -> Task:
    """The task with its first two records and all of its queries: enough to build model, optimizer and meter."""
    return _task(disclosure, records, rows=2)


def build_recipe(document: Mapping[str, Any], *, n_train: int) -> Recipe:
    """The document's recipe by itself, its whole order included."""
    with pointing(""):
        return _recipe(document["recipe"], _builder(document), n_train=n_train)


def read_records(disclosure: Disclosure) -> TrainingRecords:
    """Which records a disclosure cites, and whose they are; reads no contents."""
    citations = list(disclosure.citations.select_related("version").order_by("position"))
    specs = disclosure.document["training_data"]
    rank = {
        citation.version_id: number
        for number, citation in enumerate(sorted(citations, key=lambda c: (c.version.published_at, c.version_id)))
    }
    parts = [_cited(citation, spec, rank) for citation, spec in zip(citations, specs, strict=True)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    versions = tuple(citation.version for citation in citations)
    version_ids = np.array([version.pk for version in versions])[columns["citation"]]
    labeller = np.where(columns["labeller_party"] == NOBODY, columns["party"], columns["labeller_party"])
    owner, owners = _payees(version_ids, columns["party"])
    labelled, labellers = _payees(version_ids, labeller)
    return TrainingRecords(
        versions=versions,
        citation=columns["citation"],
        row=columns["row"],
        copy_of=copy_classes(
            roots=np.stack([columns["root_version"], columns["root_row"]], 1),
            places=np.stack([version_ids, columns["row"]], 1),
            rank=columns["rank"],
            holder=columns["holder"],
            labeller=columns["labeller"],
        ),
        owner=owner,
        owners=owners,
        labeller=labelled,
        labellers=labellers,
    )


def copy_classes(*, roots: Ints, places: Ints, rank: Ints, holder: Ints, labeller: Ints) -> Ints:
    """The representative of each record: its original where that is selected, else the first registrant among the selected.

    Label events on one item in one version (one holder, two labellers) are not copies of each other, unless the item's
    original is selected too: then each of them repeats that.

    Args:
        roots: (n, 2): version and row of the original that each record repeats; its own place if it repeats none.
        places: (n, 2): version and row of each record.
        rank: (n,): when its version was published, 0 first.
        holder, labeller: (n,): contribution numbers within its version.
    """
    n = len(roots)
    copy_of = np.arange(n)
    _, group, size = np.unique(roots, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    shared = np.flatnonzero(size[group] > 1)
    by_registration = shared[np.lexsort((places[shared, 1], rank[shared], group[shared]))]
    bounds = np.flatnonzero(np.diff(group[by_registration])) + 1
    for members in np.split(by_registration, bounds) if len(by_registration) else ():
        is_original = (roots[members] == places[members]).all(1)
        if is_original.any():
            copy_of[members] = members[np.argmax(is_original)]
            continue
        first = members[0]
        events = {labeller[first]: first}  # of the first version's item, by who labelled it
        for record in members[1:]:
            is_event = rank[record] == rank[first] and holder[record] == holder[first]
            is_event = is_event and labeller[record] != NOBODY and labeller[first] != NOBODY
            copy_of[record] = events.setdefault(labeller[record], record) if is_event else first
    return copy_of


def class_indices(records: TrainingRecords, classes: Sequence[str]) -> Ints:
    """(n_train,): each record's label as an index into `classes`.

    Raises:
        EvidenceInvalid: a label is missing or not among the classes.
    """
    labels = _column(records, "label", pa.string())
    return _indices(
        labels,
        classes,
        lambda at: (
            f"record {int(records.row[at])} of {records.versions[int(records.citation[at])]}",
            f"/training_data/{int(records.citation[at])}",
        ),
    )


def _cited(citation: Citation, spec: Mapping[str, Any], rank: Mapping[int, int]) -> dict[str, Ints]:
    version = citation.version
    row = _rows(spec["selection"], version.n_records)
    n = len(row)
    numbers = _read(version, row, ["rights_holder", "labeller"])
    holder, labeller = (numbers[name].to_numpy().astype(np.int64) for name in ("rights_holder", "labeller"))
    party = {role: _parties(version, role) for role in Contribution.Role.values}
    columns = {
        "citation": np.full(n, citation.position),
        "row": row,
        "rank": np.full(n, rank[version.pk]),
        "holder": holder,
        "labeller": labeller,
        "party": party["rights_holder"][holder],
        "labeller_party": np.where(labeller == NOBODY, NOBODY, party["labeller"][labeller]),
        "root_version": np.full(n, version.pk),
        "root_row": row.copy(),
    }
    position = np.full(version.n_records, -1)
    position[row] = np.arange(n)
    for copied, original_version, original_row, payee, copied_labeller in (
        RecordCopy.objects.filter(version=version)
        .order_by("row")
        .values_list("row", "original_version_id", "original_row", "payee_id", "labeller_id")
        .iterator()
    ):
        at = position[copied]
        if at < 0:
            continue
        columns["root_version"][at], columns["root_row"][at] = original_version, original_row
        columns["party"][at] = payee
        columns["labeller_party"][at] = NOBODY if copied_labeller is None else copied_labeller
    return columns


def _rows(selection: str | Sequence[Sequence[int]], n_records: int) -> Ints:
    if isinstance(selection, str):  # "all"
        return np.arange(n_records)
    return np.concatenate([np.arange(start, stop) for start, stop in selection])


def _parties(version: DatasetVersion, role: str) -> Ints:
    """(n_contribution + 1,): party ids by contribution number; the last one answers for -1."""
    parties = version.contributions.filter(role=role).order_by("number").values_list("party_id", flat=True)
    return np.array([*parties, NOBODY], dtype=np.int64)


def _payees(version_ids: Ints, party_ids: Ints) -> tuple[Ints, tuple[Payee, ...]]:
    pairs, index = np.unique(np.stack([version_ids, party_ids], 1), axis=0, return_inverse=True)
    return index.reshape(-1), tuple(Payee(int(version), int(party)) for version, party in pairs)


def _read(version: DatasetVersion, row: Ints, columns: list[str]) -> pa.Table:
    """Some columns of the selected rows (ascending), batch by batch: what is not selected is not kept."""
    kept, start, taken = [], 0, 0
    with default_storage.open(version.parquet_key, "rb") as stored, pq.ParquetFile(stored) as file:
        for batch in file.iter_batches(batch_size=16_384, columns=columns):
            stop = int(np.searchsorted(row, start + len(batch)))
            if stop > taken:
                kept.append(batch.take(pa.array(row[taken:stop] - start)))
            taken, start = stop, start + len(batch)
            if taken == len(row):
                break
        return pa.Table.from_batches(kept, schema=pa.schema([file.schema_arrow.field(name) for name in columns]))


def read_value(version: DatasetVersion, row: int, column: str) -> Any:
    """One record's value of one column."""
    return _read(version, np.array([row]), [column])[column][0].as_py()


def _column(records: TrainingRecords, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    chunks: list[pa.Array] = []
    for number, version in enumerate(records.versions):
        chunks += _read(version, records.row[records.citation == number], [name])[name].cast(kind).chunks
    return pa.chunked_array(chunks, type=kind)


def _indices(
    labels: pa.ChunkedArray | Sequence[str], classes: Sequence[str], place: Callable[[int], tuple[str, str]]
) -> Ints:
    known = pa.array(classes, pa.string())
    labels = labels if isinstance(labels, pa.ChunkedArray) else pa.chunked_array([pa.array(labels, pa.string())])
    found = pc.index_in(labels, known)
    if found.null_count:
        at = int(pc.index(pc.is_null(found), True).as_py())
        where, pointer = place(at)
        text = labels[at].as_py()
        what = "no label" if text is None else f"label {text!r}"
        listed = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        raise EvidenceInvalid(
            f"{where[0].upper()}{where[1:]} has {what}, which is none of the classes {listed}. Leave it out of the "
            "selection or add its class.",
            pointers={pointer: what, "/features/classes": f"lacks {text!r}"},
        )
    return found.to_numpy().astype(np.int64)


def _features(content: Content, document: Mapping[str, Any]) -> Tensor:
    numbers = torch.from_numpy(content) if isinstance(content, np.ndarray) else content
    with pointing("/features/transform"):
        return architectures.transform(document["features"]["transform"], numbers)


def _contents(records: TrainingRecords, rows: int | None = None) -> Content:
    """(n_train, length), or the texts, of all selected records, or of the first few of the first citation."""
    kinds = [version.features.get("content", {}).get("kind") for version in records.versions]
    lengths = [version.features["content"].get("length") for version in records.versions]
    for number, version in enumerate(records.versions):
        if kinds[number] != kinds[0]:
            raise EvidenceInvalid(
                f"{version} holds {kinds[number]}s, {records.versions[0]} {kinds[0]}s; one model takes one kind.",
                pointers={f"/training_data/{number}": f"{kinds[number]}s"},
            )
        if lengths[number] != lengths[0]:
            raise EvidenceInvalid(
                f"{version} has vectors of {lengths[number]} numbers, {records.versions[0]} of {lengths[0]}.",
                pointers={f"/training_data/{number}": f"{lengths[number]} numbers a record"},
            )
    parts = [
        _read(version, records.row[records.citation == number][:rows], ["content"])["content"]
        for number, version in enumerate(records.versions[: 1 if rows else None])
    ]
    if kinds[0] == "text":
        return [text for part in parts for text in part.to_pylist()]
    return np.concatenate([pc.list_flatten(part).to_numpy().reshape(len(part), -1) for part in parts])


def _check_parts(document: Mapping[str, Any]) -> None:
    """Refuse parts that do not belong together: next_byte asks a gpt about bytes and looks at no label, the others do."""
    features, kind = document["features"], document["architecture"]["kind"]
    steps = [step["kind"] for step in features["transform"]]
    if kind != "gpt":
        for name in ("loss", "measurement"):
            if document[name] == "next_byte":
                raise _unfit(f"/{name}", f"next_byte is a gpt's; of a {kind} model ask cross_entropy or squared_error")
        if "classes" not in features:
            raise _unfit("/features/classes", f"{document['loss']} needs the labels, in the order of the outputs")
        return
    for name in ("loss", "measurement"):
        if document[name] != "next_byte":
            raise _unfit(f"/{name}", f"a gpt says what follows, so its {name} is next_byte")
    if steps != ["bytes"]:
        raise _unfit("/features/transform", 'a gpt takes [{"kind": "bytes", "length": …}] and nothing else')
    if "classes" in features:
        raise _unfit("/features/classes", "next_byte looks at no label; leave the classes out")


def _unfit(pointer: str, what: str) -> EvidenceInvalid:
    return EvidenceInvalid(f"{pointer}: {what}.", pointers={pointer: what})


def _outputs(document: Mapping[str, Any], content: Tensor) -> tuple[int, ...]:
    """The shape that the model's output for one record must have."""
    classes = document["features"].get("classes")
    return (*content.shape[1:], architectures.VOCABULARY) if classes is None else (len(classes),)


def _task(
    disclosure: Disclosure,
    records: TrainingRecords,
    rows: int | None = None,
    checkpoints: Sequence[tuple[int, Any]] = (),
) -> Task:
    """The task; with `rows`, a small one of that many records, which shows whether its parts fit together."""
    document = disclosure.document
    classes = document["features"].get("classes")
    n_train = (rows and min(rows, len(records))) or len(records)
    targets = [] if classes is None else [torch.from_numpy(class_indices(records, classes)[:n_train])]
    queries, query_targets = _queries(disclosure)
    build, spec = _builder(document), document.get("recipe")
    if records.versions[0].features["content"]["kind"] == "text":
        with pointing("/features/transform"):
            architectures.check_features(document["features"]["transform"], len(records))
    content = _contents(records, rows)[:n_train]
    _check_alike(content, queries)
    train, asked = (_features(part, document) for part in (content, queries))
    is_whole = rows is None
    with pointing(""):
        return Task(
            model=build,
            loss=architectures.per_record(document["loss"], pointer="/loss"),
            measurement=architectures.per_record(document["measurement"], pointer="/measurement"),
            train=TensorRecords(train, *targets),
            queries=TensorRecords(asked, *query_targets),
            owner=torch.from_numpy(records.owner) if is_whole else None,
            groups={"labeller": torch.from_numpy(records.labeller)} if is_whole else {},
            copy_of=torch.from_numpy(records.copy_of) if is_whole else None,
            recipe=_recipe(spec, build, n_train=len(records), sampled=None if is_whole else n_train) if spec else None,
            checkpoints=checkpoints,
        )


def _recipe(
    spec: Mapping[str, Any], build: Callable[[], nn.Module], *, n_train: int, sampled: int | None = None
) -> Recipe:
    """The document's recipe; `sampled`: one step over so many records in its place."""
    rate = spec["learning_rate"]
    if isinstance(rate, list):
        rate = torch.tensor(rate if sampled is None else rate[:1], dtype=torch.float64)
    return Recipe(
        optimizer=spec["optimizer"],
        options=spec.get("options", {}),
        groups=[(regex, options) for regex, options in spec.get("groups", [])],
        learning_rate=rate,
        order=_order(spec, n_train) if sampled is None else torch.arange(sampled)[None],
        normalizer=spec.get("normalizer", "batch"),
        initial_state=initial_state_from_seed(build, spec["initial_state"]["seed"]),
        clip_norm=spec.get("clip_norm"),
        seed=spec.get("seed", 0),
        order_seed=spec["order"]["seed"] if sampled is None else None,
        initial_seed=spec["initial_state"]["seed"],
    )


def _check_alike(content: Content, queries: Content) -> None:
    """Refuse queries of another kind, or another length, than the records'."""
    pointer = "/queries/sha256"
    if isinstance(content, list) != isinstance(queries, list):
        kinds = [("texts" if isinstance(part, list) else "vectors") for part in (queries, content)]
        raise EvidenceInvalid(
            f"The queries are {kinds[0]}, the training records {kinds[1]}.", pointers={pointer: f"not {kinds[1]}"}
        )
    if isinstance(content, np.ndarray) and isinstance(queries, np.ndarray) and content.shape[1] != queries.shape[1]:
        raise EvidenceInvalid(
            f"The queries have {queries.shape[1]} numbers each, the training records {content.shape[1]}.",
            pointers={pointer: f"{queries.shape[1]} numbers a query"},
        )


def read_query_file(disclosure: Disclosure) -> Queries:
    """The evaluation queries that a document names.

    Raises:
        ArtifactMissing, EvidenceInvalid: they were not handed in, or are another number.
    """
    pointer = "/queries/sha256"
    artifact = find_artifact(
        owner=disclosure.model.owner,
        kind=Artifact.Kind.QUERIES,
        sha256=disclosure.document["queries"]["sha256"],
        pointer=pointer,
    )
    queries = read_queries(artifact)
    stated = disclosure.document["queries"]["n_queries"]
    if stated != len(queries):
        raise EvidenceInvalid(
            f"The document says {stated} queries, the file has {len(queries)}.",
            pointers={"/queries/n_queries": f"the file has {len(queries)}"},
        )
    return queries


def _queries(disclosure: Disclosure) -> tuple[Content, list[Tensor]]:
    """Contents and, for a model of classes, the targets."""
    queries, classes = read_query_file(disclosure), disclosure.document["features"].get("classes")
    if classes is None:
        return queries.content, []
    targets = _indices(queries.labels, classes, lambda at: (f"query {at}", "/queries/sha256"))
    return queries.content, [torch.from_numpy(targets)]


def _builder(document: Mapping[str, Any]) -> Callable[[], nn.Module]:
    with pointing("/architecture"):
        return architectures.builder(document["architecture"])


def _order(spec: Mapping[str, Any], n_train: int) -> Tensor:
    """The rule's order, counted before it is made."""
    rule = spec["order"]
    steps = _n_step(spec, n_train)
    if steps > MAX_STEPS or steps * rule["batch"] > MAX_SLOTS:
        raise EvidenceInvalid(
            f"{rule['epochs']} epochs of {n_train} records in batches of {rule['batch']} are {steps} steps; at most "
            f"{MAX_STEPS} steps and {MAX_SLOTS} slots can be replayed.",
            pointers={"/recipe/order/epochs": f"{steps} steps"},
        )
    rate = spec["learning_rate"]
    if isinstance(rate, list) and len(rate) != steps:
        raise EvidenceInvalid(
            f"There are {len(rate)} learning rates for {steps} steps.",
            pointers={"/recipe/learning_rate": f"{len(rate)} rates"},
        )
    with pointing("/recipe/order"):
        return epoch_order(n_train, rule["batch"], rule["epochs"], rule["seed"])


def _n_step(spec: Mapping[str, Any], n_train: int) -> int:
    epochs, batch = spec["order"]["epochs"], spec["order"]["batch"]
    return int(epochs) * math.ceil(n_train / batch)


def _probe(task: Task, wanted: tuple[int, ...]) -> None:
    """Show the model two records: what it refuses of their values, or too few outputs, are found now."""
    module, batch = task.model(), task.train[torch.arange(len(task.train))]
    try:
        with torch.no_grad():
            outputs = module(batch[0])
    except (RuntimeError, IndexError, TypeError, ValueError) as error:  # an embedding's index out of range, say
        raise EvidenceInvalid(
            f"The architecture does not take these records: {error}", pointers={"/architecture": str(error)}
        ) from error
    if outputs.shape != (len(task.train), *wanted):
        what = f"{wanted[-1]} classes" if len(wanted) == 1 else f"outputs of shape {wanted}"
        pointers = {"/architecture": f"{tuple(outputs.shape[1:])} outputs"}
        raise EvidenceInvalid(
            f"The architecture gives outputs of shape {tuple(outputs.shape[1:])} for {what}; it needs one "
            "number a class.",
            pointers=pointers | ({"/features/classes": what} if len(wanted) == 1 else {}),
        )


def _check_checkpoints(disclosure: Disclosure, *, n_step: int, expected: Mapping[str, Tensor]) -> None:
    """Steps ascend to the last one; every file holds the model's tensors, and all of the optimizer's or none."""
    before = 0
    for number, spec in enumerate(disclosure.document["checkpoints"]):
        pointer = f"/checkpoints/{number}"
        if not before < spec["step"] <= n_step:
            raise EvidenceInvalid(
                f"Checkpoint {number} is at step {spec['step']}; steps ascend and the training has {n_step}.",
                pointers={f"{pointer}/step": "out of order" if spec["step"] <= n_step else f"beyond {n_step}"},
            )
        before = spec["step"]
        artifact = find_artifact(
            owner=disclosure.model.owner, kind=Artifact.Kind.STATE, sha256=spec["sha256"], pointer=f"{pointer}/sha256"
        )
        with local_path(artifact) as path:
            found = read_header(path)
        if "recipe" not in disclosure.document:  # which optimizer it was is not known, and its state not looked at
            found = {name: entry for name, entry in found.items() if not name.startswith("optimizer.")}
        has_optimizer = any(name.startswith("optimizer.") for name in found)
        wanted = {
            name: (DTYPES[tensor.dtype], list(tensor.shape))
            for name, tensor in expected.items()
            if has_optimizer or name.startswith("model.")
        }
        for name in [*wanted, *sorted(found)]:
            if found.get(name) != wanted.get(name):
                has, needs = (_described(entries.get(name)) for entries in (found, wanted))
                raise EvidenceInvalid(
                    f"Checkpoint {number} has {has} under {name}; the architecture and its optimizer have {needs}.",
                    pointers={f"{pointer}/sha256": f"{name}: {has} instead of {needs}"},
                )
        with local_path(artifact) as path:
            broken = find_not_finite(path)
        if broken:
            raise EvidenceInvalid(
                f"Checkpoint {number} holds NaN or infinity in {broken}; disclose a training that did not diverge.",
                pointers={f"{pointer}/sha256": f"{broken} is not finite"},
            )
    if before != n_step:
        raise EvidenceInvalid(
            f"The last checkpoint is at step {before}; it must be the final state, step {n_step}.",
            pointers={"/checkpoints": f"end at {before} of {n_step}"},
        )


def _described(entry: tuple[str, list[int]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} of shape {entry[1]}"


@contextmanager
def checkpoint_paths(disclosure: Disclosure) -> Iterator[list[tuple[int, Any]]]:
    """[(completed steps, a local file)] of the document's checkpoints."""
    with ExitStack() as stack:
        paths = []
        for number, spec in enumerate(disclosure.document["checkpoints"]):
            artifact = find_artifact(
                owner=disclosure.model.owner,
                kind=Artifact.Kind.STATE,
                sha256=spec["sha256"],
                pointer=f"/checkpoints/{number}/sha256",
            )
            paths.append((spec["step"], stack.enter_context(local_path(artifact))))
        yield paths


def _check_disjoint(disclosure: Disclosure, records: TrainingRecords, queries: Content) -> None:
    """A query that repeats a training record would measure memory, not learning; found by fingerprint."""
    key = fingerprint_key()
    prints = text_fingerprints(key, queries) if isinstance(queries, list) else vector_fingerprints(key, list(queries))
    citation_of = {version.pk: number for number, version in enumerate(records.versions)}
    rows_of = {number: np.sort(records.row[records.citation == number]) for number in citation_of.values()}
    for start in range(0, len(prints), FINGERPRINTS_AT_ONCE):
        asked = {value: start + at for at, value in enumerate(prints[start : start + FINGERPRINTS_AT_ONCE])}
        found = RecordFingerprint.objects.filter(version__in=records.versions, fingerprint__in=list(asked))
        for version_id, row, value in found.order_by("version", "row").values_list("version", "row", "fingerprint"):
            rows = rows_of[citation_of[version_id]]
            at = np.searchsorted(rows, row)
            if at < len(rows) and rows[at] == row:
                query = asked[bytes(value)]
                raise EvidenceInvalid(
                    f"Query {query} repeats record {row} of {records.versions[citation_of[version_id]]}, which the model "
                    "was trained on. Leave it out of the queries.",
                    pointers={"/queries/sha256": f"query {query} repeats a training record"},
                )


@contextmanager
def pointing(prefix: str) -> Iterator[None]:
    """Turn the engine's refusal into the disclosure's, with a pointer into the document."""
    try:
        yield
    except EngineError as error:
        pointer = prefix + error.pointer
        raise EvidenceInvalid(
            f"{pointer or 'The document'}: {error.reason}", pointers={pointer: error.reason}
        ) from error
