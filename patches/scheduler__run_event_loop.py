"""Warm up prefill before the first request, and say what memory went where."""

from __future__ import annotations

from typing import Any

from sglang_kvc.attention.warmup import warm_up_prefill
from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.run_event_loop",
    hook_type=HookType.BEFORE,
    expected_params=("self",),
    reason=(
        "The first request would wait for kernels to be loaded, and nothing says in "
        "one place what memory went where."
    ),
    upstream_link="managers/scheduler.py:1975",
    remove_when="SGLang's warm-up prefills a full chunk and its log has such a table.",
    runtime_from=of_holder,
)


def hook(runtime: Any, scheduler: Any) -> None:
    """Prompts of a chunk and less; then the memory is what it will be."""
    warm_up_prefill(scheduler)
    runtime.log_memory(scheduler.tp_worker)
