"""Accept ``Engine(kv_compress=True, kv_compress_rate=8, ...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.entrypoints.engine:Engine.server_args_class",
    hook_type=HookType.ATTRIBUTE,
    expected_params=None,
    reason=(
        "`Engine.__init__` loads the plugins itself, so a hook on it comes too late; "
        "it looks this class attribute up afterwards to build its `ServerArgs`."
    ),
    upstream_link="entrypoints/engine.py:264",
    remove_when="plugins can declare keyword arguments of `Engine`.",
)


def hook(previous: Callable[..., Any]) -> Any:
    """Return a factory that takes our keywords out and attaches the options."""
    from sglang_kvc.config.server_args import construct

    def server_args_class(**kwargs: Any) -> Any:
        return construct(previous, kwargs)

    return staticmethod(server_args_class)
