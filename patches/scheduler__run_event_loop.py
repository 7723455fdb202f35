"""Warm up prefill before the first request is looked at."""

from __future__ import annotations

from typing import Any

from sglang_kvc.attention.warmup import warm_up_prefill
from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.run_event_loop",
    hook_type=HookType.BEFORE,
    expected_params=("self",),
    reason="The first request would wait for kernels to be loaded.",
    upstream_link="managers/scheduler.py:1975",
    remove_when="SGLang's warm-up prefills a full chunk.",
    runtime_from=of_holder,
)


def hook(runtime: Any, scheduler: Any) -> None:
    """Prompts of a chunk and less."""
    del runtime
    warm_up_prefill(scheduler)
