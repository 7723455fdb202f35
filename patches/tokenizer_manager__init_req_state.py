"""Show meta_info["kv_compress"] as a dict."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager._init_req_state",
    hook_type=HookType.AFTER,
    expected_params=("self", "obj", "request", "lifecycle_id"),
    reason=(
        "SGLang concatenates customized_info as per-token lists; ours is one "
        "summary, the newest."
    ),
    upstream_link="managers/tokenizer_manager.py:3414",
    remove_when="SGLang carries per-request (not per-token) extra meta_info.",
    until="0.5.19",
)


def hook(result: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Accumulate our key by replacement, for each prompt of the request."""
    del result, args, kwargs
    from sglang_kvc.config.server_args import options_of

    if options_of(manager.server_args) is None:
        return
    from sglang_kvc.scheduling.reporting import Accumulator

    for rid in [obj.rid] if isinstance(obj.rid, str) else obj.rid:
        manager.rid_to_state[rid].customized_info_accumulated = Accumulator()
