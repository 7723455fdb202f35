"""Admit with our charges and chunks, on SGLang 0.5.22 and later."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.prefill_adder import admitting
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.get_prefill_adder_class",
    hook_type=HookType.AFTER,
    expected_params=("self",),
    reason=(
        "Admission charges the prompt plus min(max_new_tokens, 4096), and a share of "
        "max_new_tokens for a running request. A compressed request holds and grows "
        "by less; a prompt that is compressed between chunks waits when the pool is "
        "full; what a preempted request gives back is not its length."
    ),
    upstream_link="managers/scheduler.py:2462",
    remove_when="Admission asks the cache for the growth of a request.",
    runtime_from=of_holder,
    since="0.5.22",
)


def hook(result: Any, runtime: Any, scheduler: Any) -> Any:
    """Put our admission before the class that SGLang or another plugin takes."""
    del runtime, scheduler
    return admitting(result)
