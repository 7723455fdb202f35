"""The table as a picture. Needs matplotlib (``pip install sglang_kvc[plot]``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.advise.asking import FULL
from sglang_kvc.tools.advise.summary import Row

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = "osD^v"
_SIZE, _DPI = (6.4, 4.2), 120


class PlotError(KVCError, RuntimeError):
    """There is nothing to draw with."""


def load_pyplot() -> Any:
    """matplotlib.pyplot without a display.

    Raises
    ------
    PlotError
        If matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotError(
            "plots need matplotlib: pip install 'sglang_kvc[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(rows: Sequence[Row], tolerance: float, title: str, path: Path) -> None:
    """Write what is kept of every score against the rate, as a PNG.

    Raises
    ------
    PlotError
        If matplotlib is missing.
    """
    plt = load_pyplot()
    rated = [row for row in rows if row.rate != FULL]
    figure, axes = plt.subplots(figsize=_SIZE)
    for number, name in enumerate(rated[0].kept if rated else ()):
        points = [(row.rate, it) for row in rated if (it := row.kept[name])]
        if not points:
            continue
        rates = [FULL, *(rate for rate, _ in points)]
        color = _COLORS[number % len(_COLORS)]
        values = [100.0, *(it.value for _, it in points)]
        axes.plot(
            rates,
            values,
            color=color,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            label=name.replace("_", "-"),
        )
        low = [100.0, *(it.low for _, it in points)]
        high = [100.0, *(it.high for _, it in points)]
        axes.fill_between(rates, low, high, color=color, alpha=0.12, linewidth=0)
    ticks = [FULL, *(row.rate for row in rated)]
    axes.axhline(100 - tolerance, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ["full", *(f"{rate:g}" for rate in ticks[1:])])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rate")
    axes.set_ylabel("% of the full cache, 95 % interval")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
