"""Read the ``--kv-compress*`` flags and force the settings they imply."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.server_args:ServerArgs.from_cli_args",
    hook_type=HookType.AROUND,
    expected_params=("cls", "args"),
    reason=(
        "`ServerArgs` drops flags that are not its own fields, and resolves all "
        "settings during construction, so ours must be in place before."
    ),
    upstream_link="server_args.py:446",
    remove_when="plugins can declare flags and defaults.",
)


def hook(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Build the ServerArgs with our options attached."""
    from sglang_kvc.config.server_args import construct

    def build(**values: Any) -> Any:
        return original(cls, argparse.Namespace(**values))

    return construct(build, vars(args))
