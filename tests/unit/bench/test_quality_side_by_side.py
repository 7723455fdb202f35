"""Systems beside each other: who is asked what, and how it ends."""

from __future__ import annotations

import sys
from ast import literal_eval
from pathlib import Path

import pytest

from bench.quality.__main__ import parse
from bench.quality.side_by_side import commands, run_all

SYSTEMS = ["stock", "ours", "ours:allocation=layer", "kvpress:full", "kvpress:snapkv"]


def test_every_system_gets_a_run_that_the_harness_understands(tmp_path: Path) -> None:
    found = commands(SYSTEMS, ["1", "4", "b512"], tmp_path, ["--model", "m"])
    asked = {name: parse(words[3:]) for name, words in found.items()}
    # One prefill serves all methods of kvpress.
    own = [[word] for word in SYSTEMS[:3]]
    assert [args.systems for args in asked.values()] == [*own, SYSTEMS[3:]]
    assert {name: args.rates for name, args in asked.items()} == {
        "stock": ["1", "4", "b512"],
        "ours": ["1", "4", "b512"],
        # Nothing is evicted at rate 1: the first of a kind answers for all.
        "ours_allocation_layer": ["4", "b512"],
        "kvpress": ["1", "4", "b512"],
    }
    assert len({args.out for args in asked.values()}) == len(asked)
    assert all(args.model == "m" for args in asked.values())


def test_the_worst_status_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(text: str) -> list[str]:
        return [sys.executable, "-c", text]

    found = {
        "good": script("print('all done')"),
        "left": script("print('2 samples are left'); raise SystemExit(3)"),
    }
    assert run_all(found, tmp_path / "new", None) == 3
    said = capsys.readouterr().out
    assert "good: exit 0" in said and "all done" in said
    assert "left: exit 3" in said and "2 samples are left" in said


def test_who_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.quality.side_by_side.PATIENCE", 0.2)
    found = {"late": [sys.executable, "-c", "import time; time.sleep(60)"]}
    assert run_all(found, tmp_path, 0.1) == 124


def test_so_many_at_a_time_and_the_rest_of_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third starts when the first has ended, and is told what is left."""
    words = "import pathlib, sys, time; print(sys.argv[1:]); "
    # A log is written at the end of its process.
    third = f"pathlib.Path({str(tmp_path / 'c.log')!r})"
    wait = f"\nwhile not ({third}.exists() and {third}.stat().st_size): time.sleep(0.1)"
    found = {
        name: [sys.executable, "-c", words + rest]
        for name, rest in (
            ("a", "time.sleep(0.5)"),
            ("b", f"{wait}\ntime.sleep(1)"),
            ("c", ""),
        )
    }
    assert run_all(found, tmp_path, 30, at_once=2) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["a", "c", "b"]
    left = {
        name: literal_eval((tmp_path / f"{name}.log").read_text()) for name in found
    }
    assert left["a"] == left["b"] == ["--deadline", "30"]
    assert 20 < float(left["c"][1]) < 29.6


@pytest.mark.parametrize(("gpus", "seen"), [(0, "kept kept kept"), (2, "0 1 0")])
def test_processes_are_dealt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "kept")
    words = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    found = {name: [sys.executable, "-c", words] for name in "abc"}
    assert run_all(found, tmp_path, None, gpus=gpus) == 0
    assert [(tmp_path / f"{name}.log").read_text().strip() for name in "abc"] == (
        seen.split()
    )


def test_who_has_no_time_left_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        name: [sys.executable, "-c", "import time; time.sleep(1)"] for name in "ab"
    }
    assert run_all(found, tmp_path, 0.5, at_once=1) == 3
    assert "not started: b" in capsys.readouterr().out
