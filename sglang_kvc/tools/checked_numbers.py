"""Numbers on the command lines of tools, checked."""

from __future__ import annotations

import argparse

MAX_RATE = 1e6


def rates(text: str) -> list[float]:
    """Rates with commas between them, in their order, each once."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(1 <= rate < MAX_RATE for rate in found):
        raise argparse.ArgumentTypeError(
            f"expected rates of at least 1 with commas between, as in 2,4,8; got {text}"
        )
    return list(dict.fromkeys(found))


def count(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return int(text)
