"""Warm up before a scheduler says that it is ready, and say what memory went where."""

from __future__ import annotations

from typing import Any

from sglang_kvc.attention.warmup import warm_up
from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.get_init_info",
    hook_type=HookType.BEFORE,
    expected_params=("self",),
    reason=(
        "The first requests would wait for kernels to be loaded or compiled, and "
        "nothing says in one place what memory went where."
    ),
    upstream_link="managers/scheduler.py:1937",
    remove_when="SGLang's warm-up prefills a full chunk and its log has such a table.",
    runtime_from=of_holder,
)


def hook(runtime: Any, scheduler: Any) -> None:
    """Prompts of a chunk and less, samplers; then the memory is what it will be."""
    warm_up(scheduler)
    runtime.log_memory(scheduler.tp_worker)
