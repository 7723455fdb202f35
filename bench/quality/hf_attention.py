"""Attention of new tokens over caches of which each row sees a part.

With a mask, transformers' own ``sdpa`` copies keys and values for every query head, in
every layer and step. Here the query heads of a group are queries of one KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAME = "bench_quality_grouped"
"""As a configuration's ``_attn_implementation``; see `register`."""


def register() -> None:
    """Make the attention known to transformers, which makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attention as transformers calls it.

    Parameters
    ----------
    query : [rows, query heads, tokens, head_dim]
    key, value : [rows, kv_heads, n, head_dim]
    attention_mask : [rows or 1, 1 or kv_heads, tokens, n] bool or None
        What may be seen; None: everything.

    Returns
    -------
    [rows, tokens, query heads, head_dim], None
    """
    from torch.nn.functional import scaled_dot_product_attention

    del module
    rows, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, kv_heads, -1, size)
    if tokens > 1 and attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, heads // kv_heads, 1)
    out = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(rows, heads, tokens, size).transpose(1, 2), None


def visible(
    lengths: Sequence[int],
    steps: int,
    hidden: Sequence[tuple[Any, Any] | None],
    kv_heads: int,
    device: Any,
) -> Any:
    """Mask of what rows may see of a layer, padded on the left to the longest of them.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row.
    steps : int
        Tokens that will follow, which all may be seen.
    hidden : sequence of None or (heads, places)
        Tokens of each row that no query may see.

    Returns
    -------
    [rows, 1 or kv_heads, 1, longest + steps] bool, or None if that is everything.
    """
    import torch

    longest = max(lengths)
    some = any(one is not None for one in hidden)
    if min(lengths) == longest and not some:
        return None
    padding = torch.tensor([longest - n for n in lengths], device=device)
    columns = torch.arange(longest + steps, device=device)
    seen = (columns >= padding[:, None])[:, None, None]
    if not some:
        return seen
    seen = seen.repeat(1, kv_heads, 1, 1)
    for row, one in enumerate(hidden):
        if one is not None:
            heads, places = one
            seen[row, heads, 0, places + longest - lengths[row]] = False
    return seen
