"""Do not end the last request of a full pool."""

from __future__ import annotations

from typing import Any

from sglang_kvc.runtime import runtime_of
from sglang_kvc.scheduling.queueing import retract
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_batch:ScheduleBatch.retract_decode",
    hook_type=HookType.AROUND,
    expected_params=("self", "server_args"),
    reason=(
        "SGLang ends the last running request when the pool is full. Here a "
        "prompt that waits between two chunks may hold memory, or late passes may "
        "have made the request large: it can come back."
    ),
    upstream_link="managers/schedule_batch.py:2734",
    remove_when="The last request is put back if the pool can hold it.",
)


def hook(original: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Retract instead of aborting; who cannot come back is told so by the queue."""
    result = original(batch, *args, **kwargs)
    runtime = runtime_of(batch.token_to_kv_pool_allocator)
    return result if runtime is None else retract(result)
