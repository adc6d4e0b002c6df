"""One row of CSV at a time, and texts that no spreadsheet takes for a formula."""

import csv
import io
from collections.abc import Iterable

#: What a spreadsheet would take for a formula, and the blanks that it skips before one.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def cell_text(text: str) -> str:
    """A text with an apostrophe before what would act as a formula."""
    return f"'{text}" if text.lstrip(" \n").startswith(FORMULA_STARTS) else text


def written(cells: Iterable[object]) -> str:
    """One row, quoted where it must be, with the line break that RFC 4180 asks for."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue()
