"""`bench.visit`: commands side by side, and one alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import visit

TICKS = "for i in $(seq 30); do echo $i; sleep 0.1; done"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(visit, "LEAST_SECONDS", 0.0)


def run(folder: Path, plan: list[dict[str, Any]], seconds: float = 30) -> str:
    """What `visit.log` says."""
    (folder / "plan.json").write_text(json.dumps(plan))
    words = [folder / "plan.json", "--logs", folder / "logs", "--seconds", seconds]
    visit.main([str(word) for word in words])
    return (folder / "logs" / "visit.log").read_text()


def said(log: str, *parts: str) -> list[int]:
    """Places of lines with these parts; all must be there."""
    lines = [line[10:] for line in log.splitlines()]
    return [lines.index(part) for part in parts]


def test_commands_run_side_by_side(tmp_path: Path) -> None:
    begin = time.monotonic()
    log = run(tmp_path, [{"name": n, "command": "sleep 1; echo hi"} for n in "abc"])
    assert time.monotonic() - begin < 2.5
    assert log.count("ended with 0") == 3
    assert (tmp_path / "logs/b.log").read_text() == "hi\n"


def test_order_and_files(tmp_path: Path) -> None:
    made, variable = tmp_path / "made", {"WHERE": str(tmp_path / "made")}
    plan = [
        {"name": "late", "command": "true", "needs": [str(made)]},
        {"name": "second", "command": "touch $WHERE", "after": ["first"]},
        {"name": "first", "command": "false"},
    ]
    plan[1]["env"] = variable
    log = run(tmp_path, plan)
    places = said(log, "first: started", "second: started", "late: started", "done")
    assert places == sorted(places)
    assert "first: ended with 1" in log


def test_what_is_timed_stops_the_others(tmp_path: Path) -> None:
    """From the line of its log on; a child in a session of its own is stopped, too."""
    ticks = f"setsid bash -c '{TICKS}'; echo over"
    timed = "sleep 0.5; echo ready in 1 s; sleep 1.5; wc -l < ticks.log; sleep 0.2"
    logs = str(tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    plan = [
        {"name": "ticks", "command": ticks, "limit": 20},
        {"name": "timed", "command": timed, "alone": "ready in", "cwd": logs},
        {"name": "more", "command": "true", "after": ["timed"]},
    ]
    log = run(tmp_path, plan)
    places = said(log, "ticks: stopped for timed", "ticks: goes on", "more: started")
    assert places == sorted(places)
    while_timed = int((tmp_path / "logs/timed.log").read_text().split()[-1])
    # Some 5 before, 20 if it had not been stopped; but it came to its end.
    assert 1 <= while_timed <= 12
    assert (tmp_path / "logs/ticks.log").read_text().endswith("30\nover\n")


def test_alone_from_the_start_waits_and_holds_back(tmp_path: Path) -> None:
    plan = [
        {"name": "a", "command": "sleep 0.5"},
        {"name": "alone", "command": "sleep 0.5", "alone": True, "after": ["a"]},
        {"name": "b", "command": "true", "after": ["a"]},
    ]
    log = run(tmp_path, plan)
    places = said(log, "alone: started", "b: started")
    assert places == sorted(places)
    between = log.splitlines()[places[0] + 1 : places[1]]
    assert any("alone: ended" in line for line in between)


def test_time_is_bounded(tmp_path: Path) -> None:
    plan = [
        {"name": "long", "command": "sleep 60 & sleep 60", "limit": 0.5},
        {"name": "late", "command": "sleep 60", "until": 1.0},
        {"name": "never", "command": "true", "after": ["last"]},
        {"name": "last", "command": "sleep 60"},
    ]
    begin = time.monotonic()
    log = run(tmp_path, plan, seconds=2)
    assert time.monotonic() - begin < 6
    assert log.count("out of time") == 3
    assert "never: not started, no time left" in log


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([{"name": "a", "command": "true", "befor": []}], "befor"),
        ([{"name": "a", "command": "true"}] * 2, "twice: a"),
        ([{"name": "a", "command": "true", "after": ["b"]}], "nothing is called b"),
    ],
)
def test_bad_plans_are_refused(
    plan: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, plan)
