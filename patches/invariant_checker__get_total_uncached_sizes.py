"""Count the target pages of passes in flight as used."""

from __future__ import annotations

from typing import Any

from sglang_kvc.runtime import runtime_of
from sglang_kvc.scheduling.accounting import uncounted_tokens
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker._get_total_uncached_sizes",
    hook_type=HookType.AROUND,
    expected_params=("self",),
    reason=(
        "The strict busy check adds up what running requests own; between "
        "launch and settling a pass owns its target pages too, and a prompt that "
        "waits between two chunks is in no batch."
    ),
    upstream_link="managers/scheduler_components/invariant_checker.py:224",
    remove_when="The busy check asks the requests what they own.",
)


def hook(original: Any, checker: Any) -> tuple[int, int]:
    """Stock sizes plus what is in no batch or no row."""
    full, swa = original(checker)
    runtime = runtime_of(checker.tree_cache.token_to_kv_pool_allocator)
    passes = runtime.pass_scheduler if runtime is not None else None
    return full + uncounted_tokens(checker, passes), swa
