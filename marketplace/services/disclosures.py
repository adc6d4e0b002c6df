"""Disclosures: a document is checked against its schema and against what its owner is licensed to use, then kept for ever."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from django.core.files.storage import default_storage
from django.db import IntegrityError, connection, transaction
from django.db.models import Max
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError, best_match

from marketplace import clock
from marketplace.errors import DomainError, InvalidInput
from marketplace.models import Citation, DatasetVersion, Disclosure, License, Party, TrainedModel, User
from marketplace.services import audit

logger = logging.getLogger(__name__)

SCHEMA_PATH = Path(__file__).resolve().parent.parent / "schemas" / "disclosure-1.schema.json"
DIGEST_BYTES = 32
MAX_POINTERS = 20  # of one refusal; a document of another kind has thousands
BATCH_ROWS = 65_536


class DisclosureInvalid(InvalidInput):
    """The document does not follow the schema."""

    code = "disclosure_invalid"


class CitationInvalid(InvalidInput):
    """A citation is not covered by a license, or does not describe the records it names."""

    code = "citation_invalid"


class ModelSlugTaken(DomainError):
    """The model's address belongs to another party."""

    code = "model_slug_taken"


@cache
def disclosure_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the document, as published."""
    schema: dict[str, Any] = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema


def canonical_json(document: Any) -> bytes:
    """The text that is hashed: keys sorted, no spaces, UTF-8, numbers without a fraction as integers.

    The last is what PostgreSQL's jsonb would make of them anyway: what is stored has the digest of what was sent.
    """
    text = json.dumps(_plain(document), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def validate_document(document: Any) -> None:
    """Check a parsed document against the schema; says where it fails and what would do.

    Raises:
        DisclosureInvalid: with a JSON pointer for each of the first problems.
    """
    errors = list(islice(_Validator(disclosure_schema()).iter_errors(document), MAX_POINTERS))
    if not errors:
        return
    pointers: dict[str, str] = {}
    for error in (_deepest(error) for error in errors):
        for where, what in _explain(error):
            pointers.setdefault(where, what)
    where, what = next(iter(_explain(_deepest(best_match(errors)))))
    raise DisclosureInvalid(
        f"{where or 'The document'}: {what} The schema is at /schemas/disclosure/1.json.",
        pointers=dict(list(pointers.items())[:MAX_POINTERS]),
    )


def record_disclosure(*, owner: Party, document: dict[str, Any], user: User | None = None) -> Disclosure:
    """Keep a disclosure and its citations; the same document again is the same disclosure.

    What needs the engine (architecture, labels, checkpoints) is `attribution.services.disclosures.disclose_model`'s to check.

    Raises:
        DisclosureInvalid, CitationInvalid, ModelSlugTaken: see the classes; nothing was written.
    """
    validate_document(document)
    canonical = canonical_json(document)
    digest = hashlib.sha256(canonical).hexdigest()
    if known := _find_disclosure(owner, digest):
        return known
    licenses = _check_citations(owner, document["training_data"])
    try:
        disclosure = _write(owner, user, json.loads(canonical), digest, licenses)
    except IntegrityError:
        # The same document came in at the same moment; anything else that the database refused is not ours to hide.
        if known := _find_disclosure(owner, digest):
            return known
        raise
    logger.info("Disclosed model=%s number=%s citations=%s", disclosure.model_id, disclosure.number, len(licenses))
    return disclosure


def selection_digest(*, version: DatasetVersion, selection: Any) -> str:
    """SHA-256 over the digests of the selected records in row order, read from the stored Parquet in batches.

    Args:
        selection: "all", or ascending half-open ranges within the version, as in the document.
    """
    hashed = hashlib.sha256()
    ranges = iter([[0, version.n_records]] if selection == "all" else selection)
    first, last = next(ranges)
    with default_storage.open(version.parquet_key, "rb") as stored:
        for start, digests in _digests(stored):
            stop = start + len(digests) // DIGEST_BYTES
            while first < stop:
                hashed.update(digests[(first - start) * DIGEST_BYTES : (min(last, stop) - start) * DIGEST_BYTES])
                if last > stop:
                    first = stop  # the range goes on in the next batch
                else:
                    first, last = next(ranges, (version.n_records, version.n_records))
    return hashed.hexdigest()


@transaction.atomic
def _write(
    owner: Party, user: User | None, document: dict[str, Any], digest: str, licenses: list[License]
) -> Disclosure:
    described = document["model"]
    _hold_live(licenses)
    TrainedModel.objects.get_or_create(slug=described["slug"], defaults={"owner": owner, "name": described["name"]})
    model = TrainedModel.objects.select_for_update().get(slug=described["slug"])  # its disclosures are numbered in turn
    if model.owner_id != owner.pk:
        raise ModelSlugTaken(
            f"The address '{model.slug}' is another party's model; choose another slug.",
            pointers={"/model/slug": "taken"},
        )
    model.name, model.summary = described["name"], described.get("summary", "")
    model.save(update_fields=["name", "summary"])
    disclosure = Disclosure.objects.create(
        model=model,
        number=(model.disclosures.aggregate(highest=Max("number"))["highest"] or 0) + 1,
        document=document,
        document_sha256=digest,
        disclosed_at=clock.now(),
    )
    Citation.objects.bulk_create(
        Citation(
            disclosure=disclosure,
            position=position,
            version_id=license.version_id,
            license=license,
            n_records=citation["n_records"],
            selection_sha256=citation["selection_sha256"],
        )
        for position, (license, citation) in enumerate(zip(licenses, document["training_data"], strict=True))
    )
    audit.record(
        actor=user,
        party=owner,
        action="model.disclosed",
        target=f"model:{model.pk}",
        number=disclosure.number,
        document_sha256=digest,
    )
    return disclosure


def _hold_live(licenses: list[License]) -> None:
    """Inside the transaction: no cited license ends before the citation is there; a refund at this moment waits, or was first.

    Shared, so that two disclosures of one license do not wait for each other; in order of keys, as whoever ends licenses
    locks them.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id FROM marketplace_license WHERE id = ANY(%s) ORDER BY id FOR SHARE",
            [[license.pk for license in licenses]],
        )
    held = License.objects.select_related("version__dataset").in_bulk([license.pk for license in licenses])
    for position, license in enumerate(licenses):
        _check_live(f"/training_data/{position}", held[license.pk], clock.now())


