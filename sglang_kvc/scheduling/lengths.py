"""Lengths in tokens and in whole pages. Imports neither torch nor SGLang."""

from __future__ import annotations

from sglang_kvc.config.options import PAGE_SIZE

NEVER = 1 << 62
"""A logical length that no request reaches."""

LATE_PASS_SLACK = 2 * PAGE_SIZE
"""A pass is planned one step late at most twice (overlap, page boundary)."""


def floor_page(tokens: int) -> int:
    """Largest multiple of the page size that is not above `tokens`."""
    return tokens // PAGE_SIZE * PAGE_SIZE


def ceil_page(tokens: int) -> int:
    """Smallest multiple of the page size that is not below `tokens`."""
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE
