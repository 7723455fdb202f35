"""R-KV (arXiv 2505.24133) in Hugging Face: evicts while decoding.

Written from the paper. Every `INTERVAL` tokens each KV head keeps its best: importance
is the attention of the last `OBSERVED` queries, smoothed over `POOLED` neighbours, the
mean over the queries of a group; redundancy is a key's mean cosine to the others, but
not to those that it is among the newest likes of; what stays has the highest
``MIX * importance - (1 - MIX) * redundancy``. The last `OBSERVED` tokens stay. Heads
keep equally many: as many as the setting says of the tokens so far, as a server does
with a rate. A prompt is whole until its first queries are decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bench.quality.hf_decoding import Decoding, Prefilled
from bench.quality.systems import Setting
from bench.quality.tasks.sample import Sample, cut_at

METHOD = "rkv"
OBSERVED, POOLED, INTERVAL = 8, 7, 64
MIX, ALIKE, NEWEST = 0.1, 0.5, 4
"""Weight of importance; cosine from which keys are alike; how many of the newest keys
that are like another one are not redundant for it."""
KEYS_AT_ONCE = 1024


class Said(NamedTuple):
    """An answer: its text, its tokens, and the mean of those held over its steps."""

    text: str
    tokens: int
    mean_resident: float


class Observing(Decoding):
    """A `Decoding` that keeps the last queries of every layer.

    Attributes
    ----------
    queries : list of [prompts, query heads, new, head_dim]
        The newest forward's, a layer each, rotated.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.queries: list[Any] = [None] * len(self._attention)

    def _see(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"]
        flat = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim))
        query, (cos, sin) = flat.transpose(1, 2), kwargs["position_embeddings"]
        first, second = query.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        own = query * cos[:, None] + turned * sin[:, None]
        self.queries[module.layer_idx] = own
        return super()._see(module, args, kwargs)

    def rows(self, prompts: Sequence[Prefilled]) -> list[Prefilled]:
        """What each prompt holds now, without the padding on its left."""
        new = self._cache.get_seq_length(0) - max(p.keys[0].shape[1] for p in prompts)
        left = []
        for row, prompt in enumerate(prompts):
            keys, values = [], []
            for layer, before in enumerate(prompt.keys):
                n = before.shape[1] + new
                held = self._cache.layers[layer]
                keys.append(held.keys[row, :, -n:].clone())
                values.append(held.values[row, :, -n:].clone())
            left.append(
                replace(
                    prompt,
                    tokens=prompt.tokens + new,
                    logits=self.logits[row],
                    keys=keys,
                    values=values,
                )
            )
        return left


def redundancy(keys: Any) -> Any:
    """Mean cosine of each key to the other ones, softmax over them, [heads, n] fp32.

    Parameters
    ----------
    keys : [heads, n, head_dim]
    """
    unit = functional.normalize(keys.float(), dim=-1)
    n = unit.shape[1]
    total = unit.new_zeros(unit.shape[:2])
    place = torch.arange(n, device=keys.device)
    for start in range(0, n, KEYS_AT_ONCE):
        own = place[start : start + KEYS_AT_ONCE]
        cosine = unit[:, own] @ unit.transpose(1, 2)
        cosine[:, own - start, own] = 0
        alike = cosine > ALIKE
        # From the end: how many likes of a row's key come at or behind a column's.
        rank = alike.flip(-1).cumsum(-1).flip(-1)
        total += cosine.masked_fill(alike & (rank <= NEWEST), 0).sum(1)
    return (total / n).softmax(-1)


def importance(queries: Any, keys: Any) -> Any:
    """Attention of the last queries, smoothed, [heads, n] fp32.

    Parameters
    ----------
    queries : [query heads, observed, head_dim]
        Of the newest tokens, in their order.
    keys : [heads, n, head_dim]
    """
    heads, n, size = keys.shape
    grouped = queries.float().unflatten(0, (heads, -1))
    logits = grouped @ keys.float()[:, None].transpose(2, 3) / size**0.5
    count = queries.shape[1]
    last = torch.arange(n - count, n, device=keys.device)
    later = torch.arange(n, device=keys.device) > last[:, None]
    paid = logits.masked_fill(later, float("-inf")).softmax(-1).mean((1, 2))
    return functional.max_pool1d(paid[None], POOLED, stride=1, padding=POOLED // 2)[0]


def compress(prompt: Prefilled, queries: Sequence[Any], budget: int) -> Prefilled:
    """Keep the best `budget` tokens of every head.

    Parameters
    ----------
    prompt : Prefilled
        What is held.
    queries : sequence of [query heads, observed, head_dim]
        A layer each.
    budget : int
    """
    keys, values = [], []
    for k, v, q in zip(prompt.keys, prompt.values, queries, strict=True):
        if k.shape[1] > budget:
            score = MIX * importance(q, k) - (1 - MIX) * redundancy(k)
            score[:, -OBSERVED:] = torch.inf
            best = score.topk(max(budget, OBSERVED), 1).indices.sort(1).values
            index = best[..., None].expand(-1, -1, k.shape[2])
            k, v = k.gather(1, index), v.gather(1, index)
        keys.append(k)
        values.append(v)
    return replace(prompt, keys=keys, values=values)


def generate(
    model: Any,
    tokenizer: Any,
    ends: Collection[int],
    prompts: Sequence[Prefilled],
    settings: Sequence[Setting],
    samples: Sequence[Sample],
) -> list[Said]:
    """Greedy answers, evicting; no question may follow its prompt."""
    rows, said = list(prompts), [list[int]() for _ in prompts]
    sums = [0] * len(prompts)
    running, first = list(range(len(prompts))), True
    with torch.inference_mode():
        while running:
            steps = OBSERVED if first else INTERVAL
            some = [rows[i] for i in running]
            seen: list[list[Any]] = []
            over = set()
            with Observing(model, some, steps) as state:
                for at in range(1, steps + 1):
                    tokens = state.logits.argmax(-1).tolist()
                    for place, i in enumerate(running):
                        if i in over or _ends(tokens[place], said[i], ends, samples[i]):
                            over.add(i)
                            continue
                        said[i].append(tokens[place])
                        sums[i] += some[place].keys[0].shape[1] + at
                    if len(over) == len(running):
                        break
                    state.step(tokens)
                    seen = [*seen, state.queries][-OBSERVED:]
                    state.queries = [None] * len(state.queries)
                else:
                    observed = [torch.cat(one, 2) for one in zip(*seen, strict=True)]
                    for place, row in enumerate(state.rows(some)):
                        i = running[place]
                        budget = settings[i].kept(row.tokens)
                        own = [queries[place] for queries in observed]
                        rows[i] = compress(row, own, budget)
            running, first = [i for i in running if i not in over], False
    return [
        Said(
            cut_at(tokenizer.decode(ids, skip_special_tokens=True), sample.stop),
            len(ids),
            total / max(len(ids), 1),
        )
        for ids, sample, total in zip(said, samples, sums, strict=True)
    ]


def _ends(token: int, said: list[int], ends: Collection[int], sample: Sample) -> bool:
    """Whether the answer is over before this token."""
    return token in ends or len(said) >= sample.max_new_tokens
