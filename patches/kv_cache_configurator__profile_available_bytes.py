"""Charge our metadata before the pool is sized."""

from __future__ import annotations

from typing import Any

from sglang_kvc.memory import pools
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator._profile_available_bytes",
    hook_type=HookType.AROUND,
    expected_params=("self", "pre_model_load_memory"),
    reason=(
        "Scores, tables and workspaces must come out of the KV "
        "budget, not out of the activation slack."
    ),
    upstream_link="mem_cache/kv_cache_configurator.py:2990",
    remove_when="SGLang lets a backend declare its memory.",
)


def hook(original: Any, configurator: Any, *args: Any, **kwargs: Any) -> int:
    """Stock budget minus what our metadata takes beside that many KVs."""
    available: int = original(configurator, *args, **kwargs)
    return pools.subtract_metadata(configurator, available)
