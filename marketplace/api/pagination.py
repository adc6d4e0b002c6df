from rest_framework.pagination import CursorPagination


class CreatedCursorPagination(CursorPagination):
    """Newest first by primary key: a page stays the same while rows are added."""

    ordering = "-pk"
    page_size_query_param = "page_size"
    max_page_size = 200
