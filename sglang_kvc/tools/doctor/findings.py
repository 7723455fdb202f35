"""What the doctor has found, as a table or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

GOOD, NOTE, BAD = "ok", "note", "NO"
_WIDTH = 96


@dataclass(frozen=True)
class Finding:
    """One row.

    Attributes
    ----------
    subject : what was looked at.
    state : `GOOD`, `NOTE` (it starts all the same) or `BAD` (it would not start).
    found : what is there, and if it is bad why; may have several lines.
    """

    subject: str
    state: str
    found: str


def starts(findings: Sequence[Finding]) -> bool:
    """Whether a server would start, as far as can be told without the model."""
    return all(finding.state != BAD for finding in findings)


def as_json(findings: Sequence[Finding]) -> str:
    """``{"starts": bool, "findings": [{"subject", "state", "found"}, ...]}``."""
    rows = [asdict(finding) for finding in findings]
    return json.dumps({"starts": starts(findings), "findings": rows}, indent=2)


def as_table(findings: Sequence[Finding]) -> str:
    """One row for each finding; long texts go on below themselves."""
    width = max(len(finding.subject) for finding in findings)
    indent = " " * (width + 8)
    lines = []
    for finding in findings:
        head = f"{finding.subject:<{width}}  {finding.state:<4}  "
        texts = [
            part
            for line in finding.found.splitlines() or [""]
            for part in textwrap.wrap(
                line, _WIDTH - len(indent), subsequent_indent="    "
            )
            or [""]
        ]
        lines.append(f"{head}{texts[0]}".rstrip())
        lines += [f"{indent}{text}".rstrip() for text in texts[1:]]
    bad = sum(finding.state == BAD for finding in findings)
    end = "Nothing is in the way of a start."
    if bad:
        end = f"It would not start: {bad} reason(s)."
    return "\n".join([*lines, "", end])
