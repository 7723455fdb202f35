"""Table and plots of what `lost` has recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.common.plotting import COLORS, load_pyplot, write_png
from bench.quality.report import table as markdown
from bench.quality.stats import order

Line = dict[str, Any]
SHARES = ("evicted_prompt", "evicted_answer", "to_answer")
TOKENS = ("prompt", "answer")
BIN = 32
"""Steps that share a figure."""
MARKS = (0, 64, 128, 256, 512, 1024)
"""Steps from which on a row of the table holds."""


def groups(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    """Lines by task and setting, settings in their order."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["task"], line["setting"]), []).append(line)
    return dict(sorted(found.items(), key=lambda it: (it[0][0], order(it[0][1]))))


def curve(lines: Sequence[Line], name: str) -> list[float]:
    """Mean over the answers that are as long, a value for each `BIN` steps."""
    longest = max(len(line[name]) for line in lines)
    return [
        mean(line[name][at] for line in lines if len(line[name]) > at)
        for at in range(longest)
    ]


def table(lines: Iterable[Line]) -> str:
    """A row for each task, setting and stretch of the answer; shares in percent."""
    rows = []
    for (task, setting), own in groups(lines).items():
        values = {name: curve(own, name) for name in (*SHARES, *TOKENS)}
        for low, high in zip(MARKS, (*MARKS[1:], None), strict=True):
            part = slice(low // BIN, high // BIN if high else None)
            if not values["prompt"][part]:
                continue
            shares = [f"{100 * mean(values[name][part]):.1f}" for name in SHARES]
            held = [f"{mean(values[name][part]):.0f}" for name in TOKENS]
            steps = f"{low} to {high}" if high else f"from {low}"
            rows.append([task, setting, str(len(own)), steps, *shares, *held])
    head = ["task", "setting", "answers", "steps", "evicted: prompt, %", "answer, %"]
    head += ["paid to the answer, %", "held of the prompt", "of the answer"]
    return markdown(head, rows)


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """A figure a task: what is missed above, what is held below, over the steps."""
    plt = load_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    by_group, paths = groups(lines), []
    for task in dict.fromkeys(task for task, _ in by_group):
        figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6))
        settings = [setting for name, setting in by_group if name == task]
        for color, setting in zip(COLORS * len(settings), settings, strict=False):
            own = by_group[task, setting]
            for axis, names, factor in ((above, SHARES[:2], 100), (below, TOKENS, 1)):
                for name, style in zip(names, ("-", "--"), strict=True):
                    values = [factor * value for value in curve(own, name)]
                    steps = [BIN * (at + 0.5) for at in range(len(values))]
                    part = name.removeprefix("evicted_")
                    label = f"{setting}: {part}"
                    axis.plot(steps, values, style, color=color, label=label)
        above.set_ylabel("attention on what was evicted, %")
        below.set_ylabel("tokens held per head")
        below.set_xlabel("step of the answer")
        above.set_title(task)
        above.legend(fontsize="small")
        path = folder / f"lost_{task}.png"
        write_png(figure, path)
        plt.close(figure)
        paths.append(path)
    return paths
