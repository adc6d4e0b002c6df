from collections.abc import Callable
from typing import Any

import pytest
from rest_framework.test import APIClient

from marketplace.api.keys import create_api_key


@pytest.fixture
def api(db: None) -> Callable[..., APIClient]:
    """`api(carol, "read", "buy")`: a client that acts for a party with a new key; `api()`: one without a key."""

    def make(party: Any = None, *scopes: str, **fields: Any) -> APIClient:
        client = APIClient()
        if party is not None:
            client.key, text = create_api_key(
                party=party, user=party.user, name="tests", scopes=list(scopes) or ["read"], **fields
            )
            client.credentials(HTTP_AUTHORIZATION=f"Bearer {text}")
        return client

    return make
