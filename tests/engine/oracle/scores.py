"""What a KV is worth, by every metric, from its definition."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sglang_kvc.config.metrics import METRICS
from sglang_kvc.config.options import KVCompressOptions
from tests.engine.oracle.choice import BLOCK
from tests.engine.oracle.model import MaskedTokens

SEED = 0


class EntryScores:
    """The score of every position for every head, kept over the passes of a request.

    Parameters
    ----------
    tokens : those of the request.
    options : metric, window, pooling and weight of distinct keys are read.
    slot : the server's row of the request, which random draws depend on.
    prompt_len : tokens of the prompt: what follows is decoded.
    """

    def __init__(
        self,
        tokens: MaskedTokens,
        options: KVCompressOptions,
        slot: int,
        prompt_len: int,
    ) -> None:
        self.tokens, self.options, self.slot = tokens, options, slot
        self.prompt_len = prompt_len
        self._scores = torch.zeros(len(tokens.visible), 0)
        # Where the last pass folded, and how long the request was at it.
        self._fold = self._scored = 0
        # By rank: each deals out its own.
        self._novelty_unit = [0.0] * tokens.model.ranks

    def crop(self, length: int) -> None:
        """Forget tokens from `length` on, and queries before: theirs are gone."""
        self._scores, self._scored = self._scores[:, :length], length

    def update(self, prompt: bool, repeated: bool) -> torch.Tensor:
        """The scores at a pass, [L * H, length].

        `prompt`: the tokens since the last pass are prompt, so their new scores are
        pooled among themselves. `repeated`: the queries are those of earlier passes,
        so the larger score counts.
        """
        length = self.tokens.length
        self._scores = pad(self._scores, (0, length - self._scores.shape[1]))
        if METRICS[self.options.metric].observes:
            self._add_attention(repeated)
            if prompt:
                self._pool()
            if self.options.distinct_weight:
                self._add_novelty(prompt)
        else:
            self._score_entries()
        self._fold, self._scored = length // BLOCK * BLOCK, length
        found = self._scores.clone()
        if length >= self.prompt_len:
            self._scores *= self.options.aging
        return found

    def _add_attention(self, repeated: bool) -> None:
        """Add what the observed queries paid, the paper's eq. 6-8."""
        tokens = self.tokens
        start = max(self._scored, tokens.length - self.options.window, 0)
        added = torch.zeros_like(self._scores)
        for pos in range(start, tokens.length):
            # Layers appended in order.
            rows = torch.cat(tokens.paid[pos])
            added[:, : rows.shape[1]] += rows
        if METRICS[self.options.metric].value_norms:
            layers = range(tokens.model.layers)
            values = torch.cat([tokens.values[layer] for layer in layers])
            added *= values.square().sum(2).sqrt()
        if repeated:
            self._scores = torch.maximum(self._scores, added)
        else:
            self._scores += added

    def _pool(self) -> None:
        """Spread new scores, and what a short rest of the last chunk has scored."""
        back, ahead = self.options.pool_back, self.options.pool_ahead
        decay, gain = self.options.pool_decay, self.options.pool_gain
        own = self._scores[:, self._fold :].clone()
        for p in range(own.shape[1]):
            first = max(p - back, 0)
            near = own[:, first : p + ahead + 1]
            places = range(first, first + near.shape[1])
            factors = [gain * decay ** abs(p - j) for j in places]
            factors[p - first] = 1
            share = torch.tensor(factors)
            self._scores[:, self._fold + p] = (near * share).max(dim=1).values

    def _add_novelty(self, prompt: bool) -> None:
        """What is folded now gains by its key if it is prompt, else by the mean."""
        for rank in range(self.tokens.model.ranks):
            own = self.tokens.model.heads_of(rank)
            self._scores[own] = self._with_novelty(rank, own, prompt)

    def _with_novelty(self, rank: int, own: list[int], prompt: bool) -> torch.Tensor:
        new = slice(self._fold, self.tokens.length // BLOCK * BLOCK)
        scores = self._scores[own]
        if not prompt:
            scores[:, new] += self._novelty_unit[rank]
            return scores
        visible = self.tokens.visible[own]
        diffs = torch.zeros_like(scores)
        for row, (h, seen) in enumerate(zip(own, visible, strict=True)):
            places = seen.nonzero().flatten().tolist()
            diffs[row, places] = torch.tensor(self._key_diff(h, places))
        mean = scores[visible].double().mean()
        self._novelty_unit[rank] = float(self.options.distinct_weight * mean)
        gain = self._novelty_unit[rank] * diffs / diffs[visible].double().mean()
        scores[:, new] += gain[:, new].float()
        return scores

    def _score_entries(self) -> None:
        """Score what is visible by keys, places or draws; no query is looked at."""
        metric = self.options.metric
        for h, seen in enumerate(self.tokens.visible):
            entries = seen.nonzero().flatten().tolist()
            if metric == "key_similarity":
                score = self._key_diff(h, entries)
            elif metric == "recency":
                score = [1 / (len(entries) - i) for i in range(len(entries))]
            elif metric == "random":
                # A draw stays: 0 says that there was none.
                stored = self._scores[h].tolist()
                score = [stored[p] or self._draw(h, p) for p in entries]
            else:
                raise ValueError(f"the oracle knows no metric {metric!r}")
            self._scores[h, entries] = torch.tensor(score, dtype=torch.float32)

    def _key_diff(self, head: int, entries: list[int]) -> list[float]:
        """How far keys of a head are from their mean direction, by KeyDiff."""
        layer, place = divmod(head, self.tokens.model.heads)
        own = self.tokens.keys[layer][place, entries].double()
        own /= own.norm(dim=1, keepdim=True)
        mean = own.mean(0)
        return (1 - own @ mean / mean.norm()).clamp(min=0).tolist()

    def _draw(self, head: int, pos: int) -> float:
        """A number in (0, 1) from seed, slot, length, head and position."""
        hashed = SEED
        for part in (self.slot, self.tokens.length, head, pos):
            hashed = _hash32(hashed) ^ part
        return ((_hash32(hashed) >> 9) + 0.5) / 2**23


def _hash32(x: int) -> int:
    """An integer hash of 32 bits."""
    x = (x ^ (x >> 15)) * 0x2C1B3C6D % 2**32
    x = (x ^ (x >> 12)) * 0x297A2D39 % 2**32
    return x ^ (x >> 15)
