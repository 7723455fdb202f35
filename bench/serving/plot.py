"""Plots of served loads against the compression rate, as PNG files.

    python -m bench.serving.plot [--results bench/results] [--out docs/plots] \\
        [--commit ID]

``throughput.png`` and ``largest_batch.png`` show the runs of `bench.serving`, one line
a load. Needs matplotlib. Figures are those of the newest commit in ``serve.jsonl``,
unless ``--commit`` names one; a plot without figures is skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common.plotting import (
    COLORS,
    MARKERS,
    Plot,
    Record,
    of_commit,
    save,
    write_plots,
)
from bench.serving.plot_data import Lines, rate_lines, serve_rows, stock_levels
from bench.serving.report import merge_commits, read_records

SPREAD = 0.8
"""Width of the points at one rate, in doublings of it."""


def plot_throughput(plt: Any, rows: list[Record], caption: str, path: Path) -> bool:
    """Tokens per second and its ratio to stock against the rate."""
    absolute = rate_lines(rows, "tokens_per_s")
    ratio = rate_lines(rows, "ratio_to_stock")
    if not absolute:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    levels = stock_levels(rows, "tokens_per_s")
    _draw_lines(left, absolute, levels)
    left.set_ylabel("tokens/s, input and output")
    left.set_title("Throughput (dashed or hollow: stock SGLang)")
    # Colours follow the load in both halves.
    _draw_lines(right, {load: ratio.get(load, []) for load in absolute}, {})
    right.axhline(1, color="grey", linestyle="--", linewidth=1)
    right.set_ylabel("x of stock SGLang")
    right.set_title("Throughput relative to stock")
    _rate_axis(left, absolute)
    _rate_axis(right, absolute)
    save(plt, figure, left, caption, path)
    return True


def plot_batch(plt: Any, rows: list[Record], caption: str, path: Path) -> bool:
    """Most requests that ran at once, against the rate."""
    lines = rate_lines(rows, "largest_batch")
    if not lines:
        return False
    figure, axes = plt.subplots(figsize=(7, 5))
    _draw_lines(axes, lines, stock_levels(rows, "largest_batch"))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(_plain)
    axes.set_ylabel("requests running at once, at most")
    axes.set_title("Largest batch (dashed or hollow: stock SGLang)")
    _rate_axis(axes, lines)
    save(plt, figure, axes, caption, path)
    return True


def _draw_lines(axes: Any, lines: Lines, levels: dict[str, float]) -> None:
    """Draw each load in a colour: its points, and stock's level as a dashed line.

    Loads that ran at one rate only stand side by side around it, each above a hollow
    marker for stock: full-width lines for all of them could not be told apart.
    """
    single = [load for load, points in lines.items() if len(points) == 1]
    for i, (load, points) in enumerate(lines.items()):
        if not points:
            continue
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        rates, values = zip(*points, strict=True)
        if load in single:
            shift = (single.index(load) - (len(single) - 1) / 2) / len(single)
            rates = (rates[0] * 2 ** (SPREAD * shift),)
        axes.plot(rates, values, color=color, marker=marker, label=load)
        if load not in levels:
            continue
        level = levels[load]
        if load in single:
            axes.plot(rates, [level], color=color, marker=marker, fillstyle="none")
            axes.plot(rates * 2, [level, *values], color=color, linestyle=":")
        else:
            axes.axhline(level, color=color, linestyle="--", linewidth=1)


def _plain(value: float, _: int) -> str:
    """Tick label: 8, not 2**3."""
    return f"{value:g}"


def _rate_axis(axes: Any, lines: Lines) -> None:
    """Make the axis of base 2, as in the paper's figure 1; a tick at every rate."""
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates)
    axes.xaxis.set_major_formatter(_plain)
    axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    axes.set_xlabel("compression rate")
    axes.set_ylim(bottom=0 if axes.get_yscale() == "linear" else None)
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw what there are figures for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/plots"))
    parser.add_argument("--commit", default="", help="default: the newest")
    parser.add_argument("--commits", default="", help="draw these as one: a,b")
    args = parser.parse_args()
    draw(args.results, args.out, args.commit, args.commits)


def draw(results: Path, out: Path, commit: str = "", commits: str = "") -> list[Path]:
    """Write the plots that have figures; the paths written."""
    source = "serve.jsonl"
    runs = merge_commits(read_records(results / source), commits)
    rows = serve_rows(runs, commit)
    served = of_commit([run for run in runs if "load" in run], commit)
    plots = [
        Plot("throughput.png", plot_throughput, rows, served, source),
        Plot("largest_batch.png", plot_batch, rows, served, source),
    ]
    return write_plots(plots, out, commit)


if __name__ == "__main__":
    main()
