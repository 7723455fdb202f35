"""What an answer's own share gains where both keep equally many tokens on average.

A setting such as ``8+512`` holds more than ``8``. So it is compared with what the same
system keeps of the score without a share, between the two rates around its own mean of
resident tokens: a straight line over their logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import log

from bench.quality.records import Cell, Key
from bench.quality.stats import Column, columns, group_retention, group_tasks, mean_of
from bench.quality.systems import SHARE


def points(
    cells: Mapping[Key, Cell], system: str, group: str
) -> list[tuple[float, float]]:
    """Mean resident tokens and retention in percent of settings without a share."""
    found = []
    for column in columns(cells):
        if column.system != system or SHARE in column.setting:
            continue
        held, kept = measured(cells, column, group)
        if held is not None and kept is not None:
            found.append((held, kept))
    return sorted(found)


def measured(
    cells: Mapping[Key, Cell], column: Column, group: str
) -> tuple[float | None, float | None]:
    """Mean resident tokens of a group's tasks, and its retention in percent."""
    value = group_retention(cells, column, group)
    held = mean_of(cells, column, group_tasks(group), "mean_resident")
    return held, value.value if value else None


def at(line: list[tuple[float, float]], tokens: float) -> float | None:
    """Retention at a mean of resident tokens; None outside of what was measured."""
    for (low, left), (high, right) in pairwise(line):
        if low <= tokens <= high:
            part = log(tokens / low) / log(high / low) if high > low else 0.0
            return left + part * (right - left)
    return None
