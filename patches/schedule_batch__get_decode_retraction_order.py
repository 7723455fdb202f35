"""Retract first what can come back."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling.queueing import retraction_order
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_batch:ScheduleBatch._get_decode_retraction_order",
    hook_type=HookType.AROUND,
    expected_params=("reqs", "server_args"),
    reason=(
        "A compressed request may have grown longer than the pool. Where prompts "
        "cannot be compressed between chunks it could not be prefilled again."
    ),
    upstream_link="managers/schedule_batch.py:2783",
    remove_when="The cache says which requests can be retracted.",
)


def hook(original: Any, reqs: Any, *args: Any, **kwargs: Any) -> list[int]:
    """Stock order among equals."""
    return retraction_order(reqs, original(reqs, *args, **kwargs))
