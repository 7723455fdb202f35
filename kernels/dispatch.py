"""Choose which implementation of an op runs: Triton or plain torch."""

import os

import torch

FORCE_REFERENCE = "SGLANG_KVC_FORCE_REFERENCE"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernel.

    CPU tensors always take the reference; CUDA tensors take it only when the
    environment variable ``SGLANG_KVC_FORCE_REFERENCE`` is 1, to bisect a numerical bug
    (the references read device values, so CUDA graphs must be off then).
    """
    return tensor.is_cuda and os.environ.get(FORCE_REFERENCE) != "1"
