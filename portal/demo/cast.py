"""Who is in the demo, and which files they bring. The images and their true labels are real; the people are made up."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv

from examples.digits.assignment import Assignment, assign

PASSWORD = "a demo password, nothing more"  # noqa: S105 - play money on this machine only
SEED = 0

COOPERATIVE = "Digits Cooperative"
CURATOR = "curator@demo.example"
LAB = "Lumen Lab"
TRAINER = "trainer@demo.example"
HOLDERS = [
    "Aster Archive",
    "Birch Studio",
    "Cedar Press",
    "Dahlia Prints",
    "Elm and Daughters",
    "Fern Collective",
    "Gorse Imaging",
    "Hazel Scans",
    "Iris Works",
    "Juniper Reuploads",  # copies of Aster Archive's records, and nothing else
]
LABELLERS = ["Kim", "Lou", "Max", "Nia", "Oz"]  # Oz's labels are wrong 40 % of the time
COPIED, COPIER, CARELESS = HOLDERS[0], HOLDERS[9], LABELLERS[4]
IN_PARQUET = range(5)  # rights holders 0–4 come in the Parquet file, 5–9 in the CSV file


def email_of(name: str) -> str:
    return f"{name.lower().replace(' ', '-')}@demo.example"


@dataclass(frozen=True)
class Listing:
    """One dataset of the demo: its file, how its columns are called, and its terms; the site names it by its title."""

    title: str
    summary: str
    filename: str
    mapping: dict[str, str]
    price: str
    upfront_percent: int = 30
    pool_percent: int = 60
    royalty_percent: int = 5
    royalty_cap: str = "20000.00"
    labellers_percent: int = 25


LISTINGS = [
    Listing(
        title="Handwritten digits, part one",
        summary="Five archives' 8 × 8 grey images of handwritten digits, labelled by hired people.",
        filename="digits-one.parquet",
        mapping={"content": "pixels", "label": "digit", "rights_holder": "holder", "labeller": "labeller"},
        price="600.00",
    ),
    Listing(
        title="Handwritten digits, part two",
        summary="Five more archives' handwritten digits, in the same format and by the same labellers.",
        filename="digits-two.csv",
        mapping={"content": "pixel_*", "label": "digit", "rights_holder": "holder", "labeller": "labeller"},
        price="400.00",
    ),
]


@cache
def assignment() -> Assignment:
    return assign(SEED)


def write_files(directory: Path) -> list[Path]:
    """The Parquet and the CSV file that the cooperative uploads, and the trainer's query file."""
    directory.mkdir(parents=True, exist_ok=True)
    data = assignment()
    first = ~data.is_query & np.isin(data.rights_holder, IN_PARQUET)
    second = ~data.is_query & ~first
    paths = [directory / listing.filename for listing in LISTINGS] + [directory / "queries.parquet"]

    pixels = pa.array(list(data.images[first]), pa.list_(pa.uint8()))
    pq.write_table(pa.table({"pixels": pixels} | _people(data, first)), paths[0])
    columns = {f"pixel_{n}": data.images[second, n] for n in range(data.images.shape[1])}
    csv.write_csv(pa.table(columns | _people(data, second)), paths[1])
    write_queries(paths[2], images=data.images[data.is_query], labels=data.true_label[data.is_query])
    return paths


def _people(data: Assignment, rows: NDArray[np.bool_]) -> dict[str, pa.Array]:
    return {
        "digit": pa.array(data.given_label[rows]),
        "holder": pa.array([HOLDERS[n] for n in data.rights_holder[rows]]),
        "labeller": pa.array([LABELLERS[n] for n in data.labeller[rows]]),
    }


def write_queries(path: Path, *, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """The format of an artifact of kind `queries`: the columns content and label."""
    content = pa.array(list(images.astype(np.float64)), pa.list_(pa.float64()))
    pq.write_table(pa.table({"content": content, "label": [str(label) for label in labels]}), path)
