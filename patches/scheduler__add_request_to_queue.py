"""Parse the options of a request, and refuse what can never run."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.queueing import enqueue
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler._add_request_to_queue",
    hook_type=HookType.AROUND,
    expected_params=("self", "req", "is_retracted"),
    reason=(
        "Options must be known before the prefix match and admission. What cannot "
        "run even alone would wait for ever and make all others wait."
    ),
    upstream_link="managers/scheduler.py:3480",
    remove_when="SGLang offers validated per-request extension fields.",
    runtime_from=of_holder,
)


def hook(
    original: Any, runtime: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any
) -> None:
    """Queue the request, or tell its sender why not."""
    enqueue(scheduler, runtime, req, lambda: original(scheduler, req, *args, **kwargs))
