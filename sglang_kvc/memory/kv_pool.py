"""The KV memory: one arena [num_pages, L, H, 16, D] for K and one for V.

SGLang sees a paged pool with page_size 16 and counts in tokens; the layout and the
address spaces are described in `kernels/layout.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import KVCache

from sglang_kvc.errors import UnsupportedModeError
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena


class KVScales(NamedTuple):
    """What stored keys and values of a layer are multiplied by, see ``kv_dtype``."""

    k: float
    v: float


class ArenaKVPool(KVCache):
    """SGLang's KV pool contract over the arena.

    Page 0 is SGLang's padding page and not part of `size`.

    Parameters
    ----------
    size : capacity in tokens, a multiple of 16.
    dtype : dtype of K and V: that of the model, or e4m3.
    num_kv_heads, head_dim, layer_num : shape of the model on this rank.
    device : where the arena lives.

    Attributes
    ----------
    arena : the tensors; see `kernels/layout.py`.
    runtime : set by the attention backend once every part exists.
    """

    runtime: Any = None

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype,
        num_kv_heads: int,
        head_dim: int,
        layer_num: int,
        device: str,
        start_layer: int | None = None,
        end_layer: int | None = None,
    ) -> None:
        super().__init__(
            size,
            PAGE_SIZE,
            dtype,
            layer_num,
            device,
            enable_memory_saver=False,
            start_layer=start_layer,
            end_layer=end_layer,
        )
        self.head_num, self.head_dim = num_kv_heads, head_dim
        pages = size // PAGE_SIZE + 1
        shape = (pages, layer_num, num_kv_heads, PAGE_SIZE, head_dim)
        # Zeros: masked lanes of a kernel may multiply unwritten values by zero.
        self.arena = Arena(
            k=torch.zeros(shape, dtype=dtype, device=device),
            v=torch.zeros(shape, dtype=dtype, device=device),
            score=torch.zeros(shape[:-1], dtype=torch.float32, device=device),
            scales=torch.ones(2, layer_num, device=device) if dtype == E4M3 else None,
        )
        self._scales = [KVScales(1.0, 1.0)] * layer_num
        self._finalize_allocation_log(size)

    @property
    def on_gpu(self) -> bool:
        """Whether the arena lives on a GPU."""
        return self.arena.k.is_cuda

    def set_scales(self, scales: Mapping[int, KVScales]) -> None:
        """Take the scales of an e4m3 cache, by SGLang's layer number; others are 1.

        Before the first KV is written. A cache of another dtype has none.
        """
        if self.arena.scales is None:
            return
        for layer_id, layer_scales in scales.items():
            self._scales[layer_id - self.start_layer] = layer_scales
        self.arena.scales.copy_(torch.tensor(self._scales).T)

    def scales_of(self, layer_id: int) -> KVScales:
        """Scales of a layer, on the host: 1 unless the cache is e4m3."""
        return self._scales[layer_id - self.start_layer]

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of K and of V."""
        return self.arena.k.nbytes, self.arena.v.nbytes

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Paged view [num_pages, 16, H, D] of one layer's keys (strided, no copy)."""
        return self.arena.k[:, layer_id - self.start_layer].permute(0, 2, 1, 3)

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Paged view [num_pages, 16, H, D] of one layer's values (strided, no copy)."""
        return self.arena.v[:, layer_id - self.start_layer].permute(0, 2, 1, 3)

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`get_key_buffer` and `get_value_buffer`."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: only our attention backend writes KV (it also zeroes the score)."""
        raise UnsupportedModeError(
            "something tried to write KV past the kvcompress attention backend "
            "(a fused model kernel or another backend); this combination is not "
            "supported with --kv-compress"
        )
