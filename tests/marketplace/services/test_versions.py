"""From a file to a registered version, on real PostgreSQL and with the real parsing process."""

import hashlib
from datetime import timedelta

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection, transaction
from django.utils import timezone

from marketplace import jobs
from marketplace.errors import InvalidInput, NotAllowed
from marketplace.ingest.errors import FileRefused
from marketplace.ingest.records import recomputed_digests
from marketplace.models import (
    Attestation,
    AuditEvent,
    Contribution,
    Dataset,
    DatasetVersion,
    Membership,
    Party,
    RecordCopy,
    RecordFingerprint,
    Upload,
)
from marketplace.selectors import datasets_visible_to, record_columns, uploads_visible_to
from marketplace.services import versions
from marketplace.services.versions import (
    DatasetWithdrawn,
    VersionNotFrozen,
    create_dataset,
    discard_finished_files,
    publish_version,
    start_upload,
    withdraw_dataset,
)
from marketplace.tasks import ingest_upload, sweep_jobs
from tests.marketplace.services.ingested import MAPPING, as_csv, published, queued, uploaded

ROWS = [[1, 2, 7, "ann", "lea"], [3, 4, 8, "ben", ""], [1, 2, 7, "ben", "lea"], [5, 6, 8, "Alice", "leo"]]


def stored_files(media):
    return sorted(path.relative_to(media).as_posix() for path in media.rglob("*") if path.is_file())


def test_upload_becomes_a_frozen_version(alice, media):
    upload = uploaded(alice, as_csv(ROWS))

    version = upload.version
    assert (upload.status, upload.attempt, upload.error_message) == ("done", 1, "")
    assert (version.status, version.number, version.n_records, version.n_copies) == ("frozen", 1, 4, 1)
    assert version.features == {
        "content": {"kind": "vector", "length": 2, "minimum": 1.0, "maximum": 6.0},
        "label": {"classes": ["7", "8"]},
    }
    assert version.preview[1] == {"content": [3.0, 4.0], "label": "8"}
    report = {name: value for name, value in upload.report.items() if name not in ("seconds", "peak_bytes")}
    assert report == {
        "n_records": 4,
        "n_rights_holders": 3,
        "n_labellers": 2,
        "copies": {"within": 1, "of_listed": 0},
        "bytes": version.size_bytes,
        "merkle_root": version.merkle_root,
    }
    rows = version.contributions.order_by("role", "number").values_list("role", "number", "party__name", "n_records")
    assert list(rows) == [
        ("labeller", 0, "lea", 2),
        ("labeller", 1, "leo", 1),
        ("rights_holder", 0, "ann", 1),
        ("rights_holder", 1, "ben", 2),
        ("rights_holder", 2, "Alice", 1),  # the uploader's own name is the uploader
    ]
    assert version.contributions.get(role="rights_holder", number=2).party == alice
    ann = Party.objects.get(external_ref="ann")
    assert (ann.introduced_by, ann.is_claimed) == (alice, False)


def test_stored_parquet_is_what_the_version_says(alice, media):
    version = uploaded(alice, as_csv(ROWS)).version

    assert stored_files(media) == [version.parquet_key]  # and the uploaded file is gone
    with default_storage.open(version.parquet_key) as file:
        data = file.read()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (version.size_bytes, version.parquet_sha256)
    with record_columns(version) as parquet:
        table = parquet.read()
    assert table["content"].to_pylist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]]
    assert recomputed_digests(table) == table["digest"].to_pylist()
    found = RecordFingerprint.objects.filter(version=version).order_by("row").values_list("row", "holder", "labeller")
    assert list(found) == [(0, 0, 0), (1, 1, -1), (2, 1, 0), (3, 2, 1)]
    assert version.fingerprints.values("fingerprint").distinct().count() == 3


def test_without_a_holders_column_the_uploader_owns_all(alice):
    version = uploaded(alice, b"text\nHello\nWorld\n", mapping={"content": "text"}).version

    assert list(version.contributions.values_list("party", "role", "n_records")) == [(alice.pk, "rights_holder", 2)]


