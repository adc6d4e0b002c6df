from typing import Any

from rest_framework.pagination import CursorPagination


class CreatedCursorPagination(CursorPagination):
    """Newest first by primary key: a page stays the same while rows are added."""

    ordering: str | tuple[str, ...] = "-pk"
    page_size_query_param = "page_size"
    max_page_size = 200

    def get_paginated_response_schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        page = {"type": ["string", "null"], "format": "uri", "description": "null: there is no such page."}
        return {
            "type": "object",
            "required": ["results", "next", "previous"],
            "properties": {"next": page, "previous": page, "results": schema},
        }
