"""`bench.quality.scouts.remembered`: what a pass keeps, by how it remembers."""

from __future__ import annotations

import torch

from bench.quality.scouts import remembered
from bench.quality.scouts.remembered import EXACT, WAYS, Layer, Prompt, compare

TOKENS, HEADS, GROUP, DIM, WINDOW = 700, 2, 3, 32, 32
RATE = 4


def prompt(bias: float) -> Prompt:
    """Two layers of random text; `bias` is of the first element of queries and keys."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers = []
    for _ in range(2):
        q, k = drawn(HEADS, WINDOW, GROUP, DIM), drawn(HEADS, TOKENS, DIM)
        q[..., 9] += bias
        k[..., 9] += bias
        layers.append(Layer(q, k, drawn(HEADS, TOKENS, DIM)))
    return Prompt(layers, DIM**-0.5, RATE)


def test_every_way_keeps_the_budget() -> None:
    case = prompt(bias=0.0)
    for way in (EXACT, *WAYS.values()):
        kept = case.kept(case.scores(way)[0])
        # 700 / 4 in whole pages, a head.
        assert len(kept) == 176 * 2 * HEADS


def test_scores_are_sums_of_squared_probabilities_times_lengths() -> None:
    case = prompt(bias=0.0)
    layer = case.layers[1]
    seen = torch.arange(TOKENS) <= torch.arange(TOKENS - WINDOW, TOKENS)[:, None]
    logits = layer.q.transpose(1, 2) @ layer.k.transpose(1, 2)[:, None] * DIM**-0.5
    chance = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    want = (chance**2).sum((1, 2)) * layer.v.norm(dim=-1)
    got = case.scores(EXACT)[0].view(2, HEADS, -1)[1, :, :TOKENS]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)


def test_large_queries_need_sums_of_what_is_remembered() -> None:
    """Those of exact queries make probabilities far above 1; fp16 does by itself."""
    found = compare(prompt(bias=150.0))
    largest = {name: found[name]["largest_log2_probability"] for name in WAYS}
    assert largest["remembered"] == 0.0
    assert largest["remembered, sums of exact queries"] > 2
    assert largest["exact, sums in fp16"] > 1
    same = {name: found[name]["same"] for name in WAYS}
    assert same["remembered"] > same["remembered, sums of exact queries"]


def test_small_queries_do_not() -> None:
    found = compare(prompt(bias=0.0))
    for name in remembered.WAYS:
        assert found[name]["same"] > 0.97 * found["kept"], name
