"""Charge a new request what it can grow to."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.admission import add_one
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
    hook_type=HookType.AROUND,
    expected_params=("self", "req", "has_chunked_req", "truncation_align_size"),
    reason=(
        "Admission charges the prompt plus min(max_new_tokens, 4096); the "
        "second part is bounded for a request that will be compressed, and the first "
        "for a prompt that is compressed between chunks."
    ),
    upstream_link="managers/schedule_policy.py:1059",
    remove_when="Admission asks the cache for the growth of a request.",
    runtime_from=of_holder,
    until="0.5.22",
)


def hook(
    original: Any, runtime: Any, adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run the stock method within this request's limits."""
    return add_one(adder, runtime, req, lambda: original(adder, req, *args, **kwargs))
