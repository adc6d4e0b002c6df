"""The import rules of STYLE, read from the sources, so that nobody has to remember them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORY = ["marketplace", "attribution", "payouts", "portal"]  # imports point back along it, never forward
PURE = ["attribution/engine", "marketplace/ingest", "marketplace/money.py", "payouts/allocation.py"]
IMPURE_MODULES = {
    "django",
    "rest_framework",
    "celery",
    "redis",
    "psycopg",
    "stripe",
    "httpx",
    "requests",
    "urllib.request",
}
HOMELESS = {"utils.py", "helpers.py", "common.py", "misc.py"}


def _files(*places: str) -> list[Path]:
    found = []
    for place in places:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [path for path in found if "migrations" not in path.parts]


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", STORY)
def test_imports_point_back_along_the_story(package: str) -> None:
    later = STORY[STORY.index(package) + 1 :]

    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _files(package)
        for name in _imports(path)
        for forward in [*later, "tests", "benchmarks"]
        if _is_of(name, forward)
    ]

    assert wrong == []
    assert len(_files(package)) > 5


def test_pure_modules_know_no_framework_and_no_network() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _files(*PURE)
        for name in _imports(path)
        if any(_is_of(name, impure) for impure in IMPURE_MODULES)
    ]

    assert wrong == []
    assert len(_files(*PURE)) > 10


def test_engine_imports_nothing_of_the_marketplace() -> None:
    assert [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _files("attribution/engine")
        for name in _imports(path)
        if any(_is_of(name, package) for package in ("marketplace", "payouts", "portal"))
        or (_is_of(name, "attribution") and not _is_of(name, "attribution.engine") and name != "attribution")
    ] == []


def test_only_the_gateway_knows_stripe() -> None:
    allowed = {"payouts/gateway.py"}

    users = {
        str(path.relative_to(ROOT))
        for path in _files(*STORY)
        if "local_stripe" not in path.parts and any(_is_of(name, "stripe") for name in _imports(path))
    }

    assert users == allowed


def test_only_the_ledger_writes_postings() -> None:
    writers = {
        str(path.relative_to(ROOT))
        for path in _files(*STORY)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("create", "bulk_create", "get_or_create", "update_or_create")
        and ast.unparse(node.value) in ("Posting.objects", "JournalEntry.objects")
    }
    statement = re.compile(r"(INSERT INTO|COPY|UPDATE|DELETE FROM)\s+payouts_(posting|journalentry)\b", re.IGNORECASE)
    writers |= {
        str(path.relative_to(ROOT))
        for path in _files(*STORY)
        if "migrations" not in path.parts and statement.search(path.read_text())
    }

    assert writers == {"payouts/ledger.py"}


def test_only_the_audit_service_writes_the_log() -> None:
    writers = {
        str(path.relative_to(ROOT))
        for path in _files(*STORY, "benchmarks")
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("create", "bulk_create", "get_or_create", "update_or_create")
            and ast.unparse(node.value) == "AuditEvent.objects"
        )
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("AuditEvent", "models.AuditEvent"))
    }

    assert writers == {"marketplace/services/audit.py"}


def test_one_check_says_who_is_staff() -> None:
    askers = {
        str(path.relative_to(ROOT))
        for path in _files(*(f"{package}/services" for package in STORY if (ROOT / package / "services").is_dir()))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "is_staff"
    }

    assert askers == {"marketplace/services/authority.py"}


def test_tasks_are_leaves() -> None:
    tasks = [f"{package}.tasks" for package in STORY]

    assert [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _files(*STORY)
        for name in _imports(path)
        if any(_is_of(name, task) for task in tasks)
    ] == []


def test_every_module_has_a_name_that_says_what_it_holds() -> None:
    assert [str(path.relative_to(ROOT)) for path in _files(*STORY) if path.name in HOMELESS] == []


def test_no_pickle_anywhere() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

    assert [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _files(*STORY, "examples", "benchmarks")
        for name in _imports(path)
        if name.split(".")[0] in forbidden or name == "torch.load"
    ] == []
    loads = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _files(*STORY)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load")
        and not any(k.arg in ("weights_only", "allow_pickle") for k in node.keywords)
    ]
    assert [place for place in loads if "torch" in place] == []
