"""Build the arena instead of per-layer KV buffers."""

from __future__ import annotations

from typing import Any

from sglang_kvc.memory import pools
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator._build_mha_kv_pool",
    hook_type=HookType.AROUND,
    expected_params=("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
    reason="One arena holds all layers, so that a page is L*H head blocks.",
    upstream_link="mem_cache/kv_cache_configurator.py:2742",
    remove_when="SGLang takes the KV pool class from a registry.",
)


def hook(original: Any, configurator: Any, **kwargs: Any) -> Any:
    """Arena when --kv-compress is on, stock otherwise."""
    options = pools.options_of(configurator)
    if options is None:
        return original(configurator, **kwargs)
    return pools.build_arena(configurator, kwargs["max_total_num_tokens"])
