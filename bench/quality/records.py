"""Results as JSON lines: one a cell and visit, merged by sample.

A cell is a model, a system, a setting, a task, a length and a seed. Later lines add
samples to earlier ones or replace them, so files of several visits to a machine are
one table, and a run that was stopped goes on where it stopped. Lines that `archive` has
moved into the Parquet file beside a JSONL file are read before that file's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.record import read_lines, write_record
from bench.quality import columns

ANSWER_CHARS = 60
"""Of a wrong answer, kept to see what went wrong."""
DIGITS = 5


class Key(NamedTuple):
    """Names a cell."""

    model: str
    system: str
    setting: str
    task: str
    length: int
    seed: int


@dataclass
class Cell:
    """Merged results of a cell.

    Attributes
    ----------
    key : Key
    group : str
    samples : dict
        Result of each sample index: ``score`` and what else was measured.
    origins : set of (str, str)
        Commit and hardware of the lines.
    """

    key: Key
    group: str
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    origins: set[tuple[str, str]] = field(default_factory=set)

    def missing(self, count: int) -> list[int]:
        """Indices below `count` that were not measured."""
        return [index for index in range(count) if index not in self.samples]


def key_of(record: dict[str, Any]) -> Key:
    """Key of a line."""
    return Key(*(record[name] for name in Key._fields))


def pack(samples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Results of samples as lists of equal length, which take less room."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: [_short(sample.get(name)) for sample in samples] for name in names}


def _short(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value


def unpack(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """What `pack` was given; figures that a sample lacks are None."""
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def merge(records: Iterable[dict[str, Any]]) -> dict[Key, Cell]:
    """Cells of lines; lines that are no results (errors) are left out."""
    cells: dict[Key, Cell] = {}
    for record in records:
        if "samples" not in record:
            continue
        key = key_of(record)
        cell = cells.setdefault(key, Cell(key, record["group"]))
        cell.samples |= {s["index"]: s for s in unpack(record["samples"])}
        cell.origins.add((record.get("commit", ""), record.get("gpu") or "CPU"))
    return cells


def read(paths: Iterable[Path]) -> dict[Key, Cell]:
    """Cells of files; a file that does not exist has none."""
    return merge(record for path in paths for record in lines_of(path))


class Results:
    """What is measured, and the file that takes more.

    Parameters
    ----------
    out : Path
        JSON lines are appended; what is there already counts as done.
    also : iterable of Path
        Files whose results count as done, too.
    origin : dict
        Goes into every line: command, commit, hardware, settings.

    Attributes
    ----------
    done : dict of Key to Cell
        As the files were at the beginning.
    """

    def __init__(
        self,
        out: Path,
        also: Iterable[Path] = (),
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.origin = out, origin or {}
        self.done = read([out, *also])

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        write_record(self.out, {**self.origin, **line})


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file, archived ones first, or of a Parquet file alone."""
    lines = columns.read(path.with_suffix(columns.SUFFIX))
    return lines if path.suffix == columns.SUFFIX else lines + read_lines(path)
