"""Pages of the pool in host memory, for `sessions.host`.

They are copied on the stream of the forward, so nobody waits for them and none of the
forward's own pages are read or written too early. A page's parts lie where the
allocator has put it, a snapshot's pages in host memory mostly side by side. So some
pages at a time are gathered on the device and copied at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import psutil
import torch

from sglang_kvc.errors import ConfigError, Section, points_to
from sglang_kvc.kernels.kv_dtype import kernel_arena
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.sessions.host import Copy

logger = logging.getLogger(__name__)

AT_ONCE = 32
"""Pages that are gathered at a time: of an 8B model in bf16 32 MiB of K, then of V."""


class HostPages:
    """Host memory for K, V and scores of some pages; pinned if the pool is on a GPU.

    Parameters
    ----------
    arena : of the pool.
    ratio : its size, as a multiple of the pool's.

    Attributes
    ----------
    count : pages.

    Raises
    ------
    ConfigError
        If the machine has not as much memory.
    """

    @points_to(Section.MEMORY)
    def __init__(self, arena: Arena, ratio: float) -> None:
        self._device = kernel_arena(arena).cells
        pages = len(arena.k) - 1
        self.count = int(pages * ratio)
        page_bytes = sum(part[0].nbytes for part in self._device)
        self.bytes = self.count * page_bytes
        free = psutil.virtual_memory().available
        if self.bytes > free:
            raise ConfigError(
                f"--kv-compress-sessions-host {ratio:g} asks for {_gb(self.bytes)} "
                f"host memory, {ratio:g} times the KV pool; {_gb(free)} are free. "
                "Give a smaller number"
            )
        logger.info("Setting aside %s host memory for snapshots", _gb(self.bytes))
        self._host = tuple(self._like(part) for part in self._device)

    def _like(self, part: torch.Tensor) -> torch.Tensor:
        host = torch.empty((self.count, *part.shape[1:]), dtype=part.dtype)
        if part.is_cuda and self.count:
            # torch would pin the next power of 2 of it.
            cuda = torch.cuda.cudart()
            torch.cuda.check_error(
                cuda.cudaHostRegister(host.data_ptr(), host.nbytes, 0)
            )
        return host

    def copy_all(self, copies: Sequence[Copy]) -> None:
        """Copy, in this order (forward stream)."""
        for slots, tokens, to_host in copies:
            if tokens.is_cuda:
                # They were made on the scheduling stream, which may reuse their memory.
                tokens.record_stream(torch.cuda.current_stream())
            pages = tokens[::PAGE_SIZE] // PAGE_SIZE
            for at in range(0, len(slots), AT_ONCE):
                some = slice(at, at + AT_ONCE)
                self._copy(list(_runs(slots[some])), pages[some], to_host)

    def _copy(
        self, runs: list[tuple[int, int, int]], pages: torch.Tensor, to_host: bool
    ) -> None:
        for host, device in zip(self._host, self._device, strict=True):
            if to_host:
                gathered = device.index_select(0, pages)
            else:
                gathered = device.new_empty(len(pages), *device.shape[1:])
            for start, slot, count in runs:
                here, there = gathered[start : start + count], host[slot : slot + count]
                target, source = (there, here) if to_host else (here, there)
                target.copy_(source, non_blocking=True)
            if not to_host:
                device.index_copy_(0, pages, gathered)


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive numbers: where each starts, its first, its length."""
    start = 0
    for at in range(1, len(slots) + 1):
        if at == len(slots) or slots[at] != slots[at - 1] + 1:
            yield start, slots[start], at - start
            start = at


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