def test_the_same_name_is_the_same_party_for_one_uploader_and_another_for_another(alice, bob):
    uploaded(alice, as_csv(ROWS))
    uploaded(alice, as_csv([[9, 9, 1, "ann", ""]]))
    uploaded(bob, as_csv([[8, 8, 1, "ann", ""]]))

    assert list(Party.objects.filter(external_ref="ann").order_by("pk").values_list("introduced_by", flat=True)) == [
        alice.pk,
        bob.pk,
    ]


def test_ingest_runs_once_however_often_it_is_told(alice):
    upload = uploaded(alice, as_csv(ROWS))

    ingest_upload(upload.pk)

    upload.refresh_from_db()
    assert (upload.attempt, upload.status) == (1, "done")
    assert RecordFingerprint.objects.count() == 4


def test_a_second_attempt_after_a_kill_makes_the_same_bytes(alice, media, monkeypatch):
    upload = queued(alice, as_csv(ROWS))
    half = {}

    class Killed(BaseException):
        pass

    def killed_while_storing(path):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        half["key"] = default_storage.save(f"versions/{digest[:2]}/{digest}.parquet", ContentFile(data[:100]))
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(versions, "_store_parquet", killed_while_storing)
        ingest_upload(upload.pk)
    upload.refresh_from_db()
    assert upload.status == "running"
    assert not Contribution.objects.exists()
    Upload.objects.filter(pk=upload.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))

    ingest_upload(upload.pk)

    upload.refresh_from_db()
    assert (upload.status, upload.attempt) == ("done", 2)
    assert upload.version.parquet_key == half["key"]
    assert stored_files(media) == [half["key"]]
    assert default_storage.size(half["key"]) == upload.version.size_bytes


def test_an_attempt_that_lost_its_lease_writes_nothing(alice, monkeypatch):
    upload = queued(alice, as_csv(ROWS))
    real = versions.count_copies

    def another_worker_takes_over(*, version):
        Upload.objects.filter(pk=upload.pk).update(attempt=2)
        return real(version=version)

    monkeypatch.setattr(versions, "count_copies", another_worker_takes_over)
    ingest_upload(upload.pk)

    upload.refresh_from_db()
    assert upload.version.status == "draft"
    assert upload.report == {}
    assert not Contribution.objects.exists()
    assert not RecordFingerprint.objects.exists()
    assert not Party.objects.filter(introduced_by=alice).exists()


def test_worker_without_rights_to_money_can_ingest(alice):
    upload = queued(alice, as_csv(ROWS))

    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL ROLE residual_worker")
        ingest_upload(upload.pk)
        with connection.cursor() as cursor:
            cursor.execute("RESET ROLE")

    upload.refresh_from_db()
    assert (upload.status, upload.error_message) == ("done", "")


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (as_csv([]), "file_empty", "has columns and no rows"),
        (as_csv([*ROWS, [1, 2, 7]]), "row_ragged", "row 5 (line 6) has 3 fields, the header has 5"),
        (as_csv([[1, "nan", 7, "ann", ""]]), "number_invalid", "row 1 (line 2), column 'x1'"),
        (b"x0,y,holder,by\n1,2,ann\xff,lea\n", "not_utf8", "byte 22 is 0xff"),
        (b"PAR1 but not really", "parquet_invalid", "cannot be read"),
        (b"x0,y\n1,2\n", "column_missing", "no column 'holder' for rights_holder. It has: x0, y."),
    ],
)
def test_bad_file_leaves_nothing_but_its_report(alice, media, data, code, words):
    upload = uploaded(alice, data)

    assert (upload.status, upload.error_code, upload.attempt) == ("failed", code, 1)
    assert words in upload.error_message
    assert upload.report == {}
    assert (upload.version.status, upload.version.merkle_root, upload.version.parquet_key) == ("draft", "", "")
    assert not Contribution.objects.exists()
    assert not RecordFingerprint.objects.exists()
    assert not Party.objects.filter(introduced_by__isnull=False).exists()
    assert stored_files(media) == []


