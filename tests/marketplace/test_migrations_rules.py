"""What PostgreSQL refuses, whoever asks: tried as the owner of the tables, against whom rights alone would not help."""

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from marketplace.models import (
    Attestation,
    AuditEvent,
    Citation,
    DatasetVersion,
    Disclosure,
    Offer,
    Party,
    RecordCopy,
    TrainedModel,
)
from tests.factories.marketplace import DatasetFactory, LicenseFactory, PartyFactory, PublishedVersionFactory

APPEND_ONLY = [AuditEvent, Attestation, Offer, Citation, RecordCopy]


@pytest.fixture
def evidence(db):
    """A row of every table that may only grow."""
    license = LicenseFactory()
    original = license.version
    PublishedVersionFactory(copies={1: (original, 0)})
    model = TrainedModel.objects.create(owner=license.licensee, slug="model", name="Model")
    disclosure = Disclosure.objects.create(
        model=model, number=1, document={}, document_sha256="0" * 64, disclosed_at=timezone.now()
    )
    Citation.objects.create(
        disclosure=disclosure,
        position=0,
        version=original,
        license=license,
        n_records=1,
        selection_sha256="0" * 64,
    )
    AuditEvent.objects.create(action="something.happened", target="thing:1")


@pytest.mark.parametrize("model", APPEND_ONLY, ids=lambda model: model.__name__)
@pytest.mark.parametrize("statement", ["UPDATE {} SET id = id", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
def test_evidence_only_grows(evidence, model, statement):
    n_rows = model.objects.count()
    assert n_rows

    with pytest.raises(IntegrityError, match="is refused: its rows are append-only"), transaction.atomic():
        execute(statement.format(model._meta.db_table))

    assert model.objects.count() == n_rows


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM marketplace_party WHERE id = %s",
        "UPDATE marketplace_party SET id = id + 1000000 WHERE id = %s",
        "TRUNCATE marketplace_party CASCADE -- %s",
    ],
)
def test_a_party_stays(db, statement):
    """Also one that nothing names yet: a line that is being made may."""
    party = PartyFactory(name="Nobody's")

    with pytest.raises(IntegrityError, match="of a party is refused"), transaction.atomic():
        execute(statement % party.pk)
    party.name = "Somebody's"
    party.save()

    assert list(Party.objects.filter(pk=party.pk).values_list("name", flat=True)) == ["Somebody's"]


@pytest.mark.parametrize(
    "change",
    [
        "merkle_root = repeat('0', 64)",
        "n_records = n_records + 1",
        "size_bytes = 1",
        "parquet_key = 'elsewhere'",
        "parquet_sha256 = ''",
        "features = '{}'",
        "statistics = '{\"a\": 1}'",
        "preview = '[1]'",
        "number = 9",
        "dataset_id = (SELECT max(id) FROM marketplace_dataset)",
        "frozen_at = NULL",
        "status = 'draft', published_at = NULL",
        "status = 'frozen', published_at = NULL",
        "published_at = now()",
        "n_copies = 5",
    ],
)
def test_published_version_stays_as_it_is(db, change):
    version = PublishedVersionFactory()
    DatasetFactory()
    before = DatasetVersion.objects.filter(pk=version.pk).values().get()

    with pytest.raises(IntegrityError, match=f"version {version.pk} is published"), transaction.atomic():
        change_version(version, change)

    assert DatasetVersion.objects.filter(pk=version.pk).values().get() == before


def test_frozen_version_can_be_published_and_nothing_else(db):
    version = frozen_version()
    change_version(version, "status = status")

    for change in (
        "n_copies = 1",
        "status = 'draft'",
        "features = '[]'",
        "status = 'published', published_at = now(), number = 7",
    ):
        with pytest.raises(IntegrityError, match=f"version {version.pk} is frozen"), transaction.atomic():
            change_version(version, change)

    change_version(version, "status = 'published', published_at = now(), n_copies = 1")


