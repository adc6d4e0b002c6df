"""From a file to a version that may be sold: upload → ingest → frozen → attested and published."""

import hashlib
import hmac
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.files import File
from django.core.files.storage import default_storage
from django.db import IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone
from django.utils.text import slugify

from marketplace import clock, jobs
from marketplace.errors import DomainError, InvalidInput, NotAllowed
from marketplace.ingest.mapping import ColumnMapping
from marketplace.ingest.process import Parsed, parsed
from marketplace.ingest.readers import sniff
from marketplace.models import (
    Attestation,
    Contribution,
    Dataset,
    DatasetVersion,
    Party,
    Upload,
    User,
)
from marketplace.services import audit
from marketplace.services.authority import require_authority, require_editor
from marketplace.services.contributions import write_contributions
from marketplace.services.copies import count_copies, hold_publication_lock, write_copies, write_fingerprints

logger = logging.getLogger(__name__)

HEAD_BYTES = 4_096
CHUNK_BYTES = 1 << 20
SECONDS_BETWEEN_PROGRESS = 1.0
ATTESTATION = (
    "I am authorised to act for {party}. {party} holds the rights in the records of “{title}”, version {number}, or has the "
    "permission of those who do, named in it as rights holders and labellers, to license them on the terms it offers. The "
    "version is the one whose Merkle root is {merkle_root}."
)


class VersionNotFrozen(DomainError):
    """The version's content is not final yet."""

    code = "version_not_frozen"


class NothingNew(DomainError):
    """Every record repeats one that is registered already, so that nothing could be paid to anyone here."""

    code = "nothing_new"


class DatasetWithdrawn(DomainError):
    """The dataset takes no new versions and makes no new sales."""

    code = "dataset_withdrawn"


# --- datasets ---------------------------------------------------------------------------------------------------------
@transaction.atomic
def create_dataset(
    *,
    owner: Party,
    user: User,
    title: str,
    summary: str = "",
    description: str = "",
    source: str = "",
    modality: str = Dataset.Modality.TABULAR,
) -> Dataset:
    """A dataset without records yet; its address is made from its title.

    Raises:
        NotAllowed: the user may not edit for the owner.
        InvalidInput: the title is empty or too long, or the modality is none.
    """
    require_editor(user=user, party=owner, to="make a dataset")
    title = title.strip()
    wrong = {}
    if not title or len(title) > 120:
        wrong["title"] = "Give a title of 1 to 120 characters."
    if len(summary) > 280:
        wrong["summary"] = "Give at most 280 characters."
    if modality not in Dataset.Modality.values:
        wrong["modality"] = f"Choose one of {', '.join(Dataset.Modality.values)}."
    if wrong:
        raise InvalidInput(next(iter(wrong.values())), pointers=wrong)
    stem = slugify(title)[:70].strip("-") or "dataset"
    taken = set(Dataset.objects.filter(slug__startswith=stem).values_list("slug", flat=True))
    number = 1
    while True:
        slug = stem if number == 1 else f"{stem}-{number}"
        number += 1
        if slug in taken:
            continue
        try:
            with transaction.atomic():
                dataset = Dataset.objects.create(
                    owner=owner,
                    slug=slug,
                    title=title,
                    summary=summary,
                    description=description,
                    source=source,
                    modality=modality,
                )
        except IntegrityError:  # someone took the address since we looked
            continue
        audit.record(actor=user, party=owner, action="dataset.created", target=f"dataset:{dataset.pk}")
        return dataset


@transaction.atomic
def withdraw_dataset(*, dataset: Dataset, user: User) -> Dataset:
    """Stop new sales; licenses already sold keep their terms. Twice is once.

    Raises:
        NotAllowed: the user cannot sign for the owner.
    """
    require_authority(user=user, party=dataset.owner, to="withdraw it")
    withdrawn = Dataset.Status.WITHDRAWN
    if Dataset.objects.filter(pk=dataset.pk).exclude(status=withdrawn).update(status=withdrawn):
        audit.record(actor=user, party=dataset.owner, action="dataset.withdrawn", target=f"dataset:{dataset.pk}")
    dataset.refresh_from_db()
    return dataset


