"""Run once at start-up what requests will run, so that they find everything loaded.

A GPU library loads a matrix product when it first runs, and which one runs depends on
the number of tokens. SGLang's own warm-up request has a handful of them, and is greedy:
FlashInfer compiles its sampling kernels, for a minute on a new machine, when a request
first asks for them.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.runtime import runtime_of
from sglang_kvc.upstream.batches import made_up_prompt

logger = logging.getLogger(__name__)

HALVINGS = 5
"""Lengths to run: a full chunk and its halves; and one window, as in a `probe`."""
DEFAULT_CHUNK = 8192
SAMPLED: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
)
"""Ways to sample that have kernels of their own."""


def warm_up(scheduler: Any) -> None:
    """Prefill prompts of a chunk and less and sample, before any request; GPU only."""
    runtime = runtime_of(scheduler.token_to_kv_pool_allocator)
    if runtime is None or not runtime.state.on_gpu:
        return
    begin = time.perf_counter()
    logger.info("Warm-up: what is not in a cache is compiled now, for up to minutes")
    chunk = scheduler.chunked_prefill_size or DEFAULT_CHUNK
    room = scheduler.token_to_kv_pool_allocator.available_size() - 2 * PAGE_SIZE
    longest = min(chunk, room, scheduler.max_req_input_len)
    # PyTorch reuses memory per stream: what was freed on this one serves nobody, and
    # the first request would wait for memory of its own.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with stream_of_steps(scheduler):
        lengths = [longest >> halving for halving in range(HALVINGS)]
        for length in [*lengths, min(longest, runtime.options.window)]:
            if length >= PAGE_SIZE:
                prefill_once(scheduler, length)
        prefilled = time.perf_counter()
        # Answers that are drawn from the server's seed stay what they were.
        with torch.random.fork_rng([torch.cuda.current_device()]):
            for sampling in SAMPLED:
                prefill_once(scheduler, PAGE_SIZE, **sampling)
        sampled = time.perf_counter()
        runtime.passes.warm_up(chunks=bool(runtime.chunk_rule.chunk_size))
    torch.cuda.synchronize()
    logger.info(
        "Warm-up took %.1f s: prompts %.1f s, samplers %.1f s, passes %.1f s",
        time.perf_counter() - begin,
        prefilled - begin,
        sampled - prefilled,
        time.perf_counter() - sampled,
    )


def stream_of_steps(scheduler: Any) -> AbstractContextManager[Any]:
    """Stream on which SGLang will run its batches."""
    if scheduler.enable_overlap:
        return torch.cuda.stream(scheduler.forward_stream)
    return nullcontext()


@torch.no_grad()
def prefill_once(scheduler: Any, length: int, **sampling: float) -> None:
    """Prefill and sample outside any queue, and give back what it took."""
    runner = scheduler.tp_worker.model_runner
    with made_up_prompt(scheduler, length, **sampling) as batch:
        runner.sample(runner.forward(batch).logits_output, batch)
