"""Charge a new request what it can grow to."""

from __future__ import annotations

from typing import Any

from sglang_kvc.admission import with_clip
from sglang_kvc.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_policy:PrefillAdder.add_chunked_req",
    hook_type=HookType.AROUND,
    expected_params=("self", "req"),
    reason=(
        "Admission charges the prompt plus min(max_new_tokens, 4096); the "
        "second part is bounded for a request that will be compressed."
    ),
    upstream_link="managers/schedule_policy.py:868",
    remove_when="Admission asks the cache for the growth of a request.",
)


def hook(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the stock method with this request's clip."""
    return with_clip(req, lambda: original(adder, req, *args, **kwargs))
