"""What PostgreSQL refuses, whoever asks: evidence stays as it was written."""

import io

import pytest
from django.db import IntegrityError, connection, transaction

from attribution.artifacts import store_artifact
from attribution.models import AttributionResult, Share
from marketplace import clock
from tests.attribution.test_artifacts import STATE
from tests.factories.attribution import PublishedResultFactory


@pytest.fixture
def result(alice, bob):
    return PublishedResultFactory(shares={alice: 2, bob: 1})


STATEMENTS = {
    "a share's amount": "UPDATE attribution_share SET paid_ppq = 0",
    "a share's row": "DELETE FROM attribution_share",
    "all shares": "TRUNCATE attribution_share",
    "a published result": "UPDATE attribution_attributionresult SET reliability = 1",
    "a published result's row": "DELETE FROM attribution_attributionresult",
    "all results": "TRUNCATE attribution_attributionresult CASCADE",
    "an artifact's hash": "UPDATE attribution_artifact SET sha256 = repeat('0', 64)",
    "an artifact's row": "DELETE FROM attribution_artifact",
    "all artifacts": "TRUNCATE attribution_artifact CASCADE",
    "one more share": """INSERT INTO attribution_share
        (result_id, version_id, party_id, partition, n_records, count_ppq, paid_ppq)
        SELECT result_id, version_id, party_id + 1000000, partition, 1, 0, 0 FROM attribution_share LIMIT 1""",
    "a result published at once": """INSERT INTO attribution_attributionresult
        (public_id, disclosure_id, model_id, number, grade, status, paid_by, regime, summary, created_at, published_at)
        SELECT gen_random_uuid(), disclosure_id, model_id, 99, grade, 'published', 'count', '', '{}', now(), now()
        FROM attribution_attributionresult LIMIT 1""",
}


@pytest.mark.parametrize("what", STATEMENTS)
@pytest.mark.parametrize("session", ["", "SET LOCAL session_replication_role = replica"], ids=["plain", "as a replica"])
def test_evidence_cannot_be_changed(what, session, result, alice):
    store_artifact(owner=alice, kind="state", stream=io.BytesIO(STATE))
    before = list(Share.objects.order_by("pk").values())
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # a truncation with checks pending is refused for that reason

    with (
        pytest.raises(IntegrityError, match="refused"),
        transaction.atomic(),
        connection.cursor() as cursor,
    ):
        if session:
            cursor.execute(session)
        cursor.execute(STATEMENTS[what])

    assert list(Share.objects.order_by("pk").values()) == before
    assert AttributionResult.objects.get().reliability is None


def test_a_result_whose_shares_are_not_all_there_cannot_be_published(result):
    draft = AttributionResult.objects.create(
        disclosure=result.disclosure, model=result.model, number=2, grade="declared", paid_by="count"
    )
    share = Share.objects.first()
    Share.objects.create(
        result=draft,
        version=share.version,
        party=share.party,
        partition="rights_holder",
        n_records=1,
        count_ppq=1,
        paid_ppq=1,
    )
    draft.status, draft.published_at = "published", clock.now()

    with pytest.raises(IntegrityError, match="rights_holder shares sum to 1 ppq"), transaction.atomic():
        draft.save()

    draft.refresh_from_db()
    assert draft.status == "draft"
