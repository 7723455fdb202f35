"""Arguments and records of `bench.serving`, as its tests want them."""

from __future__ import annotations

import argparse
from typing import Any

from bench.serving.loads import LOADS, STOCK


def namespace(**values: Any) -> argparse.Namespace:
    defaults = {
        "model": "m",
        "load_format": "dummy",
        "device": "",
        "extra_args": "{}",
        "requests": 4,
        "min_len": 10,
        "max_len": 20,
        "output": 5,
        "pool": 1024,
        "rate": 8,
        "min_budget": 512,
        "seed": 0,
        "systems": "stock,kvc",
    }
    return argparse.Namespace(**{**defaults, **values})


def record(load: str, system: str, rate: float, seconds: float, **more: Any) -> Any:
    prompts = LOADS[load].count(system, rate)
    tokens = prompts * (LOADS[load].input_len + LOADS[load].output_len)
    return {
        "engine": f"{system}#1",
        "commit": "abc",
        "gpu": "H200",
        "versions": {"sglang": "0.5.17"},
        "load": load,
        "system": system,
        "rate": rate,
        "prompts": prompts,
        "seconds": seconds,
        "input_tokens": prompts * LOADS[load].input_len,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": prompts / seconds,
        "largest_batch": 3 if system == STOCK else 24,
        "decode_step_ms": 12.0 if system == STOCK else 5.0,
        "retractions": 0,
        **more,
    }
