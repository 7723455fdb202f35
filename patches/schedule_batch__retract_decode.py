"""Do not end the last request of a full pool."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.queueing import retract
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_batch:ScheduleBatch.retract_decode",
    hook_type=HookType.AROUND,
    expected_params={"0.5.17": ("self", "server_args"), "0.5.20": ("self",)},
    reason=(
        "SGLang ends the last running request when the pool is full. Here a "
        "prompt that waits between two chunks may hold memory, or late passes may "
        "have made the request large: it can come back."
    ),
    upstream_link="managers/schedule_batch.py:3451",
    remove_when="The last request is put back if the pool can hold it.",
    runtime_from=of_holder,
)


def hook(original: Any, runtime: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Retract instead of aborting; who cannot come back is told so by the queue."""
    del runtime
    return retract(original(batch, *args, **kwargs))
