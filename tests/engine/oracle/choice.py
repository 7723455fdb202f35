"""Algorithm 1: from scores and positions to what every head keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 16
INF = float("inf")

Block = tuple[float, int, int]
"""Price, head, ordinal in the head: the order in which blocks go."""


@dataclass(frozen=True)
class Rule:
    """Who competes, for how much, and what stays whatever it scores.

    Attributes
    ----------
    budget : tokens that a head keeps on average.
    layers : equal groups of consecutive heads.
    allocation : ``joint``, ``layer`` or ``head``.
    layer_share : part of the budget that a joint choice leaves every layer; 0 for none.
    floor_blocks : blocks that every head keeps, those that it would lose last.
    sinks, protected : first and last positions that stay.
    """

    budget: int
    layers: int
    allocation: str
    layer_share: float
    floor_blocks: int
    sinks: int
    protected: int

    @property
    def least_layer_blocks(self) -> int:
        """Blocks that a head of a layer keeps on average at least."""
        return max(
            int(self.layer_share * (self.budget // BLOCK)),
            -(-(self.sinks + self.protected) // BLOCK),
            self.floor_blocks,
        )


@dataclass(frozen=True)
class Choice:
    """What a pass keeps, and how close it was.

    Attributes
    ----------
    kept : positions kept below the fold, per (layer, head) in layer-major order.
    evicted_blocks : e_h per head.
    scores : score of every logical position, [heads, length]; inf for those that sinks
        and protection keep.
    competing : positions that competed, per head.
    ranked : the same, the lowest score first.
    prices : price_h[k] per head; inf for a block that the floor keeps.
    thresholds : per head, price of the last block evicted among those it competes with.
    """

    kept: list[list[int]]
    evicted_blocks: list[int]
    scores: torch.Tensor
    competing: list[list[int]]
    ranked: list[list[int]]
    prices: list[list[float]]
    thresholds: list[float]


def choose(scores: torch.Tensor, competing: list[list[int]], rule: Rule) -> Choice:
    """Evict the cheapest blocks of those that compete; `scores` is only read."""
    scores, total = scores.clone(), len(competing)
    scores[:, scores.shape[1] - rule.protected :] = INF
    ranked, prices, blocks = [], [], []
    for h, positions in enumerate(competing):
        scores[h, positions[: rule.sinks]] = INF
        score = scores[h].tolist()
        order = sorted(positions, key=score.__getitem__)
        price = [score[p] for p in order[BLOCK - 1 :: BLOCK]]
        open_blocks = max(len(price) - rule.floor_blocks, 0)
        ranked.append(order)
        prices.append(price[:open_blocks] + [INF] * (len(price) - open_blocks))
        blocks.append([(p, h, k) for k, p in enumerate(price[:open_blocks])])
    bounds = [INF] * total
    if rule.layer_share and rule.allocation == "joint":
        blocks, bounds = _bound_layers(blocks, competing, rule)

    held = sum(len(positions) for positions in competing) // BLOCK
    evict = held - rule.budget // BLOCK * total
    groups = {"joint": 1, "layer": rule.layers, "head": total}[rule.allocation]
    size = total // groups
    evicted, thresholds = [0] * total, []
    for first in range(0, total, size):
        rivals = sorted(sum(blocks[first : first + size], []))
        lost = rivals[: evict // groups]
        for _, h, _ in lost:
            evicted[h] += 1
        # In a layer that lost all it may, the last block is cheaper.
        thresholds += [min(lost[-1][0], b) for b in bounds[first : first + size]]
    kept = [sorted(ranked[h][BLOCK * evicted[h] :]) for h in range(total)]
    return Choice(kept, evicted, scores, competing, ranked, prices, thresholds)


def _bound_layers(
    blocks: list[list[Block]], competing: list[list[int]], rule: Rule
) -> tuple[list[list[Block]], list[float]]:
    """The blocks of each layer without those that its share leaves it.

    With them, per head, the price of the last one that its layer may lose.
    """
    heads = len(blocks) // rule.layers
    open_blocks: list[list[Block]] = []
    bounds: list[float] = []
    for first in range(0, len(blocks), heads):
        own = range(first, first + heads)
        spare = sum(len(competing[h]) // BLOCK - rule.least_layer_blocks for h in own)
        cheapest = sorted(sum((blocks[h] for h in own), []))[:spare]
        open_blocks += [[block for block in cheapest if block[1] == h] for h in own]
        bounds += [cheapest[-1][0]] * heads
    return open_blocks, bounds
