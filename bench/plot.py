"""Plots of the recorded figures, as PNG files.

    python -m bench.plot [--results bench/results] [--out docs/plots] [--commit ID]

``throughput.png`` and ``largest_batch.png`` show the runs of `bench.serve` against the
compression rate, one line a load; ``decode_bandwidth.png`` shows what decode attention
reads (`bench.kernels`). Needs matplotlib. Figures are those of the newest commit in
each file, unless ``--commit`` names one; a plot without figures is skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.plot_data import (
    BARS,
    Lines,
    Record,
    caption_of,
    decode_bars,
    of_commit,
    rate_lines,
    serve_rows,
    stock_levels,
)
from bench.record import read_lines
from bench.report import merge_commits, read_records

COPY_TB_S = 4.3
"""What a copy reaches on an H200; used where the run did not measure it."""
DPI = 150
SPREAD = 0.8
"""Width of the points at one rate, in doublings of it."""
# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def load_pyplot() -> Any:
    """matplotlib.pyplot without a display; a hint where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "bench.plot needs matplotlib: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


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
    _save(plt, figure, left, caption, path)
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
    _save(plt, figure, axes, caption, path)
    return True


def plot_decode(plt: Any, records: list[Record], caption: str, path: Path) -> bool:
    """Bandwidth of decode attention by case, FA3 beside it, under the copy line."""
    cases = decode_bars(records)
    kinds = [kind for kind in BARS if any(kind in bars for bars in cases.values())]
    if not kinds:
        return False
    copies = [r["tb_s"] for r in records if r["kernel"] == "copy"]
    copy = copies[-1] if copies else COPY_TB_S
    figure, axes = plt.subplots(figsize=(max(7.0, 1.5 * len(cases)), 5))
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        places, heights = [], []
        for x, bars in enumerate(cases.values()):
            # Bars that a case lacks leave no gap.
            present = [other for other in kinds if other in bars]
            if kind in present:
                shift = present.index(kind) - (len(present) - 1) / 2
                places.append(x + shift * width)
                heights.append(bars[kind])
        axes.bar(places, heights, width * 0.92, label=BARS[kind], color=COLORS[i])
    axes.axhline(copy, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"copy {copy:.1f} TB/s",
        (1, copy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    axes.set_ylim(0, max(copy, max(max(b.values()) for b in cases.values())) * 1.1)
    axes.set_xticks(range(len(cases)), [c.replace(" ", "\n") for c in cases])
    axes.set_xlabel("requests x mean KVs a head, head lengths equal or skewed")
    axes.set_ylabel("TB/s of K and V read, one layer")
    axes.set_title("Decode attention: bandwidth, L2 cold")
    axes.grid(axis="y", alpha=0.3)
    _save(plt, figure, axes, caption, path)
    return True


def _draw_lines(axes: Any, lines: Lines, levels: dict[str, float]) -> None:
    """One colour a load: its points, and stock's level as a dashed line.

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
    """Base 2, as in the paper's figure 1; a tick at every measured rate."""
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates)
    axes.xaxis.set_major_formatter(_plain)
    axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    axes.set_xlabel("compression rate")
    axes.set_ylim(bottom=0 if axes.get_yscale() == "linear" else None)
    axes.grid(alpha=0.3)


def _save(plt: Any, figure: Any, axes: Any, caption: str, path: Path) -> None:
    """Legend and caption below the axes; writes the file."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(3, len(handles))
    rows = -(-len(handles) // columns)
    bottom = 0.05 + 0.036 * rows
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=columns,
        bbox_to_anchor=(0.5, 0.04),
        frameon=False,
        fontsize=8,
    )
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8, color="dimgrey")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def main() -> None:
    """Draw what there are figures for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/plots"))
    parser.add_argument("--commit", default="", help="default: the newest of each file")
    parser.add_argument("--commits", default="", help="draw these servings as one: a,b")
    args = parser.parse_args()
    draw(args.results, args.out, args.commit, args.commits)


def draw(results: Path, out: Path, commit: str = "", commits: str = "") -> list[Path]:
    """Write the plots that have figures; the paths written."""
    plt = load_pyplot()
    out.mkdir(parents=True, exist_ok=True)
    runs = merge_commits(read_records(results / "serve.jsonl"), commits)
    kernels = of_commit(read_lines(results / "kernels.jsonl"), commit)
    rows = serve_rows(runs, commit)
    served = of_commit([run for run in runs if "load" in run], commit)
    plots: list[tuple[str, Callable[..., bool], list[Record], list[Record]]] = [
        ("throughput.png", plot_throughput, rows, served),
        ("largest_batch.png", plot_batch, rows, served),
        ("decode_bandwidth.png", plot_decode, kernels, kernels),
    ]
    written: list[Path] = []
    for name, plot, data, origin in plots:
        path = out / name
        if data and origin and plot(plt, data, caption_of(origin), path):
            print(path)
            written.append(path)
        else:
            source = "kernels.jsonl" if data is kernels else "serve.jsonl"
            wanted = f" of commit {commit}" if commit else ""
            print(f"{name} skipped: {source} has no figures for it{wanted}")
    return written


if __name__ == "__main__":
    main()
