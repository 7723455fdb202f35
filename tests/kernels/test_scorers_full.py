"""`full_attention_scores`: against loops, and against a window of everything."""

import math

import pytest
import torch

from sglang_kvc.kernels.full_attention import full_attention_scores
from sglang_kvc.kernels.observe import observe_scores
from sglang_kvc.kernels.testing import make_case, make_plan
from tests.kernels import oracles


def by_loops(
    queries: torch.Tensor,
    keys: torch.Tensor,
    first_position: int,
    scale: float,
    power: int,
    buffer: int,
) -> torch.Tensor:
    """Equation 19 pair by pair in plain Python floats."""
    heads = keys.shape[1]
    group = queries.shape[1] // heads
    scores = [[0.0] * keys.shape[0] for _ in range(heads)]
    key_list = keys.tolist()
    for position, query in enumerate(queries.tolist(), start=first_position):
        for g, q in enumerate(query):
            h = g // group
            weights = [
                math.exp(scale * sum(a * b for a, b in zip(q, key[h], strict=True)))
                for key in key_list[: position + 1]
            ]
            for i in range(position + 1 - buffer):
                scores[h][i] += (weights[i] / sum(weights)) ** power
    return torch.tensor(scores, dtype=torch.float64)


def random_prompt(
    tokens: int, heads: int, group: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    queries = torch.randn(tokens, heads * group, dim, generator=generator)
    return queries.to(dtype), torch.randn(
        tokens, heads, dim, generator=generator, dtype=torch.float32
    ).to(dtype)


@pytest.mark.parametrize(
    ("tokens", "first", "heads", "group", "dim", "power", "buffer", "chunk"),
    [
        (1, 0, 1, 1, 4, 2, 0, 128),
        (1, 0, 1, 1, 4, 2, 1, 128),
        (23, 0, 3, 2, 5, 2, 10, 7),
        (23, 17, 1, 3, 8, 1, 3, 1),
        (40, 8, 2, 1, 5, 2, 0, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_loops(
    tokens: int,
    first: int,
    heads: int,
    group: int,
    dim: int,
    power: int,
    buffer: int,
    chunk: int,
    dtype: torch.dtype,
) -> None:
    queries, keys = random_prompt(tokens, heads, group, dim, dtype)
    how = {"power": power, "buffer": buffer}
    scores = full_attention_scores(
        queries[first:], keys, first, sm_scale=0.4, chunk=chunk, **how
    )
    assert scores.dtype == torch.float32
    truth = by_loops(queries[first:], keys, first, 0.4, **how)
    torch.testing.assert_close(scores, truth.float(), rtol=1e-5, atol=1e-7)
    assert (scores[truth == 0] == 0).all()


def test_chunks_of_a_prompt_add_up() -> None:
    queries, keys = random_prompt(60, 2, 3, 16, torch.float32)
    how = {"sm_scale": 0.25, "power": 2}
    whole = full_attention_scores(queries, keys, 0, **how)
    parts = torch.zeros_like(whole)
    for first, end in ((0, 25), (25, 26), (26, 60)):
        part = full_attention_scores(queries[first:end], keys[:end], first, **how)
        parts[:, :end] += part
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("power", [1, 2])
def test_a_window_of_everything_observes_the_same(power: int, device: str) -> None:
    """Without a buffer KVC-full is what `observe_scores` finds with all queries."""
    case = make_case(
        [45], layers=2, kv_heads=3, group=2, head_dim=32, window=45, device=device
    )
    args = (case.arena, case.tables, make_plan(case), case.query_ring)
    how = {"sm_scale": 0.25, "power": power}
    observed = observe_scores(*args, group=2, **how).view(2, 3, 48)[..., :45]
    keys = case.arena.k.view(-1, 32)
    for layer in range(2):
        rows = [
            [row for row, _ in oracles.entries(case, 0, layer * 3 + h)]
            for h in range(3)
        ]
        prompt_keys = keys[torch.tensor(rows)].transpose(0, 1)
        queries = case.queries[case.slots[0], layer]
        full = full_attention_scores(queries, prompt_keys, 0, **how, buffer=0, chunk=16)
        torch.testing.assert_close(full, observed[layer], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "power", "message"),
    [
        (0, 3, "power must be 1 or 2, got 3"),
        (3, 2, "queries at positions 3 to 8 need keys at 0 to the same, got 8 keys"),
        (-1, 2, "queries at positions -1 to 4 need keys"),
    ],
)
def test_bad_arguments_are_named(first: int, power: int, message: str) -> None:
    queries, keys = random_prompt(8, 1, 1, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        full_attention_scores(queries[:6], keys, first, sm_scale=1.0, power=power)
