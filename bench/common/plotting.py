"""Helpers of all plots: looks, captions, and which records count."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DPI = 100
PALETTE = 128
"""Colours of a file; smooth edges of lines need most of them."""
# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

Record = dict[str, Any]


class Plot(NamedTuple):
    """One figure to write.

    Attributes
    ----------
    name : str
        Of the PNG file.
    draw : callable
        Takes pyplot, `data`, the caption and the path; whether it drew.
    data, origin : list of dict
        What is drawn, and the records that the caption is made of.
    source : str
        The file of the records.
    """

    name: str
    draw: Callable[[Any, list[Record], str, Path], bool]
    data: list[Record]
    origin: list[Record]
    source: str


def load_pyplot() -> Any:
    """matplotlib.pyplot without a display; a hint where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write_plots(plots: Sequence[Plot], out: Path, commit: str = "") -> list[Path]:
    """Write the plots that have figures, say which have none; the paths written."""
    plt = load_pyplot()
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for plot in plots:
        path = out / plot.name
        drawn = plot.data and plot.origin
        if drawn and plot.draw(plt, plot.data, caption_of(plot.origin), path):
            print(path)
            written.append(path)
        else:
            wanted = f" of commit {commit}" if commit else ""
            print(f"{plot.name} skipped: {plot.source} has no figures for it{wanted}")
    return written


def save(plt: Any, figure: Any, axes: Any, caption: str, path: Path) -> None:
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
    write_png(figure, path)
    plt.close(figure)


def write_png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG with a palette: a quarter of the bytes, same picture."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    with Image.open(drawn) as image:
        small = image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
        small.save(path, "PNG", optimize=True)


def of_commit(records: list[Record], commit: str = "") -> list[Record]:
    """Records of the given commit, or of the last record's."""
    if not commit and records:
        commit = records[-1]["commit"]
    return [record for record in records if is_commit(record, commit)]


def is_commit(record: Record, commit: str) -> bool:
    """Whether a record is of a commit; a dirty one must be named in full."""
    own: str = record.get("commit", "")
    return own == commit or (own.startswith(commit) and "+" not in own)


def caption_of(records: list[Record]) -> str:
    """Commit, GPU and versions of the last record."""
    last = records[-1]
    versions = last.get("versions") or {}
    words = [f"commit {last['commit']}", str(last.get("gpu"))]
    words += [
        f"{name} {versions[name]}" for name in ("sglang", "torch") if versions.get(name)
    ]
    return ", ".join(words)
