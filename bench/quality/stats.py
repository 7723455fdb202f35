"""Retention of the full cache's score and its uncertainty.

Retention is the mean score over tasks as a percentage of the full cache's on the same
weights and the same prompts; samples are pairs, so both are resampled together, within
each task (percentile bootstrap, 95 %).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.quality.records import Cell, Key
from bench.quality.systems import FULL, SHARE, STOCK
from bench.quality.tasks import GROUPS, RULER, TASKS
from sglang_kvc.tools.advise import bootstrap
from sglang_kvc.tools.advise.bootstrap import LEVELS

RESAMPLES = 2000
LM = "lm"


class Column(NamedTuple):
    """What a table's row is made of: system and setting."""

    system: str
    setting: str


class Estimate(bootstrap.Estimate):
    """A value with its 95 % interval, from `count` samples; to a tenth."""

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def select(
    cells: Mapping[Key, Cell], model: str, length: int, seed: int | None = None
) -> dict[Key, Cell]:
    """Cells of a model and length (0: tasks with a length of their own)."""
    return {
        key: cell
        for key, cell in cells.items()
        if key.model == model
        and key.length == length
        and (seed is None or key.seed == seed)
    }


def columns(cells: Mapping[Key, Cell]) -> list[Column]:
    """Systems and settings that there are: by system as found, then by setting."""
    systems = list(dict.fromkeys(key.system for key in cells))
    found = {Column(key.system, key.setting) for key in cells}
    return sorted(found, key=lambda c: (systems.index(c.system), order(c.setting)))


def order(setting: str) -> tuple[int, float, int]:
    """Sorts rates upwards, then budgets downwards; shares of the answer upwards."""
    keep, _, share = setting.partition(SHARE)
    answer = int(share or 0)
    if keep.startswith("b"):
        return 1, -float(keep[1:]), answer
    return 0, float(keep), answer


def full_cell(cells: Mapping[Key, Cell], key: Key) -> Cell | None:
    """The full cache's cell to compare with: its own kind's, else stock's."""
    kind = key.system.partition(":")[0]
    same = [
        other
        for other in cells
        if other._replace(system="", setting="") == key._replace(system="", setting="")
        and other.setting == FULL.label
    ]
    for wanted in (kind, STOCK):
        for other in same:
            if other.system.partition(":")[0] == wanted:
                return cells[other]
    return None


def pairs(
    cells: Mapping[Key, Cell], column: Column, task: str, field: str = "score"
) -> Any:
    """Scores and the full cache's of the same samples, ``[n, 2]``, seeds together."""
    rows = []
    for key, cell in cells.items():
        if (key.system, key.setting, key.task) != (*column, task):
            continue
        full = full_cell(cells, key)
        if full is None:
            continue
        for index, sample in sorted(cell.samples.items()):
            if index in full.samples:
                rows.append((sample[field], full.samples[index][field]))
    return np.array(rows, float).reshape(-1, 2)


def group_tasks(group: str) -> list[str]:
    """Names of a group's tasks, or of the RULER-like ones."""
    return [t.name for t in TASKS.values() if t.group == group or _ruler(t, group)]


def _ruler(task: Any, group: str) -> bool:
    return bool(group == RULER and task.ruler)


def retention(tables: Sequence[Any]) -> Estimate | None:
    """Retention in percent over tasks, each a table of `pairs`.

    Returns
    -------
    Estimate or None
        None without samples or where the full cache scores nothing.
    """
    tables = [table for table in tables if len(table)]
    draws = _resampled_means(tables)
    if draws is None or draws[0, 1] == 0:
        return None
    value = 100 * draws[0, 0] / draws[0, 1]
    drawn = draws[1:][draws[1:, 1] > 0]
    low, high = np.percentile(100 * drawn[:, 0] / drawn[:, 1], LEVELS)
    return Estimate(float(value), float(low), float(high), sum(map(len, tables)))


def difference(tables: Sequence[Any]) -> Estimate | None:
    """Mean score of the first column minus that of the second, in points."""
    tables = [table for table in tables if len(table)]
    draws = _resampled_means(tables)
    if draws is None:
        return None
    gap = 100 * (draws[:, 0] - draws[:, 1])
    low, high = np.percentile(gap[1:], LEVELS)
    return Estimate(float(gap[0]), float(low), float(high), sum(map(len, tables)))


def _resampled_means(tables: Sequence[Any]) -> Any:
    """Mean over tasks of both columns: as measured, then resampled."""
    if not tables:
        return None
    rng = np.random.default_rng(0)
    total = np.zeros((RESAMPLES + 1, 2))
    for table in tables:
        total[0] += table.mean(0)
        places = rng.integers(len(table), size=(RESAMPLES, len(table)))
        total[1:] += table[places].mean(1)
    return total / len(tables)


def group_retention(
    cells: Mapping[Key, Cell], column: Column, group: str
) -> Estimate | None:
    """Retention of a group, ``ruler`` among them.

    None if the column lacks a task of the group that others have: a mean over easier
    tasks must not stand beside theirs.
    """
    measured = {key.task for key in cells}
    tasks = [task for task in group_tasks(group) if task in measured]
    tables = [pairs(cells, column, task) for task in tasks]
    return retention(tables) if all(map(len, tables)) else None


def versus(
    cells: Mapping[Key, Cell], first: Column, second: Column, group: str
) -> Estimate | None:
    """Points by which one column is better than another on the same samples."""
    tables = []
    for task in group_tasks(group):
        a, b = scores(cells, first, task), scores(cells, second, task)
        common = sorted(a.keys() & b.keys())
        tables.append(np.array([(a[i], b[i]) for i in common]).reshape(-1, 2))
    return difference(tables)


def scores(
    cells: Mapping[Key, Cell], column: Column, task: str
) -> dict[tuple[int, int], float]:
    """Score of each (seed, index)."""
    return {
        (key.seed, index): sample["score"]
        for key, cell in cells.items()
        if (key.system, key.setting, key.task) == (*column, task)
        for index, sample in cell.samples.items()
    }


def mean_of(
    cells: Mapping[Key, Cell], column: Column, tasks: Iterable[str], field: str
) -> float | None:
    """Mean of a recorded figure over samples."""
    wanted = set(tasks)
    values = [
        sample[field]
        for key, cell in cells.items()
        if (key.system, key.setting) == column and key.task in wanted
        for sample in cell.samples.values()
        if sample.get(field) is not None
    ]
    return float(np.mean(values)) if values else None


def groups_of(cells: Mapping[Key, Cell]) -> list[str]:
    """Groups that have cells, ``ruler`` first if any of its tasks has."""
    tasks = {key.task for key in cells}
    found = [group for group in GROUPS if tasks & set(group_tasks(group))]
    return [RULER, *found] if tasks & set(group_tasks(RULER)) else found
