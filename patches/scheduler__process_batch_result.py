"""Settle the passes of a step before its result is processed."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.attached import passes_of
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.process_batch_result",
    hook_type=HookType.BEFORE,
    expected_params=("self", "batch", "result"),
    reason=(
        "A request that finishes with this result must own what the pass left, "
        "not what it read; without overlap nothing has settled it before."
    ),
    upstream_link="managers/scheduler.py:5074",
    remove_when="SGLang lets a backend free memory when a result arrives.",
    runtime_from=of_holder,
)


def hook(runtime: Any, scheduler: Any, batch: Any, result: Any) -> None:
    """Free what the step's passes replaced."""
    del batch
    runtime.pass_scheduler.settle(scheduler, passes_of(result))
