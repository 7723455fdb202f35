"""Device state of a server beside SGLang's own: one record, made at start-up.

Passes, probes and prefills take this record; none of them knows the runtime above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables
from sglang_kvc.kernels.query_ring import QueryRing, ring_in, ring_pages
from sglang_kvc.memory.host_pages import HostPages
from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.memory.metadata import (
    ModelShape,
    mlp_width,
    packed_width,
)
from sglang_kvc.scheduling.step_plan import Resumed


@dataclass
class DeviceState:
    """Tensors by request slot, and the arena; written on the forward stream only.

    Attributes
    ----------
    options : the server's options.
    shape : of the model on this rank.
    arena : K, V and scores of all layers.
    tables : SGLang's request table and our block tables, a row a slot.
    query_ring : last queries of every slot that has got pages for them, in 8 bits.
    novelty_unit : what a key of mean novelty adds, a number a slot, fp32.
    device : where all of it lives.
    host : host memory for snapshots; None if there is to be none.
    """

    options: KVCompressOptions
    shape: ModelShape
    arena: Arena
    tables: BlockTables
    query_ring: QueryRing
    novelty_unit: torch.Tensor
    device: Any
    host: HostPages | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the arena lives on a GPU (the kernels are Triton then)."""
        return torch.device(self.device).type == "cuda"

    def to_device(self, values: list[int]) -> torch.Tensor:
        """Copy integers to the device, int64, without a host synchronisation."""
        host = torch.tensor(values, dtype=torch.int64)
        if not self.on_gpu:
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    @property
    def ring_tokens(self) -> int:
        """Tokens of the pool that a ring takes."""
        return self.query_ring.pages.shape[1] * PAGE_SIZE

    def reset_slots(self, slots: list[int]) -> None:
        """Forget what the previous owners of `slots` had (forward stream)."""
        index = self.to_device(slots)
        self.tables.fold_lens.index_fill_(0, index, 0)
        self.tables.block_offsets.index_fill_(0, index, 0)
        self.query_ring.pages.index_fill_(0, index, 0)

    def set_rings(self, rings: Mapping[int, torch.Tensor]) -> None:
        """Give slots the pages of these tokens for their rings (forward stream)."""
        pages = torch.stack([tokens[::PAGE_SIZE] for tokens in rings.values()])
        pages = (pages // PAGE_SIZE).to(self.query_ring.pages.dtype)
        self.query_ring.pages.index_copy_(0, self.to_device(list(rings)), pages)

    def resume_slots(self, resumed: list[Resumed]) -> None:
        """Let the owners of slots read the packed pages of snapshots (forward stream).

        Their tails are in the request table, as every prefix is.
        """
        tables, snapshots = self.tables, [it.snapshot for it in resumed]
        slots = self.to_device([it.slot for it in resumed])
        offsets = torch.stack([snapshot.offsets for snapshot in snapshots])
        tables.block_offsets.index_copy_(0, slots, offsets)
        folds = self.to_device([snapshot.fold for snapshot in snapshots])
        tables.fold_lens.index_copy_(0, slots, folds.to(tables.fold_lens.dtype))
        counts = [snapshot.packed // PAGE_SIZE for snapshot in snapshots]
        rows = slots.repeat_interleave(self.to_device(counts), output_size=sum(counts))
        columns = self.to_device([column for n in counts for column in range(n)])
        if self.on_gpu:
            # They were made on the scheduling stream, which may reuse their memory.
            for it in resumed:
                it.packed_tokens.record_stream(torch.cuda.current_stream())
        tokens = torch.cat([it.packed_tokens[::PAGE_SIZE] for it in resumed])
        pages = (tokens // PAGE_SIZE).to(tables.packed_pages.dtype)
        tables.packed_pages.index_put_((rows, columns), pages)
        if snapshots[0].unit is not None:
            units = torch.stack([snapshot.unit for snapshot in snapshots])
            self.novelty_unit.index_copy_(0, slots, units)


def make_device_state(model_runner: Any, options: KVCompressOptions) -> DeviceState:
    """Allocate the device state of a server.

    Parameters
    ----------
    model_runner : SGLang's ModelRunner, with its pools built.
    options : the server's options.
    """
    pool: ArenaKVPool = model_runner.token_to_kv_pool
    arena, device = pool.arena, pool.device
    req_to_token = model_runner.req_to_token_pool.req_to_token
    slots = req_to_token.shape[0]
    num_qo_heads = model_runner.model_config.num_attention_heads
    query_dtype: torch.dtype = model_runner.model_config.dtype
    shape = ModelShape(
        num_layers=arena.num_layers,
        num_kv_heads=arena.num_kv_heads,
        num_qo_heads=num_qo_heads // get_parallel().attn_tp_size,
        head_dim=arena.head_dim,
        itemsize=arena.k.element_size(),
        query_itemsize=query_dtype.itemsize,
        mlp_width=mlp_width(model_runner.model_config, get_parallel().attn_tp_size),
    )

    def zeros(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.int32, device=device)

    pages = ring_pages(options.window, shape.group, shape.itemsize)
    return DeviceState(
        options=options,
        shape=shape,
        arena=arena,
        tables=BlockTables(
            req_to_token=req_to_token,
            fold_lens=zeros(slots),
            block_offsets=zeros(slots, arena.heads_per_page + 1),
            packed_pages=zeros(slots, packed_width(req_to_token.shape[1], pool.size)),
        ),
        query_ring=ring_in(arena, zeros(slots, pages), options.window),
        novelty_unit=torch.zeros(slots, device=device),
        device=device,
        host=HostPages(arena, options.sessions_host) if options.sessions_host else None,
    )
