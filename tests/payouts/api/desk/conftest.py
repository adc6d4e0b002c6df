"""People of the staff with a key each."""

import json
from typing import Any

import pytest
from drf_spectacular.generators import SchemaGenerator

from marketplace.models import StaffKey
from tests.desk import Desk
from tests.factories.marketplace import UserFactory


@pytest.fixture(autouse=True)
def steady_codes(settings: Any) -> None:
    """A code that the test made in the last moment of its thirty seconds is still good in the first of the next."""
    settings.MFA_TOTP_TOLERANCE = 1


@pytest.fixture(scope="session")
def document() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(SchemaGenerator().get_schema(request=None, public=True)))
    return made


@pytest.fixture
def ann(db: Any, document: dict[str, Any]) -> Desk:
    return Desk(document, UserFactory(is_staff=True, email="ann@desk.example"), list(StaffKey.Scope.values))


@pytest.fixture
def ben(db: Any, document: dict[str, Any]) -> Desk:
    return Desk(document, UserFactory(is_staff=True, email="ben@desk.example"), list(StaffKey.Scope.values))


@pytest.fixture
def ann_again(ann: Desk, document: dict[str, Any]) -> Desk:
    """A second key of the same person."""
    return Desk(document, ann.user, list(StaffKey.Scope.values))
