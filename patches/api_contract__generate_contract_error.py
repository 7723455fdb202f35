"""Keep a client's megabytes out of the error message, on SGLang 0.5.22 and later."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    # Where it is defined: its module is imported by that of the HTTP server, which
    # then takes the hooked function by name.
    target="sglang.srt.entrypoints.api_contract:generate_contract_error",
    hook_type=HookType.AFTER,
    expected_params=("body",),
    reason=(
        "SGLang checks a body of /generate before we see it and repeats what it "
        "refuses in full: 3 MB in are 3 MB out."
    ),
    upstream_link="entrypoints/api_contract.py:12",
    remove_when="SGLang bounds what an error message repeats.",
    since="0.5.22",
)


def hook(message: str | None, body: Any) -> str | None:
    """Shorten the message if this process serves with KV-Compress."""
    del body
    if message is None:
        return None
    from sglang.srt.runtime_context import get_server_args

    from sglang_kvc.config.server_args import options_of
    from sglang_kvc.requests.contract import shortened

    return None if options_of(get_server_args()) is None else shortened(message)
