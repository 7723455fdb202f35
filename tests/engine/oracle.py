"""A slow, independent KV-Compress: Hugging Face attention and a literal Algorithm 1.

No pages, no arena, no ring, no kernels of ours: every KV stays in the Hugging Face
cache, evicted ones are masked, scores are kept per logical position, and selection is
a Python loop over heads and blocks. Paper: arXiv 2410.00161, Algorithm 1, eq. 6-10, 20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

BLOCK = 16


@dataclass
class OraclePass:
    """Result of one pass.

    kept : positions kept below the fold, per (layer, head) in layer-major order.
    evicted_blocks : e_h per head.
    scores : score of every logical position, [heads, length].
    prices : price_h[k] per head.
    competing : positions that competed, per head.
    threshold : price of the last block evicted.
    """

    kept: list[list[int]]
    evicted_blocks: list[int]
    scores: torch.Tensor
    prices: list[list[float]]
    competing: list[list[int]]
    threshold: float


class Oracle:
    """One request, decoded token by token with masked attention.

    Parameters
    ----------
    model_path : Hugging Face folder.
    window, protected, sinks, pool : as the server's options.
    """

    def __init__(
        self, model_path: str, window: int, protected: int, sinks: int, pool: int
    ) -> None:
        AttentionInterface.register("kv_oracle", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="kv_oracle"
        ).eval()
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.group = config.num_attention_heads // self.heads
        self.window, self.protected = window, protected
        self.sinks, self.pool = sinks, pool

    def start(self, ids: list[int]) -> None:
        """Run a prompt, or its first chunk, with full attention."""
        self.length = len(ids)
        self.visible = torch.ones(self.layers, self.heads, 0, dtype=torch.bool)
        self.scores = torch.zeros(self.layers * self.heads, 0)
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.fold, self.observed, self.cache = 0, 0, None
        self._forward(ids)

    def extend(self, ids: list[int]) -> None:
        """Run more tokens, causally, over everything that is visible."""
        self.length += len(ids)
        self._forward(ids)

    def _forward(self, ids: list[int]) -> None:
        grow = self.length - self.visible.shape[2]
        self.visible = torch.nn.functional.pad(self.visible, (0, grow), value=True)
        self.scores = torch.nn.functional.pad(self.scores, (0, grow))
        with torch.no_grad():
            out = self.model(
                torch.tensor([ids]), past_key_values=self.cache, use_cache=True
            )
        self.cache = out.past_key_values

    def _attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        del attention_mask, kwargs
        layer, new = module.layer_idx, query.shape[2]
        n = key.shape[2]
        key = key.repeat_interleave(self.group, 1)
        value = value.repeat_interleave(self.group, 1)
        logits = (query @ key.transpose(2, 3))[0] * scaling
        q_pos = torch.arange(n - new, n)
        causal = torch.arange(n)[None] <= q_pos[:, None]
        mask = self.visible[layer].repeat_interleave(self.group, 0)[:, None] & causal
        probs = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        for row in range(max(new - self.window, 0), new):
            squared = probs[:, row].view(self.heads, self.group, n).square().sum(1)
            self.seen.setdefault(n - new + row, []).append(squared)
        out = (probs @ value[0])[None].transpose(1, 2)
        return out, None

    def run_pass(self, budget: int, pool_tail: bool = False) -> OraclePass:
        """Evict down to `budget` tokens per head on average.

        `pool_tail`: the tokens since the last pass are prompt, so their new scores
        are pooled among themselves.
        """
        pooled = pool_tail or self.fold == 0
        total = self.layers * self.heads
        start = max(self.observed, self.length - self.window, 0)
        added = torch.zeros(total, self.length)
        for pos in range(start, self.length):
            rows = torch.cat(self.seen[pos])  # layers appended in order
            added[:, : rows.shape[1]] += rows
        self.scores += added
        if pooled and self.pool > 1:
            # Pooled together with what a short rest of the last chunk has scored.
            self.scores[:, self.fold :] = torch.nn.functional.max_pool1d(
                self.scores[None, :, self.fold :],
                self.pool,
                stride=1,
                padding=self.pool // 2,
            )[0]
        fold = self.length // BLOCK * BLOCK
        flat = self.visible.view(total, -1)
        competing = [[p for p in range(fold) if flat[h, p]] for h in range(total)]
        ranked, prices = [], []
        for h, positions in enumerate(competing):
            forced = set(positions[: self.sinks])
            forced |= {p for p in positions if p >= self.length - self.protected}
            inf = float("inf")
            score = self.scores[h].tolist()
            order = sorted(positions, key=lambda p: inf if p in forced else score[p])
            value = [inf if p in forced else score[p] for p in order]
            ranked.append(order)
            prices.append(value[BLOCK - 1 :: BLOCK])
        held = sum(len(c) for c in competing) // BLOCK
        evict = held - budget // BLOCK * total
        blocks = sorted(
            (price, h, k) for h in range(total) for k, price in enumerate(prices[h])
        )[:evict]
        evicted = [0] * total
        for _, h, _ in blocks:
            evicted[h] += 1
        kept = [sorted(ranked[h][BLOCK * evicted[h] :]) for h in range(total)]
        self.fold, self.observed = fold, self.length
        self.ranked = ranked
        return OraclePass(
            kept, evicted, self.scores.clone(), prices, competing, blocks[-1][0]
        )

    def apply(self, kept: list[list[int]]) -> None:
        """Mask everything below the fold that is not in `kept` (per head)."""
        flat = self.visible.view(self.layers * self.heads, -1)
        flat[:, : self.fold] = False
        for h, positions in enumerate(kept):
            flat[h, positions] = True


def explain_difference(
    result: OraclePass, ranked: list[list[int]], kept: list[list[int]], tol: float
) -> list[str]:
    """Differences between served and oracle kept sets that are not near-ties.

    A head may keep another number of blocks only if the price of every block in
    dispute is within `tol` (relative) of the threshold; at its own number of blocks,
    positions may differ only if their scores are within `tol` of the cut.
    """

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tol * max(abs(a), abs(b), 1e-12)

    problems = []
    for h, own in enumerate(kept):
        if own == result.kept[h]:
            continue
        e_served = (len(result.competing[h]) - len(own)) // BLOCK
        lo, hi = sorted((e_served, result.evicted_blocks[h]))
        for k in range(lo, hi):
            if not near(result.prices[h][k], result.threshold):
                problems.append(
                    f"head {h}: block {k} costs {result.prices[h][k]:.3e}, "
                    f"threshold {result.threshold:.3e}"
                )
        cut = BLOCK * e_served
        expected = set(ranked[h][cut:])
        edge = float(result.scores[h, ranked[h][cut - 1]]) if cut else 0.0
        for p in expected ^ set(own):
            if not near(float(result.scores[h, p]), edge):
                problems.append(
                    f"head {h}: position {p} scores {float(result.scores[h, p]):.3e}, "
                    f"cut {edge:.3e}"
                )
    return problems
