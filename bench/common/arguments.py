"""Command lines whose end is another program's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parse_before_dashes(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Arguments before ``--``, and the words behind it; without `words` the process's.

    argparse takes the first ``--`` for its own.
    """
    given = list(sys.argv[1:] if words is None else words)
    cut = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:cut]), given[cut + 1 :]
