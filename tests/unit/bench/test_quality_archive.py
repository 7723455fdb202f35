"""Samples of a campaign in a compressed file: nothing is lost, all see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.common.record import read_lines, write_record
from bench.quality import columns
from bench.quality.__main__ import main
from bench.quality.archive import SUMMARY, archive
from bench.quality.records import Key, lines_of, pack, read

ORIGIN = {"time": "t", "commit": "abc", "gpu": None, "versions": {"torch": "2.11.0"}}
ERROR = {**ORIGIN, "system": "ours", "error": "died"}
HEADS = Key("m", "ours", "8", "needle_words", 4096, 0)
OTHER = {**ORIGIN, **HEADS._asdict(), "kept_per_head": [[0.5, 0.25]], "prompts": 3}


def line(setting: str, task: str, first: int, *scores: float, **more: Any) -> Any:
    """A line of a run; a task that continues text has figures of its own."""
    samples = [
        {"index": first + i, "resident": None, "score": score, **more}
        for i, score in enumerate(scores)
    ]
    key = Key("m", "ours", setting, task, 4096, 0)
    cell = {**key._asdict(), "group": "lm" if "nll" in more else "needles"}
    return {**ORIGIN, **cell, "seconds_per_sample": 0.5, "samples": pack(samples)}


LINES = [
    line("1", "needle_words", 0, 1.0, 0.0, answer='"né\\\n'),
    line("8", "needle_words", 0, 1.0, 0.33333, answer=None),
    line("1", "essays", 0, 0.5, tokens=7, nll=0.69315, agree=1.0, kl=0.0),
    line("8", "needle_words", 2, 0.12345, answer="x"),
]


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    path = tmp_path / "quality.jsonl"
    for one in (LINES[0], ERROR, *LINES[1:], OTHER):
        write_record(path, one)
    return path


def exact(lines: list[dict[str, Any]]) -> list[str]:
    """Text that tells 1 from 1.0, and an absent figure from None."""
    return [json.dumps(one, sort_keys=True) for one in lines]


def test_every_line_survives(campaign: Path) -> None:
    cells = read([campaign])
    assert archive(campaign) == len(LINES)
    packed = campaign.with_suffix(".parquet")
    assert sorted(campaign.parent.iterdir()) == [campaign, packed]
    assert exact(columns.read(packed)) == exact(LINES)
    assert read([campaign]) == read([packed]) == cells
    text = read_lines(campaign)
    assert text[:2] == [ERROR, OTHER]
    assert all(one[SUMMARY] and "samples" not in one for one in text[2:])


def test_the_report_says_the_same(
    campaign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(campaign)])
    before = capsys.readouterr().out
    assert "needle_words" in before and "Fraction kept" in before
    main(["archive", str(campaign)])
    assert "4 lines" in capsys.readouterr().out
    main(["report", str(campaign)])
    assert capsys.readouterr().out == before


def test_the_summary_is_what_the_report_says(campaign: Path) -> None:
    archive(campaign)
    first, second = (one for one in read_lines(campaign) if SUMMARY in one)
    assert (first["setting"], second["setting"]) == ("1", "8")
    assert first["scores"] == {"needle_words": 50.0, "essays": 50.0}
    assert first["decoded"]["essays"]["nll"] == 0.693
    assert second["asked"] == 3
    assert second["scores"] == {"needle_words": 48.6}
    # Of two pairs: the third sample has no full cache to be compared with.
    assert second["retention"]["needles"][0] == 133.3
    assert second["origins"] == [["abc", "CPU"]]


def test_later_lines_join_the_earlier_ones(campaign: Path) -> None:
    archive(campaign)
    assert archive(campaign) == 0
    later = line("8", "needle_words", 1, 1.0, answer=None, tried=2)
    write_record(campaign, later)
    (cell,) = (c for k, c in read([campaign]).items() if k.setting == "8")
    assert [cell.samples[i]["score"] for i in range(3)] == [1.0, 1.0, 0.12345]
    assert archive(campaign) == 1
    assert exact(columns.read(campaign.with_suffix(".parquet"))) == exact(
        [*LINES, later]
    )
    assert [SUMMARY in one for one in read_lines(campaign)] == [False] * 2 + [True] * 2
    assert exact(lines_of(campaign)[: len(LINES) + 1]) == exact([*LINES, later])


def test_lines_that_only_count_samples_stay(tmp_path: Path) -> None:
    path = tmp_path / "passkey.jsonl"
    write_record(path, {**ORIGIN, "samples": 3})
    before = path.read_bytes()
    assert archive(path) == 0
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == before


def test_nothing_moves_if_it_would_read_differently(
    campaign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = campaign.read_bytes()
    monkeypatch.setattr(columns, "read", lambda path: [])
    with pytest.raises(RuntimeError, match="would not hold"):
        archive(campaign)
    assert [*campaign.parent.iterdir()] == [campaign]
    assert campaign.read_bytes() == before


def test_pyarrow_is_named_when_it_is_missing(
    campaign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert read([campaign])
    with pytest.raises(SystemExit, match="pip install pyarrow"):
        archive(campaign)
