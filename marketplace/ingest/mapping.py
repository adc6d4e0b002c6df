"""Which column of a file is what, as the uploader said."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from marketplace.ingest.errors import FileRefused
from marketplace.ingest.limits import Limits

KINDS = ("", "vector", "text")
MAX_PREVIEW_ROWS = 100


@dataclass(frozen=True)
class ColumnMapping:
    """Content by name or pattern; label, rights holder and labeller by name, "" for none.

    Without a rights holder's column every record is the uploader's; without a labeller's, nobody's.
    """

    content: tuple[str, ...]  # names, or patterns such as "pixel_*", which take the file's order
    label: str = ""
    rights_holder: str = ""
    labeller: str = ""
    kind: str = ""  # "vector" or "text"; "": as the column is typed
    preview_rows: int = 20  # the first rows, which the rights holder lets anyone see

    @classmethod
    def parse(cls, mapping: Mapping[str, Any]) -> Self:
        """Read what a form or a client sent.

        Raises:
            FileRefused: a field is unknown, missing or of another type; the pointers name it.
        """
        pointers: dict[str, str] = {}
        if unknown := sorted(set(mapping) - set(cls.__dataclass_fields__)):
            pointers |= dict.fromkeys(unknown, "There is no such field.")
        content = mapping.get("content", ())
        content = [content] if isinstance(content, str) else content
        if (
            not isinstance(content, list | tuple)
            or not content
            or not all(isinstance(name, str) and name for name in content)
        ):
            pointers["content"] = 'Name the content columns: "text", ["width", "height"] or "pixel_*".'
        for name in ("label", "rights_holder", "labeller", "kind"):
            if not isinstance(mapping.get(name, ""), str):
                pointers[name] = 'Give a column name, or "" for none.'
        if mapping.get("kind", "") not in KINDS:
            pointers["kind"] = "Say vector or text, or leave it out."
        rows = mapping.get("preview_rows", 20)
        if not isinstance(rows, int) or isinstance(rows, bool) or not 0 <= rows <= MAX_PREVIEW_ROWS:
            pointers["preview_rows"] = f"Give a number from 0 to {MAX_PREVIEW_ROWS}."
        if pointers:
            where, what = next(iter(pointers.items()))
            raise FileRefused(f"{where}: {what}", code="mapping_invalid", pointers=pointers)
        known = {name: value for name, value in mapping.items() if name != "content"}
        return cls(content=tuple(content), **known)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"content": list(self.content)}

    def resolve(self, columns: Sequence[str], *, filename: str, limits: Limits) -> "ResolvedColumns":
        """Find the mapped columns among those of a file.

        Raises:
            FileRefused: a column is missing, twice in the file, or used twice.
        """
        if len(columns) > limits.columns:
            raise FileRefused(
                f"{filename} has {len(columns):,} columns; the most is {limits.columns:,}. Keep numeric content in one list column.",
                code="too_many_columns",
            )
        if twice := _repeated(columns):
            raise FileRefused(
                f"{filename} has more than one column named {twice[0]!r}; rename one.",
                code="column_twice",
                pointers={"file": f"Columns that appear twice: {_names(twice)}"},
            )
        known = set(columns)
        singles = {role: getattr(self, role) for role in ("label", "rights_holder", "labeller") if getattr(self, role)}
        missing = {role: name for role, name in singles.items() if name not in known}
        content: list[str] = []
        for wanted in self.content:
            if wanted in known:
                found = [wanted]
            else:
                found = [name for name in columns if fnmatchcase(name, wanted) and name not in singles.values()]
            if not found:
                missing["content"] = wanted
            content += found
        if missing:
            where, name = next(iter(missing.items()))
            raise FileRefused(
                f"{filename} has no column {name!r} for {where}. It has: {_names(columns)}.",
                code="column_missing",
                pointers={where: f"There is no column {name!r}." for where, name in missing.items()},
            )
        used = content + list(singles.values())
        if both := _repeated(used):
            raise FileRefused(
                f"Column {both[0]!r} of {filename} is used for two things; name another for one of them.",
                code="column_used_twice",
                pointers={"content": f"Column {both[0]!r} is used twice."},
            )
        return ResolvedColumns(
            content=tuple(content), label=self.label, rights_holder=self.rights_holder, labeller=self.labeller
        )


@dataclass(frozen=True)
class ResolvedColumns:
    """Columns that the file has."""

    content: tuple[str, ...]
    label: str
    rights_holder: str
    labeller: str

    @property
    def named(self) -> tuple[str, ...]:
        """The columns beside the content, which are read as text."""
        return tuple(name for name in (self.label, self.rights_holder, self.labeller) if name)


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _names(columns: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(columns[:most])
    return f"{shown} and {len(columns) - most:,} more" if len(columns) > most else shown
