"""Count the target pages of passes in flight as used."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_checker
from sglang_kvc.scheduling.accounting import uncounted_tokens
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker._get_total_uncached_sizes",
    hook_type=HookType.AROUND,
    expected_params=("self",),
    reason=(
        "The strict busy check adds up what running requests own; between "
        "launch and settling a pass owns its target pages too, and a prompt that "
        "waits between two chunks is in no batch."
    ),
    upstream_link="managers/scheduler_components/invariant_checker.py:297",
    remove_when="The busy check asks the requests what they own.",
    runtime_from=of_checker,
)


def hook(original: Any, runtime: Any, checker: Any) -> tuple[int, int]:
    """Stock sizes plus what is in no batch or no row."""
    full, swa = original(checker)
    return full + uncounted_tokens(checker, runtime.pass_scheduler), swa
