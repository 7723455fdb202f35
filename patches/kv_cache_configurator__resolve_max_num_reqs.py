"""Choose a number of request slots that the pool can use."""

from __future__ import annotations

from typing import Any

from sglang_kvc.memory import pools
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target=(
        "sglang.srt.mem_cache.kv_cache_configurator:"
        "KVCacheConfigurator.resolve_max_num_reqs"
    ),
    hook_type=HookType.AROUND,
    expected_params=("self", "token_capacity"),
    reason=(
        "Every slot has a ring of queries, so SGLang's default of 2,048 slots or more "
        "would cost more memory than the pool of a small GPU."
    ),
    upstream_link="mem_cache/kv_cache_configurator.py:3119",
    remove_when="Slots are allocated when requests take them.",
)


def hook(original: Any, configurator: Any, token_capacity: int) -> int:
    """Stock result, capped unless --max-running-requests was given."""
    slots: int = original(configurator, token_capacity)
    return pools.limit_slots(configurator, slots, token_capacity)
