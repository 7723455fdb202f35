"""300 mixed requests on a tiny pool: no page lost, no output changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engine import warm


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `tests.engine.stress`, run in a process of its own."""
    target = tmp_path_factory.mktemp("stress") / "report.json"
    log = warm.run("tests.engine.stress", target, log=target.with_suffix(".log"))
    assert target.exists(), log
    result: dict[str, Any] = json.loads(target.read_text())
    assert "traceback" not in result, result["traceback"]
    return result


def test_every_page_has_one_owner_through_the_load(report: dict[str, Any]) -> None:
    """Strict idle and busy checks were on, and each poll was audited."""
    loads = report["loads"]
    assert loads["requests"] >= 300
    # The load really exercised what it claims to.
    assert loads["aborted"] > 20
    assert loads["passes"] > 100
    assert loads["retractions"] > 10
    assert loads["audits"] > 500
    assert loads["chunk_passes"] > 100
    assert loads["longer_than_pool"] > 5


@pytest.mark.parametrize(("name", "least"), [("equal", 40), ("equal_chunks", 12)])
def test_overlap_and_radix_cache_change_no_output(
    report: dict[str, Any], name: str, least: int
) -> None:
    """fp32: the same tokens, with prompts compressed whole and between chunks."""
    result = report[name]
    assert result.pop("compared") >= least
    assert result == {"overlap off": [], "radix off": []}


def test_a_row_that_changes_hands_in_the_next_step_changes_no_output(
    report: dict[str, Any],
) -> None:
    """The old owner's last step runs while the new one is scheduled; all audited."""
    slots = report["slots"]
    assert slots["newest"]["reused"] > 10
    assert slots["newest"]["dead_passes"] > 0
    assert slots["oldest"]["reused"] == 0
    assert slots["tokens"] > 500
    assert slots["different"] == []


def test_a_planted_leak_is_seen(report: dict[str, Any]) -> None:
    """SGLang's idle check fails when a pass does not give its pages back."""
    assert "leak" in report["leak"].lower()
