"""One object per server that ties the pool, the device tables and the host plan.

It is owned by the KV pool (`ArenaKVPool.runtime`), so that every SGLang object that
reaches the pool reaches it; two engines in one process do not share it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_kvc.chunking import ChunkRule
from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction import PassRunner
from sglang_kvc.kernels.head_tables import head_tables
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables
from sglang_kvc.kv_pool import ArenaKVPool
from sglang_kvc.memory import ModelShape, metadata_bytes
from sglang_kvc.prefill_folded import can_prefill_folded
from sglang_kvc.scheduling import PassScheduler

if TYPE_CHECKING:
    from sglang_kvc.options import KVCompressOptions

logger = logging.getLogger(__name__)


def runtime_of(allocator: Any) -> KVCompressRuntime | None:
    """The runtime behind an SGLang allocator, or None when --kv-compress is off."""
    pool = allocator.get_kvcache() if allocator is not None else None
    return pool.runtime if isinstance(pool, ArenaKVPool) else None


class KVCompressRuntime:
    """Device tables, query rings, pass runner and pass scheduler of one server.

    Every device table here is written on the forward stream only.

    Parameters
    ----------
    model_runner : SGLang's ModelRunner, with its pools built.
    options : the server's options.
    sm_scale : softmax scale of the model's attention (the same in all layers).
    """

    def __init__(
        self, model_runner: Any, options: KVCompressOptions, sm_scale: float
    ) -> None:
        pool: ArenaKVPool = model_runner.token_to_kv_pool
        self.options = options
        self.device = pool.device
        self.arena = pool.arena
        req_to_token = model_runner.req_to_token_pool.req_to_token
        slots = req_to_token.shape[0]
        self.shape = ModelShape(
            num_layers=self.arena.num_layers,
            num_kv_heads=self.arena.num_kv_heads,
            num_qo_heads=model_runner.model_config.num_attention_heads
            // get_parallel().attn_tp_size,
            head_dim=self.arena.head_dim,
            itemsize=self.arena.k.element_size(),
        )
        self.tables = BlockTables(
            req_to_token=req_to_token,
            fold_lens=self._zeros(slots),
            block_offsets=self._zeros(slots, self.arena.heads_per_page + 1),
            packed_pages=self._zeros(slots, -(-req_to_token.shape[1] // PAGE_SIZE)),
        )
        self.query_ring = torch.zeros(
            slots,
            self.shape.num_layers,
            options.window,
            self.shape.num_qo_heads,
            self.shape.head_dim,
            dtype=pool.dtype,
            device=self.device,
        )
        self.query_lse = torch.zeros(self.query_ring.shape[:-1], device=self.device)
        self.distinct_units = torch.zeros(slots, device=self.device)
        self.passes = PassRunner(self, sm_scale)
        self.scheduler = PassScheduler(options, slots)
        self.prefill_folds: list[tuple[int, int]] = []
        chunk = max(model_runner.server_args.chunked_prefill_size or 0, 0)
        self.chunk_rule = ChunkRule(
            mode=options.chunks,
            pool_tokens=pool.size,
            chunk_size=chunk if can_prefill_folded(pool) else 0,
            window=options.window,
        )
        if options.chunks == "always" and not self.chunk_rule.chunk_size:
            raise ConfigError(
                "--kv-compress-chunks always needs chunked prefill and a Hopper GPU or "
                "the CPU; leave it at auto, which then compresses whole prompts only"
            )
        pool.runtime = self

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def reset_slots(self, slots: list[int]) -> None:
        """Forget what the previous owners of `slots` had packed (forward stream)."""
        index = self.to_device(slots)
        self.tables.fold_lens.index_fill_(0, index, 0)
        self.tables.block_offsets.index_fill_(0, index, 0)

    def to_device(self, values: list[int]) -> torch.Tensor:
        """int64 tensor on the device without a host synchronisation."""
        host = torch.tensor(values, dtype=torch.int64)
        if not self.on_gpu:
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    @property
    def on_gpu(self) -> bool:
        """Whether the arena lives on a GPU (the kernels are Triton then)."""
        return torch.device(self.device).type == "cuda"

    def log_memory(self) -> None:
        """Print what our metadata takes beside the KV."""
        slots, max_len = self.tables.req_to_token.shape
        tokens = self.arena.k.shape[0] * PAGE_SIZE
        sizes = metadata_bytes(
            self.shape,
            self.options,
            max_running_requests=slots - 1,
            context_len=max_len,
            pool_tokens=tokens,
            chunk_size=self.chunk_rule.chunk_size,
        )
        kv_bytes = self.arena.k.nbytes + self.arena.v.nbytes
        logger.info(sizes.describe(kv_bytes, tokens))

    def warm_up(self) -> None:
        """Compile the kernels of passes and chunks at start-up, on the padding slot.

        The decode kernel and the KV write are compiled by SGLang's graph capture and
        by its own warm-up request.
        """
        if not self.on_gpu:
            return
        self.passes.warm_up()
        if self.chunk_rule.chunk_size:
            layers, heads = self.shape.num_layers, self.shape.num_kv_heads
            slot, length = self.to_device([0]), self.to_device([1])
            head_tables(self.tables, slot, length, layers, heads, width=1)
