"""What kvpress keeps if it scores as we do; runs where kvpress is installed.

    PYTHONPATH=KVPRESS_DIR python -m bench.quality.scouts.snapkv_press --model DIR \\
        --prompts prompts.json --out kept.npz --window 32 --pool 7 --budget 128

`SnapKVPress` of kvpress 0.5.5 and our uniform ``l2`` look at the same numbers, the
causal attention of the last w queries over all keys. From there stock SnapKV

* averages over queries and over the heads of a group, where we sum squares,
* pools by the average of 5 keys, where we take the maximum of ``pool``,
* pools only the keys before the window, padded with zeros at its edge, where we pool
  the whole prompt: a key just before the window sees scores inside of it,
* keeps the window's keys by giving them the best score of all; we keep ``protected``
  tokens (here: as many).

`PooledSquares` does all of these as we do. What is left to kvpress are its hooks, its
queries with their rotation, its number of KVs to keep and its top-k for each head.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRESSES = ("ours", "snapkv")


def window_attention(queries: Any, keys: Any) -> Any:
    """Causal attention of the last queries of a prompt, [heads, w, keys] fp32.

    Parameters
    ----------
    queries : [heads, w, head_dim] with rotation.
    keys : [kv_heads, keys, head_dim] with rotation.
    """
    import torch

    rows, count = queries.shape[1], keys.shape[1]
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    logits = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[2])
    hidden = torch.ones(rows, count, dtype=torch.bool, device=logits.device)
    hidden = hidden.triu(count - rows + 1)
    return logits.float().masked_fill(hidden, float("-inf")).softmax(-1)


def pooled_squares(attention: Any, kv_heads: int, pool: int, protected: int) -> Any:
    """Our score of every key, [kv_heads, keys] fp32.

    Squared probabilities, summed over queries and over the heads of a group, then the
    maximum of `pool` neighbours. The last `protected` keys stay: they score infinity.
    """
    import torch.nn.functional as F

    mass = attention.square().sum(1)
    mass = mass.view(kv_heads, -1, mass.shape[-1]).sum(1)
    scores = F.max_pool1d(mass[None], pool, stride=1, padding=pool // 2)[0]
    scores[:, -protected:] = float("inf")
    return scores


def recording_press(name: str, window: int, pool: int, discard: float) -> Any:
    """A press that notes what it scores and keeps, and leaves the cache alone."""
    from kvpress import SnapKVPress  # type: ignore[import-not-found]
    from kvpress.utils import (  # type: ignore[import-not-found]
        get_prerope_query_states,
    )
    from transformers.models.llama.modeling_llama import rotate_half

    class Recording(SnapKVPress):
        """Stock SnapKV; `kept` and `scores` have an entry [kv_heads, n] a layer."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.kept: list[Any] = []
            self.scores: list[Any] = []
            self.apart = 0.0

        def compress(
            self, module: Any, hidden: Any, keys: Any, values: Any, *rest: Any
        ) -> tuple[Any, Any]:
            """Kvpress' own choice, told by positions in the place of values."""
            import torch

            places = torch.arange(keys.shape[2], dtype=values.dtype)
            places = places.to(values.device)[:, None].expand_as(values)
            _, kept = super().compress(module, hidden, keys, places, *rest)
            self.kept.append(kept[0, :, :, 0].long().sort(-1).values)
            return keys, values

        def score(self, *inputs: Any) -> Any:
            scores = self.own_score(*inputs)
            self.scores.append(scores[0].float())
            return scores

        def own_score(self, *inputs: Any) -> Any:
            return super().score(*inputs)

    class PooledSquares(Recording):
        """The same attention with our metric and pooling."""

        def own_score(
            self,
            module: Any,
            hidden: Any,
            keys: Any,
            values: Any,
            attentions: Any,
            kwargs: dict[str, Any],
        ) -> Any:
            del values, attentions
            rotation = kwargs["position_embeddings"]
            cos, sin = (part[:, -window:].unsqueeze(1) for part in rotation)
            states = get_prerope_query_states(module, hidden[:, -window:])
            queries = states * cos + rotate_half(states) * sin
            attention = window_attention(queries[0], keys[0])
            stock = self.compute_window_attention(
                module, hidden, keys, window, rotation
            )[0]
            apart = float((attention[..., :-window] - stock).abs().max())
            self.apart = max(self.apart, apart)
            return pooled_squares(attention, keys.shape[1], pool, window)[None]

    kind = PooledSquares if name == "ours" else Recording
    return kind(compression_ratio=discard, window_size=window)


def choose(
    model: Any, name: str, ids: list[int], window: int, pool: int, budget: int
) -> tuple[Any, Any, float]:
    """What a press keeps of a prompt.

    Returns
    -------
    kept : [layers * kv_heads, budget] int64
    scores : [layers * kv_heads, tokens] fp32
    apart : largest difference from the attention that kvpress computes for itself.
    """
    import torch

    # In the middle between two numbers of KVs, so that rounding cannot matter.
    discard = 1 - (budget + 0.5) / len(ids)
    press = recording_press(name, window, pool, discard)
    with torch.inference_mode(), press(model):
        model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
    kept, scores = torch.cat(press.kept).cpu(), torch.cat(press.scores).cpu()
    if kept.shape[1] != budget:
        raise RuntimeError(f"kvpress kept {kept.shape[1]} of a head, not {budget}")
    return kept, scores, press.apart


def main(words: Sequence[str] | None = None) -> None:
    """Write what each press keeps of each prompt."""
    from importlib.metadata import version

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True)
    add("--prompts", type=Path, required=True, help="JSON: a list of token lists")
    add("--out", type=Path, required=True)
    for name in ("window", "pool", "budget"):
        add(f"--{name}", type=int, required=True)
    args = parser.parse_args(words)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    found: dict[str, list[Any]] = {}
    for ids in json.loads(args.prompts.read_text()):
        for name in PRESSES:
            chosen = choose(model, name, ids, args.window, args.pool, args.budget)
            for part, value in zip(("kept", "scores", "apart"), chosen, strict=True):
                found.setdefault(f"{name}_{part}", []).append(value)
    arrays: dict[str, Any] = {key: np.stack(found[key]) for key in found}
    versions = [f"{name} {version(name)}" for name in ("kvpress", "transformers")]
    np.savez(args.out, versions=np.array(versions), **arrays)


if __name__ == "__main__":
    main()
