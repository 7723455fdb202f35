"""Show the options in force in /server_info and in Engine.get_server_info."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.entrypoints.engine:Engine._launch_subprocesses",
    hook_type=HookType.AFTER,
    expected_params={
        "0.5.17": (
            "cls",
            "server_args",
            "init_tokenizer_manager_func",
            "run_scheduler_process_func",
            "run_detokenizer_process_func",
            "port_args",
        ),
        "0.5.22": (
            "cls",
            "server_args",
            "init_tokenizer_manager_func",
            "run_scheduler_process_func",
            "run_detokenizer_process_func",
            "port_args",
            "placement_group",
        ),
    },
    reason="A running server cannot be asked for its rate: it shows SGLang's own.",
    upstream_link="entrypoints/engine.py:1129",
    remove_when="/server_info shows what plugins add to the settings.",
)


def hook(result: Any, cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Add them to what the schedulers have told; both pages show all of that."""
    del cls, args, kwargs
    from sglang_kvc.config.server_args import options_of

    options = options_of(server_args)
    if options is not None:
        for info in result[3].scheduler_infos:
            info["kv_compress"] = options.in_force()
