"""Our metadata stays small, and is charged before the pool is sized."""

from __future__ import annotations

import dataclasses

import pytest

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.memory.metadata import (
    MetadataBytes,
    ModelShape,
    default_slots,
    metadata_bytes,
)

LLAMA_8B = ModelShape(
    num_layers=32,
    num_kv_heads=8,
    num_qo_heads=32,
    head_dim=128,
    itemsize=2,
    query_itemsize=2,
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
    )


def test_at_most_three_percent_at_8b_defaults() -> None:
    """256 running requests, 131k context, the memory of one H200 beside 8B weights."""
    sizes = at_8b_defaults(pool_tokens=900_000)
    kv = sizes.scale_kv_bytes(110 * GIB, LLAMA_8B)
    tokens = kv // LLAMA_8B.kv_bytes_per_token
    metadata = sizes.fixed + sizes.per_token * tokens
    assert metadata <= 0.03 * kv
    assert kv + metadata <= 110 * GIB


def test_e4m3_halves_the_bytes_of_kvs_and_of_nothing_else() -> None:
    """At equal bytes nearly twice the tokens: a score stays four bytes a head."""
    narrow = dataclasses.replace(LLAMA_8B, itemsize=1)
    assert narrow.kv_bytes_per_token * 2 == LLAMA_8B.kv_bytes_per_token
    how = {"max_running_requests": 8, "context_len": 4096, "pool_tokens": 65536}
    wide_sizes, sizes = (
        metadata_bytes(shape, KVCompressOptions(), **how)
        for shape in (LLAMA_8B, narrow)
    )
    assert sizes == wide_sizes
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
def test_ring_is_the_window_of_every_slot(window: int) -> None:
    options = KVCompressOptions(window=window)
    sizes = metadata_bytes(
        LLAMA_8B,
        options,
        max_running_requests=10,
        context_len=4096,
        pool_tokens=8192,
    )
    assert sizes.ring == 11 * 32 * window * 32 * (128 + 2)


def test_a_small_pool_gets_fewer_slots_and_less_workspace() -> None:
    assert default_slots(900_000) == 256
    assert default_slots(20_480) == 106
    assert default_slots(100) == 16
    large, small = at_8b_defaults(900_000), at_8b_defaults(20_480)
    assert small.fixed < 0.45 * large.fixed
