"""Settle the passes of the last step before the next one is scheduled."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.get_next_batch_to_run",
    hook_type=HookType.BEFORE,
    expected_params=("self", "running_batch", "last_batch"),
    reason=(
        "With the overlap scheduler the result of a step is processed after the next "
        "step is scheduled, which could then not use what its passes have freed."
    ),
    upstream_link="managers/scheduler.py:3894",
    remove_when="SGLang lets a backend free memory when a step is launched.",
    runtime_from=of_holder,
)


def hook(runtime: Any, scheduler: Any, running_batch: Any, last_batch: Any) -> None:
    """Free what the last step's passes replaced."""
    del running_batch, last_batch
    runtime.pass_scheduler.settle_launched(scheduler)
