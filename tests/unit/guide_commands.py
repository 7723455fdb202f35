"""The commands of docs/guide.md, read from it in their order."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
_STARTS = r"(?:pip |python -m |curl |chromium |\()"
_BLOCK = re.compile(rf"(?:^ {{4}}{_STARTS}.*\n(?:^ {{4}}.*\n)*)", re.M)
_INLINE = re.compile(r"`((?:pip |python -m )[^`\n]+)`")
_COMMENT = re.compile(r"\s{2,}# .*$", re.M)


def commands(text: str) -> list[str]:
    """What a reader would type: indented lines, and what stands in backquotes.

    A line of a block that begins like no command goes on with the one before.
    """
    found = []
    for match in _BLOCK.finditer(text):
        block = re.sub(r"^ {4}", "", match[0], flags=re.M)
        parts = re.split(rf"^(?={_STARTS})", _COMMENT.sub("", block), flags=re.M)
        found += [(match.start(), part.strip()) for part in parts if part.strip()]
    found += [(match.start(), match[1]) for match in _INLINE.finditer(text)]
    return [command for _, command in sorted(found, key=lambda it: it[0])]
