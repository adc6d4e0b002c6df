"""What is kept so that whoever reads the database cannot read it: bank details, under a key of their own.

Each text is sealed for one party; opened for another it is refused, so a row that was moved pays nobody else.
"""

import base64
import hashlib
import json
from collections.abc import Mapping

from cryptography.fernet import Fernet
from django.conf import settings


def seal(values: Mapping[str, str], *, party: int) -> str:
    return _cipher().encrypt(json.dumps({"party": party, "values": dict(values)}).encode()).decode()


def unseal(text: str, *, party: int) -> dict[str, str]:
    """
    Raises:
        cryptography.fernet.InvalidToken: it was not sealed under this key, or was changed.
        ValueError: it was sealed for another party.
    """
    kept = json.loads(_cipher().decrypt(text.encode()))
    if kept["party"] != party:
        raise ValueError(f"Sealed for party {kept['party']}, not for {party}")
    return {str(name): str(value) for name, value in kept["values"].items()}


def _cipher() -> Fernet:
    assert settings.BANK_DETAILS_KEY, "only the web process has the key"
    return Fernet(
        base64.urlsafe_b64encode(hashlib.sha256(f"bank details:{settings.BANK_DETAILS_KEY}".encode()).digest())
    )
