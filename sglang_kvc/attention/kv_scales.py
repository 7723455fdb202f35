"""Scales of an e4m3 cache: where SGLang keeps them, and how stock kernels take them.

A checkpoint or ``--quantization-param-path`` gives an attention layer k_scale and
v_scale, one number each. The cache holds k / k_scale and v / v_scale; without scales
both are 1. Prefill on a GPU follows SGLang's backends: FlashAttention-3 multiplies
queries in e4m3 and takes the scales as tensors, FlashInfer converts K and V and takes
numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sglang_kvc.errors import UnsupportedModeError
from sglang_kvc.kernels.kv_dtype import E4M3, narrow_ref
from sglang_kvc.memory.kv_pool import ArenaKVPool, KVScales


def layer_scales(layer: Any) -> KVScales:
    """Scales of an attention layer.

    Parameters
    ----------
    layer : SGLang's RadixAttention. `k_scale` is a tensor with `k_scale_float` beside
        it, or a number (``load_kv_cache_scales`` of some models), or None for 1.

    Raises
    ------
    UnsupportedModeError
        If a scale is not one finite number above 0.
    """
    return KVScales(*(_one_scale(layer, name) for name in ("k_scale", "v_scale")))


def _one_scale(layer: Any, name: str) -> float:
    scale = getattr(layer, f"{name}_float", None)
    if scale is None:
        scale = getattr(layer, name, None)
    if isinstance(scale, torch.Tensor) and scale.numel() == 1:
        scale = scale.item()
    if scale is None:
        return 1.0
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UnsupportedModeError(
            f"--kv-compress needs one {name} above 0 for all heads of a layer, got "
            f"{str(scale)[:100]} in layer {layer.layer_id}; serve the model with "
            "--kv-cache-dtype bf16"
        )
    return float(scale)


def fa3_inputs(
    pool: ArenaKVPool, q: torch.Tensor, layer: Any, sequences: int, heads: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Queries and further arguments of ``flash_attn_with_kvcache``.

    Beside an e4m3 cache queries are cast to e4m3, as SGLang does it; those above 448,
    of which SGLang makes NaN, become 448.

    Parameters
    ----------
    pool : the KV pool.
    q : [rows, heads, D].
    layer : SGLang's RadixAttention.
    sequences, heads : of the call, KV heads.

    Returns
    -------
    `q` as it is and nothing, unless the cache is e4m3.
    """
    scales = pool.arena.scales
    if scales is None:
        return q, {}
    own = scales[:, layer.layer_id - pool.start_layer, None, None]
    k_descale, v_descale = own.expand(-1, sequences, heads)
    descales = {"k_descale": k_descale, "v_descale": v_descale}
    return narrow_ref(q, None, E4M3), descales


def flashinfer_scales(pool: ArenaKVPool, layer: Any) -> dict[str, float]:
    """Further arguments of ``run`` of FlashInfer's wrapper."""
    if pool.arena.scales is None:
        return {}
    scales = pool.scales_of(layer.layer_id)
    return {"k_scale": scales.k, "v_scale": scales.v}
