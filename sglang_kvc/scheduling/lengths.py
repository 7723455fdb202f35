"""Lengths that have a name. Imports neither torch nor SGLang."""

from __future__ import annotations

from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.upstream.types import Req

UNLIMITED = 1 << 62
"""A budget, a pool or an allowance without end, in tokens; calculated with."""

NEVER_DUE = 1 << 62
"""Length at which a slot without a pass to come is due; no request reaches it."""

LATE_PASS_SLACK = 2 * PAGE_SIZE
"""A pass is planned one step late at most twice (overlap, page boundary)."""


def tokens_left(req: Req) -> int:
    """Tokens that a request may still decode."""
    return max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
