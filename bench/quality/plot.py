"""Plots of retention as PNG files. Needs matplotlib; `heads_report` has heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.common.plotting import COLORS, MARKERS, load_pyplot, write_png
from bench.quality.records import Cell, Key
from bench.quality.stats import (
    Estimate,
    columns,
    group_retention,
    groups_of,
    select,
)
from bench.quality.systems import FULL, KVPRESS, SHARE
from bench.quality.tasks import OWN_LENGTH

PANEL = (4.2, 3.4)
ACROSS = 3
DASHES = {KVPRESS: "--"}
LEGEND_LINE = 0.22
"""Inches."""

Lines = dict[str, list[tuple[float, Estimate]]]


def draw(
    cells: Mapping[Key, Cell], out: Path, model: str = "", seed: int | None = None
) -> list[Path]:
    """Write one plot for each model and length; the paths written."""
    plt = load_pyplot()
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, length in sorted({(key.model, key.length) for key in cells}):
        if model and name != model:
            continue
        chosen = select(cells, name, length, seed)
        where = "own" if length == OWN_LENGTH else str(length)
        path = out / f"quality_{name}_{where}.png"
        if plot_retention(plt, chosen, f"{name}, {where} tokens", path):
            written.append(path)
    return written


def retention_lines(cells: Mapping[Key, Cell], group: str) -> Lines:
    """Rate and retention of each system that evicts; budgets are left out."""
    lines: Lines = {}
    for column in columns(cells):
        if column.setting.startswith("b") or SHARE in column.setting:
            continue
        value = group_retention(cells, column, group)
        if value is not None:
            point = (float(column.setting), value)
            lines.setdefault(column.system, []).append(point)
    # Where nothing is evicted, systems of a kind are one.
    full = {s.partition(":")[0]: p for s, p in lines.items() if _is_full(p[0])}
    for system, points in lines.items():
        start = full.get(system.partition(":")[0])
        if start and not _is_full(points[0]):
            points.insert(0, start[0])
    return {system: points for system, points in lines.items() if len(points) > 1}


def _is_full(point: tuple[float, Estimate]) -> bool:
    return f"{point[0]:g}" == FULL.label


def plot_retention(plt: Any, cells: Mapping[Key, Cell], title: str, path: Path) -> bool:
    """Retention against rate, one panel a group, one line a system."""
    panels = {group: retention_lines(cells, group) for group in groups_of(cells)}
    panels = {group: lines for group, lines in panels.items() if lines}
    if not panels:
        return False
    numbers = _numbers(dict.fromkeys(s for lines in panels.values() for s in lines))
    rows = -(-len(panels) // ACROSS)
    across = min(ACROSS, len(panels))
    figure, grid = plt.subplots(
        rows,
        across,
        figsize=(PANEL[0] * across, PANEL[1] * rows + 0.8),
        squeeze=False,
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (group, lines) in zip(grid.flat, panels.items(), strict=False):
        for system, points in lines.items():
            _line(axes, system, numbers[system], points)
        _panel(axes, group, lines)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(f"Retention of the full cache's score: {title}")
    legend = LEGEND_LINE * (1 - (-len(handles) // 3))
    figure.tight_layout(rect=(0, legend / figure.get_figheight(), 1, 1))
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False
    )
    write_png(figure, path)
    plt.close(figure)
    return True


def _numbers(systems: Iterable[str]) -> dict[str, int]:
    """Which colour a system has; kinds differ by their dashes, so each counts anew."""
    seen: dict[str, int] = {}
    numbers = {}
    for system in systems:
        kind = system.partition(":")[0]
        numbers[system] = seen.get(kind, 0)
        seen[kind] = numbers[system] + 1
    return numbers


def _line(
    axes: Any, system: str, number: int, points: list[tuple[float, Estimate]]
) -> None:
    rates = [rate for rate, _ in points]
    color = COLORS[number % len(COLORS)]
    axes.plot(
        rates,
        [value.value for _, value in points],
        color=color,
        marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
        markersize=4,
        linestyle=DASHES.get(system.partition(":")[0], "-"),
        label=system,
    )
    axes.fill_between(
        rates,
        [value.low for _, value in points],
        [value.high for _, value in points],
        color=color,
        alpha=0.12,
        linewidth=0,
    )


def _panel(axes: Any, group: str, lines: Lines) -> None:
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    axes.axhline(100, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(group)
    axes.set_xlabel("compression rate")
    axes.set_ylabel("% of the full cache")
    axes.grid(alpha=0.3)