def _find_disclosure(owner: Party, digest: str) -> Disclosure | None:
    return Disclosure.objects.select_related("model").filter(document_sha256=digest, model__owner=owner).first()


def _check_citations(owner: Party, citations: list[dict[str, Any]]) -> list[License]:
    """The license behind each citation, in document order."""
    found = {
        str(license.public_id): license
        for license in License.objects.select_related("version__dataset").filter(
            licensee=owner, public_id__in=[citation["license"] for citation in citations]
        )
    }
    at = clock.now()
    licenses: list[License] = []
    for position, citation in enumerate(citations):
        pointer = f"/training_data/{position}"
        license = found.get(citation["license"])
        if license is None:
            raise _refused(f"{pointer}/license", f"{citation['license']} is none of your licenses.")
        _check_live(pointer, license, at)
        if any(license.version_id == earlier.version_id for earlier in licenses):
            raise _refused(pointer, f"{license.version} is cited twice; join the two selections.")
        _check_selection(pointer, citation, license.version)
        licenses.append(license)
    return licenses


def _check_live(pointer: str, license: License, at: datetime) -> None:
    if license.suspended_at is not None and license.revoked_at is None:
        raise _refused(
            f"{pointer}/license",
            f"The license of {license.version} is suspended while its payment is disputed at the card's bank.",
        )
    if license.in_arrears_at is not None and license.revoked_at is None:
        raise _refused(
            f"{pointer}/license",
            f"The license of {license.version} is suspended since {license.in_arrears_at:%d %B %Y}, because a royalty report or "
            "invoice is overdue; it is back as soon as that is settled.",
        )
    if not license.is_live(at):
        raise _refused(
            f"{pointer}/license",
            f"The license of {license.version} is not in force: it ended on {license.revoked_at or license.expires_at:%d %B %Y}.",
        )


