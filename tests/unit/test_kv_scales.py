"""Scales of an e4m3 cache: where they come from, and what stock kernels are given."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kvc.attention.kv_scales import fa3_inputs, flashinfer_scales, layer_scales
from sglang_kvc.errors import UnsupportedModeError
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.memory.kv_pool import ArenaKVPool, KVScales

LAYERS, HEADS, DIM = 3, 2, 16


def layer(**given: Any) -> SimpleNamespace:
    """SGLang's RadixAttention without scales, but for what is given."""
    scales = {"k_scale": None, "v_scale": None}
    scales |= {"k_scale_float": None, "v_scale_float": None}
    return SimpleNamespace(layer_id=1, **{**scales, **given})


def pool(dtype: torch.dtype) -> ArenaKVPool:
    """A pool of a page."""
    shape = {"num_kv_heads": HEADS, "head_dim": DIM, "layer_num": LAYERS}
    return ArenaKVPool(16, dtype=dtype, device="cpu", **shape)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (1.0, 1.0)),
        (
            {
                "k_scale": torch.tensor(0.5),
                "v_scale": torch.tensor(0.25),
                "k_scale_float": 0.5,
                "v_scale_float": 0.25,
            },
            (0.5, 0.25),
        ),
        # Some models set numbers, and no others beside them.
        ({"k_scale": 0.5, "v_scale": 2}, (0.5, 2.0)),
        ({"k_scale": torch.tensor([0.5])}, (0.5, 1.0)),
    ],
)
def test_scales_are_read_where_sglang_keeps_them(
    given: dict[str, Any], found: tuple[float, float]
) -> None:
    assert layer_scales(layer(**given)) == found


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan, torch.ones(2)])
def test_a_scale_that_is_no_scale_is_refused(wrong: Any) -> None:
    with pytest.raises(UnsupportedModeError, match=r"one v_scale above 0.*layer 1"):
        layer_scales(layer(v_scale=wrong))


def test_the_pool_keeps_them_on_host_and_device() -> None:
    narrow = pool(E4M3)
    assert narrow.scales_of(1) == (1.0, 1.0)
    narrow.set_scales({1: KVScales(0.5, 0.25)})
    assert narrow.scales_of(1) == (0.5, 0.25)
    assert narrow.arena.scales is not None
    assert narrow.arena.scales.tolist() == [[1, 0.5, 1], [1, 0.25, 1]]


def test_other_caches_have_none() -> None:
    """A checkpoint may have scales that nobody asked for."""
    wide = pool(torch.bfloat16)
    wide.set_scales({1: KVScales(0.5, 0.25)})
    assert wide.arena.scales is None
    q = torch.randn(4, 2 * HEADS, DIM).bfloat16()
    assert fa3_inputs(wide, q, layer(), 3, HEADS) == (q, {})
    assert flashinfer_scales(wide, layer()) == {}


def test_stock_kernels_get_what_sglang_gives_them() -> None:
    """FA3 queries in e4m3 and a scale a sequence and head; FlashInfer numbers."""
    narrow = pool(E4M3)
    narrow.set_scales({1: KVScales(0.5, 0.25)})
    q = torch.randn(4, 2 * HEADS, DIM).bfloat16()
    q[0, 0, 0] = 1e4
    query, descales = fa3_inputs(narrow, q, layer(), 3, HEADS)
    assert query.dtype == E4M3
    assert query[0, 0, 0].float() == 448
    assert torch.equal(query[1:].float(), q[1:].to(E4M3).float())
    for name, scale in (("k_descale", 0.5), ("v_descale", 0.25)):
        assert descales[name].dtype == torch.float32
        assert torch.equal(descales[name], torch.full((3, HEADS), scale))
    assert flashinfer_scales(narrow, layer()) == {"k_scale": 0.5, "v_scale": 0.25}
