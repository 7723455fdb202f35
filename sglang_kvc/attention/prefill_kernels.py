"""Which device attends with what in prefill; nothing else asks for the device."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from sglang.srt.utils import get_device_capability

from sglang_kvc.attention.prefill import (
    FlashAttention3Prefill,
    FlashInferPrefill,
    Folds,
    PrefillKernel,
)
from sglang_kvc.attention.prefill_packed import FlashAttention3PackedPrefill
from sglang_kvc.attention.prefill_torch import (
    PackedPrompts,
    TorchPrefill,
    WholePrompts,
)
from sglang_kvc.kernels.layout import BlockTables
from sglang_kvc.memory.kv_pool import ArenaKVPool

HOPPER = 9
"""Major compute capability."""


class PrefillKernels(NamedTuple):
    """The prefill attention of a device.

    Attributes
    ----------
    whole : for a batch in which nothing is packed yet.
    packed : for one in which something is; None if the device has no kernel for it, so
        that prompts have to stay whole.
    """

    whole: PrefillKernel[Any]
    packed: PrefillKernel[Any] | None

    def of(self, folds: Folds) -> PrefillKernel[Any]:
        """The kernel for a batch with these folds."""
        if folds and self.packed is not None:
            return self.packed
        return self.whole


class PrefillDevice(enum.Enum):
    """Kinds of device, with the names of their kernels.

    Attributes
    ----------
    whole : for prompts in which nothing is packed yet.
    packed : for those in which something is; None if there is none.
    """

    CPU = ("torch SDPA", "torch SDPA, per head")
    HOPPER = ("FlashAttention-3", "FlashAttention-3, per head")
    OTHER_NVIDIA = ("FlashInfer", None)

    def __init__(self, whole: str, packed: str | None) -> None:
        self.whole, self.packed = whole, packed


def prefill_device(on_gpu: bool) -> PrefillDevice:
    """Kind of this machine's device; `on_gpu` says whether the pool is on its GPU."""
    if not on_gpu:
        return PrefillDevice.CPU
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
        whole=FlashInferPrefill(pool, tables.req_to_token), packed=None
    )
