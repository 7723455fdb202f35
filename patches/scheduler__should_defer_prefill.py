"""Decode before the next prefill, on SGLang 0.5.23 and later."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler._should_defer_prefill",
    hook_type=HookType.AFTER,
    expected_params=("self", "running_batch"),
    reason=(
        "SGLang prefills until no prompt waits, or with --prefill-decode-interval "
        "decodes between two prefills also where many wait and few decode."
    ),
    upstream_link="managers/scheduler.py:1400",
    remove_when="--prefill-decode-interval weighs who waits against who decodes.",
    runtime_from=of_holder,
    since="0.5.23",
)


def hook(result: bool, runtime: Any, scheduler: Any, running_batch: Any) -> bool:
    """As SGLang says, or if it is the turn of the answers."""
    steps = runtime.options.turns
    answers = runtime.turns.decode_first(scheduler, running_batch, steps)
    return result or answers
