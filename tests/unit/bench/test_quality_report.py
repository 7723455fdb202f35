"""bench.quality's scores, retention, tables and plots."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.quality import metrics
from bench.quality.__main__ import main, parser
from bench.quality.plot import draw, retention_lines
from bench.quality.records import Cell, Key, merge, pack
from bench.quality.report import markdown
from bench.quality.stats import (
    Column,
    columns,
    difference,
    full_cell,
    group_retention,
    pairs,
    retention,
    versus,
)
from bench.quality.tasks import TASKS


def cell_line(
    system: str, setting: str, task: str, scores: list[float], **more: Any
) -> dict[str, Any]:
    key = Key("m", system, setting, task, more.pop("length", 4096), 0)
    samples = [{"index": i, "score": s, **more} for i, s in enumerate(scores)]
    return {
        **key._asdict(),
        "group": TASKS[task].group,
        "samples": pack(samples),
        "commit": "abc",
    }


@pytest.fixture
def cells() -> dict[Key, Cell]:
    lines = [
        cell_line("stock", "1", "needle_noise", [1, 1, 1, 1]),
        cell_line("ours", "1", "needle_noise", [1, 1, 1, 1], resident=4000),
        cell_line("ours", "1", "multivalue", [0.5, 1, 0.5, 0]),
        cell_line("ours", "8", "needle_noise", [1, 1, 1, 0], resident=500),
        cell_line("ours", "8", "multivalue", [0.5, 0.5, 0, 0], resident=500),
        cell_line("ours:allocation=head", "8", "multivalue", [0.25, 0.5, 0]),
        cell_line("kvpress:full", "1", "multivalue", [1, 1]),
        cell_line("kvpress:snapkv", "8", "multivalue", [0.5, 0]),
        cell_line("ours", "8", "essays", [0.1], nll=2.3, agree=0.8, kl=0.05),
        cell_line("ours", "1", "essays", [0.2], nll=1.6, agree=1.0, kl=0.0),
        cell_line("ours", "b512", "gsm8k", [1, 0], length=0),
        cell_line("ours", "1", "gsm8k", [1, 1], length=0),
    ]
    return merge(lines)


@pytest.mark.parametrize(
    ("scorer", "text", "answers", "score"),
    [
        ("found", "It is ABC and d", ["abc", "D", "x", "y"], 0.5),
        ("any", "the Eiffel-Tower, of course", ["Eiffeltower"], 1),
        ("any", "in 1984", ["198"], 0),
        ("any", "The answer: a dog.", ["cat", "dog"], 1),
        ("starts", " Blue. Text: green", ["blue"], 1),
        ("starts", "bluebell", ["blue"], 0),
        ("last_number", "3 + 4 = 7, so it costs $1,007.00.", ["1007"], 1),
        ("last_number", "no digits", ["7"], 0),
        ("last_number", "The answer is -5", ["5"], 0),
        ("boxed", r"so \boxed{1} no \boxed{\frac{1}{2} }.", [r"\frac{1}{2}"], 1),
        ("boxed", r"\boxed{x", ["x"], 1),
        ("boxed", "x", ["x"], 0),
        ("rouge_l", "the cat sat", ["The cat sat!"], 1),
        ("rouge_l", "one two three four", ["one three five six"], 0.5),
        ("rouge_l", "", ["one"], 0),
    ],
)
def test_scores(scorer: str, text: str, answers: list[str], score: float) -> None:
    assert metrics.SCORERS[scorer](text, answers) == score


def test_the_full_cache_is_the_kinds_own(cells: dict[Key, Cell]) -> None:
    def full(system: str, task: str) -> str:
        found = full_cell(cells, Key("m", system, "8", task, 4096, 0))
        return found.key.system if found else ""

    assert full("ours", "needle_noise") == "ours"
    assert full("ours:allocation=head", "multivalue") == "ours"
    assert full("kvpress:snapkv", "multivalue") == "kvpress:full"
    assert full("kvpress:snapkv", "needle_noise") == "stock"
    assert full("ours", "wikitext") == ""


def test_pairs_are_of_the_same_samples(cells: dict[Key, Cell]) -> None:
    table = pairs(cells, Column("ours:allocation=head", "8"), "multivalue")
    assert table.tolist() == [[0.25, 0.5], [0.5, 1], [0, 0.5]]


def test_retention_is_the_ratio_of_the_means_over_tasks(
    cells: dict[Key, Cell],
) -> None:
    column = Column("ours", "8")
    value = group_retention(cells, column, "multi-needles")
    assert value is not None
    assert value.value == pytest.approx(50)
    assert value.low <= 50 <= value.high
    assert value.count == 4
    both = group_retention(cells, column, "ruler")
    assert both is not None
    assert both.value == pytest.approx(100 * (0.75 + 0.25) / (1 + 0.5))
    assert group_retention(cells, column, "kv") is None
    # A mean over some of the tasks does not stand beside one over all.
    some = Column("ours:allocation=head", "8")
    assert group_retention(cells, some, "multi-needles")
    assert group_retention(cells, some, "ruler") is None
    assert retention([np.zeros((3, 2))]) is None


def test_intervals_shrink_with_samples_and_cover_pairs() -> None:
    rng = random.Random(0)

    def table(count: int) -> Any:
        full = [float(rng.random() < 0.8) for _ in range(count)]
        return np.array([(f * (rng.random() < 0.9), f) for f in full])

    few, many = retention([table(30)]), retention([table(3000)])
    assert few
    assert many
    assert many.high - many.low < (few.high - few.low) / 4
    assert many.low < 90 < many.high
    # The same scores on both sides differ by nothing, however they vary.
    same = table(50)
    same[:, 0] = same[:, 1]
    gap = difference([same])
    assert gap
    assert gap.low == gap.high == 0


def test_points_between_systems(cells: dict[Key, Cell]) -> None:
    gap = versus(
        cells, Column("ours", "8"), Column("ours:allocation=head", "8"), "ruler"
    )
    assert gap
    assert gap.value == pytest.approx(100 * (0.25 / 3))
    assert gap.count == 3


def test_columns_are_sorted(cells: dict[Key, Cell]) -> None:
    found = [c for c in columns(cells) if c.system == "ours"]
    assert [c.setting for c in found] == ["1", "8", "b512"]


def test_the_report_has_every_cell(cells: dict[Key, Cell]) -> None:
    text = markdown(cells)
    assert "## m, 4096 tokens" in text
    assert "## m, prompts as they are" in text
    assert "| ours | 8 | 500 | 66.7 [" in text
    assert "| 25.0 (n=3) |" in text
    assert "2.300 | 0.800 | 0.0500" in text
    assert "| ours | ours:allocation=head | 8 | 8.3 [" in text
    assert "b512" in text
    assert markdown(cells, model="other") == "no results\n"
    assert markdown(cells, seed=1) == "no results\n"


def test_plots_are_written(cells: dict[Key, Cell], tmp_path: Path) -> None:
    lines = retention_lines(cells, "multi-needles")
    assert [rate for rate, _ in lines["ours"]] == [1, 8]
    # The baseline of the kind is where a line begins.
    assert [rate for rate, _ in lines["ours:allocation=head"]] == [1, 8]
    assert [rate for rate, _ in lines["kvpress:snapkv"]] == [1, 8]
    (path,) = draw(cells, tmp_path)
    assert path.name == "quality_m_4096.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_commands(
    cells: dict[Key, Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    assert "multikey_uuids (ruler)" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none.jsonl")]) == 0
    assert capsys.readouterr().out == "no results\n\n"
    args = parser().parse_args(["run", "--model", "m", "--length", "2048", "4096"])
    assert args.lengths == [2048, 4096]
    assert args.systems[0] == "ours"
    with pytest.raises(SystemExit, match="no folder"):
        main(["run", "--model", str(tmp_path / "m"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="unknown task"):
        words = ["run", "--model", str(tmp_path), "--data", str(tmp_path)]
        main([*words, "--tasks", "nonsense"])