# --- upload -----------------------------------------------------------------------------------------------------------
def start_upload(
    *, dataset: Dataset, user: User, party: Party, file: File, filename: str, mapping: Mapping[str, Any]
) -> Upload:
    """Keep a file and queue the job that makes a version of it.

    Raises:
        NotAllowed: the dataset is not the party's, or the user may not upload for it.
        DatasetWithdrawn: see the class.
        FileRefused: the file is empty or of an unknown format, or the mapping is malformed.
        InvalidInput: the file is too large.
    """
    if dataset.owner_id != party.pk:
        raise NotAllowed(f"{dataset.title} belongs to someone else.")
    require_editor(user=user, party=party, to="upload")
    if dataset.status == Dataset.Status.WITHDRAWN:
        raise DatasetWithdrawn(f"{dataset.title} was withdrawn; make a new dataset for these records.")
    filename = _plain_filename(filename)
    columns = ColumnMapping.parse(mapping)
    sha256, size_bytes, head = _digest(file, filename)
    format = sniff(head, filename=filename)

    upload = Upload(
        uploaded_by=user,
        filename=filename,
        format=format,
        size_bytes=size_bytes,
        sha256=sha256,
        mapping=columns.as_dict(),
        progress_total=size_bytes,
    )
    file.seek(0)
    # Named by the upload, not by the digest: it is removed after ingest, whoever else sent the same bytes.
    upload.file_key = default_storage.save(f"uploads/{upload.public_id}", file)
    try:
        with transaction.atomic():
            Dataset.objects.select_for_update().get(pk=dataset.pk)  # two uploads at once get consecutive numbers
            newest = dataset.versions.aggregate(newest=Max("number"))["newest"] or 0
            upload.version = DatasetVersion.objects.create(dataset=dataset, number=newest + 1)
            upload.save()
            jobs.wake(upload)
    except BaseException:
        default_storage.delete(upload.file_key)
        raise
    logger.info("Upload queued upload=%s dataset=%s format=%s bytes=%s", upload.pk, dataset.pk, format, size_bytes)
    return upload


def _plain_filename(filename: str) -> str:
    """What the browser called the file, fit to be shown: no folders, no control characters."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(mark for mark in name if mark.isprintable())[-255:] or "file"


def _digest(file: File, filename: str) -> tuple[str, int, bytes]:
    """(SHA-256, bytes, first bytes); stops reading where the limit is passed."""
    digest, size_bytes, head = hashlib.sha256(), 0, b""
    for chunk in file.chunks(CHUNK_BYTES):
        head = head or chunk[:HEAD_BYTES]
        digest.update(chunk)
        size_bytes += len(chunk)
        if size_bytes > settings.MAX_UPLOAD_BYTES:
            raise InvalidInput(
                f"{filename} is larger than {settings.MAX_UPLOAD_BYTES:,} bytes; split it into several datasets.",
                pointers={"file": f"The most is {settings.MAX_UPLOAD_BYTES:,} bytes."},
            )
    return digest.hexdigest(), size_bytes, head


# --- ingest -----------------------------------------------------------------------------------------------------------
def ingest(upload: Upload) -> None:
    """Make the upload's version: parse in a process of its own, then write everything in one transaction.

    Killed at any moment, it leaves the database as it was; the next attempt makes the same bytes again.

    Raises:
        FileRefused: the file's fault, with file, row and column.
        LostLease: another worker took over.
    """
    started = time.monotonic()
    version = upload.version
    said_at = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SECONDS_BETWEEN_PROGRESS:
            said_at = time.monotonic()
            upload.progress(done=done, total=total)

    with (
        _local(upload.file_key) as path,
        parsed(
            path,
            format=upload.format,
            mapping=upload.mapping,
            filename=upload.filename,
            version_key=version_key(version.pk),
            fingerprint_key=fingerprint_key(),
            name=f"upload-{upload.public_id}",
            on_progress=on_progress,
        ) as result,
    ):
        upload.progress(done=upload.size_bytes, total=upload.size_bytes)  # an attempt that lost its lease ends here
        freeze_version(upload=upload, result=result, started=started)
    discard_file(upload)


def freeze_version(*, upload: Upload, result: Parsed, started: float) -> DatasetVersion:
    """Write a parsed file's version, its contributions, fingerprints and report, and finish the job: all or nothing."""
    report = result.report
    parquet_sha256, parquet_key, size_bytes = _store_parquet(result.parquet)
    version = DatasetVersion.objects.select_related("dataset__owner").get(pk=upload.version_id)
    with transaction.atomic():
        for role, names, counts in (
            (Contribution.Role.RIGHTS_HOLDER, report.rights_holders, report.rights_holder_counts),
            (Contribution.Role.LABELLER, report.labellers, report.labeller_counts),
        ):
            write_contributions(version=version, role=role, names=names, counts=counts)
        version.n_records = report.n_records
        write_fingerprints(version=version, path=result.fingerprints)
        copies = count_copies(version=version)
        version.n_copies = copies.total
        version.status = DatasetVersion.Status.FROZEN
        version.merkle_root = report.merkle_root
        version.size_bytes = size_bytes
        version.parquet_sha256 = parquet_sha256
        version.parquet_key = parquet_key
        version.features = report.features
        version.statistics = report.statistics
        version.preview = report.preview
        version.frozen_at = timezone.now()
        version.save()
        # Last, so that the heartbeat goes on while the rows are written; a lease lost meanwhile undoes them.
        upload.lock()
        upload.report = {
            "n_records": report.n_records,
            "n_rights_holders": len(report.rights_holders),
            "n_labellers": len(report.labellers),
            "copies": {"within": copies.within, "of_listed": copies.of_listed},
            "bytes": size_bytes,
            "merkle_root": report.merkle_root,
            "seconds": round(time.monotonic() - started, 3),
            "peak_bytes": result.peak_bytes,
        }
        upload.write(report=upload.report, progress_done=upload.size_bytes, progress_total=upload.size_bytes)
        upload.finish()
    logger.info(
        "Froze version=%s upload=%s records=%s root=%s", version.pk, upload.pk, report.n_records, report.merkle_root
    )
    return version


