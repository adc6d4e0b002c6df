from collections.abc import Mapping
from typing import Any

from rest_framework.parsers import BaseParser


class RawBody(BaseParser):
    """Hands on the body as a stream, unread: a checkpoint does not fit a request's memory."""

    media_type = "application/octet-stream"

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Mapping[str, Any] | None = None) -> Any:
        return stream
