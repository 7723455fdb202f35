"""Run resets before and passes behind a forward."""

from __future__ import annotations

from typing import Any

from sglang_kvc.attention.step import run_step
from sglang_kvc.upstream.hooks import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    hook_type=HookType.AROUND,
    expected_params=(
        "self",
        "batch",
        "forward_batch",
        "pp_proxy_tensors",
        "is_verify",
        "skip_attn_backend_init",
        "capture_hidden_mode",
    ),
    reason=(
        "A pass selects over all layers, so it runs behind the whole forward, "
        "on its stream."
    ),
    upstream_link="managers/tp_worker.py:558",
    remove_when="SGLang offers a hook behind the forward that sees the requests.",
)


def hook(original: Any, worker: Any, batch: Any = None, *args: Any, **kw: Any) -> Any:
    """Carry out the batch's plan around the stock forward."""
    pool = worker.model_runner.token_to_kv_pool
    runtime = getattr(pool, "runtime", None)

    def forward() -> Any:
        return original(worker, batch, *args, **kw)

    return forward() if runtime is None else run_step(runtime, worker, batch, forward)
