"""PDF documents: a typst template per kind, and the data that it shows.

What people wrote reaches a template as JSON strings, which typst sets as text; nothing of it is ever evaluated.
"""

import json
from pathlib import Path
from typing import Any

import typst

FOLDER = Path(__file__).resolve().parent


def compile_pdf(template: str, data: dict[str, Any]) -> bytes:
    """The PDF of one template ("statement" is `statement.typ`) with its data, which must be JSON.

    Raises:
        ValueError: there is no such template.
    """
    source = FOLDER / f"{template}.typ"
    if source.parent != FOLDER or not source.is_file():
        raise ValueError(f"There is no template {template!r}")
    return bytes(typst.compile(str(source), root=str(FOLDER), sys_inputs={"data": json.dumps(data)}))
