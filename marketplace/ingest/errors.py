from collections.abc import Mapping

from marketplace.errors import DomainError


class FileRefused(DomainError):
    """The file cannot become a dataset version; the message names file, row, line, column and remedy, as far as each is known.

    The code says what kind of fault it is (`file_empty`, `row_ragged`, `column_missing`, …) and travels as text between
    the parsing process and the worker, so it is an argument and not a class of its own.
    """

    code = "file_refused"
    status = 422

    def __init__(self, message: str, *, code: str = "file_refused", pointers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, pointers=pointers)
        self.code = code
