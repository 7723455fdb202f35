"""Charge a running request what it can still grow to."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.headroom import running_charge
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.schedule_policy:PrefillAdder._get_running_request_total_token_offset",
    hook_type=HookType.AROUND,
    expected_params=("self", "req"),
    reason=(
        "A compressed request grows by one interval at most; charging "
        "max_new_tokens would leave the freed memory unused."
    ),
    upstream_link="managers/schedule_policy.py:559",
    remove_when="Admission asks the cache for the growth of a request.",
    runtime_from=of_holder,
    until="0.5.22",
)


def hook(original: Any, runtime: Any, adder: Any, req: Any) -> float:
    """At most the stock charge; what a request can give back while one is sought."""
    del runtime
    return running_charge(adder, req, original(adder, req))
