"""One request of tiny models whose passes are held against the oracle's."""

from __future__ import annotations

import random

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import floor_tokens
from tests.engine.inprocess import Request
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.ranks import Load, Served
from tests.engine.tiny_model import LAYERS, VOCAB
from tests.engine.tracer import shares

INTERVAL = 16
OPTIONS = {"rate": 4, "min_budget": 48, "interval": INTERVAL}
FLAGS = {f"kv_compress_{name}": value for name, value in OPTIONS.items()}


def tokens(rng: random.Random, count: int) -> list[int]:
    """A prompt that means nothing."""
    return [rng.randrange(2, VOCAB) for _ in range(count)]


def traced(length: int, budget: int) -> Load:
    """One request with two periodic passes behind that of its prompt."""
    new = floor_tokens(length) + 2 * INTERVAL - length + 4
    ids = tokens(random.Random(length), length)
    kv = {"budget": budget, "report_heads": True, "report_tokens": True}
    return Load([Request("x", ids, new, kv=kv)], trace=True)


def check_kept(
    model: str, served: list[Served], length: int, budget: int, ranks: int
) -> None:
    """What every rank keeps is what the oracle keeps of its heads."""
    slots = [list(rank.kept) for rank in served]
    assert slots == slots[:1] * ranks
    ((slot,), *_) = slots
    lengths = served[0].lengths[slot]
    assert lengths == [
        length,
        *(floor_tokens(length) + i * INTERVAL for i in (1, 2)),
    ]
    oracle = Oracle(model, KVCompressOptions(**OPTIONS), ranks)
    passes = [
        joined([rank.kept[slot][number] for rank in served])
        for number in range(len(lengths))
    ]
    output = served[0].outputs["x"]
    ids = traced(length, budget).requests[0].ids
    steps = [Step(at) for at in lengths]
    differing = oracle.request(ids).replay(output.ids, steps, passes, budget, TIE)
    total = len(passes) * budget * oracle.layers * oracle.heads
    check_few_differ(differing, total)
    told = output.kv[-1]["packed_tokens_per_head"]
    assert told == [len(positions) for positions in passes[-1]]
    assert len(set(told)) > 2
    assert output.kv[-1]["num_layers"] == LAYERS
    assert output.kv[-1]["prompt_token_shares"] == shares(passes[-1], length)


def joined(by_rank: list[list[list[int]]]) -> list[list[int]]:
    """Heads of all ranks in layer-major order."""
    own = len(by_rank[0]) // LAYERS
    return [
        head
        for layer in range(LAYERS)
        for rank in by_rank
        for head in rank[layer * own : (layer + 1) * own]
    ]
