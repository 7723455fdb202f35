"""Do not decode between two prefills if that gives nobody a token."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.turns import answers_wait
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler._should_defer_prefill",
    hook_type=HookType.AROUND,
    expected_params=("self", "running_batch"),
    reason=(
        "With --prefill-decode-interval SGLang decodes also if nothing runs, or only "
        "requests that their token on its way completes."
    ),
    upstream_link="managers/scheduler.py:1400",
    remove_when="SGLang counts who has a token to come.",
    runtime_from=of_holder,
    since="0.5.22",
)


def hook(original: Any, runtime: Any, scheduler: Any, running_batch: Any) -> bool:
    """Ask SGLang, which counts the steps, then look whether anybody waits."""
    del runtime
    defer: bool = original(scheduler, running_batch)
    return defer and answers_wait(running_batch)
