"""Run resets before and passes behind a forward."""

from __future__ import annotations

from typing import Any

from sglang_kvc.attention.step import run_step
from sglang_kvc.patches.runtimes import of_worker
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    hook_type=HookType.AROUND,
    expected_params={
        "0.5.17": (
            "self",
            "batch",
            "forward_batch",
            "pp_proxy_tensors",
            "is_verify",
            "skip_attn_backend_init",
            "capture_hidden_mode",
        ),
        "0.5.22": (
            "self",
            "batch",
            "forward_batch",
            "pp_proxy_tensors",
            "is_verify",
            "skip_attn_backend_init",
            "capture_hidden_mode",
            "return_kv_loc_plan",
        ),
    },
    reason=(
        "A pass selects over all layers, so it runs behind the whole forward, "
        "on its stream."
    ),
    upstream_link="managers/tp_worker.py:622",
    remove_when="SGLang offers a hook behind the forward that sees the requests.",
    runtime_from=of_worker,
)


def hook(
    original: Any, runtime: Any, worker: Any, batch: Any = None, *args: Any, **kw: Any
) -> Any:
    """Carry out the batch's plan around the stock forward."""
    return run_step(
        runtime, worker, batch, lambda: original(worker, batch, *args, **kw)
    )
