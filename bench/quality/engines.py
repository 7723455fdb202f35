"""Starts ``sglang.Engine`` for a system."""

from __future__ import annotations

import os
from typing import Any

from bench.quality.systems import STOCK, System

CPU_REQUESTS = 8


def start(system: System, model: str, extra: dict[str, Any]) -> Any:
    """An engine; `extra` are keywords that win."""
    from sglang_kvc.tools import serve

    gpu = serve.has_gpu()
    serve.set_defaults(os.environ, gpu, True)
    import sglang

    return sglang.Engine(**engine_keywords(system, model, gpu, extra))


def engine_keywords(
    system: System, model: str, gpu: bool, extra: dict[str, Any]
) -> dict[str, Any]:
    """Keywords of ``sglang.Engine``; `extra` wins."""
    keywords: dict[str, Any] = {
        "model_path": model,
        "skip_server_warmup": True,
        "enable_custom_logit_processor": True,
        "random_seed": 0,
        "log_level": "warning",
        **system.keywords(),
    }
    if not gpu:
        from sglang_kvc.tools.serve import CPU_POOL_TOKENS

        # SGLang would size the pool by the memory of the machine.
        keywords |= {
            "device": "cpu",
            "dtype": "float32",
            "max_running_requests": CPU_REQUESTS,
            "max_total_tokens": CPU_POOL_TOKENS,
        }
        if system.kind == STOCK:
            keywords |= {"attention_backend": "torch_native"}
    return keywords | extra
