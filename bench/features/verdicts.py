"""Checks, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bench.common.server import say
from bench.features.asking import Asker

LONGEST = 1200


class MissedError(Exception):
    """What came is not what was expected."""


@dataclass(frozen=True)
class Check:
    """One check.

    Parameters
    ----------
    name : str
    look : callable
        Asks, and returns in words what came; raises `MissedError`, or whatever goes
        wrong.
    ours : bool
        Whether stock SGLang cannot do this.
    """

    name: str
    look: Callable[[Asker], str]
    ours: bool = False


@dataclass(frozen=True)
class Verdict:
    """What came of a check."""

    name: str
    passed: bool
    said: str
    seconds: float

    def line(self) -> str:
        """One line."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.said}"


def expect(true: bool, wanted: str, came: object) -> None:
    """Raise `MissedError` unless something is `true`."""
    if not true:
        raise MissedError(f"expected {wanted}, came {came}")


def judge(check: Check, asker: Asker) -> Verdict:
    """Make one check; whatever goes wrong is its verdict."""
    begin = time.monotonic()
    try:
        passed, said = True, check.look(asker)
    except MissedError as missed:
        passed, said = False, str(missed)
    except Exception as error:  # a check that breaks must not hide those behind it
        passed, said = False, f"{type(error).__name__}: {error}"
    said = " ".join(said.split())[:LONGEST]
    return Verdict(check.name, passed, said, round(time.monotonic() - begin, 2))


def judge_all(checks: Iterable[Check], asker: Asker) -> list[Verdict]:
    """Make all checks in their order, and tell of each."""
    verdicts = []
    for check in checks:
        verdicts.append(judge(check, asker))
        say(verdicts[-1].line())
    return verdicts


def summary(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """What a record says of them."""
    listed = [asdict(verdict) for verdict in verdicts]
    failed = [verdict["name"] for verdict in listed if not verdict["passed"]]
    return {"checks": len(listed), "failed": failed, "verdicts": listed}
