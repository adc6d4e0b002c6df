from collections.abc import Callable
from typing import Any

import pytest
from rest_framework.test import APIClient

from marketplace.api.keys import create_api_key


@pytest.fixture
def client_of() -> Callable[..., APIClient]:
    """A client with a key that acts for a party."""

    def make(party: Any, *scopes: str) -> APIClient:
        _, text = create_api_key(party=party, user=party.user, name="test", scopes=list(scopes or ("read", "disclose")))
        client = APIClient()
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {text}")
        return client

    return make
