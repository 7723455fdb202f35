"""Time a layer of a decode step: it stores the new token and attends to it.

Ours in one launch, which also records the query; FA3, if given, behind `append_kv`,
which records nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.kernels.checks import WINDOW
from bench.kernels.decode_case import TOLERANCE, Decode
from bench.kernels.timing import Clock, Timing, require_close
from sglang_kvc.kernels import decode_attention as decode
from sglang_kvc.kernels.append import append_kv
from sglang_kvc.kernels.testing import random_ring


def bench_steps(
    case: Decode,
    workspace: Any,
    folded: Callable[[int], torch.Tensor] | None,
    clock: Clock,
) -> Iterator[tuple[str, Timing]]:
    """Yield names and times of a call; overwrites the newest token of every request."""
    shape, batch = case.shape, case.batch
    new = new_tokens(case)
    tables, slots, lens = batch.tables, batch.slots, batch.seq_lens
    how = {"num_kv_heads": shape.kv_heads, "query_ring": new.query_ring}
    decode.plan_decode(tables, slots, lens, workspace, **how)

    def ours(layer: int) -> torch.Tensor:
        return decode.decode_attention(
            **case.arguments(layer),
            out=case.out,
            workspace=workspace,
            new_tokens=new,
        )

    for layer, like in case.want.items():
        got = ours(layer)
        want = decode.decode_attention_ref(
            **case.arguments(layer), out=torch.empty_like(like)
        )
        require_close(f"step, layer {layer}", got.view_as(want), want, TOLERANCE)
    yield "decode_step", case.time(clock, ours)
    if folded is None:
        return
    nothing = torch.full_like(new.out_cache_loc, -1)

    def theirs(layer: int) -> torch.Tensor:
        loc, ring = new.out_cache_loc, new.query_ring
        append_kv(case.arena, new.k, new.v, case.q, loc, ring, nothing, layer=layer)
        return folded(layer)

    yield "fa3_folded_step", case.time(clock, theirs)


def new_tokens(case: Decode) -> decode.NewTokens:
    """Made-up new tokens at the last position, and rings for their queries."""
    shape, batch, like = case.shape, case.batch, case.q
    k, v = (torch.randn_like(like[:, : shape.kv_heads]) for _ in range(2))
    slots = int(batch.slots.max()) + 1
    query_ring = random_ring(slots, WINDOW, shape.qo_heads, case.arena)
    rows = batch.tables.req_to_token[batch.slots.long()]
    last = rows.gather(1, batch.seq_lens.long()[:, None] - 1)[:, 0]
    return decode.NewTokens(k, v, last.long(), query_ring)
