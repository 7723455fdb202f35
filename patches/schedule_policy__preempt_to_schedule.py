"""Preempt as many requests as an urgent one needs."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.admission import preempt
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_policy:PrefillAdder.preempt_to_schedule",
    hook_type=HookType.AROUND,
    expected_params=("self", "req", "server_args"),
    reason=(
        "SGLang weighs an urgent request by its length and takes the growth of "
        "the preempted ones out of its sum. Here there are two sums, and growth "
        "is in one of them; a second urgent prompt was admitted into memory that "
        "was not there."
    ),
    upstream_link="managers/schedule_policy.py:1256",
    remove_when="Admission asks the cache for the growth of a request.",
    runtime_from=of_holder,
    until="0.5.22",
)


def hook(
    original: Any, runtime: Any, adder: Any, req: Any, *args: Any, **kwargs: Any
) -> bool:
    """Run the stock method with this request's charge."""
    done: bool = preempt(
        adder, runtime, req, lambda: original(adder, req, *args, **kwargs)
    )
    return done
