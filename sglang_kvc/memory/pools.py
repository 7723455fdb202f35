"""Build SGLang's pools over the arena; called from the configurator's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_kvc.config.server_args import chunk_tokens
from sglang_kvc.config.server_args import options_of as attached_options
from sglang_kvc.errors import (
    ConfigError,
    Section,
    UnsupportedModeError,
    points_to,
)
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.memory.metadata import (
    ModelShape,
    default_slots,
    metadata_bytes,
    mlp_width,
)

if TYPE_CHECKING:
    from sglang_kvc.config.options import KVCompressOptions


AS_BYTES = torch.uint8
"""In the place of e4m3, see `e4m3_as_bytes`; SGLang also stores it as this."""


def options_of(configurator: Any) -> KVCompressOptions | None:
    """The server's options, or None when --kv-compress is off."""
    return attached_options(configurator.server_args)


def model_shape(configurator: Any) -> ModelShape:
    """Shape of the model on this rank."""
    config = configurator.model_config
    tp_size = get_parallel().attn_tp_size
    return ModelShape(
        num_layers=configurator.layer_info.num_effective_layers,
        num_kv_heads=config.get_num_kv_heads(tp_size),
        num_qo_heads=config.num_attention_heads // tp_size,
        head_dim=config.head_dim,
        itemsize=configurator.kv_cache_dtype.itemsize,
        query_itemsize=config.dtype.itemsize,
        mlp_width=mlp_width(config, tp_size),
    )


@contextmanager
def e4m3_as_bytes(configurator: Any) -> Iterator[None]:
    """Hide an e4m3 cache on the CPU from SGLang's configurator.

    Its own CPU kernels need Intel AMX for one, and it refuses to start without. Ours do
    not. All that it computes from the dtype is the size of an element.
    """
    hidden = (
        options_of(configurator) is not None
        and configurator.device == "cpu"
        and configurator.kv_cache_dtype == E4M3
    )
    if hidden:
        configurator.kv_cache_dtype = AS_BYTES
    try:
        yield
    finally:
        if hidden:
            configurator.kv_cache_dtype = E4M3


@points_to(Section.START_UP)
def build_arena(configurator: Any, max_total_num_tokens: int) -> ArenaKVPool:
    """Build the arena for a pool of this many tokens."""
    config, dtype = configurator.model_config, configurator.kv_cache_dtype
    if dtype == AS_BYTES:
        dtype = E4M3
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, E4M3):
        raise UnsupportedModeError(
            "--kv-compress stores KV as bfloat16, float16, fp8_e4m3 or (CPU) float32, "
            f"got {dtype}; leave --kv-cache-dtype at auto or say fp8_e4m3"
        )
    if config.head_dim != config.v_head_dim:
        raise UnsupportedModeError(
            "--kv-compress needs equal key and value head sizes, got "
            f"{config.head_dim} and {config.v_head_dim}"
        )
    shape = model_shape(configurator)
    return ArenaKVPool(
        max_total_num_tokens,
        dtype=dtype,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        layer_num=shape.num_layers,
        device=configurator.device,
        start_layer=configurator.layer_info.start_layer,
        end_layer=configurator.layer_info.end_layer,
    )


def needs_torch_allocator(pool: Any) -> bool:
    """Whether the pool is an arena on the CPU."""
    return isinstance(pool, ArenaKVPool) and not pool.on_gpu


def build_torch_allocator(pool: ArenaKVPool, size: int) -> Any:
    """Build the paged allocator in torch over `size` tokens."""
    from sglang_kvc.memory.cpu_allocator import TorchPagedAllocator

    return TorchPagedAllocator(
        size,
        page_size=PAGE_SIZE,
        dtype=pool.dtype,
        device=pool.device,
        kvcache=pool,
        need_sort=False,
    )


@points_to(Section.MEMORY)
def subtract_metadata(configurator: Any, available: int) -> int:
    """Bytes left for K and V once our metadata has its share.

    Raises
    ------
    ConfigError
        If the fixed part alone does not fit.
    """
    options = options_of(configurator)
    if options is None:
        return available
    shape = model_shape(configurator)
    schedule = get_schedule()
    # More than there will be, so more slots and workspace: never too little is charged.
    tokens = available // shape.kv_bytes_per_token
    if schedule.max_total_tokens is not None:
        tokens = min(tokens, schedule.max_total_tokens)
    requests = schedule.max_running_requests or default_slots(tokens)
    chunk_size = chunk_tokens(schedule)
    sizes = metadata_bytes(
        shape,
        options,
        max_running_requests=requests,
        context_len=configurator.model_config.context_len,
        pool_tokens=tokens,
        chunk_size=chunk_size,
        prefill_tokens=chunk_size,
    )
    left = sizes.scale_kv_bytes(available, shape)
    if left <= 0:
        raise ConfigError(
            f"KV-Compress needs {sizes.describe_fixed()} for {requests} running "
            f"requests, but only {available / (1 << 30):.2f} GiB are free for the KV "
            "cache; lower --max-running-requests or --kv-compress-window, or raise "
            "--mem-fraction-static"
        )
    return left


def limit_slots(configurator: Any, slots: int, token_capacity: int) -> int:
    """Request slots of a pool of `token_capacity`: `slots`, or fewer by default."""
    given = get_schedule().max_running_requests
    if options_of(configurator) is None or given is not None:
        return slots
    return min(slots, default_slots(token_capacity))


def arena_is_active() -> bool:
    """Whether this process serves from an arena."""
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    return isinstance(get_token_to_kv_pool(), ArenaKVPool)
