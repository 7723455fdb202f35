"""Bars of `bench.serving.conversations`: turns a second, and waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.common.plotting import COLORS, Plot, Record, save, write_plots
from bench.serving.conversations.table import about, failed

NAME = "conversations.png"


def plot_conversations(
    plt: Any, records: list[Record], caption: str, path: Path
) -> bool:
    """Turns a second, and seconds to the first token of later turns, by system."""
    good = [one for one in records if not failed(one)]
    if not good:
        return False
    names = [one["system"] for one in good]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    colors = [COLORS[0] if one["stock"] else COLORS[1] for one in good]
    bars = left.bar(names, [one["turns_per_s"] for one in good], color=colors)
    left.bar_label(bars, fmt="%.2f", fontsize=8)
    left.set_ylabel("turns/s")
    left.set_title("Turns a second")
    places = range(len(good))
    for shift, key, color in ((-0.2, "p50", COLORS[2]), (0.2, "p99", COLORS[4])):
        waits = [one["later"][f"first_token_{key}_s"] or 0.0 for one in good]
        bars = right.bar(
            [at + shift for at in places], waits, 0.4, color=color, label=key
        )
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks(list(places), names)
    right.set_ylabel("s")
    right.set_title("Time to first token, turns 2 and later")
    for axes in (left, right):
        axes.tick_params(axis="x", labelrotation=30)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(about(good[-1]), fontsize=9)
    save(plt, figure, right, caption, path)
    return True


def draw(records: list[Record], out: Path, source: str) -> list[Path]:
    """Write the plot of comparable records; the paths written."""
    good = [one for one in records if not failed(one)]
    return write_plots([Plot(NAME, plot_conversations, good, good, source)], out)
