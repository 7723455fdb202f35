"""Tokens and whole pages. Imports neither torch nor SGLang.

Kernels import nothing of the package, so `kernels.layout` states the page size once
more; a test compares the two.
"""

from __future__ import annotations

PAGE_SIZE = 16
"""Tokens of a page, the unit of SGLang's allocator and of every budget."""


def floor_tokens(tokens: int) -> int:
    """Largest number of tokens in whole pages that is not above `tokens`."""
    return tokens // PAGE_SIZE * PAGE_SIZE


def ceil_tokens(tokens: int) -> int:
    """Smallest number of tokens in whole pages that is not below `tokens`."""
    return pages_of(tokens) * PAGE_SIZE


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens; the last one may be partly filled."""
    return -(-tokens // PAGE_SIZE)
