"""Settle the passes of a step before its result is processed."""

from __future__ import annotations

from typing import Any

from sglang_kvc.runtime import runtime_of
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.process_batch_result",
    hook_type=HookType.BEFORE,
    expected_params=("self", "batch", "result"),
    reason=(
        "A request that finishes with this result must own what the pass left, "
        "not what it read; without overlap nothing has settled it before."
    ),
    upstream_link="managers/scheduler.py:3814",
    remove_when="SGLang lets a backend free memory when a result arrives.",
)


def hook(scheduler: Any, batch: Any, result: Any) -> None:
    """Free what the step's passes replaced."""
    del batch
    runtime = runtime_of(scheduler.token_to_kv_pool_allocator)
    if runtime is not None:
        runtime.pass_scheduler.settle(
            scheduler, getattr(result, "kv_compress_passes", [])
        )
