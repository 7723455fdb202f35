"""What `simulate` tries: ways to score the KVs of a prompt, and what each keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sglang_kvc.config.options import (
    DEFAULT_DISTINCT,
    DEFAULT_LAYER_SHARE,
    KVCompressOptions,
)
from sglang_kvc.config.pages import PAGE_SIZE, floor_tokens
from sglang_kvc.kernels.pool import Pooling, pool_rows_ref
from sglang_kvc.kernels.select import cheapest_by_head

SINKS = KVCompressOptions.sinks
MAX_WINDOW = 256


@dataclass(frozen=True)
class Candidate:
    """One way to choose.

    Attributes
    ----------
    window : queries observed, at most `MAX_WINDOW`.
    back, ahead : a KV takes the highest score of those up to `back` before it and
        `ahead` behind it: what follows a match is kept with it.
    decay, gain : what is left of such a score with every position of distance, and what
        it counts for at all.
    power : on the probabilities.
    reduce : sum or max over the queries.
    share : divide by the mean of the head's scores.
    value_norm : weigh by the norm of the value.
    distinct : add this many times the mean score of all heads times the key's distance
        from its head's mean key over the mean distance. What no query has looked at is
        then kept for being unusual, whoever asks for it later.
    allocation : joint, layer or head.
    floor : part of the budget that every head keeps.
    layer_share : part of the budget that every layer keeps, where it is joint.
    protected : last tokens that every head keeps.
    """

    window: int = KVCompressOptions.window
    back: int = KVCompressOptions.pool_back
    ahead: int = KVCompressOptions.pool_ahead
    decay: float = KVCompressOptions.pool_decay
    gain: float = KVCompressOptions.pool_gain
    power: int = 2
    reduce: str = "sum"
    share: bool = False
    value_norm: bool = KVCompressOptions.metric == "value_norm"
    distinct: float = DEFAULT_DISTINCT
    allocation: str = "joint"
    floor: float = 0.0
    layer_share: float = DEFAULT_LAYER_SHARE
    protected: int = KVCompressOptions.protected

    @property
    def pool(self) -> Pooling:
        """As the kernels want it."""
        return Pooling(self.back, self.ahead, self.decay, self.gain)

    @property
    def name(self) -> str:
        """What differs from the server's defaults."""
        plain = Candidate()
        words = [
            f"{field}={value}"
            for field, value in vars(self).items()
            if value != getattr(plain, field)
        ]
        return ",".join(words) or "plain"


CANDIDATES = (
    *(Candidate(window=window) for window in (16, 32, 64, 128, 256)),
    *(Candidate(back=back) for back in (0, 3, 16, 32, 48, 96)),
    *(Candidate(ahead=ahead) for ahead in (0, 8, 32)),
    *(Candidate(decay=decay) for decay in (0.8, 0.9, 0.97, 1.0)),
    *(Candidate(gain=gain) for gain in (0.01, 0.1, 0.3, 1.0)),
    *(Candidate(window=64, back=back) for back in (3, 32)),
    Candidate(power=1),
    Candidate(reduce="max"),
    Candidate(share=True),
    *(Candidate(distinct=distinct) for distinct in (0, 0.3, 1, 3)),
    Candidate(value_norm=False),
    Candidate(window=64, value_norm=False),
    Candidate(window=64, reduce="max"),
    Candidate(allocation="layer"),
    Candidate(allocation="head"),
    Candidate(floor=0.25),
    Candidate(floor=0.5),
    *(Candidate(layer_share=share) for share in (0, 0.75)),
    *(Candidate(protected=protected) for protected in (64, 128, 256)),
    Candidate(window=128, protected=128),
    Candidate(window=128, protected=128, value_norm=False),
)