@pytest.mark.parametrize(
    ("data", "mapping", "pointer"),
    [
        (b"", MAPPING, "file"),
        (b"PK\x03\x04 a workbook", MAPPING, "file"),
        (as_csv(ROWS), {"content": []}, "content"),
        (as_csv(ROWS), {"content": "x*", "other": "y"}, "other"),
    ],
)
def test_what_can_be_told_at_once_is_refused_at_once(alice, media, data, mapping, pointer):
    dataset = create_dataset(owner=alice, user=alice.user, title="Numbers")

    with pytest.raises(FileRefused) as caught:
        queued(alice, data, dataset=dataset, mapping=mapping)

    assert list(caught.value.pointers) == [pointer]
    assert not Upload.objects.exists()
    assert not DatasetVersion.objects.exists()
    assert stored_files(media) == []


def test_format_is_found_by_content_and_the_name_is_made_plain(alice):
    upload = queued(alice, as_csv(ROWS), filename="..\\..\\evil/\x00digits.parquet")

    assert (upload.format, upload.filename) == ("csv", "digits.parquet")


def test_too_large_a_file_is_refused(alice, media, settings):
    settings.MAX_UPLOAD_BYTES = 20

    with pytest.raises(InvalidInput, match="larger than 20 bytes"):
        queued(alice, as_csv(ROWS))

    assert not Upload.objects.exists()
    assert stored_files(media) == []


def test_upload_is_for_editors_of_the_owner(alice, bob, mallory):
    dataset = create_dataset(owner=alice, user=alice.user, title="Numbers")
    Membership.objects.create(party=alice, user=bob.user, role=Membership.Role.VIEWER)

    for party, user in ((mallory, mallory.user), (alice, mallory.user), (alice, bob.user)):
        with pytest.raises(NotAllowed):
            start_upload(
                dataset=dataset, user=user, party=party, file=ContentFile(as_csv(ROWS)), filename="f", mapping=MAPPING
            )

    assert not Upload.objects.exists()
    assert list(uploads_visible_to(mallory)) == []


def test_upload_is_woken_when_it_is_committed(alice, django_capture_on_commit_callbacks, monkeypatch):
    sent = []
    monkeypatch.setattr(jobs, "_send", lambda *message: sent.append(message))

    with django_capture_on_commit_callbacks(execute=True):
        upload = queued(alice, as_csv(ROWS))

    assert sent == [("marketplace.tasks.ingest_upload", upload.pk)]


def test_versions_are_numbered(alice):
    dataset = create_dataset(owner=alice, user=alice.user, title="Numbers")

    numbers = [queued(alice, as_csv(ROWS), dataset=dataset).version.number for _ in range(2)]

    assert numbers == [1, 2]


def test_the_same_file_again_has_another_root(alice):
    first, second = (uploaded(alice, as_csv(ROWS)).version for _ in range(2))

    assert first.merkle_root != second.merkle_root
    assert second.n_copies == 1  # nothing is published yet, so only the repeat inside


def test_sweeper_removes_what_a_killed_worker_left(alice, media):
    done, waiting = queued(alice, as_csv(ROWS)), queued(alice, as_csv(ROWS))
    Upload.objects.filter(pk=done.pk).update(status=Upload.Status.DONE)

    sweep_jobs()

    assert stored_files(media) == [waiting.file_key]
    assert discard_finished_files() == 0


# --- publication ---
def test_publishing_attests_and_registers(alice):
    version = uploaded(alice, as_csv(ROWS)).version

    publish_version(version=version, user=alice.user, signed_name="  Alice   Archer ")
    again = publish_version(version=version, user=alice.user, signed_name="Alice Archer")

    version.refresh_from_db()
    assert again == version
    assert (version.status, version.n_copies) == ("published", 1)
    signed = Attestation.objects.get()
    assert (signed.version, signed.merkle_root, signed.party, signed.signed_by) == (
        version,
        version.merkle_root,
        alice,
        alice.user,
    )
    assert signed.signed_name == "Alice Archer"
    assert version.merkle_root in signed.statement
    assert "Alice holds the rights in the records of “Numbers”, version 1" in signed.statement
    assert AuditEvent.objects.filter(action="version.published", target=f"version:{version.pk}").count() == 1
    assert RecordCopy.objects.count() == 1


