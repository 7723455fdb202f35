"""Parse the compression options of a request."""

from __future__ import annotations

from typing import Any

from sglang_kvc.admission import attach_policy
from sglang_kvc.hooks import HookType, Patch
from sglang_kvc.runtime import runtime_of

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler._add_request_to_queue",
    hook_type=HookType.BEFORE,
    expected_params=("self", "req", "is_retracted"),
    reason=(
        "Options must be known before the prefix match and admission; a bad one "
        "aborts its request alone."
    ),
    upstream_link="managers/scheduler.py:2629",
    remove_when="SGLang offers validated per-request extension fields.",
)


def hook(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Attach the request's policy."""
    del args, kwargs
    runtime = runtime_of(scheduler.token_to_kv_pool_allocator)
    if runtime is not None:
        attach_policy(req, runtime)
