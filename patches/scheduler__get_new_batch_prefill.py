"""Begin a round of admission, and look after it that nobody is lost."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.queueing import after_admission, before_admission
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
    hook_type=HookType.AROUND,
    expected_params=("self", "running_batch"),
    reason=(
        "Snapshots are kept for those whose turn comes next. Preempted requests are "
        "put back only if the request that they made room for was admitted; else "
        "SGLang forgets them."
    ),
    upstream_link="managers/scheduler.py:4052",
    remove_when="SGLang puts preempted requests back in any case; sessions need it.",
    runtime_from=of_holder,
)


def hook(original: Any, runtime: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Lend snapshots, admit, and put back who was preempted for nothing."""
    before_admission(scheduler)
    result = original(scheduler, *args, **kwargs)
    after_admission(scheduler, runtime)
    return result
