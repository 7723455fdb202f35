"""Put the ``--kv-compress*`` flags into SGLang's parser."""

from __future__ import annotations

import argparse

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.server_args:ServerArgs.add_cli_args",
    hook_type=HookType.AFTER,
    expected_params=("parser",),
    reason="SGLang has no registry for the command-line flags of plugins.",
    upstream_link="server_args.py:351",
    remove_when="plugins can declare flags.",
)


def hook(_result: None, parser: argparse.ArgumentParser) -> None:
    """Add our argument group."""
    from sglang_kvc.config.flags import add_cli_arguments

    add_cli_arguments(parser)
