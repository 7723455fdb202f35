"""A slow, independent KV-Compress: Hugging Face attention and a literal Algorithm 1.

No pages, no arena, no ring, no kernels of ours: every KV stays in the Hugging Face
cache, evicted ones are masked, scores are kept per logical position, and selection is
a Python loop over heads and blocks. Paper: arXiv 2410.00161, Algorithm 1, eq. 6-10, 20.

Metrics other than the paper's, allocations other than the joint one, the floor per head
and the share per layer are written out here once more, from their definitions.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from sglang_kvc.config.options import ATTENTION_METRICS, KVCompressOptions

BLOCK = 16
SEED = 0


@dataclass(frozen=True)
class Policy:
    """What a KV is worth and who shares a budget, named as the server's options."""

    metric: str = KVCompressOptions.metric
    distinct: float | None = None
    allocation: str = "joint"
    head_floor: int = 0
    layer_share: float | None = None

    @property
    def options(self) -> KVCompressOptions:
        """A server's, with numbers in the place of None."""
        return KVCompressOptions(**asdict(self))


@dataclass
class OraclePass:
    """Result of one pass.

    kept : positions kept below the fold, per (layer, head) in layer-major order.
    evicted_blocks : e_h per head.
    scores : score of every logical position, [heads, length]; inf for those that sinks
        and protection keep.
    prices : price_h[k] per head; inf for a block that the floor keeps.
    competing : positions that competed, per head.
    thresholds : per head, price of the last block evicted among those it competes with.
    """

    kept: list[list[int]]
    evicted_blocks: list[int]
    scores: torch.Tensor
    prices: list[list[float]]
    competing: list[list[int]]
    thresholds: list[float]


