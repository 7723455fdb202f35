"""Decode attention over head blocks: o = softmax(sm_scale q K^T) V, head by head.

One launch serves compressed and uncompressed requests. The KVs of (request, KV head)
are its packed entries, then the tail entries of positions fold_len .. seq_len - 1
(`layout`); attention does not depend on their order, so no position is needed.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``q``                   [B, Hq, D]             query of the newest token
``slots``               [B] int32 or int64     row of each request in the tables
``seq_lens``            [B] int32 or int64     logical tokens, the newest one included
``partial_out``         [rows, splits, D]      fp32, softmax output of one split
``partial_lse``         [rows, splits]         fp32, log2 of its sum of exponentials
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.decode_kernels import decode_merge_kernel, decode_split_kernel
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables

LOG2E = 1.4426950408889634


class DecodeWorkspace(NamedTuple):
    """Flat fp32 scratch of the split kernel, reused by every layer and step."""

    partial_out: torch.Tensor
    partial_lse: torch.Tensor


def decode_attention_ref(
    q: torch.Tensor,
    arena: Arena,
    layer: int,
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    upcast: bool = True,
) -> torch.Tensor:
    """Plain torch form of `decode_attention`; `upcast` = False stays in q's dtype."""
    out = torch.empty_like(q) if out is None else out
    dtype = torch.float32 if upcast else q.dtype
    heads, head_dim = arena.num_kv_heads, arena.head_dim
    keys, values = arena.k.view(-1, head_dim), arena.v.view(-1, head_dim)
    folds = tables.fold_lens[slots.long()].tolist()
    requests = zip(slots.tolist(), seq_lens.tolist(), folds, strict=True)
    for b, (slot, seq_len, fold_len) in enumerate(requests):
        rows, valid, _, _ = head_rows_ref(
            tables,
            slot,
            fold_len,
            seq_len,
            arena.heads_per_page,
            layer * heads,
            heads,
        )
        k, v = keys[rows].to(dtype), values[rows].to(dtype)
        query = q[b].view(heads, -1, head_dim).to(dtype)
        s = (query @ k.transpose(1, 2)) * sm_scale
        if not valid.all():
            # Row 0 may hold anything, also NaN, which 0 * NaN would keep.
            v.masked_fill_(~valid[..., None], 0)
            s.masked_fill_(~valid[:, None], float("-inf"))
        out[b] = (s.softmax(-1) @ v).view(-1, head_dim).to(out.dtype)
    return out


# Tokens a tile, and the fewest a split takes once the grid fills the GPU.
_TILE = 64
_MAX_SPLITS = 64
_TARGET_PROGRAMS = 4096


def _split_plan(rows: int, max_len: int) -> tuple[int, int]:
    """(splits, smallest share) for `rows` = B * H heads of at most `max_len` entries.

    Depends on shapes alone, so a CUDA graph replays what it captured. Many rows fill
    the GPU by themselves; they still get four splits, because lengths are skewed. Few
    rows are cut finer.
    """
    min_share = _TILE if rows <= 64 else 2 * _TILE if rows <= 256 else 4 * _TILE
    splits = triton.next_power_of_2(-(-_TARGET_PROGRAMS // rows))
    longest = triton.next_power_of_2(-(-max_len // min_share))
    return min(max(splits, 4), _MAX_SPLITS, longest), min_share


def make_decode_workspace(
    max_batch: int,
    num_qo_heads: int,
    head_dim: int,
    device: torch.device | str,
    num_kv_heads: int = 1,
) -> DecodeWorkspace:
    """Allocate the partial results for batches of up to `max_batch`.

    Parameters
    ----------
    max_batch : B of the largest call.
    num_qo_heads, num_kv_heads : Hq and H on this rank. Without `num_kv_heads` the
        buffers are larger than they need be.
    head_dim, device : as in the arena.

    Returns
    -------
    DecodeWorkspace : at Hq = 32, H = 8, D = 128 and B = 256, 17 MB.
    """
    rows = max(
        batch * _split_plan(batch * num_kv_heads, 2**31)[0]
        for batch in range(1, max_batch + 1)
    )
    rows *= num_qo_heads
    return DecodeWorkspace(
        torch.empty(rows * head_dim, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def decode_attention_triton(
    q: torch.Tensor,
    arena: Arena,
    layer: int,
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> torch.Tensor:
    """Triton form of `decode_attention`: a split kernel, then a merge kernel."""
    batch, num_qo_heads, head_dim = q.shape
    out = torch.empty_like(q) if out is None else out
    heads = arena.num_kv_heads
    group = num_qo_heads // heads
    if workspace is None:
        workspace = make_decode_workspace(
            batch, num_qo_heads, head_dim, q.device, heads
        )
    splits, min_share = _split_plan(batch * heads, tables.req_to_token.shape[1])
    needed = batch * num_qo_heads * splits
    if workspace.partial_lse.numel() < needed:
        raise ValueError(
            f"workspace holds {workspace.partial_lse.numel()} partial rows, a batch of "
            f"{batch} needs {needed}: make it with max_batch >= {batch}"
        )
    common = {
        "LH": arena.heads_per_page,
        "H": heads,
        "G": group,
        "D": head_dim,
        "S": PAGE_SIZE,
        "DP": triton.next_power_of_2(head_dim),
        "TILE": _TILE,
        "NUM_SPLITS": splits,
        "MIN_SHARE": min_share,
        "num_warps": 4,
    }
    decode_split_kernel[(batch, heads, splits)](
        q,
        arena.k,
        arena.v,
        tables.req_to_token,
        tables.fold_lens,
        tables.block_offsets,
        tables.packed_pages,
        slots,
        seq_lens,
        workspace.partial_out,
        workspace.partial_lse,
        q.stride(0),
        q.stride(1),
        tables.req_to_token.stride(0),
        tables.packed_pages.stride(0),
        layer,
        sm_scale * LOG2E,
        GP=max(16, triton.next_power_of_2(group)),
        num_stages=3,
        **common,
    )
    decode_merge_kernel[(batch, num_qo_heads)](
        workspace.partial_out,
        workspace.partial_lse,
        out,
        tables.fold_lens,
        tables.block_offsets,
        slots,
        seq_lens,
        out.stride(0),
        out.stride(1),
        layer,
        **common,
    )
    return out


def decode_attention(
    q: torch.Tensor,
    arena: Arena,
    layer: int,
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> torch.Tensor:
    """Attend from one new token of each request over all its resident KVs.

    Parameters
    ----------
    q : [B, Hq, D], last dimension contiguous; the arena's dtype.
    arena, tables : only read.
    layer : which layer of the arena.
    slots : [B] int32 or int64. Padding rows have slot 0 and sequence length 1.
    seq_lens : [B] int32 or int64, logical tokens, the current one included.
    sm_scale : factor on the logits, usually D ** -0.5.
    out : [B, Hq, D], last dimension contiguous; allocated like q by default.
    workspace : from `make_decode_workspace`, for at least this B; allocated by default.

    Returns
    -------
    torch.Tensor : `out`, in q's dtype.
    """
    op = decode_attention_triton if use_triton(q) else decode_attention_ref
    return op(q, arena, layer, tables, slots, seq_lens, sm_scale, out, workspace)
