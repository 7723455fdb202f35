"""Parse the options of a request, and refuse what can never run."""

from __future__ import annotations

from typing import Any

from sglang_kvc.runtime import runtime_of
from sglang_kvc.scheduling.queueing import enqueue
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler._add_request_to_queue",
    hook_type=HookType.AROUND,
    expected_params=("self", "req", "is_retracted"),
    reason=(
        "Options must be known before the prefix match and admission. What cannot "
        "run even alone would wait for ever and make all others wait."
    ),
    upstream_link="managers/scheduler.py:2629",
    remove_when="SGLang offers validated per-request extension fields.",
)


def hook(original: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Queue the request, or tell its sender why not."""
    runtime = runtime_of(scheduler.token_to_kv_pool_allocator)

    def call() -> None:
        original(scheduler, req, *args, **kwargs)

    if runtime is None:
        call()
    else:
        enqueue(scheduler, runtime, req, call)
