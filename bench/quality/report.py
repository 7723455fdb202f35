"""Tables in Markdown over recorded cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bench.quality import equal_memory
from bench.quality.long_answers import FIGURES
from bench.quality.records import Cell, Key
from bench.quality.scoring import LONG
from bench.quality.stats import (
    Column,
    Estimate,
    columns,
    group_retention,
    group_tasks,
    groups_of,
    mean_of,
    pairs,
    scores,
    select,
    versus,
)
from bench.quality.systems import FULL, SHARE
from bench.quality.tasks import OWN_LENGTH, RULER, TASKS

DECODED = ("lm", "replay", "long-replay")


def markdown(
    cells: Mapping[Key, Cell], model: str = "", seed: int | None = None
) -> str:
    """All tables: by model, then by length."""
    parts = []
    for name in dict.fromkeys(key.model for key in cells):
        if model and name != model:
            continue
        for length in sorted({key.length for key in cells if key.model == name}):
            chosen = select(cells, name, length, seed)
            if chosen:
                parts.append(_section(chosen, name, length))
    return "\n\n".join(parts) + "\n" if parts else "no results\n"


def _section(cells: Mapping[Key, Cell], model: str, length: int) -> str:
    where = f"{length} tokens" if length != OWN_LENGTH else "prompts as they are"
    origins = sorted({origin for cell in cells.values() for origin in cell.origins})
    counts = sorted({len(cell.samples) for cell in cells.values()})
    seeds = sorted({key.seed for key in cells})
    parts = [
        f"## {model}, {where}",
        f"Samples a cell: {_span(counts)}; seeds {_span(seeds)}. "
        f"Commits: {'; '.join(f'{commit} on {gpu}' for commit, gpu in origins)}.",
        "### Retention of the full cache's score, %, with 95 % intervals",
        retention_table(cells),
        "### Score by task, %",
        score_table(cells),
    ]
    for title, text in (
        ("Decoded text: likelihood of what the full cache sees", decoded_table(cells)),
        ("Long answers beside the full cache's", long_table(cells)),
        ("An answer's own share, at equal memory", share_table(cells)),
        ("Points over other systems on the same samples", versus_table(cells)),
    ):
        if text:
            parts += [f"### {title}", text]
    return "\n\n".join(parts)


def retention_table(cells: Mapping[Key, Cell]) -> str:
    """One row a system and setting, one column a group."""
    groups, found = groups_of(cells), columns(cells)
    # Older records do not know the mean over the steps.
    fields = [
        field
        for field in ("resident", "mean_resident")
        if any(mean_of(cells, column, TASKS, field) is not None for column in found)
    ]
    rows = []
    for column in found:
        values = [group_retention(cells, column, group) for group in groups]
        held = [_number(mean_of(cells, column, TASKS, it), 0) for it in fields]
        rows.append([*_name(column), *held, *map(_cell, values)])
    head = ["system", "rate", *(field.replace("_", " ") for field in fields)]
    return table([*head, *(_title(cells, group) for group in groups)], rows)


def score_table(cells: Mapping[Key, Cell]) -> str:
    """Absolute scores; a star marks cells with fewer samples than the most."""
    tasks = [name for name in TASKS if any(key.task == name for key in cells)]
    most = max(len(cell.samples) for cell in cells.values())
    rows = []
    for column in columns(cells):
        row = list(_name(column))
        for task in tasks:
            values = list(scores(cells, column, task).values())
            if not values:
                row.append("")
                continue
            text = f"{100 * sum(values) / len(values):.1f}"
            row.append(text + (f" (n={len(values)})" if len(values) < most else ""))
        rows.append(row)
    return table(["system", "rate", *tasks], rows)


def decoded_table(cells: Mapping[Key, Cell]) -> str:
    """Loss, agreement of the most likely token, and divergence, per decoded task."""
    tasks = [
        name
        for name, task in TASKS.items()
        if task.group in DECODED
        and any(
            "nll" in sample
            for key, cell in cells.items()
            if key.task == name
            for sample in cell.samples.values()
        )
    ]
    rows = []
    for column in columns(cells):
        row = list(_name(column))
        for task in tasks:
            row += [
                _number(mean_of(cells, column, [task], field), digits)
                for field, digits in (("nll", 3), ("agree", 3), ("kl", 4))
            ]
        if any(row[2:]):
            rows.append(row)
    head = [f"{task} {name}" for task in tasks for name in ("nll", "agree", "KL")]
    return table(["system", "rate", *head], rows) if rows else ""


def long_table(cells: Mapping[Key, Cell]) -> str:
    """Means of what is known of long answers, and their length in percent of the full
    cache's; resident tokens are means over the decode steps.
    """
    tasks = [name for name, task in TASKS.items() if task.group in LONG]
    rows = []
    for column in columns(cells):
        means = [mean_of(cells, column, tasks, figure) for figure in FIGURES]
        if not any(value is not None for value in means):
            continue
        lengths = np.concatenate(
            [pairs(cells, column, task, "output_tokens") for task in tasks]
        )
        share = (
            100 * lengths[:, 0].sum() / lengths[:, 1].sum() if len(lengths) else None
        )
        resident = mean_of(cells, column, tasks, "mean_resident")
        shares = [None if value is None else 100 * value for value in means]
        rows.append(
            [*_name(column), _number(resident, 0), _number(share, 0)]
            + [_number(value, 1) for value in shares]
        )
    head = ["system", "rate", "mean resident", "length", *FIGURES]
    return table(head, rows) if rows else ""


def share_table(cells: Mapping[Key, Cell]) -> str:
    """Retention with a share of the answer's own, minus that of the same system where
    it keeps as many tokens on average without one, in points.
    """
    groups = [group for group in groups_of(cells) if group != RULER]
    rows = []
    for column in columns(cells):
        if SHARE not in column.setting:
            continue
        row = list(_name(column))
        for group in groups:
            held, kept = equal_memory.measured(cells, column, group)
            line = equal_memory.points(cells, column.system, group)
            plain = equal_memory.at(line, held) if held else None
            known = kept is not None and plain is not None
            row.append(f"{kept - plain:+.1f} ({held:.0f})" if known else "")
        rows.append(row)
    head = ["system", "rate", *(f"{group}, points (mean)" for group in groups)]
    return table(head, rows) if rows else ""


def versus_table(cells: Mapping[Key, Cell]) -> str:
    """The first compressing system against each other one, at equal settings."""
    found = [c for c in columns(cells) if c.setting != FULL.label]
    systems = list(dict.fromkeys(column.system for column in found))
    groups = [group for group in groups_of(cells) if group == RULER or len(systems) > 1]
    rows = []
    for other in systems[1:]:
        for column in (c for c in found if c.system == systems[0]):
            against = Column(other, column.setting)
            if against not in found:
                continue
            values = [versus(cells, column, against, group) for group in groups]
            rows.append([systems[0], other, f"{column.setting}", *map(_cell, values)])
    head = ["system", "minus", "rate", *groups]
    return table(head, rows) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _title(cells: Mapping[Key, Cell], group: str) -> str:
    """Group and how many of its tasks were measured."""
    measured = {key.task for key in cells} & set(group_tasks(group))
    return f"{group} ({len(measured)})"


def _name(column: Column) -> tuple[str, str]:
    return column.system, column.setting


def _cell(value: Estimate | None) -> str:
    return "" if value is None else str(value)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