class Oracle:
    """One request, decoded token by token with masked attention.

    Parameters
    ----------
    model_path : Hugging Face folder.
    options : the server's; window, protected, sinks and pooling are read.
    """

    def __init__(self, model_path: str, options: KVCompressOptions) -> None:
        AttentionInterface.register("kv_oracle", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="kv_oracle"
        ).eval()
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.group = config.num_attention_heads // self.heads
        self.window, self.protected = options.window, options.protected
        self.sinks = options.sinks
        self.back, self.ahead = options.pool_back, options.pool_ahead
        self.decay, self.gain = options.pool_decay, options.pool_gain

    def start(
        self, ids: list[int], policy: Policy | None = None, slot: int = 0
    ) -> None:
        """Run a prompt, or its first chunk, with full attention.

        `slot`: the server's row of the request, which random draws depend on.
        """
        self.policy, self.slot = (policy or Policy()).options, slot
        self.length = len(ids)
        self.visible = torch.ones(self.layers, self.heads, 0, dtype=torch.bool)
        self.scores = torch.zeros(self.layers * self.heads, 0)
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.fold, self.observed, self.cache = 0, 0, None
        self.probing = 0
        self._forward(ids)

    def extend(self, ids: list[int]) -> None:
        """Run more tokens, causally, over everything that is visible."""
        self.length += len(ids)
        self._forward(ids)

    def probe(self, ids: list[int], first: int) -> None:
        """Let `ids`, at positions `first` and on, observe in the place of the oldest
        of the last w tokens: each sees what that token sees. They leave nothing else.
        """
        self.probing = len(ids)
        places = torch.arange(first, first + len(ids))[None]
        with torch.no_grad():
            self.model(
                torch.tensor([ids]),
                position_ids=places,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.probing = 0
        self.cache.crop(self.length)

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
        kept = n - self.probing
        self.keys[layer], self.values[layer] = key[0, :, :kept], value[0, :, :kept]
        key = key.repeat_interleave(self.group, 1)
        value = value.repeat_interleave(self.group, 1)
        logits = (query @ key.transpose(2, 3))[0] * scaling
        q_pos = torch.arange(n - new, n)
        visible = self.visible[layer].repeat_interleave(self.group, 0)
        visible = torch.nn.functional.pad(visible, (0, self.probing), value=True)

        def attention(last_seen: torch.Tensor) -> torch.Tensor:
            mask = visible[:, None] & (torch.arange(n) <= last_seen[:, None])
            return logits.masked_fill(~mask, float("-inf")).softmax(-1)

        probs = attention(q_pos)
        # A probe observes as the tokens before it would.
        back = self.window if self.probing else 0
        seen = attention(q_pos - back) if back else probs
        power = 1 if self.policy.metric.endswith("l1") else 2
        for row in range(max(new - self.window, 0), new):
            mass = seen[:, row].view(self.heads, self.group, n).pow(power).sum(1)
            place = self.seen.setdefault(n - new + row - back, [])
            if len(place) == self.layers:
                place.clear()
            place.append(mass[:, :kept])
        out = (probs @ value[0])[None].transpose(1, 2)
        return out, None

    def run_pass(
        self,
        budget: int,
        pool_tail: bool = False,
        repeated: bool = False,
        allocation: str = "",
    ) -> OraclePass:
        """Evict down to `budget` tokens per head on average.

        `pool_tail`: the tokens since the last pass are prompt, so their new scores
        are pooled among themselves. `repeated`: the queries are those of earlier
        passes, so the larger score counts. `allocation`: default, the policy's.
        """
        if self.policy.metric in ATTENTION_METRICS:
            self._add_attention(pool_tail or self.fold == 0, repeated)
        else:
            self._score_entries()
        total = self.layers * self.heads
        fold = self.length // BLOCK * BLOCK
        allocation = allocation or self.policy.allocation
        share = self.policy.layer_share
        if share and allocation == "joint" and self.fold and not pool_tail:
            # After the prompt each layer loses as much as it has gained.
            allocation, share = "layer", 0
        flat = self.visible.view(total, -1)
        competing = [[p for p in range(fold) if flat[h, p]] for h in range(total)]
        floor_blocks = -(-self.policy.head_floor // BLOCK)
        ranked, prices, candidates = [], [], []
        scores, inf = self.scores.clone(), float("inf")
        for h, positions in enumerate(competing):
            scores[h, positions[: self.sinks]] = inf
            scores[h, self.length - self.protected :] = inf
            score = scores[h].tolist()
            order = sorted(positions, key=score.__getitem__)
            ranked.append(order)
            price = [score[p] for p in order[BLOCK - 1 :: BLOCK]]
            # The floor keeps what the head would lose last.
            open_blocks = max(len(price) - floor_blocks, 0)
            prices.append(price[:open_blocks] + [inf] * (len(price) - open_blocks))
            candidates.append([(p, h, k) for k, p in enumerate(price[:open_blocks])])
        held = sum(len(c) for c in competing) // BLOCK
        evict = held - budget // BLOCK * total
        groups = {"joint": 1, "layer": self.layers, "head": total}
        size = total // groups[allocation]
        bounds = [inf] * total
        if share and allocation == "joint":
            forced = self.sinks + self.protected
            least = max(
                int(share * (budget // BLOCK)), -(-forced // BLOCK), floor_blocks
            )
            for first in range(0, total, self.heads):
                own = range(first, first + self.heads)
                spare = sum(len(competing[h]) // BLOCK - least for h in own)
                open_to_all = sorted(sum((candidates[h] for h in own), []))[:spare]
                for h in own:
                    candidates[h] = [block for block in open_to_all if block[1] == h]
                    bounds[h] = open_to_all[-1][0]
        evicted, thresholds = [0] * total, []
        for first in range(0, total, size):
            rivals = sorted(sum(candidates[first : first + size], []))
            blocks = rivals[: evict * size // total]
            for _, h, _ in blocks:
                evicted[h] += 1
            # In a layer that lost all it may, the last block is cheaper.
            thresholds += [min(blocks[-1][0], b) for b in bounds[first : first + size]]
        kept = [sorted(ranked[h][BLOCK * evicted[h] :]) for h in range(total)]
        self.fold, self.observed = fold, self.length
        self.ranked = ranked
        return OraclePass(kept, evicted, scores, prices, competing, thresholds)

    def replay(
        self,
        output: list[int],
        lengths: list[int],
        passes: list[list[list[int]]],
        budget: int,
        tie: float,
    ) -> int:
        """Follow a started request through its served passes.

        Parameters
        ----------
        output : tokens that the server decoded.
        lengths : logical length at each pass.
        passes : kept positions of each, per head.
        budget : tokens that each keeps per head on average.
        tie : scores closer than this (relative) may go either way; 0 for none.

        Returns
        -------
        int
            Positions on which server and oracle differ, over all passes and heads.

        Raises
        ------
        AssertionError
            A pass keeps another number of KVs, or differs by more than near-ties.
        """
        differing, tokens = 0, iter(output)
        for length, kept in zip(lengths, passes, strict=True):
            if length > self.length:
                self.extend(list(itertools.islice(tokens, length - self.length)))
            assert self.length == length
            result = self.run_pass(budget)
            assert sum(map(len, kept)) == budget * self.layers * self.heads
            if tie:
                problems = explain_difference(result, self.ranked, kept, tie)
            else:
                problems = _differing_heads(result.kept, kept)
            assert not problems, (len(problems), problems[:5])
            pairs = zip(kept, result.kept, strict=True)
            differing += sum(len(set(a) ^ set(b)) for a, b in pairs)
            # A near-tie that went the other way must not hide a later difference.
            self.apply(kept)
        return differing

    def _add_attention(self, pooled: bool, repeated: bool) -> None:
        """Add what the observed queries paid, the paper's eq. 6-8."""
        total = self.layers * self.heads
        start = max(self.observed, self.length - self.window, 0)
        added = torch.zeros(total, self.length)
        for pos in range(start, self.length):
            rows = torch.cat(self.seen[pos])  # layers appended in order
            added[:, : rows.shape[1]] += rows
        if self.policy.metric.startswith("value_norm"):
            added *= self._per_head(self.values).square().sum(2).sqrt()
        if repeated:
            self.scores = torch.maximum(self.scores, added)
        else:
            self.scores += added
        if pooled:
            # Pooled together with what a short rest of the last chunk has scored.
            own = self.scores[:, self.fold :].clone()
            for p in range(own.shape[1]):
                first = max(p - self.back, 0)
                near = own[:, first : p + self.ahead + 1]
                places = range(first, first + near.shape[1])
                factors = [self.gain * self.decay ** abs(p - j) for j in places]
                factors[p - first] = 1
                share = torch.tensor(factors)
                self.scores[:, self.fold + p] = (near * share).max(dim=1).values
        if self.policy.distinct:
            self._add_distinct(pooled)

    def _add_distinct(self, prompt: bool) -> None:
        """What is folded now gains by its key if it is prompt, else by the mean."""
        new = slice(self.fold, self.length // BLOCK * BLOCK)
        if prompt:
            visible = self.visible.view(len(self.scores), -1)
            unlike = torch.zeros_like(self.scores)
            for h, seen in enumerate(visible):
                places = seen.nonzero().flatten().tolist()
                unlike[h, places] = torch.tensor(self._unlike(h, places))
            mean = self.scores[visible].double().mean()
            self.unit = float(self.policy.distinct * mean)
            gain = self.unit * unlike / unlike[visible].double().mean()
            self.scores[:, new] += gain[:, new].float()
        else:
            self.scores[:, new] += self.unit

    def _score_entries(self) -> None:
        """Score what is visible by keys, places or draws; no query is looked at."""
        total = self.layers * self.heads
        visible = self.visible.view(total, -1)
        for h in range(total):
            entries = [p for p in range(self.length) if visible[h, p]]
            if self.policy.metric == "key_similarity":
                score = self._unlike(h, entries)
            elif self.policy.metric == "recency":
                score = [1 / (len(entries) - i) for i in range(len(entries))]
            elif self.policy.metric == "random":
                # A draw stays: 0 says that there was none.
                stored = self.scores[h].tolist()
                score = [stored[p] or self._draw(h, p) for p in entries]
            else:
                raise ValueError(f"the oracle knows no metric {self.policy.metric!r}")
            self.scores[h, entries] = torch.tensor(score, dtype=torch.float32)

    def _unlike(self, head: int, entries: list[int]) -> list[float]:
        """How unlike their mean direction keys of a head are, by KeyDiff."""
        layer, place = divmod(head, self.heads)
        own = self.keys[layer][place, entries].double()
        own /= own.norm(dim=1, keepdim=True)
        mean = own.mean(0)
        return (1 - own @ mean / mean.norm()).clamp(min=0).tolist()

    def _per_head(self, by_layer: dict[int, torch.Tensor]) -> torch.Tensor:
        """The cache of all layers, [heads, length, head_dim]."""
        return torch.cat([by_layer[layer] for layer in range(self.layers)])

    def _draw(self, head: int, pos: int) -> float:
        """A number in (0, 1) from seed, slot, length, head and position."""
        hashed = SEED
        for part in (self.slot, self.length, head, pos):
            hashed = _hash32(hashed) ^ part
        return ((_hash32(hashed) >> 9) + 0.5) / 2**23

    def apply(self, kept: list[list[int]]) -> None:
        """Mask everything below the fold that is not in `kept` (per head)."""
        flat = self.visible.view(self.layers * self.heads, -1)
        flat[:, : self.fold] = False
        for h, positions in enumerate(kept):
            flat[h, positions] = True


def _hash32(x: int) -> int:
    """An integer hash of 32 bits."""
    x = (x ^ (x >> 15)) * 0x2C1B3C6D % 2**32
    x = (x ^ (x >> 12)) * 0x297A2D39 % 2**32
    return x ^ (x >> 15)


def _differing_heads(expected: list[list[int]], kept: list[list[int]]) -> list[str]:
    return [
        f"head {h}: kept {sorted(set(own) ^ set(want))[:8]}, ... by one side only"
        for h, (want, own) in enumerate(zip(expected, kept, strict=True))
        if want != own
    ]


def explain_difference(
    result: OraclePass, ranked: list[list[int]], kept: list[list[int]], tol: float
) -> list[str]:
    """Differences between served and oracle kept sets that are not near-ties.

    A head may keep another number of blocks only if the price of every block in
    dispute is within `tol` (relative) of the threshold; at its own number of blocks,
    positions may differ only if their scores are within `tol` of the cut.
    """

    def near(a: float, b: float) -> bool:
        scale = max(abs(a), abs(b), 1e-12)
        # What must stay (inf) is near nothing.
        return scale < float("inf") and abs(a - b) <= tol * scale

    problems = []
    for h, own in enumerate(kept):
        if own == result.kept[h]:
            continue
        e_served = (len(result.competing[h]) - len(own)) // BLOCK
        lo, hi = sorted((e_served, result.evicted_blocks[h]))
        for k in range(lo, hi):
            if not near(result.prices[h][k], result.thresholds[h]):
                problems.append(
                    f"head {h}: block {k} costs {result.prices[h][k]:.3e}, "
                    f"threshold {result.thresholds[h]:.3e}"
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
