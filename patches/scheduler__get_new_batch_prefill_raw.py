"""Decode before the next prefill, on SGLang 0.5.17 and 0.5.22."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler._get_new_batch_prefill_raw",
    hook_type=HookType.AROUND,
    expected_params=("self", "prefill_delayer_single_pass", "running_batch"),
    reason=(
        "SGLang prefills until no prompt waits. One client that sends prompts as fast "
        "as it can makes everybody wait for their next token."
    ),
    upstream_link="managers/scheduler.py:3093",
    remove_when="0.5.23, which has a method for it (scheduler__should_defer_prefill).",
    runtime_from=of_holder,
    until="0.5.23",
)


def hook(
    original: Any,
    runtime: Any,
    scheduler: Any,
    prefill_delayer_single_pass: Any,
    running_batch: Any,
) -> Any:
    """No prefill in this step if it is the turn of the answers."""
    steps = runtime.options.turns
    if runtime.turns.decode_first(scheduler, running_batch, steps):
        # A started prompt is in no batch now; the busy check has to know of it.
        runtime.pass_scheduler.waiting_prompt = scheduler.chunked_req
        return None, running_batch
    return original(scheduler, prefill_delayer_single_pass, running_batch)
