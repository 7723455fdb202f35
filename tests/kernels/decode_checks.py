"""What the tests of decode attention share: batches, and one launch checked whole."""

import pytest
import torch

from sglang_kvc.kernels import decode_schedule
from sglang_kvc.kernels.append import append_kv_ref
from sglang_kvc.kernels.decode_attention import (
    DecodeConfig,
    DecodeWorkspace,
    NewTokens,
    decode_attention_ref,
    decode_attention_triton,
    make_decode_workspace,
    plan_decode_triton,
)
from sglang_kvc.kernels.testing import Case
from tests.kernels import oracles


@pytest.fixture
def one_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `programs_per_sm` the number of programs, on every machine."""
    monkeypatch.setattr(decode_schedule, "_num_sms", lambda device: 1)


def make_workspace(
    case: Case, batch: int, config: DecodeConfig | None = None
) -> DecodeWorkspace:
    """Allocate the workspace of `batch` requests in the arena of `case`."""
    arena = case.arena
    return make_decode_workspace(
        batch,
        arena.num_kv_heads * case.group,
        arena.head_dim,
        arena.k.device,
        num_kv_heads=arena.num_kv_heads,
        num_layers=arena.num_layers,
        config=config,
    )


def make_batch(
    case: Case, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, slots, seq_lens of one decode step; `padding` rows of slot 0 at the end."""
    device = case.arena.k.device
    slots = torch.tensor([*case.slots, *[0] * padding], device=device)
    seq_lens = torch.tensor([*case.seq_lens, *[1] * padding], device=device)
    heads = case.group * case.arena.num_kv_heads
    shape = (len(slots), heads, case.arena.head_dim)
    q = torch.randn(shape, dtype=case.query_dtype, device=device)
    return q, slots, seq_lens.int()


def make_new_tokens(case: Case, slots: torch.Tensor) -> NewTokens:
    """K and V, strided, for the newest positions of `case`, whose cells become NaN."""
    arena, tables = case.arena, case.tables
    last = torch.zeros_like(slots)
    last[: len(case.slots)] = torch.tensor(case.seq_lens, device=slots.device) - 1
    cells = tables.req_to_token[slots, last].long()
    size = (len(slots), 2 * arena.num_kv_heads + 3, arena.head_dim)
    fused = torch.randn(size, device=slots.device).to(arena.k.dtype)
    k, v = fused[:, 1:-2].chunk(2, dim=1)
    live = cells[: len(case.slots)]
    for part, poison in zip(arena[:3], (torch.nan, torch.nan, -1.0), strict=True):
        part[live // 16, :, :, live % 16] = poison
    return NewTokens(k, v, cells, case.query_ring)


def check(
    case: Case, layer: int = 0, padding: int = 0, config: DecodeConfig | None = None
) -> None:
    """Run the kernel in a poisoned, too large workspace; compare with the oracle.

    Also: a second call gives the same, and no count of arrivals stays behind.
    """
    arena, live = case.arena, len(case.slots)
    q, slots, seq_lens = make_batch(case, padding)
    scale = arena.head_dim**-0.5
    workspace = make_workspace(case, len(slots) + 1, config)
    batch, heads = (case.tables, slots, seq_lens), arena.num_kv_heads
    plan_decode_triton(*batch, workspace, num_kv_heads=heads, config=config)
    args = (arena, case.tables, q, slots, seq_lens)
    how = {"layer": layer, "sm_scale": scale}
    run = {**how, "workspace": workspace, "config": config}
    out = decode_attention_triton(*args, **run)
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    working = decode_attention_ref(*args, **how, upcast=False)
    truth = oracles.decode(case, q[:live], layer, scale)
    oracles.assert_arith(out[:live], working[:live], truth)
    again = decode_attention_triton(*args, **run)
    assert torch.equal(out, again)
    assert not workspace.arrivals.any()


def check_same_rings(ours: Case, theirs: Case) -> None:
    """All bytes are equal, those between rings included."""
    for mine, other in zip(ours.query_ring[:3], theirs.query_ring[:3], strict=True):
        assert torch.equal(mine, other)


def check_new_tokens(
    case: Case, layer: int = 0, padding: int = 0, config: DecodeConfig | None = None
) -> None:
    """One launch writes bit for bit what `append_kv_ref` does, and attends to it."""
    q, slots, seq_lens = make_batch(case, padding)
    live, window = len(case.slots), case.query_ring.window
    new = make_new_tokens(case, slots)
    mine = case._replace(
        arena=case.arena.clone(),
        query_ring=case.query_ring.clone(),
    )
    ring_index = slots * window + (seq_lens.long() - 1) % window
    append_kv_ref(case.arena, *new[:2], q, *new[2:], ring_index, layer=layer)

    scale = case.arena.head_dim**-0.5
    args = (case.tables, q, slots, seq_lens)
    how = {"layer": layer, "sm_scale": scale}
    run = {**how, "config": config}
    new = new._replace(query_ring=mine.query_ring)
    out = decode_attention_triton(mine.arena, *args, **run, new_tokens=new)
    working = decode_attention_ref(case.arena, *args, **how, upcast=False)
    truth = oracles.decode(case, q[:live], layer, scale)
    oracles.assert_arith(out[:live], working[:live], truth)
    # All but the padding page and the padding slot, where padding rows meet.
    for ours, theirs in zip(mine.arena[:3], case.arena[:3], strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], atol=0, rtol=0, equal_nan=True)
    check_same_rings(mine, case)
    again = decode_attention_triton(mine.arena, *args, **run, new_tokens=new)
    assert torch.equal(out[:live], again[:live])
