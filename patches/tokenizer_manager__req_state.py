"""Show meta_info["kv_compress"] as a dict."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling.reporting import Accumulator
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tokenizer_manager:ReqState.__init__",
    hook_type=HookType.AFTER,
    expected_params=None,
    reason=(
        "SGLang concatenates customized_info as per-token lists; ours is one "
        "summary, the newest."
    ),
    upstream_link="managers/tokenizer_manager.py:281",
    remove_when="SGLang carries per-request (not per-token) extra meta_info.",
)


def hook(result: Any, state: Any, *args: Any, **kwargs: Any) -> None:
    """Accumulate our key by replacement."""
    del result, args, kwargs
    state.customized_info_accumulated = Accumulator()
