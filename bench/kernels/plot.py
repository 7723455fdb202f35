"""Plot of what decode attention reads, as a PNG file.

    python -m bench.kernels.plot [--results bench/results] [--out docs/plots] \\
        [--commit ID]

``decode_bandwidth.png`` shows the figures of the newest commit in ``kernels.jsonl``,
unless ``--commit`` names one; without figures it is skipped. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common.plotting import (
    COLORS,
    Plot,
    Record,
    of_commit,
    save,
    write_plots,
)
from bench.common.record import read_lines

COPY_TB_S = 4.3
"""What a copy reaches on an H200; used where the run did not measure it."""
BARS = {
    ("decode_attention", "packed"): "compressed (ours)",
    ("decode_attention", "tail"): "uncompressed (ours)",
    ("fa3_folded", "packed"): "FA3, a sequence per head, same arena",
    ("fa3_stock_page1", "stock"): "FA3, stock layout, page 1",
    ("fa3_stock_page64", "stock"): "FA3, stock layout, page 64",
}


def decode_bars(records: list[Record]) -> dict[str, dict[tuple[str, str], float]]:
    """TB/s of KV read by case and (kernel, layout); the last measurement counts."""
    bars: dict[str, dict[tuple[str, str], float]] = {}
    for record in records:
        key = (record["kernel"], record.get("layout", ""))
        if record["section"] == "decode" and key in BARS and "tb_s" in record:
            bars.setdefault(record["case"], {})[key] = record["tb_s"]
    return bars


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
    save(plt, figure, axes, caption, path)
    return True


def draw(results: Path, out: Path, commit: str = "") -> list[Path]:
    """Write the plot if it has figures; the paths written."""
    source = "kernels.jsonl"
    found = of_commit(read_lines(results / source), commit)
    plot = Plot("decode_bandwidth.png", plot_decode, found, found, source)
    return write_plots([plot], out, commit)


def main() -> None:
    """Draw what there are figures for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/plots"))
    parser.add_argument("--commit", default="", help="default: the newest")
    args = parser.parse_args()
    draw(args.results, args.out, args.commit)


if __name__ == "__main__":
    main()
