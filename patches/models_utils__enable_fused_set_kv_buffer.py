"""Keep fused rope kernels from writing KV themselves."""

from __future__ import annotations

from typing import Any

from sglang_kvc.memory import pools
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.models.utils:enable_fused_set_kv_buffer",
    hook_type=HookType.AROUND,
    expected_params=("forward_batch",),
    reason=(
        "Some models write K and V in their rope kernel, past the attention "
        "backend and in the stock layout."
    ),
    upstream_link="models/utils.py:286",
    remove_when="The fused write goes through the KV pool.",
)


def hook(original: Any, forward_batch: Any) -> bool:
    """Off when the pool is an arena."""
    return not pools.arena_is_active() and original(forward_batch)
