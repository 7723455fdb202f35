"""The clock by which conversations are served as on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.serving.conversations.load import Load, Shape
from tests.engine import timed, warm

SHAPE = Shape(
    sessions=12, turns=3, first=600, user=30, answer=20, think=5.0, forks=0.25
)
LENGTHS = ("sessions", "turns", "first", "user", "answer", "forks")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A record of `tests.engine.timed`, run in a process of its own."""
    target: Path = tmp_path_factory.mktemp("timed") / "record.jsonl"
    words = [it for name in LENGTHS for it in (f"--{name}", getattr(SHAPE, name))]
    log = warm.run(
        "tests.engine.timed",
        target,
        *map(str, (*words, "--pool", 16384, "--rate", 4)),
        log=target.with_suffix(".log"),
    )
    assert target.exists(), log
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def test_all_turns_are_served_and_found_in_a_large_pool(record: dict[str, Any]) -> None:
    assert record["complete"]
    assert record["turns"] == SHAPE.all_turns
    # But for the last page, which is always computed again.
    assert 1 <= record["computed_over_new"] < 1.3
    assert record["last_turn_hits"] == 1


def test_time_goes_on_with_steps_and_thoughts(record: dict[str, Any]) -> None:
    """Of the longest conversation: its thoughts, and steps for prompts and answers."""
    load, thoughts = Load(SHAPE, 1000), []
    for session in range(SHAPE.sessions):
        for branch in range(1 + load.forks(session)):
            numbers = range(1, SHAPE.turns + 1)
            ways = [branch if it > SHAPE.fork_after else 0 for it in numbers]
            thoughts.append(sum(map(load.thought, [session] * 3, ways, numbers)))
    answers = SHAPE.turns * (SHAPE.answer - 1) * timed.DECODE_S
    least = max(thoughts) + SHAPE.turns * timed.PREFILL_S + answers
    assert least < record["seconds"] < least + 2
    assert record["turn_1"]["first_token_p50_s"] >= timed.PREFILL_S
