"""Count what KV-Compress does, beside SGLang's own metrics."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.init_metrics_reporter",
    hook_type=HookType.AFTER,
    expected_params={
        "0.5.17": ("self", "tp_rank", "pp_rank", "dp_rank"),
        "0.5.22": ("self",),
    },
    reason="/metrics knows nothing of passes and of what is resident.",
    upstream_link="managers/scheduler.py:1428",
    remove_when="SGLang lets a backend add series to its collector.",
    runtime_from=of_holder,
)


def hook(result: Any, runtime: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Add our series, if this rank has metrics on."""
    del result, args, kwargs
    runtime.watch(scheduler)
