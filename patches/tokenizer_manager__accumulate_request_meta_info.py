"""Show meta_info["kv_compress"] as a dict, on SGLang 0.5.19 and later."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target=(
        "sglang.srt.managers.tokenizer_manager:"
        "TokenizerManager._accumulate_request_meta_info"
    ),
    hook_type=HookType.AROUND,
    expected_params=("meta_info", "state", "key", "values"),
    reason=(
        "SGLang concatenates customized_info as per-token lists; ours is one "
        "summary, the newest. Without it the client gets a list of summaries."
    ),
    upstream_link="managers/tokenizer_manager.py:2812",
    remove_when="SGLang carries per-request (not per-token) extra meta_info.",
    since="0.5.19",
)


def hook(original: Any, meta_info: Any, state: Any, key: str, values: Any) -> Any:
    """Keep the newest value of our key, which only a server with the feature sends."""
    if key != "kv_compress":
        return original(meta_info, state, key, values)
    for value in values:
        if value is not None:
            state.kv_compress_summary = value
    newest = getattr(state, "kv_compress_summary", None)
    if newest is not None:
        meta_info[key] = newest
    return None
