"""Check the resolved settings before processes are started."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.server_args:ServerArgs.check_server_args",
    hook_type=HookType.AFTER,
    expected_params=("self",),
    reason=(
        "Unsupported settings, models and missing hooks must stop the server with one "
        "clear message before anything is spawned."
    ),
    upstream_link="server_args.py:508",
    remove_when="attention backends can check `ServerArgs` in the parent process.",
)


def hook(_result: None, server_args: Any) -> None:
    """Refuse by name what KV-Compress does not serve."""
    from sglang_kvc.config.server_args import check_server_args

    check_server_args(server_args)
