"""Heat maps and a table of what every head keeps, from the lines of `heads`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.common.plotting import load_pyplot, write_png
from bench.common.record import read_lines
from bench.quality.heads import FIELD
from bench.quality.records import key_of
from bench.quality.report import table
from bench.quality.stats import order

HEAD = ("model", "system", "tokens", "rate", "prompts", "mean", "min", "max", "CV")


class Map(NamedTuple):
    """Mean over the tasks of a model, length, system and setting.

    Attributes
    ----------
    model, system, setting : str
    length, prompts : int
    kept : [layers, heads]
        Fraction of a prompt that a head keeps.
    """

    model: str
    length: int
    system: str
    setting: str
    prompts: int
    kept: Any

    @property
    def variation(self) -> float:
        """Standard deviation over heads, divided by the mean."""
        return float(self.kept.std() / self.kept.mean())


def maps(
    records: Iterable[dict[str, Any]], model: str = "", seed: int | None = None
) -> list[Map]:
    """One map a model, length, system and setting; of equal lines the last counts."""
    lines = {key_of(r): r for r in records if FIELD in r}
    groups: dict[tuple[str, int, str, str], list[dict[str, Any]]] = {}
    for key, record in lines.items():
        if (not model or key.model == model) and seed in (None, key.seed):
            group = (key.model, key.length, key.system, key.setting)
            groups.setdefault(group, []).append(record)
    made = []
    for group in sorted(groups, key=lambda g: (*g[:3], order(g[3]))):
        weights = [record["prompts"] for record in groups[group]]
        kept = np.average([r[FIELD] for r in groups[group]], axis=0, weights=weights)
        made.append(Map(*group, sum(weights), kept))
    return made


def markdown(found: Iterable[Map]) -> str:
    """How unevenly heads keep: one row a map; empty without any."""
    rows = [
        [
            m.model,
            m.system,
            str(m.length) if m.length else "own",
            m.setting,
            str(m.prompts),
            *(f"{v:.3f}" for v in (m.kept.mean(), m.kept.min(), m.kept.max())),
            f"{m.variation:.2f}",
        ]
        for m in found
    ]
    return f"### Fraction kept by a head\n\n{table(HEAD, rows)}" if rows else ""


def draw(found: Iterable[Map], out: Path) -> list[Path]:
    """Write one figure for each model, length and system; the paths written."""
    figures: dict[tuple[str, int, str], list[Map]] = {}
    for one in found:
        figures.setdefault(one[:3], []).append(one)
    if not figures:
        return []
    plt = load_pyplot()
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for (model, length, system), panels in figures.items():
        where = str(length) if length else "own"
        name = system.translate(str.maketrans(":,=", "___"))
        path = out / f"heads_{model}_{where}_{name}.png"
        plot_kept(plt, panels, f"{model}, {where} tokens, {system}", path)
        written.append(path)
    return written


def plot_kept(plt: Any, panels: list[Map], title: str, path: Path) -> None:
    """Layers x heads, one panel a setting, with least, most and variation.

    Colours show a head's share relative to the mean over all heads, the same in all
    panels.
    """
    layers, heads = panels[0].kept.shape
    height = max(1.1, 0.6 + 0.22 * heads)
    figure, grid = plt.subplots(
        len(panels),
        figsize=(2.2 + 0.2 * max(layers, 20), 0.7 + height * len(panels)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    top = max(float((one.kept / one.kept.mean()).max()) for one in panels)
    for axes, one in zip(grid[:, 0], panels, strict=True):
        image = axes.imshow(
            one.kept.T / one.kept.mean(),
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=top,
        )
        low, high = one.kept.min(), one.kept.max()
        axes.set_title(
            f"{_words(one.setting)}: a head keeps {low:.3f} to {high:.3f} of a prompt, "
            f"CV {one.variation:.2f}, {one.prompts} prompts",
            fontsize="small",
        )
        axes.set_ylabel("KV head")
        axes.set_yticks(range(0, heads, max(1, heads // 8)))
    grid[-1, 0].set_xlabel("layer")
    grid[-1, 0].set_xticks(range(0, layers, max(1, layers // 8)))
    figure.colorbar(image, ax=grid[:, 0].tolist(), label="of the mean")
    figure.suptitle(title)
    write_png(figure, path)
    plt.close(figure)


def _words(setting: str) -> str:
    return f"{setting[1:]} tokens" if setting.startswith("b") else f"{setting}x"


def read_maps(
    paths: Iterable[Path], model: str = "", seed: int | None = None
) -> list[Map]:
    """`maps` of files."""
    return maps((line for path in paths for line in read_lines(path)), model, seed)
