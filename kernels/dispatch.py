"""Which of the two implementations of an op runs: Triton or plain torch."""

import os
from functools import lru_cache

import torch
import triton

FORCE_REFERENCE = "SGLANG_KVC_FORCE_REFERENCE"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernel.

    CPU tensors always take the reference; CUDA tensors take it only when the
    environment variable ``SGLANG_KVC_FORCE_REFERENCE`` is 1, to bisect a numerical bug
    (the references read device values, so CUDA graphs must be off then).
    """
    return tensor.is_cuda and os.environ.get(FORCE_REFERENCE) != "1"


@lru_cache
def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel may be launched before the last one ends (sm_90 and later).

    This is programmatic dependent launch; Triton's interpreter does not know it.
    """
    if device.type != "cuda" or torch.version.hip or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
