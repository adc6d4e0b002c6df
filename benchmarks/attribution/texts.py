"""Real text for the worlds: ten projects' own descriptions of themselves, and short texts that people rated.

`texts.json` holds paragraphs of the README files of ten packages on PyPI, each with its version, license (MIT or BSD) and the holder of the copyright:
their owners are real. Ten other packages' paragraphs (MIT, BSD, Apache-2.0) are what the frozen base model was trained on. Code, links
and whatever is not ASCII was taken out; a blank line was between paragraphs.

`snippets` are tweets, product reviews and newspaper editorials from the source package of vaderSentiment 3.3.2 (C. J. Hutto,
E. Gilbert, ICWSM 2014; MIT license). The archive is fetched once into var/bench, by pip, and known by its checksum.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CACHE = Path(__file__).resolve().parents[2] / "var" / "bench"
PROJECTS = Path(__file__).with_name("texts.json")
SNIPPETS = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
KINDS = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
BYTES = 128  # ASCII


@cache
def projects(part: str = "owners") -> list[tuple[str, str]]:
    """(package, its paragraphs joined by blank lines) for each of the ten; `part` may be "base"."""
    found = json.loads(PROJECTS.read_text())[part]
    return [(project["package"], "\n\n".join(project["paragraphs"])) for project in found]


def windows(text: str, length: int) -> NDArray[np.int64]:
    """(n, length): the text cut into pieces that do not overlap."""
    data = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)
    return data[: len(data) // length * length].reshape(-1, length)


@cache
def snippets() -> tuple[tuple[str, ...], ...]:
    """For each of KINDS, its texts in the archive's order."""
    archive = CACHE / "vaderSentiment-3.3.2.tar.gz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-binary", ":all:", "-d", str(CACHE), SNIPPETS], check=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive} has SHA-256 {found}, not {SHA256}: delete it and run this again")
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            kinds = []
            for kind in KINDS:
                member = tar.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
                assert member is not None
                rows = member.read().decode("latin-1").splitlines()
                kinds.append(tuple(row.split("\t")[2] for row in rows if row.count("\t") >= 2))
    return tuple(kinds)


def hashed_words(text: str, *, length: int, vocabulary: int) -> NDArray[np.int64]:
    """(length,) word numbers from 1 on by a hash that is the same everywhere; 0 is no word."""
    words = re.findall(r"[A-Za-z']+|[0-9]+|[^\sA-Za-z0-9]", text)[:length]
    numbers = [1 + int.from_bytes(hashlib.sha256(w.encode()).digest()[:4], "big") % (vocabulary - 1) for w in words]
    return np.array(numbers + [0] * (length - len(numbers)), np.int64)
