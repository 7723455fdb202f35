"""Which device attends with what in prefill; nothing else asks for the device."""

from __future__ import annotations

import enum
import os
from typing import Any, NamedTuple

from sglang.srt.utils import get_device_capability

from sglang_kvc.attention.prefill import (
    FlashAttention3Prefill,
    FlashInferPrefill,
    Folds,
    PrefillKernel,
)
from sglang_kvc.attention.prefill_packed import (
    FlashAttention3PackedPrefill,
    TritonPackedPrefill,
)
from sglang_kvc.attention.prefill_torch import (
    PackedPrompts,
    TorchPrefill,
    WholePrompts,
)
from sglang_kvc.errors import ConfigError
from sglang_kvc.kernels.layout import BlockTables
from sglang_kvc.memory.kv_pool import ArenaKVPool

HOPPER = 9
"""Major compute capability."""
CHOICE = "SGLANG_KVC_PREFILL"
"""Environment variable that chooses on a GPU, in the place of its capability."""


class PrefillKernels(NamedTuple):
    """The prefill attention of a device.

    Attributes
    ----------
    whole : for a batch in which nothing is packed yet.
    packed : for one in which something is.
    """

    whole: PrefillKernel[Any]
    packed: PrefillKernel[Any]

    def of(self, folds: Folds) -> PrefillKernel[Any]:
        """The kernel for a batch with these folds."""
        return self.packed if folds else self.whole


class PrefillDevice(enum.Enum):
    """Kinds of device, with the names of their kernels.

    Attributes
    ----------
    whole : for prompts in which nothing is packed yet.
    packed : for those in which something is.
    """

    CPU = ("torch SDPA", "torch SDPA, per head")
    HOPPER = ("FlashAttention-3", "FlashAttention-3, per head")
    OTHER_NVIDIA = ("FlashInfer", "Triton, per head")

    def __init__(self, whole: str, packed: str) -> None:
        self.whole, self.packed = whole, packed


CHOICES = {"fa3": PrefillDevice.HOPPER, "flashinfer": PrefillDevice.OTHER_NVIDIA}


def prefill_device(on_gpu: bool) -> PrefillDevice:
    """Kind of this machine's device; `on_gpu` says whether the pool is on its GPU.

    Raises
    ------
    ConfigError
        If the environment variable `CHOICE` has a value that nobody knows.
    """
    chosen = os.environ.get(CHOICE, "")
    if chosen and chosen not in CHOICES:
        raise ConfigError(
            f"{CHOICE} must be {' or '.join(CHOICES)}, got {chosen[:100]!r}; leave it "
            "out to let the GPU decide"
        )
    if not on_gpu:
        return PrefillDevice.CPU
    if chosen:
        return CHOICES[chosen]
    if get_device_capability()[0] == HOPPER:
        return PrefillDevice.HOPPER
    return PrefillDevice.OTHER_NVIDIA


def prefill_kernels(pool: ArenaKVPool, tables: BlockTables) -> PrefillKernels:
    """The kernels for the pool's device, as `PrefillDevice` names them.

    Parameters
    ----------
    pool : the KV pool.
    tables : request table and block tables.
    """
    kind = prefill_device(pool.on_gpu)
    if kind is PrefillDevice.CPU:
        return PrefillKernels(
            whole=TorchPrefill(WholePrompts(pool, tables.req_to_token)),
            packed=TorchPrefill(PackedPrompts(pool, tables)),
        )
    if kind is PrefillDevice.HOPPER:
        return PrefillKernels(
            whole=FlashAttention3Prefill(pool, tables.req_to_token),
            packed=FlashAttention3PackedPrefill(pool, tables),
        )
    return PrefillKernels(
        whole=FlashInferPrefill(pool, tables.req_to_token),
        packed=TritonPackedPrefill(pool, tables),
    )
