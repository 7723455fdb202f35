"""Leave the observation window out of a prefix hit."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling.acceptance import max_prefix_len
from sglang_kvc.scheduling.attached import policy_of
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_batch:Req._compute_max_prefix_len",
    hook_type=HookType.AROUND,
    expected_params=("self", "input_len"),
    reason=(
        "The last w queries of a prompt must be computed to score its keys, "
        "also when the whole prompt is cached."
    ),
    upstream_link="managers/schedule_batch.py:1766",
    remove_when="Never: it is part of the method.",
)


def hook(original: Any, req: Any, input_len: int) -> int:
    """Cap the hit at input_len - window for requests that can be compressed."""
    stock: int = original(req, input_len)
    return stock if policy_of(req) is None else max_prefix_len(req, input_len, stock)
