"""Our metadata stays small, and is charged before the pool is sized."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.memory.metadata import (
    MetadataBytes,
    ModelShape,
    default_slots,
    lse_bytes,
    metadata_bytes,
    mlp_width,
    pass_head_bytes,
)

LLAMA_8B = ModelShape(
    num_layers=32,
    num_kv_heads=8,
    num_qo_heads=32,
    head_dim=128,
    itemsize=2,
    query_itemsize=2,
    mlp_width=2 * 14336,
)
GIB = 1 << 30


def at_8b_defaults(pool_tokens: int) -> MetadataBytes:
    """131k context, chunks of 8192, as many slots as the pool gets by default."""
    return metadata_bytes(
        LLAMA_8B,
        KVCompressOptions(),
        max_running_requests=default_slots(pool_tokens),
        context_len=131_072,
        pool_tokens=pool_tokens,
        chunk_size=8192,
        prefill_tokens=8192,
    )


@pytest.mark.parametrize(
    ("pool_tokens", "running", "most"), [(20_480, 25, 0.05), (800_000, 256, 0.02)]
)
def test_a_small_part_of_the_kv_at_8b_defaults(
    pool_tokens: int, running: int, most: float
) -> None:
    """131k context, the rings of all that run included."""
    sizes = at_8b_defaults(pool_tokens)
    kv = pool_tokens * LLAMA_8B.kv_bytes_per_token
    metadata = sizes.fixed + sizes.per_token * pool_tokens + running * sizes.ring
    assert metadata <= most * kv


def test_what_is_charged_fits_beside_the_kv() -> None:
    """The memory of one H200 beside 8B weights."""
    sizes = at_8b_defaults(pool_tokens=900_000)
    kv = sizes.scale_kv_bytes(110 * GIB, LLAMA_8B)
    tokens = kv // LLAMA_8B.kv_bytes_per_token
    assert kv + sizes.fixed + sizes.per_token * tokens <= 110 * GIB


def test_a_pass_takes_what_a_prefill_step_has_left() -> None:
    """Workspace beyond the activations of a step is charged, and only that."""
    how = {"max_running_requests": 8, "context_len": 131_072, "pool_tokens": 900_000}
    alone = metadata_bytes(LLAMA_8B, KVCompressOptions(), **how).workspace
    tokens, charged = (64, 1024, 2048, 8192), []
    for count in tokens:
        sizes = metadata_bytes(
            LLAMA_8B, KVCompressOptions(), **how, prefill_tokens=count
        )
        charged.append(sizes.workspace)
    # Query, key, value and output, or gate and up, which are more.
    saved = [min(count * 2 * 14336 * 2, alone - charged[-1]) for count in tokens]
    assert [alone - size for size in charged] == saved
    assert 0 < charged[-1] < charged[0]


def test_copies_of_a_chunk_take_what_its_mlps_leave() -> None:
    """They are there while query, key, value and output are."""
    how = {"max_running_requests": 8, "context_len": 16, "pool_tokens": 16}
    shapes = [dataclasses.replace(LLAMA_8B, mlp_width=n) for n in (0, 10_240, 10_340)]
    none, equal, more = (
        metadata_bytes(
            it, KVCompressOptions(), **how, chunk_size=8192, prefill_tokens=8192
        )
        for it in shapes
    )
    assert none == equal
    assert equal.workspace - more.workspace == 8192 * 100 * 2


def test_experts_leave_nothing_that_is_known() -> None:
    dense = SimpleNamespace(hf_text_config=SimpleNamespace(intermediate_size=14336))
    assert mlp_width(dense, 1) == 28672
    assert mlp_width(dense, 4) == 7168
    dense.hf_text_config.num_local_experts = 8
    assert mlp_width(dense, 1) == 0
    assert mlp_width(SimpleNamespace(hf_text_config=SimpleNamespace()), 1) == 0


def test_e4m3_halves_the_bytes_of_kvs_and_of_nothing_else() -> None:
    """At equal bytes nearly twice the tokens: a score stays four bytes a head."""
    narrow = dataclasses.replace(LLAMA_8B, itemsize=1)
    assert narrow.kv_bytes_per_token * 2 == LLAMA_8B.kv_bytes_per_token
    how = {"max_running_requests": 8, "context_len": 4096, "pool_tokens": 65536}
    wide_sizes, sizes = (
        metadata_bytes(shape, KVCompressOptions(), **how)
        for shape in (LLAMA_8B, narrow)
    )
    assert dataclasses.replace(sizes, tables=0) == dataclasses.replace(
        wide_sizes, tables=0
    )
    before, after = (
        sizes.scale_kv_bytes(64 * GIB, shape) // shape.kv_bytes_per_token
        for shape in (LLAMA_8B, narrow)
    )
    # (512 + 4) / (256 + 4) bytes a head and token.
    assert after / before == pytest.approx(516 / 260, rel=1e-4)


def test_nothing_is_offered_when_the_fixed_part_does_not_fit() -> None:
    sizes = at_8b_defaults(pool_tokens=900_000)
    assert sizes.scale_kv_bytes(sizes.fixed // 2, LLAMA_8B) == 0


@pytest.mark.parametrize("window", [32, 64])
def test_a_ring_is_a_window_of_bytes(window: int) -> None:
    options = KVCompressOptions(window=window)
    sizes = metadata_bytes(
        LLAMA_8B,
        options,
        max_running_requests=10,
        context_len=4096,
        pool_tokens=8192,
    )
    assert sizes.ring == 32 * window * 32 * 128
    assert lse_bytes(LLAMA_8B, options) == 4 * window * 4


def test_a_pass_holds_scores_and_what_comes_beside_them() -> None:
    """Log-sum-exps are gone before scores are pooled, these before the choice."""
    sizes = {"counts": 100, "lse": 4096, "pooled": True}
    assert pass_head_bytes(100, 50, **sizes) == 400 + 4096
    assert pass_head_bytes(2000, 50, **sizes) == 8000 + 8000
    assert pass_head_bytes(2000, 1500, **sizes) == 8000 + 12_000 + 100


def test_a_small_pool_gets_as_many_slots_as_it_can_use_and_smaller_tables() -> None:
    assert default_slots(900_000) == 256
    assert default_slots(20_480) == 256
    assert default_slots(6400) == 100
    assert default_slots(100) == 16
    large, small = at_8b_defaults(900_000), at_8b_defaults(20_480)
    assert small.tables < 0.2 * large.tables
