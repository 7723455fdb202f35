"""Retract first what can come back."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling.attached import policy_of
from sglang_kvc.scheduling.queueing import retraction_order
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_batch:ScheduleBatch._get_decode_retraction_order",
    hook_type=HookType.AROUND,
    expected_params={"0.5.17": ("reqs", "server_args"), "0.5.20": ("reqs",)},
    reason=(
        "A compressed request may have grown longer than the pool. Where prompts "
        "cannot be compressed between chunks it could not be prefilled again."
    ),
    upstream_link="managers/schedule_batch.py:3542",
    remove_when="The cache says which requests can be retracted.",
)


def hook(original: Any, reqs: Any, *args: Any) -> list[int]:
    """Stock order among equals."""
    order: list[int] = original(reqs, *args)
    # With the feature on, every request has a policy.
    return retraction_order(reqs, order) if reqs and policy_of(reqs[0]) else order
