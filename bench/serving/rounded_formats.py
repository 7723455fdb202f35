"""Linear layers rounded to nearest, in the layouts that SGLang 0.5.17 reads.

Each function takes a weight, float32 [out, in], and gives what replaces it, by the end
of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GROUP = 128
"""Inputs that share a scale; a block of fp8 has as many outputs, too."""
LARGEST_E4M3 = 448.0
SMALLEST_HALF = 2.0**-24
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is in which nibble of a word, lowest nibble first."""
GPTQ_ORDER = tuple(range(8))


def to_e4m3(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 nearest to `weight` / `scale`; scale: float32, broadcast over the weight."""
    # A quotient a little above the largest number must not become NaN.
    return (weight / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


def scale_e4m3(largest: torch.Tensor) -> torch.Tensor:
    """Scale, float32, that takes the largest magnitude to 448; zeros get one, too."""
    return (largest / LARGEST_E4M3).clamp(min=torch.finfo(torch.float32).tiny)


def fp8_tensor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """``weight``: e4m3 [out, in]; ``weight_scale``: float32 []."""
    scale = scale_e4m3(weight.abs().amax())
    return {"weight": to_e4m3(weight, scale), "weight_scale": scale}


def fp8_block(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """``weight``: e4m3 [out, in]; ``weight_scale_inv``: float32 [out / 128, in / 128].

    In spite of its name the weight is multiplied by ``weight_scale_inv``.
    """
    blocks = weight.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
    scale = scale_e4m3(blocks.abs().amax((1, 3), keepdim=True))
    return {
        "weight": to_e4m3(blocks, scale).reshape(weight.shape),
        "weight_scale_inv": scale[:, 0, :, 0].contiguous(),
    }


def half_at_least(steps: torch.Tensor) -> torch.Tensor:
    """Least float16 that is not below `steps` (float32, positive or zero) nor zero.

    A step rounded down would leave a group's ends further than half a step from the
    outermost levels.
    """
    near = steps.clamp(min=SMALLEST_HALF).half()
    # The bits of positive numbers are in their order.
    above = (near.view(torch.int16) + 1).view(torch.float16)
    return torch.where(near.float() < steps, above, near)


def packed(levels: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Eight levels of a row in a word.

    Parameters
    ----------
    levels : Tensor, any dtype, shape (n, m)
        Whole numbers from 0 to 15; m is divisible by 8.
    order : sequence of 8 int
        Nibble i of word c, from the lowest, is level 8 c + order[i].

    Returns
    -------
    Tensor, int32, shape (n, m / 8)
    """
    nibbles = levels.to(torch.int32).unflatten(1, (-1, 8))[..., list(order)]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    # Nibbles do not overlap: their sum is their union.
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """AWQ's "gemm" layout, packed along the outputs.

    ``qweight``: int32 [in, out / 8]; ``qzeros``: int32 [in / 128, out / 8];
    ``scales``: float16 [in / 128, out].
    """
    groups = weight.unflatten(1, (-1, GROUP))
    # With zero in the range, its level is one of the sixteen.
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = half_at_least((high - low) / 15)
    zeros = (-low / scales.float()).round()
    steps = (groups / scales.float()[..., None]).round()
    levels = (steps + zeros[..., None]).clamp(0, 15).flatten(1)
    return {
        "qweight": packed(levels.t(), AWQ_ORDER),
        "qzeros": packed(zeros.t(), AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQ's first format, weights packed along the inputs.

    ``qweight``: int32 [in / 8, out]; ``qzeros``: int32 [in / 128, out / 8];
    ``scales``: float16 [in / 128, out]; ``g_idx``: int32 [in].
    """
    groups = weight.unflatten(1, (-1, GROUP))
    # Levels are -8 to 7 steps: 7.5 steps are half a step from the end on either side.
    scales = half_at_least(groups.abs().amax(-1) / 7.5)
    levels = ((groups / scales.float()[..., None]).round() + 8).clamp(0, 15).flatten(1)
    # The first format stores the zero point, 8, less one.
    zeros = torch.full_like(scales.t(), 7)
    return {
        "qweight": packed(levels, GPTQ_ORDER).t().contiguous(),
        "qzeros": packed(zeros, GPTQ_ORDER),
        "scales": scales.t().contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


@dataclass(frozen=True)
class Format:
    """How one layer is rounded, and what config.json says of it."""

    round: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    config: dict[str, Any]
    multiples: tuple[int, int]
    """What a layer's outputs and inputs must be divisible by."""


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FOUR_BITS = {"bits": 4, "group_size": GROUP}
AWQ = {"quant_method": "awq", "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "sym": True, "desc_act": False}
FORMATS = {
    # Multiples of 16 are what CUTLASS multiplies, of 64 outputs what Marlin does.
    "fp8-tensor": Format(fp8_tensor, FP8, (16, 16)),
    "fp8-block": Format(
        fp8_block, {**FP8, "weight_block_size": [GROUP, GROUP]}, (GROUP, GROUP)
    ),
    "awq": Format(awq, {**AWQ, **FOUR_BITS}, (64, GROUP)),
    "gptq": Format(
        gptq, {**GPTQ, **FOUR_BITS, "checkpoint_format": "gptq"}, (64, GROUP)
    ),
}