class Observer:
    """Attention of the model: exact in prefill, masked per candidate after it.

    Attributes
    ----------
    seen : for each layer, probabilities of the last queries [H, G, w, n], norms of the
        values and distances of the keys from their mean, [H, n] both.
    visible : [candidates, L, H, tokens] bool while decoding; None in prefill.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.visible: torch.Tensor | None = None

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """[batch, new, Hq, D], as Hugging Face wants it."""
        del attention_mask, kwargs
        batch, heads, new, dim = query.shape
        kv_heads, n = key.shape[1:3]
        grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
        window = new if self.visible is not None else min(MAX_WINDOW, new)
        last = torch.arange(n - window, n)[:, None]
        later = (torch.arange(n) > last).to(key.device)
        if self.visible is not None:
            # Queries of a group as rows of one product: else keys are copied for each.
            shape = grouped.shape[2:4]
            logits = (grouped.flatten(2, 3) @ key.transpose(2, 3)) * scaling
            hidden = ~self.visible[:, module.layer_idx, :, None, None, :n] | later
            logits = logits.unflatten(2, shape).masked_fill_(hidden, float("-inf"))
            probs = logits.softmax(-1)
            self.decoded(module.layer_idx, probs)
            out = (probs.flatten(2, 3) @ value).unflatten(2, shape).flatten(1, 2)
            return out.transpose(1, 2), None
        logits = (grouped[0, :, :, -window:] @ key[0, :, None].transpose(2, 3)).float()
        logits = (logits * scaling).masked_fill_(later, float("-inf"))
        unit = functional.normalize(key[0].float(), dim=-1)
        mean = functional.normalize(unit.mean(1, keepdim=True), dim=-1)
        distance = 1 - (unit * mean).sum(-1)
        norms = value[0].float().norm(dim=-1)
        self.seen.append((logits.softmax(-1), norms, distance))
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    def decoded(self, layer: int, probs: torch.Tensor) -> None:
        """Called with [batch, H, G, new, n] probabilities of decoded queries."""

    def scores(self, candidate: Candidate) -> torch.Tensor:
        """[L * H, n] scores of a prompt; attention is pooled, distances are not."""
        masses, distances = [], []
        for probs, norms, distance in self.seen:
            paid = probs[:, :, -candidate.window :].pow(candidate.power).flatten(1, 2)
            mass = paid.amax(1) if candidate.reduce == "max" else paid.sum(1)
            masses.append(mass * norms if candidate.value_norm else mass)
            distances.append(distance)
        score = torch.cat(masses)
        if candidate.share:
            score = score / score.mean(1, keepdim=True)
        score = pool_rows_ref(score, candidate.pool)
        if candidate.distinct:
            distance = torch.cat(distances)
            unit = candidate.distinct * score.mean()
            score = score + unit * distance / distance.mean()
        return score


def keep(scores: torch.Tensor, layers: int, budget: int, c: Candidate) -> torch.Tensor:
    """[L * H, n] bool: what stays at `budget` tokens a head on average."""
    heads, n = scores.shape
    fold = floor_tokens(n)
    own = scores[:, :fold].clone()
    own[:, :SINKS] = own[:, n - c.protected :] = float("inf")
    order = own.argsort(dim=1, stable=True)
    price = own.gather(1, order)[:, PAGE_SIZE - 1 :: PAGE_SIZE]
    price = price[:, : fold // PAGE_SIZE - int(budget * c.floor) // PAGE_SIZE]
    evict = (fold // PAGE_SIZE - budget // PAGE_SIZE) * heads
    groups = {"joint": 1, "layer": layers, "head": heads}[c.allocation]
    exists = torch.ones_like(price, dtype=torch.bool)
    if c.layer_share and c.allocation == "joint":
        least = int(budget // PAGE_SIZE * c.layer_share) * heads // layers
        spare = fold // PAGE_SIZE * heads - least * layers
        most = cheapest_by_head(price, exists, spare, layers)
        exists = torch.arange(price.shape[1], device=most.device) < most[:, None]
    lost = cheapest_by_head(price, exists, evict, groups)
    stays = torch.ones(heads, n, dtype=torch.bool, device=scores.device)
    rank = torch.arange(fold, device=scores.device) >= PAGE_SIZE * lost[:, None]
    stays[:, :fold].scatter_(1, order, rank)
    return stays
