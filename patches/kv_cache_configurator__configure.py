"""Let an e4m3 KV cache start on any CPU."""

from __future__ import annotations

from typing import Any

from sglang_kvc.memory import pools
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator.configure",
    hook_type=HookType.AROUND,
    expected_params=("self", "pre_model_load_memory"),
    since="0.5.22",
    reason=(
        "On the CPU SGLang starts with --kv-cache-dtype fp8_e4m3 only for its own "
        "attention with Intel AMX; ours reads it on any CPU."
    ),
    upstream_link="mem_cache/kv_cache_configurator.py:457",
    remove_when="SGLang asks the attention backend which dtypes it reads on the CPU.",
)


def hook(original: Any, configurator: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock configuration, which does not see that the cache is e4m3."""
    with pools.e4m3_as_bytes(configurator):
        return original(configurator, *args, **kwargs)
