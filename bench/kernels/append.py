"""Time the storing of new tokens: decode batches and a prefill chunk, all layers."""

from __future__ import annotations

import torch

from bench.kernels.batches import Shape
from bench.kernels.checks import WINDOW, check_append, qkv
from bench.kernels.timing import Clock, Report, Timing
from sglang_kvc.kernels.append import append_kv
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.kernels.query_ring import QueryRing
from sglang_kvc.kernels.testing import random_ring

SECTION = "append"
DECODE_BATCHES = (1, 64, 256)
PREFILL_TOKENS = 8192


def bench_append(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool
) -> None:
    """Check the kernel, then time the batches."""
    device = str(arena.k.device)
    checked = False
    with report.guard("append_kv check"):
        check_append(device, shape)
        checked = True
    if not checked:
        return
    slots = max(DECODE_BATCHES) + 1
    ring = random_ring(slots, WINDOW, shape.qo_heads, arena)
    for count in DECODE_BATCHES[-1:] if quick else DECODE_BATCHES:
        with report.guard(f"append_kv decode {count}"):
            targets = decode_targets(count, arena.k.shape[0], device)
            _bench_tokens(f"decode {count}", arena, shape, ring, targets, clock, report)
    name = f"prefill {PREFILL_TOKENS}"
    with report.guard(f"append_kv {name}"):
        targets = prefill_targets(PREFILL_TOKENS, arena.k.shape[0], device)
        _bench_tokens(name, arena, shape, ring, targets, clock, report)


def decode_targets(
    count: int, pages: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_cache_loc and ring_index: one token in a page and a ring of its own."""
    page = torch.randperm(pages - 1, device=device)[:count] + 1
    tokens = page * PAGE_SIZE + torch.randint(PAGE_SIZE, (count,), device=device)
    return tokens, (torch.arange(count, device=device) + 1) * WINDOW + 5


def prefill_targets(
    count: int, pages: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_cache_loc and ring_index of a prompt: its last window is recorded."""
    page = torch.randperm(pages - 1, device=device)[: count // PAGE_SIZE] + 1
    tokens = page[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
    index = torch.full((count,), -1, device=device)
    index[-WINDOW:] = torch.arange(WINDOW, device=device) + WINDOW
    return tokens.flatten(), index


def _bench_tokens(
    name: str,
    arena: Arena,
    shape: Shape,
    ring: QueryRing,
    targets: tuple[torch.Tensor, torch.Tensor],
    clock: Clock,
    report: Report,
) -> None:
    """Time one batch, per layer."""
    tokens, index = targets
    count = len(tokens)
    k, v, q = qkv(count, shape, str(arena.k.device))

    def all_layers() -> None:
        for layer in range(shape.layers):
            append_kv(arena, k, v, q, tokens, ring, index, layer=layer)

    us, how = clock.gpu(all_layers)
    timing = Timing(us / shape.layers, how)
    host = round(clock.host(all_layers) / shape.layers, 1)
    row = shape.head_dim * k.element_size()
    # K and V are read and written, a score is zeroed; queries only where recorded.
    nbytes = count * shape.kv_heads * (4 * row + 4)
    # A query is stored in a byte an element.
    nbytes += int((index >= 0).sum()) * shape.qo_heads * (row + shape.head_dim)
    report.add(SECTION, "append_kv", name, timing, nbytes, host_us=host)
