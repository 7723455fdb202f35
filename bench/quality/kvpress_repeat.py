"""A score as KVzip's (arXiv 2505.23416): what is read again when a context is repeated.

The context is fed a second time behind itself, with the whole cache. A KV is worth the
largest attention weight that any repeated token, in any head of its group, gives it.
It needs no question, so it is a reference for questions that come later. Unlike KVzip
it is repeated at once and without an instruction, and every head keeps as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

QUERIES = 256
"""Repeated tokens whose weights are computed at a time."""


@dataclass
class Repetition:
    """Looks like a press of kvpress, for `kvpress_prefill`.

    Attributes
    ----------
    compression_ratio : float
        Fraction of KVs to discard.
    reads_again : bool
        Its ``compress`` is for the second reading.
    """

    compression_ratio: float
    reads_again: bool = True

    def post_init_from_model(self, model: Any) -> None:
        """Do nothing."""

    def compress(
        self,
        module: Any,
        hidden: Any,
        keys: Any,
        values: Any,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any]:
        """Choose from a layer's cache, whose second half are the repeated tokens.

        Parameters
        ----------
        hidden : [rows, n, hidden_size]
            Of the repeated tokens.
        keys, values : [rows, kv_heads, 2 * n, head_dim]

        Returns
        -------
        keys, values : [rows, kv_heads, kept, head_dim], in their order.
        """
        del attentions
        count = hidden.shape[1]
        queries = rotated_queries(module, hidden, kwargs["position_embeddings"])
        scores = repeated_weights(queries, keys, count)
        kept = max(1, round(count * (1 - self.compression_ratio)))
        places = scores.topk(kept, -1).indices.sort(-1).values
        places = places[..., None].expand(-1, -1, -1, keys.shape[-1])
        first = slice(None), slice(None), slice(0, count)
        return keys[first].gather(2, places), values[first].gather(2, places)


def rotated_queries(module: Any, hidden: Any, rotation: tuple[Any, Any]) -> Any:
    """Queries of an attention layer, [rows, heads, n, head_dim]."""
    from transformers.models.llama.modeling_llama import rotate_half

    rows, count, _ = hidden.shape
    queries = module.q_proj(hidden).view(rows, count, -1, module.head_dim)
    if hasattr(module, "q_norm"):
        queries = module.q_norm(queries)
    queries = queries.transpose(1, 2)
    cos, sin = (part.unsqueeze(1) for part in rotation)
    return queries * cos + rotate_half(queries) * sin


def repeated_weights(queries: Any, keys: Any, count: int) -> Any:
    """Largest weight that each of the first `count` keys gets, [rows, kv_heads, count].

    Parameters
    ----------
    queries : [rows, heads, n, head_dim]
        Of the last tokens; each sees all keys up to its own.
    keys : [rows, kv_heads, count + n, head_dim]
    count : int
    """
    import torch

    rows, kv_heads, total, size = keys.shape
    last = queries.shape[2]
    grouped = queries.view(rows, kv_heads, -1, last, size)
    places = torch.arange(total, device=keys.device)
    best = keys.new_zeros(rows, kv_heads, count, dtype=torch.float32)
    for start in range(0, last, QUERIES):
        some = grouped[:, :, :, start : start + QUERIES]
        logits = (some @ keys[:, :, None].transpose(-1, -2)).float() / math.sqrt(size)
        own = total - last + start + torch.arange(some.shape[3], device=keys.device)
        logits.masked_fill_(places > own[:, None], float("-inf"))
        weights = logits.softmax(-1)[..., :count]
        best = torch.maximum(best, weights.amax((2, 3)))
    return best
