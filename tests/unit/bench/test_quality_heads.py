"""bench.quality's figures of what every head keeps, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.common.record import read_lines
from bench.quality import heads_report
from bench.quality.__main__ import main
from bench.quality.heads import FIELD, HeadAsker, context, fractions, measure, todo
from bench.quality.plan import Wish
from bench.quality.records import read
from bench.quality.systems import Setting, parse_setting, parse_systems
from bench.quality.tasks import TASKS
from bench.quality.tasks.sample import DICTATED, TURNS, Sample, SampleKey
from tests.unit.bench.quality_fixtures import WordTokenizer

LAYERS, HEADS, PAGE = 3, 2, 16


def wish(systems: tuple[str, ...] = ("ours",), samples: int = 2) -> Wish:
    return Wish(
        "model",
        parse_systems(systems),
        [parse_setting(word) for word in ("1", "4", "8")],
        [TASKS["needle_noise"], TASKS["gsm8k"]],
        [64],
        1,
        samples,
    )


def sample(index: int, **changes: Any) -> Sample:
    text = "word " * (100 + index)
    return Sample(
        "needle_noise",
        "needles",
        index,
        64,
        1,
        prompt=f"{text}What ?",
        answers=(),
        max_new_tokens=8,
        scorer="found",
        question="What ?",
        **changes,
    )


class FakeEngine:
    """Keeps more in later heads; the mean is a quarter of the whole pages."""

    def __init__(self) -> None:
        self.params: list[dict[str, Any]] = []
        self.down = False

    def generate(
        self, input_ids: list[list[int]], sampling_params: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        self.params += sampling_params
        return [{"meta_info": {"kv_compress": self.report(len(i))}} for i in input_ids]

    def report(self, tokens: int) -> dict[str, Any]:
        packed = [PAGE * (head + 1) for head in range(LAYERS * HEADS)]
        mean = sum(packed) / len(packed)
        return {
            "logical_tokens": tokens,
            "resident_tokens": mean + tokens % PAGE,
            "packed_tokens_per_head": packed,
        }

    def shutdown(self) -> None:
        self.down = True


class Store:
    """Hands out samples made here."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def start(self, keys: Any) -> None:
        self.started += keys

    def get(self, key: SampleKey) -> Sample:
        assert key in self.started
        return sample(key.number)


def test_fractions_count_what_lies_behind_the_last_page() -> None:
    meta = {"kv_compress": FakeEngine().report(100)}
    kept = fractions(meta)
    assert kept == [(PAGE * (head + 1) + 4) / 100 for head in range(LAYERS * HEADS)]
    del meta["kv_compress"]["packed_tokens_per_head"]
    with pytest.raises(RuntimeError, match="nothing was evicted of 100 tokens"):
        fractions(meta)


def test_the_compressed_part_of_a_prompt_is_sent() -> None:
    tokenizer = WordTokenizer()
    whole = tokenizer.decode(context(tokenizer, sample(0)))
    assert "What ?" in whole
    for mode in (DICTATED, TURNS):
        text = tokenizer.decode(context(tokenizer, sample(0, mode=mode)))
        assert "What" not in text
        assert text.count("word") == 100


def test_lines_are_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "heads.jsonl"
    engine = FakeEngine()

    def open_system(_: Any) -> HeadAsker:
        return HeadAsker(engine, WordTokenizer(), LAYERS)

    store: Any = Store()
    assert measure(wish(), store, out, {"commit": "abc"}, open_system) == 4
    assert engine.down
    assert measure(wish(), store, out, {}, open_system) == 0
    assert measure(wish(samples=3), store, out, {}, open_system) == 4
    lines = read_lines(out)
    assert len(lines) == 8
    assert [line["setting"] for line in lines[:4]] == ["4", "4", "8", "8"]
    assert lines[0]["commit"] == "abc"
    assert lines[0]["prompts"] == 2
    assert np.shape(lines[0][FIELD]) == (LAYERS, HEADS)
    assert engine.params[0] == {
        "temperature": 0.0,
        "max_new_tokens": 1,
        "custom_params": {"kv_compress": {"rate": 4, "report_heads": True}},
    }
    # Other commands read the same files.
    assert read([out]) == {}
    with pytest.raises(ValueError, match="only ours"):
        list(todo(wish(("stock",)), []))


def line(setting: str, task: str, kept: Any, **changes: Any) -> dict[str, Any]:
    made = {
        "model": "m",
        "system": "ours",
        "setting": setting,
        "task": task,
        "length": 4096,
        "seed": 0,
        "prompts": 2,
        FIELD: kept,
    }
    return {**made, **changes}


def test_maps_are_means_over_prompts() -> None:
    lines = [
        line("8", "needle_noise", [[0.1, 0.1]]),
        line("4", "needle_noise", [[0.9, 0.9]]),
        # Measured again with more prompts.
        line("4", "needle_noise", [[0.1, 0.3]], prompts=6),
        line("4", "variables", [[0.3, 0.7]]),
        {"error": "no figures"},
    ]
    four, eight = heads_report.maps(lines)
    assert (four.setting, four.prompts, eight.setting) == ("4", 8, "8")
    assert four.kept == pytest.approx(np.array([[0.15, 0.4]]))
    assert four.variation == pytest.approx(0.125 / 0.275)
    assert eight.variation == 0
    assert heads_report.maps(lines, model="other") == []
    assert heads_report.maps(lines, seed=1) == []
    text = heads_report.markdown([four])
    assert "| m | ours | 4096 | 4 | 8 | 0.275 | 0.150 | 0.400 | 0.45 |" in text
    assert heads_report.markdown([]) == ""


def test_plots_and_tables_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    kept = (np.arange(1, 61).reshape(30, 2) / 100).tolist()
    system = "ours:head_floor=64,window=64"
    lines = [line(s, "variables", kept, system=system) for s in ("4", "8", "b512")]
    source = tmp_path / "heads.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert main(["plot", str(source), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    path = tmp_path / "heads_m_4096_ours_head_floor_64_window_64.png"
    assert said.splitlines()[0] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "| b512 | 2 | 0.305 | 0.010 | 0.600 |" in said
    assert main(["report", str(source)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("### Fraction kept by a head")
    assert "no results" not in said


def test_settings_are_sent_as_they_are_written() -> None:
    engine = FakeEngine()
    asker = HeadAsker(engine, WordTokenizer(), LAYERS)
    figures = asker.ask([sample(i) for i in range(3)], Setting(budget=512))
    assert engine.params[0]["custom_params"]["kv_compress"]["budget"] == 512
    assert figures["prompts"] == 3
    spread = np.array(figures["spread_per_head"])
    assert (spread > 0).all()