@pytest.mark.parametrize("name", ["", "   ", "x" * 121])
def test_publishing_needs_a_name(alice, name):
    version = uploaded(alice, as_csv(ROWS)).version

    with pytest.raises(InvalidInput) as caught:
        publish_version(version=version, user=alice.user, signed_name=name)

    assert list(caught.value.pointers) == ["signed_name"]
    assert not Attestation.objects.exists()


def test_publishing_needs_authority(alice, bob, mallory):
    version = uploaded(alice, as_csv(ROWS)).version
    Membership.objects.create(party=alice, user=bob.user, role=Membership.Role.EDITOR)

    for user in (bob.user, mallory.user):
        with pytest.raises(NotAllowed, match="Only an owner of Alice can publish it"):
            publish_version(version=version, user=user, signed_name="Someone")

    version.refresh_from_db()
    assert version.status == "frozen"
    assert not Attestation.objects.exists()
    assert not RecordCopy.objects.exists()


def test_draft_and_withdrawn_are_not_published(alice):
    draft = queued(alice, as_csv(ROWS)).version
    frozen = uploaded(alice, as_csv(ROWS)).version
    withdraw_dataset(dataset=frozen.dataset, user=alice.user)

    with pytest.raises(VersionNotFrozen):
        publish_version(version=draft, user=alice.user, signed_name="Alice")
    with pytest.raises(DatasetWithdrawn):
        publish_version(version=frozen, user=alice.user, signed_name="Alice")

    assert not Attestation.objects.exists()
    assert not RecordCopy.objects.exists()


# --- datasets ---
def test_addresses_are_made_from_titles_and_never_shared(alice):
    slugs = [
        create_dataset(owner=alice, user=alice.user, title=title).slug
        for title in ("Digits & Ünïcode", "Digits & Unicode", "数字", "数字", "x" * 120)
    ]

    assert slugs == ["digits-unicode", "digits-unicode-2", "dataset", "dataset-2", "x" * 70]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"title": " "}, "title"),
        ({"title": "x" * 121}, "title"),
        ({"title": "x", "summary": "y" * 281}, "summary"),
        ({"title": "x", "modality": "smell"}, "modality"),
    ],
)
def test_dataset_with_a_wrong_field_is_refused(alice, fields, pointer):
    with pytest.raises(InvalidInput) as caught:
        create_dataset(owner=alice, user=alice.user, **fields)

    assert list(caught.value.pointers) == [pointer]
    assert not Dataset.objects.exists()


def test_dataset_is_made_by_its_owners_people(alice, mallory):
    with pytest.raises(NotAllowed):
        create_dataset(owner=alice, user=mallory.user, title="Mine")

    assert not Dataset.objects.exists()


def test_withdrawal_is_the_owners_and_once(alice, mallory):
    dataset = published(alice, ROWS).dataset

    with pytest.raises(NotAllowed):
        withdraw_dataset(dataset=dataset, user=mallory.user)
    withdraw_dataset(dataset=dataset, user=alice.user)
    withdraw_dataset(dataset=dataset, user=alice.user)

    assert Dataset.objects.get().status == "withdrawn"
    assert AuditEvent.objects.filter(action="dataset.withdrawn").count() == 1


def test_draft_is_visible_to_its_owner_alone(alice, mallory):
    dataset = create_dataset(owner=alice, user=alice.user, title="Numbers")

    assert list(datasets_visible_to(alice)) == [dataset]
    assert list(datasets_visible_to(mallory)) == []
    assert list(datasets_visible_to(None)) == []
