"""References to dataset versions as papers write them: BibTeX, and CSL-JSON for everything else."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.conf import settings

from marketplace.models import Citation, DatasetVersion

#: What BibTeX's readers would take for markup.
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def bibtex(citations: Iterable[Citation]) -> str:
    """A disclosure's bibliography: an entry per cited version, in the document's order."""
    return "\n".join(_bibtex(citation) for citation in citations)


def csl_json(citations: Iterable[Citation]) -> list[dict[str, Any]]:
    """The same as CSL-JSON 1.0.2 items, which Zotero, Pandoc and Crossref's tools read."""
    return [_csl(citation) for citation in citations]


def citation_key(version: DatasetVersion) -> str:
    """Readable, and as unique as the records: "digits-v2-9f86d081"."""
    return f"{version.dataset.slug}-v{version.number}-{version.merkle_root[:8]}"


def _bibtex(citation: Citation) -> str:
    version = citation.version
    fields = {
        "author": f"{{{_latex(version.dataset.owner.name)}}}",  # braced twice: a party's name is not split into parts
        "title": _latex(version.dataset.title),
        "year": str(_published(version).year),
        "version": str(version.number),
        "publisher": "Residual",
        "url": _url(version),
        "note": _latex(_note(citation)),
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{citation_key(version)},\n{lines}\n}}\n"


def _csl(citation: Citation) -> dict[str, Any]:
    version = citation.version
    published = _published(version)
    return {
        "id": citation_key(version),
        "type": "dataset",
        "title": version.dataset.title,
        "author": [{"literal": version.dataset.owner.name}],
        "issued": {"date-parts": [[published.year, published.month, published.day]]},
        "version": str(version.number),
        "publisher": "Residual",
        "URL": _url(version),
        "note": _note(citation),
    }


def _note(citation: Citation) -> str:
    version = citation.version
    return f"{citation.n_records} of {version.n_records} records; Merkle root {version.merkle_root}"


def _url(version: DatasetVersion) -> str:
    return f"{settings.BASE_URL.rstrip('/')}/datasets/{version.dataset.slug}/"


def _published(version: DatasetVersion) -> datetime:
    assert version.published_at is not None, "what is cited was sold, and so published"
    return version.published_at


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
