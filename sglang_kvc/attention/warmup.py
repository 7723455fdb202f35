"""Prefill once at start-up, so that the first request finds everything loaded.

A GPU library loads a matrix product when it first runs, and which one runs depends on
the number of tokens. SGLang's own warm-up request has a handful of them.
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


def warm_up_prefill(scheduler: Any) -> None:
    """Run prompts of a chunk and less before any request is served; GPU only."""
    runtime = runtime_of(scheduler.token_to_kv_pool_allocator)
    if runtime is None or not runtime.state.on_gpu:
        return
    begin = time.perf_counter()
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
        runtime.passes.warm_up(chunks=bool(runtime.chunk_rule.chunk_size))
    torch.cuda.synchronize()
    logger.info("Prefill warm-up took %.2f s", time.perf_counter() - begin)


def stream_of_steps(scheduler: Any) -> AbstractContextManager[Any]:
    """Stream on which SGLang will run its batches."""
    if scheduler.enable_overlap:
        return torch.cuda.stream(scheduler.forward_stream)
    return nullcontext()


@torch.no_grad()
def prefill_once(scheduler: Any, length: int) -> None:
    """Prefill a made-up prompt outside any queue, and give back what it took."""
    runner = scheduler.tp_worker.model_runner
    with made_up_prompt(scheduler, length) as batch:
        runner.sample(runner.forward(batch).logits_output, batch)
