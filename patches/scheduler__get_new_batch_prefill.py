"""Look after a round of admission that nobody is lost."""

from __future__ import annotations

from typing import Any

from sglang_kvc.runtime import runtime_of
from sglang_kvc.scheduling.queueing import after_admission
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
    hook_type=HookType.AFTER,
    expected_params=("self", "running_batch"),
    reason=(
        "Preempted requests are put back only if the request that they made room "
        "for was admitted; else SGLang forgets them."
    ),
    upstream_link="managers/scheduler.py:3067",
    remove_when="SGLang puts preempted requests back in any case.",
)


def hook(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Put back who was preempted for nothing."""
    del result, args, kwargs
    runtime = runtime_of(scheduler.token_to_kv_pool_allocator)
    if runtime is not None:
        after_admission(scheduler, runtime)
