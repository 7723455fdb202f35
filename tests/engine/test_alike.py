"""Prompts that are cut for the answers' sake find memory for all their parts."""

from __future__ import annotations

import json
from pathlib import Path

from tests.engine import warm

SEEDS = (5, 13, 43, 104)
"""In two of them on either release, running requests took the last part's pages."""


def test_running_requests_do_not_take_the_pages_of_a_started_prompt(
    tmp_path: Path,
) -> None:
    """SGLang goes on with a started prompt whatever the memory, and ended."""
    target = tmp_path / "report.json"
    words = ("--seeds", *map(str, SEEDS))
    log = warm.run("tests.engine.alike", target, *words, log=tmp_path / "log")
    assert target.exists(), log
    report = json.loads(target.read_text())
    assert "failed" not in report, report["failed"]
    assert report["cut"] >= 5
