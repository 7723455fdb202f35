"""One object per server that ties the device's tensors, the passes and the host plan.

It is owned by the KV pool (`ArenaKVPool.runtime`), so that every SGLang object that
reaches the pool reaches it; two engines in one process do not share it.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import pages_of
from sglang_kvc.config.server_args import chunk_tokens
from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction.runner import PassRunner
from sglang_kvc.eviction.scorers import get_scorer
from sglang_kvc.eviction.stopwatch import Stopwatch
from sglang_kvc.kernels.head_tables import head_tables
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.memory.device_state import DeviceState
from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.memory.metadata import GIB, metadata_bytes
from sglang_kvc.memory.start_table import (
    device_bytes,
    memory_table,
    parts_of,
    weight_bytes,
)
from sglang_kvc.scheduling.attached import attach_runtime
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.meter import Meter
from sglang_kvc.scheduling.passes import PassScheduler
from sglang_kvc.scheduling.turns import Turns
from sglang_kvc.upstream.ranks import checks_every_step
from sglang_kvc.upstream.types import Scheduler

logger = logging.getLogger(__name__)


def runtime_of(allocator: Any) -> KVCompressRuntime | None:
    """The runtime behind an SGLang allocator, or None when --kv-compress is off."""
    pool = allocator.get_kvcache() if allocator is not None else None
    return pool.runtime if isinstance(pool, ArenaKVPool) else None


class KVCompressRuntime:
    """Device state, pass runner, pass scheduler and chunk rule of one server.

    Parameters
    ----------
    pool : the KV pool; it owns the runtime from here on.
    state : what the server keeps on the device.
    sm_scale : softmax scale of the model's attention (the same in all layers).
    chunk_size : SGLang's chunk of a prompt, in tokens, or 0: the prompt is prefilled
        whole, or the device of a rank has no attention for prompts that are packed
        already.

    Attributes
    ----------
    stopwatch : measures passes for ``/metrics``; None if they are off.
    """

    def __init__(
        self,
        pool: ArenaKVPool,
        state: DeviceState,
        sm_scale: float,
        *,
        chunk_size: int,
    ) -> None:
        options, req_to_token = state.options, state.tables.req_to_token
        self.state = state
        self.passes = PassRunner(state, sm_scale)
        observes = get_scorer(options.metric).observes
        self.pass_scheduler = PassScheduler(
            options,
            req_to_token.shape[0],
            probes=options.chunk_queries == "prompt" and observes,
            ring_tokens=state.ring_tokens if observes else 0,
        )
        self.turns = Turns()
        self.chunk_rule = ChunkRule(
            mode=options.chunks,
            pool_tokens=pool.size,
            chunk_size=chunk_size,
            window=options.window,
        )
        if options.chunks == "always" and not chunk_size:
            raise ConfigError(
                "--kv-compress-chunks always needs chunked prefill; leave it at auto, "
                "which then compresses whole prompts only"
            )
        if options.sessions and not chunk_size:
            raise ConfigError(
                "--kv-compress-sessions needs chunked prefill, which can compute "
                "behind what is packed already; leave it out"
            )
        self.checks_ranks = checks_every_step()
        self.stopwatch: Stopwatch | None = None
        pool.runtime = self

    @property
    def options(self) -> KVCompressOptions:
        """The server's options."""
        return self.state.options

    @property
    def page_list_width(self) -> int:
        """Pages of the longest request: what page lists are set aside for."""
        return pages_of(self.state.tables.req_to_token.shape[1])

    def watch(self, scheduler: Scheduler) -> None:
        """Count for ``/metrics`` from now on, if this rank of the server shows any."""
        context = scheduler.metrics_collector_context
        if not context.current_scheduler_metrics_enabled:
            return
        self.stopwatch = Stopwatch(self.state.on_gpu)
        meter = Meter(scheduler, context.collector, self.stopwatch)
        self.pass_scheduler.meter = meter
        attach_runtime(context.collector, self)

    def log_memory(self, worker: Any) -> None:
        """Print what memory went where, at the end of the start, on the first rank.

        Parameters
        ----------
        worker : SGLang's TpModelWorker.
        """
        if get_parallel().attn_tp_rank:
            return
        state = self.state
        slots, max_len = state.tables.req_to_token.shape
        tokens = state.arena.k.shape[0] * PAGE_SIZE
        sizes = metadata_bytes(
            state.shape,
            state.options,
            max_running_requests=slots - 1,
            context_len=max_len,
            pool_tokens=tokens,
            chunk_size=self.chunk_rule.chunk_size,
            prefill_tokens=chunk_tokens(get_schedule()),
        )
        kv_bytes = state.arena.k.nbytes + state.arena.v.nbytes
        parts = parts_of(
            state,
            sizes,
            weights=weight_bytes(worker.model_runner.model),
            graphs=int(sum(worker.graph_memory_usage.values()) * GIB),
        )
        table = memory_table(parts, device_bytes(state.device))
        metadata = sizes.describe(kv_bytes, tokens)
        logger.info("Memory of this rank with KV-Compress:\n%s\n%s", table, metadata)

    def warm_up(self) -> None:
        """Compile the kernels of passes and chunks at start-up, on the padding slot.

        The decode kernel and the KV write are compiled by SGLang's graph capture and
        by its own warm-up request.
        """
        state, chunks = self.state, bool(self.chunk_rule.chunk_size)
        if not state.on_gpu:
            return
        self.passes.warm_up(chunks=chunks)
        if chunks:
            heads = state.shape.num_kv_heads
            slot, length = state.to_device([0]), state.to_device([1])
            head_tables(state.tables, slot, length, num_kv_heads=heads, width=1)
