"""docs/grafana.json: a dashboard of series that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sglang_kvc.config.series import PREFIX, SERIES

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def panels() -> list[dict[str, Any]]:
    """Panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[str]:
    """All queries of the dashboard."""
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def names_in(expression: str) -> set[str]:
    """Names of series in a query, which takes both spellings of a colon."""
    return {f"sglang:{name}" for name in re.findall(r"sglang\[:_\](\w+)", expression)}


def either(name: str) -> str:
    """Pattern of a name: the Python client may say `_` for a colon in OpenMetrics."""
    return name.replace(":", "[:_]")


def test_every_series_of_ours_is_shown_and_no_other() -> None:
    """What it asks of SGLang's own is compared with a server's /metrics."""
    asked = {name for text in expressions() for name in names_in(text)}
    own = {name for name in asked if name.startswith(PREFIX)}
    assert own == {one.name for one in SERIES}


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in taken) < 24
        assert not cells & taken, panel["title"]
        cells |= taken


def test_counters_are_asked_for_their_rate() -> None:
    counters = [one.name for one in SERIES if one.kind == "counter"]
    for text in expressions():
        for name in counters:
            selector = f'{{__name__=~"{either(name)}"}}'
            assert either(name) not in text or f"rate({selector}[" in text, text
