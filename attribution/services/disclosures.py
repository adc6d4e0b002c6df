"""A trainer discloses: the document is checked as a whole, recorded, and its replay queued."""

from typing import Any

from django.db import transaction

from attribution import documents
from attribution.grades import Grade, disclosed_grade
from attribution.services import meters, runs
from marketplace.models import Disclosure, Party, User
from marketplace.services.disclosures import record_disclosure


@transaction.atomic
def disclose_model(*, owner: Party, document: dict[str, Any], user: User | None = None) -> Disclosure:
    """Publish what a model was trained on; the same document again is the same disclosure.

    Raises:
        DomainError: the schema, a license, the selection or the evidence is wrong; with pointers, and nothing is written.
    """
    disclosure = record_disclosure(owner=owner, document=document, user=user)
    if not disclosure.results.exists() and not runs.is_requested(disclosure):  # else it was checked before
        documents.check_evidence(disclosure)
        if disclosed_grade(document) == Grade.METERED:
            meters.check_meter(disclosure)
            meters.commit_meter(disclosure)
        runs.request_measurement(disclosure)
    return disclosure