def test_draft_is_frozen_before_it_is_published(db):
    draft = DatasetVersion.objects.create(dataset=DatasetFactory(), number=1)

    with pytest.raises(IntegrityError, match="must be frozen before it is published"), transaction.atomic():
        change_version(
            draft, "status = 'published', published_at = now(), merkle_root = 'r', parquet_key = 'k', n_records = 1"
        )


def test_only_a_draft_can_be_deleted(db):
    draft = DatasetVersion.objects.create(dataset=DatasetFactory(), number=1)
    frozen = frozen_version()

    with pytest.raises(IntegrityError, match="is frozen: it cannot be deleted"), transaction.atomic():
        execute("DELETE FROM marketplace_datasetversion WHERE id = %s", frozen.pk)
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        execute("TRUNCATE marketplace_datasetversion CASCADE")
    execute("DELETE FROM marketplace_datasetversion WHERE id = %s", draft.pk)

    assert list(DatasetVersion.objects.all()) == [frozen]


@pytest.mark.parametrize("table", ["contribution", "recordfingerprint"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {} SET version_id = version_id",
        "DELETE FROM {}",
        "TRUNCATE {} CASCADE",
        "INSERT INTO {} SELECT * FROM copied",
    ],
)
def test_who_gave_what_to_a_version_is_settled_when_it_is_frozen(db, table, statement):
    """Whoever could change it afterwards could redirect the version's money."""
    PublishedVersionFactory()
    table = f"marketplace_{table}"
    execute(f"CREATE TEMPORARY TABLE copied AS SELECT * FROM {table}")  # noqa: S608
    execute("UPDATE copied SET id = id + 1000")
    execute(f"UPDATE copied SET {'number = number + 1000' if 'contribution' in table else 'row = row + 1000'}")  # noqa: S608

    with pytest.raises(IntegrityError, match=f"on {table} is refused"), transaction.atomic():
        execute(statement.format(table))


def test_publication_counts_the_copies_of_a_frozen_contribution_and_changes_nothing_else(db):
    version = PublishedVersionFactory()
    other = PublishedVersionFactory().dataset.owner
    execute(
        "ALTER TABLE marketplace_datasetversion DISABLE TRIGGER keep_version"
    )  # back to frozen, for this test alone
    change_version(version, "status = 'frozen', published_at = NULL")

    with pytest.raises(IntegrityError, match="is refused: version"), transaction.atomic():
        execute("UPDATE marketplace_contribution SET party_id = %s WHERE version_id = %s", other.pk, version.pk)
    execute("UPDATE marketplace_contribution SET n_copies = 1 WHERE version_id = %s", version.pk)


@pytest.mark.parametrize("change", ["document = '[1]'", "document_sha256 = 'x'", "disclosed_at = now()", "number = 7"])
def test_a_disclosure_stays_as_it_was_published(evidence, change):
    Disclosure.objects.update(embargo_until=timezone.now())

    for statement in (
        f"UPDATE marketplace_disclosure SET {change}",  # noqa: S608
        "DELETE FROM marketplace_disclosure",
        "TRUNCATE marketplace_disclosure CASCADE",
    ):
        with pytest.raises(IntegrityError, match="is refused"), transaction.atomic():
            execute(statement)


def frozen_version():
    return DatasetVersion.objects.create(
        dataset=DatasetFactory(),
        number=1,
        status=DatasetVersion.Status.FROZEN,
        merkle_root="f" * 64,
        parquet_key="versions/f.parquet",
        n_records=3,
        frozen_at=timezone.now(),
    )


def change_version(version, change):
    execute(f"UPDATE marketplace_datasetversion SET {change} WHERE id = %s", version.pk)  # noqa: S608


def execute(statement, *parameters):
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # or PostgreSQL refuses a TRUNCATE for reasons of its own
        cursor.execute(statement, parameters)