def _check_selection(pointer: str, citation: dict[str, Any], version: DatasetVersion) -> None:
    if citation["merkle_root"] != version.merkle_root:
        raise _refused(f"{pointer}/merkle_root", f"The license is for {version}, whose root is {version.merkle_root}.")
    selection = citation["selection"]
    n_selected, end = version.n_records, 0
    if selection != "all":
        n_selected = 0
        for index, (start, stop) in enumerate(selection):
            if not end <= start < stop <= version.n_records:
                raise _refused(
                    f"{pointer}/selection/{index}",
                    f"[{start}, {stop}) does not follow: ranges are [start, stop), ascending, without overlap, and "
                    f"{version} has {version.n_records} records.",
                )
            n_selected, end = n_selected + stop - start, stop
    if citation["n_records"] != n_selected:
        raise _refused(
            f"{pointer}/n_records", f"It says {citation['n_records']}; the selection has {n_selected} records."
        )
    computed = selection_digest(version=version, selection=selection)
    if citation["selection_sha256"] != computed:
        raise _refused(
            f"{pointer}/selection_sha256",
            "It is not the SHA-256 of the selected records' digests, in row order; hash the column 'digest' of the file "
            "that you trained on, and check which rows you selected.",
        )


def _refused(pointer: str, what: str) -> CitationInvalid:
    return CitationInvalid(f"{pointer}: {what}", pointers={pointer: what})


def _digests(stored: Any) -> Iterator[tuple[int, bytes]]:
    """First row and concatenated digests of each batch; no other column is read."""
    start = 0
    for batch in pq.ParquetFile(stored).iter_batches(batch_size=BATCH_ROWS, columns=["digest"]):
        column = batch.column(0)
        offset = column.offset * DIGEST_BYTES
        yield start, column.buffers()[1].to_pybytes()[offset : offset + len(column) * DIGEST_BYTES]
        start += len(column)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _any_of(validator: Any, alternatives: list[Any], instance: Any, schema: Any) -> Iterator[ValidationError]:
    """jsonschema's own finds every problem of every alternative first: in a list of a million, a million."""
    problems: list[ValidationError] = []
    for index, alternative in enumerate(alternatives):
        found = list(islice(validator.descend(instance, alternative, schema_path=index), MAX_POINTERS))
        if not found:
            return
        problems += found
    yield ValidationError("fits no alternative", context=problems)


_Validator = validators.extend(Draft202012Validator, {"anyOf": _any_of})


def _deepest(error: ValidationError) -> ValidationError:
    """Of an error over alternatives, the one that got furthest into the document: there it was meant."""
    while error.context:
        error = max(error.context, key=lambda inner: len(inner.absolute_path))
    return error


def _explain(error: ValidationError) -> Iterable[tuple[str, str]]:
    """Pointer and remedy; jsonschema's own messages would repeat the whole document."""
    where = _pointer(*error.absolute_path)
    limit: Any = error.validator_value
    match error.validator:
        case "required" | "dependentRequired":
            needed = limit if error.validator == "required" else sorted({n for names in limit.values() for n in names})
            yield from ((where + _pointer(name), "is missing.") for name in needed if name not in error.instance)
        case "additionalProperties" if limit is False:
            known = sorted(error.schema["properties"])
            for name in sorted(set(error.instance) - set(known)):
                yield where + _pointer(name[:60]), f"is not a field here; there are {', '.join(known)}."
        case "enum":
            yield where, f"is {_short(error.instance)}; use one of {', '.join(map(str, limit))}."
        case "const":
            yield where, f"is {_short(error.instance)}; use {limit}."
        case "type":
            yield where, f"is {_short(error.instance)}; give {limit if isinstance(limit, str) else ' or '.join(limit)}."
        case "minimum" | "exclusiveMinimum":
            yield (
                where,
                f"is {_short(error.instance)}; give {'at least' if error.validator == 'minimum' else 'more than'} {limit}.",
            )
        case "maximum":
            yield where, f"is {_short(error.instance)}; give at most {limit}."
        case "minItems" | "maxItems":
            yield (
                where,
                f"has {len(error.instance)} items; give {'at least' if error.validator == 'minItems' else 'at most'} {limit}.",
            )
        case "maxLength" | "minLength":
            yield (
                where,
                f"has {len(error.instance)} characters; give {'at most' if error.validator == 'maxLength' else 'at least'} {limit}.",
            )
        case "pattern":
            yield where, f"is {_short(error.instance)}, which does not match {limit}."
        case "uniqueItems":
            yield where, "names something twice."
        case _:
            yield where, error.message[:200]


def _pointer(*parts: str | int) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)  # RFC 6901


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
