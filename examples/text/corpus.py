"""Two corpora that are on this machine already, and whose they are.

*Words*: the VADER lexicon (Hutto & Gilbert 2014; beside this file under its MIT license): 7,520 entries, each rated from −4
to 4 by ten people hired to rate it. The ratings are real, and so is their place: column k of every entry. That column k was
the same person throughout is not said; each column keeps its habits over the whole file (the last one is nearest to the
others' mean in every fifth of it), so a column is taken for a rater. Which of an entry's ten ratings is used here is drawn.

*Docstrings*: the first paragraphs of ten pinned packages' docstrings, read from their source files, which are parsed and
never imported. Their owners are their projects: nothing is assigned.
"""

import ast
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LEXICON = Path(__file__).with_name("lexicon") / "vader_lexicon.txt"
LEXICON_HOLDER = "VADER lexicon"
CLASSES = ["negative", "neutral", "positive"]
N_RATER = 10
N_QUERY = 400
NEUTRAL_BELOW = 0.5  # |mean rating|
PACKAGES = {  # import name → its holder; BSD-3-Clause but redis, which is MIT
    "django": "Django Software Foundation",
    "rest_framework": "Encode",
    "celery": "Celery contributors",
    "numpy": "NumPy Developers",
    "scipy": "SciPy Developers",
    "sklearn": "scikit-learn developers",
    "sympy": "SymPy Development Team",
    "networkx": "NetworkX Developers",
    "werkzeug": "Pallets",
    "redis": "Redis",
}
SHORTEST, LONGEST = 30, 400  # characters of a docstring's first paragraph


@dataclass(frozen=True)
class Words:
    """Parallel arrays, one entry per rated word; queries are words that nobody is trained on."""

    words: list[str]
    label: NDArray[np.int64]  # index into CLASSES: the sign of one rater's rating; of a query, of all ten's mean
    rater: NDArray[np.int64]  # 0..9; -1 for queries
    is_query: NDArray[np.bool_]


def rated_words() -> tuple[list[str], NDArray[np.int64]]:
    """Entries that are words of three letters or more, and their ratings (n, 10), in the lexicon's order."""
    words, ratings = [], []
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        word, _, _, given = line.split("\t")
        if re.fullmatch("[a-z]{3,}", word):
            words.append(word)
            ratings.append(ast.literal_eval(given))
    return words, np.array(ratings, dtype=np.int64)


def draw_words(seed: int, n_train: int) -> Words:
    """`n_train` words for training, nearly as many of each rater as of any other, and 400 held out.

    Raises:
        ValueError: the lexicon has fewer words.
    """
    words, ratings = rated_words()
    if n_train + N_QUERY > len(words):
        raise ValueError(f"{n_train} + {N_QUERY} words of {len(words)}")
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.permutation(len(words))[: n_train + N_QUERY]
    is_query = np.arange(len(drawn)) >= n_train
    rater = np.append(rng.permutation(n_train) % N_RATER, np.full(N_QUERY, -1))
    mean = ratings[drawn].mean(1)
    of_all = np.where(np.abs(mean) < NEUTRAL_BELOW, 0, np.sign(mean))
    given = np.where(is_query, of_all, np.sign(ratings[drawn, np.maximum(rater, 0)]))
    return Words([words[n] for n in drawn], given.astype(np.int64) + 1, rater.astype(np.int64), is_query)


def draw_docstrings(seed: int, n_each: int) -> tuple[list[str], NDArray[np.int64]]:
    """`n_each` first paragraphs of every package, no text twice, and whose each is: an index into PACKAGES.

    Raises:
        ValueError: a package has fewer.
    """
    texts: list[str] = []
    owner: list[int] = []
    seen: set[str] = set()
    rng = np.random.Generator(np.random.PCG64(seed))
    for number, package in enumerate(PACKAGES):
        found = [text for text in dict.fromkeys(_docstrings(package)) if text.casefold() not in seen]
        if len(found) < n_each:
            raise ValueError(
                f"{package} has {len(found)} docstrings of {SHORTEST} to {LONGEST} characters, not {n_each}"
            )
        kept = [found[n] for n in np.sort(rng.permutation(len(found))[:n_each])]
        seen |= {text.casefold() for text in kept}
        texts += kept
        owner += [number] * n_each
    return texts, np.array(owner)


def _docstrings(package: str) -> list[str]:
    """In the order of the files' names and of their lines; tests, and what a package carries of others', are left out."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, f"{package} is pinned"
    root = Path(next(iter(spec.submodule_search_locations)))
    found = []
    for path in sorted(root.rglob("*.py"))[:400]:
        if {"tests", "testing", "_vendored", "externals", "_lib", "vendor"} & set(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                text = " ".join(paragraph.split())
                if SHORTEST <= len(text) <= LONGEST:
                    found.append(text)
    return found
