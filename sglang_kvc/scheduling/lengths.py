"""Lengths that have a name. Imports neither torch nor SGLang."""

from __future__ import annotations

from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.upstream.types import Req

NEVER = 1 << 62
"""A logical length that no request reaches."""

LATE_PASS_SLACK = 2 * PAGE_SIZE
"""A pass is planned one step late at most twice (overlap, page boundary)."""


def tokens_left(req: Req) -> int:
    """Tokens that a request may still decode."""
    return max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
