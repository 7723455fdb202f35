"""Limit a request by what it can hold, not by its logical length."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_holder
from sglang_kvc.scheduling.acceptance import limit_request
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.init_req_max_new_tokens",
    hook_type=HookType.AROUND,
    expected_params=("self", "req"),
    reason=(
        "SGLang caps prompt plus output at the pool; a compressed request holds its "
        "budget and one interval."
    ),
    upstream_link="managers/scheduler.py:2693",
    remove_when="The limit on a request's length asks the cache.",
    runtime_from=of_holder,
)


def hook(original: Any, runtime: Any, scheduler: Any, req: Any) -> None:
    """Run the stock method, then set the limits of a compressed request."""
    asked = req.sampling_params.max_new_tokens
    # A request's 0 is a limit: scoring a prompt generates nothing. A server's is none.
    limits = [asked, scheduler.max_new_tokens_limit or None]
    most = min((limit for limit in limits if limit is not None), default=None)
    original(scheduler, req)
    truncate = scheduler.server_args.allow_auto_truncate
    limit_request(req, runtime, most, scheduler.max_req_len, truncate)
