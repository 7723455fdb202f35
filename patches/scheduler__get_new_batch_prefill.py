"""Look after a round of admission that nobody is lost."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.queueing import after_admission
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
    hook_type=HookType.AFTER,
    expected_params=("self", "running_batch"),
    reason=(
        "Preempted requests are put back only if the request that they made room "
        "for was admitted; else SGLang forgets them."
    ),
    upstream_link="managers/scheduler.py:4052",
    remove_when="SGLang puts preempted requests back in any case.",
    runtime_from=of_holder,
)


def hook(result: Any, runtime: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Put back who was preempted for nothing."""
    del result, args, kwargs
    after_admission(scheduler, runtime)