def discard_file(upload: Upload) -> None:
    """Remove the uploaded bytes of a finished upload; what is kept of them is the version, or the refusal."""
    if upload.file_key:
        default_storage.delete(upload.file_key)
        Upload.objects.filter(pk=upload.pk, file_key=upload.file_key).update(file_key="")
        upload.file_key = ""


def discard_finished_files() -> int:
    """Remove what a killed worker did not get to; returns how many."""
    finished = Upload.objects.filter(status__in=[Upload.Status.DONE, Upload.Status.FAILED]).exclude(file_key="")
    uploads = list(finished.order_by("pk")[:100])
    for upload in uploads:
        discard_file(upload)
    return len(uploads)


def fingerprint_key() -> bytes:
    """The key of every fingerprint; see `marketplace.ingest.copies`."""
    key: str = settings.FINGERPRINT_KEY
    return key.encode()


def version_key(version_id: int) -> bytes:
    """The key of a version's salts: the same on every attempt, so that the root is too."""
    return hmac.digest(fingerprint_key(), f"salt:{version_id}".encode(), "sha256")


@contextmanager
def _local(key: str) -> Iterator[Path]:
    """A stored file as a path: its own where storage is a disk, a temporary copy where it is not."""
    try:
        path = Path(default_storage.path(key))
    except NotImplementedError:
        with tempfile.NamedTemporaryFile(prefix="residual-") as copy, default_storage.open(key) as source:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)
            copy.flush()
            yield Path(copy.name)
    else:
        yield path


def _store_parquet(path: Path) -> tuple[str, str, int]:
    """(SHA-256, key, bytes). The key is the digest; an attempt that was killed may have left half a file under it."""
    with path.open("rb") as file:
        digest = _sha256(File(file))
    key, size_bytes = f"versions/{digest[:2]}/{digest}.parquet", path.stat().st_size
    if default_storage.exists(key):
        with default_storage.open(key) as stored:
            if _sha256(stored) == digest:
                return digest, key, size_bytes
        default_storage.delete(key)
    with path.open("rb") as file:
        return digest, default_storage.save(key, File(file)), size_bytes


def _sha256(file: File) -> str:
    digest = hashlib.sha256()
    for chunk in file.chunks(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


# --- publication ------------------------------------------------------------------------------------------------------
def attestation_statement(version: DatasetVersion) -> str:
    """What is signed at publication, word for word."""
    return ATTESTATION.format(
        party=version.dataset.owner.name,
        title=version.dataset.title,
        number=version.number,
        merkle_root=version.merkle_root,
    )


@transaction.atomic
def publish_version(*, version: DatasetVersion, user: User, signed_name: str) -> DatasetVersion:
    """Attest the rights in a frozen version, settle its copies, and register it. Publishing it again changes nothing.

    Raises:
        NotAllowed: the user cannot sign for the dataset's owner.
        InvalidInput: no name was signed.
        VersionNotFrozen, NothingNew, DatasetWithdrawn: see the classes.
    """
    owner = version.dataset.owner
    require_authority(user=user, party=owner, to="publish it")
    signed_name = " ".join(signed_name.split())
    if not signed_name or len(signed_name) > 120:
        raise InvalidInput(
            "Sign with your full name.", pointers={"signed_name": "Give your full name, at most 120 characters."}
        )
    hold_publication_lock()
    version = DatasetVersion.objects.select_related("dataset__owner").get(pk=version.pk)
    if version.status == DatasetVersion.Status.PUBLISHED:
        return version
    if version.status != DatasetVersion.Status.FROZEN:
        raise VersionNotFrozen(f"{version} is still being read; wait for its upload to finish.")
    if version.dataset.status == Dataset.Status.WITHDRAWN:
        raise DatasetWithdrawn(f"{version.dataset.title} was withdrawn.")

    copies = write_copies(version=version)
    if copies.total == version.n_records:
        raise NothingNew(
            f"Each of the {version.n_records:,} records repeats one that is registered already, so nothing here could earn. "
            "If they are yours, open a claim."
        )
    Attestation.objects.create(
        version=version,
        merkle_root=version.merkle_root,
        party=owner,
        signed_by=user,
        signed_name=signed_name,
        statement=attestation_statement(version),
    )
    version.status = DatasetVersion.Status.PUBLISHED
    version.published_at = clock.now()
    version.n_copies = copies.total
    version.save(update_fields=["status", "published_at", "n_copies"])
    audit.record(
        actor=user,
        party=owner,
        action="version.published",
        target=f"version:{version.pk}",
        merkle_root=version.merkle_root,
        n_records=version.n_records,
        n_copies=copies.total,
    )
    logger.info("Published version=%s records=%s copies=%s", version.pk, version.n_records, copies.total)
    return version
