"""Allocate pages with torch on the CPU."""

from __future__ import annotations

from typing import Any

from sglang_kvc.memory import pools
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator._build_token_to_kv_pool_allocator",
    hook_type=HookType.AROUND,
    expected_params=(
        "self",
        "sizes",
        "token_to_kv_pool",
        "is_dsv4_model",
        "req_to_token_pool",
        "token_to_kv_pool_allocator",
    ),
    reason=(
        "SGLang's paged allocator launches Triton kernels; the CPU needs their "
        "torch form. On a GPU the stock class is used unchanged."
    ),
    upstream_link="mem_cache/kv_cache_configurator.py:2795",
    remove_when="The stock paged allocator runs on CPU.",
)


def hook(original: Any, configurator: Any, **kwargs: Any) -> Any:
    """Torch allocator for an arena on the CPU, stock otherwise."""
    pool = kwargs["token_to_kv_pool"]
    if not pools.needs_torch_allocator(pool):
        return original(configurator, **kwargs)
    return pools.build_torch_allocator(pool, kwargs["sizes"].max_total_num_tokens)
