"""Moves the samples of a campaign out of the text, and leaves a summary there.

``quality.jsonl`` is what runs append to. `archive` moves its lines with samples behind
those of ``quality.parquet`` (`columns`), which every command reads with it, and leaves
what the report says of them: a line a model, length, system and setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.common.record import read_lines
from bench.quality import columns
from bench.quality.records import Cell, Key, merge
from bench.quality.report import DECODED
from bench.quality.stats import (
    Column,
    group_retention,
    groups_of,
    mean_of,
    scores,
    select,
)
from bench.quality.stats import columns as table_rows
from bench.quality.tasks import TASKS

SUMMARY = "summary"
"""Marks the lines that are written anew."""
DIGITS = 1
FIGURES = {"nll": 3, "agree": 3, "kl": 4}
"""Of decoded text, and their digits."""


def archive(path: Path) -> int:
    """Move the lines with samples of a JSONL file; how many were moved.

    Raises
    ------
    RuntimeError
        If what was written reads differently: the text is as it was then.
    """
    lines = read_lines(path)
    moved = [line for line in lines if _has_samples(line)]
    if not moved:
        return 0
    kept = [line for line in lines if not _has_samples(line) and SUMMARY not in line]
    target = path.with_suffix(columns.SUFFIX)
    every = [*columns.read(target), *moved]
    trial = target.with_name(f"{target.stem}.trial{columns.SUFFIX}")
    columns.write(trial, every, Key._fields)
    if columns.read(trial) != every:
        trial.unlink()
        raise RuntimeError(f"{target.name} would not hold what {path.name} says")
    trial.replace(target)
    text = [json.dumps(line) for line in kept]
    # Tight: numbers are most of it.
    text += [json.dumps(row, separators=(",", ":")) for row in summary(merge(every))]
    new = path.with_name(path.name + ".new")
    new.write_text("".join(f"{line}\n" for line in text))
    new.replace(path)
    return len(moved)


def _has_samples(line: dict[str, Any]) -> bool:
    """Whether a line has samples; other benches write how many there were."""
    return isinstance(line.get(columns.SAMPLES), dict)


def summary(cells: Mapping[Key, Cell]) -> Iterator[dict[str, Any]]:
    """Figures of the tables of `report`, but for the comparison of systems."""
    for model, length in sorted({(key.model, key.length) for key in cells}):
        chosen = select(cells, model, length)
        for row in table_rows(chosen):
            yield {SUMMARY: True, "model": model, "length": length, **_row(chosen, row)}


def _row(cells: Mapping[Key, Cell], row: Column) -> dict[str, Any]:
    """Figures of one system at one setting."""
    own = {key: c for key, c in cells.items() if (key.system, key.setting) == row}
    tasks = [name for name in TASKS if any(key.task == name for key in own)]
    found: dict[str, Any] = {
        **row._asdict(),
        "seeds": sorted({key.seed for key in own}),
        "origins": sorted({origin for cell in own.values() for origin in cell.origins}),
        "asked": sum(len(cell.samples) for cell in own.values()),
        "resident": _round(mean_of(cells, row, TASKS, "resident"), 0),
        "retention": {},
        "scores": {},
    }
    for group in groups_of(cells):
        if value := group_retention(cells, row, group):
            bounds = (value.value, value.low, value.high)
            found["retention"][group] = [_round(one, DIGITS) for one in bounds]
    for task in tasks:
        values = list(scores(cells, row, task).values())
        found["scores"][task] = _round(100 * sum(values) / len(values), DIGITS)
        figures = {
            name: _round(mean_of(cells, row, [task], name), digits)
            for name, digits in FIGURES.items()
        }
        if TASKS[task].group in DECODED and figures["nll"] is not None:
            found.setdefault("decoded", {})[task] = figures
    return found


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
