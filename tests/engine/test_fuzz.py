"""A slice of `fuzz`: one short load in every setting; forty long ones ran once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engine import warm
from tests.engine.fuzz import SESSIONS, SETTINGS

REQUESTS = 15


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `tests.engine.fuzz`, run in a process of its own."""
    target = tmp_path_factory.mktemp("fuzz") / "report.json"
    slice_of_it = ["--seeds", "0", "1", "--requests", str(REQUESTS)]
    log = warm.run(
        "tests.engine.fuzz",
        target,
        *slice_of_it,
        log=target.with_suffix(".log"),
        timeout=1800,
    )
    assert target.exists(), log
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def test_every_request_ends_and_no_page_is_lost(report: dict[str, Any]) -> None:
    """Strict checks, an audit of every page after every poll, a watch for progress."""
    assert "failed" not in report, "\n".join(map(str, report["failed"]))
    assert report.keys() == SETTINGS.keys()
    for name, counts in report.items():
        # Conversations have several turns, and fewer than so many end in each.
        least = REQUESTS // 3 if name in SESSIONS else REQUESTS
        most = REQUESTS // 3 * 4 if name in SESSIONS else REQUESTS
        assert least <= counts["requests"] <= most, name
        assert counts["audits"] > 40, name


def test_the_loads_did_what_they_are_for(report: dict[str, Any]) -> None:
    """Passes of both kinds, late passes, retractions, refusals, aborts."""
    total = {
        key: sum(counts[key] for counts in report.values())
        for key in next(iter(report.values()))
    }
    assert total["passes"] > 300
    assert total["chunk_passes"] > 100
    # 66 with SGLang 0.5.23, 2 with 0.5.17.
    assert total["deferred_passes"] > 0
    assert total["retractions"] > 30
    assert total["refused"] > 50
    assert total["aborted"] > 10
    for name in ("never", "unchunked", "priority never"):
        assert report[name]["chunk_passes"] == 0
    for name in ("retract", "pause", "all at once"):
        assert report[name]["retractions"] > 0
    assert total["resumed"] > 10
    # Polls at which somebody ran on a snapshot, and pages that the tree has taken.
    assert total["borrowed"] > 5
    assert total["shared"] > 500
    for name, counts in report.items():
        assert name in SESSIONS or counts["resumed"] == 0, name
