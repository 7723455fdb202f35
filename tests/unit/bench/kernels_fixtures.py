"""What tests of the kernel bench share: a small shape, a clock, an FA3 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.kernels.batches import Shape
from bench.kernels.timing import Clock, Timing

SMALL = Shape(layers=2, kv_heads=2, qo_heads=4, head_dim=16)
PAGES = 200


class OnceClock(Clock):
    """Runs the work once on the CPU; every time is one microsecond."""

    def __init__(self) -> None:
        self.runs = 0

    def gpu(
        self,
        work: Callable[[], object],
        before: Callable[[], object] | None = None,
        replays: int | None = None,
    ) -> Timing:
        (before or list)()
        work()
        self.runs += 1
        return Timing(1.0, "graph")

    eager = gpu

    def host(
        self,
        work: Callable[[], object],
        before: Callable[[], object] | None = None,
    ) -> float:
        return self.gpu(work, before).us


def fake_fa3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: torch.Tensor
) -> torch.Tensor:
    """Attention over paged keys; causal with several queries a request."""
    out = torch.empty_like(q)
    lens = kwargs["cache_seqlens"].tolist()
    single = "max_seqlen_q" in kwargs
    starts = kwargs["cu_seqlens_q"].tolist() if single else []
    for b, (table, n) in enumerate(zip(kwargs["page_table"], lens, strict=True)):
        rows = slice(starts[b], starts[b + 1]) if single else b
        query = q[rows].transpose(0, 1).float()
        keys, values = (
            cells[table.long()].flatten(0, 1)[:n].transpose(0, 1).float()
            for cells in (k, v)
        )
        mask = torch.ones(query.shape[1], n).tril(n - query.shape[1]).bool()
        result = torch.nn.functional.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=kwargs["softmax_scale"],
            enable_gqa=True,
        )[0].transpose(0, 1)
        out[rows] = result.to(q.dtype)
    return out
