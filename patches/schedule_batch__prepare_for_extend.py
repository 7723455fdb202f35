"""Plan the eviction passes of a extend step."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend",
    hook_type=HookType.AFTER,
    expected_params=("self",),
    reason=(
        "Target pages are taken after SGLang has taken its own, so that a full "
        "pool defers a pass instead of breaking the promise of "
        "check_decode_mem."
    ),
    upstream_link="managers/schedule_batch.py:2847",
    remove_when="SGLang calls backends while it schedules.",
    runtime_from=of_holder,
)


def hook(result: Any, runtime: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Attach the plan to the batch; the forward hook carries it out."""
    del result, args, kwargs
    runtime.pass_scheduler.plan_extend(batch)
