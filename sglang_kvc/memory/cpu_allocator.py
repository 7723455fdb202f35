"""SGLang's paged allocator with its two Triton launches done in torch, for the CPU."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """Stock page accounting; only `alloc_extend` and `alloc_decode` are replaced.

    New positions of a request continue the page of its last token and then take
    whole pages from the head of the free list, request by request.
    """

    free_pages: torch.Tensor

    def _take(self, num_pages: int) -> torch.Tensor | None:
        if num_pages > len(self.free_pages):
            return None
        taken = self.free_pages[:num_pages]
        self.free_pages = self.free_pages[num_pages:]
        return taken

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Token ids of positions [prefix, seq) of every request, int64, or None."""
        size = self.page_size
        first_page = (prefix_lens_cpu + size - 1) // size
        last_page = (seq_lens_cpu + size - 1) // size
        pages = self._take(int((last_page - first_page).sum()))
        if pages is None:
            return None
        extend = seq_lens_cpu - prefix_lens_cpu
        request = torch.repeat_interleave(torch.arange(len(extend)), extend)
        start = torch.cumsum(extend, 0) - extend
        position = torch.arange(extend_num_tokens) - start[request]
        position += prefix_lens_cpu[request]
        # Pages of request r are taken[page_start[r] :], its first one at first_page[r].
        page_start = torch.cumsum(last_page - first_page, 0) - (last_page - first_page)
        index = position // size - first_page[request]
        fresh = index >= 0
        in_page = last_loc.cpu()[request] + 1 + position - prefix_lens_cpu[request]
        if len(pages):
            taken = pages.cpu()[(index.clamp(min=0) + page_start[request]) * fresh]
            in_page = torch.where(fresh, taken * size + position % size, in_page)
        return in_page.to(device=self.device, dtype=torch.int64)

    def alloc_decode(
        self,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
    ) -> torch.Tensor | None:
        """Token id of position seq_len - 1 of every request, int64 [bs], or None."""
        fresh = (seq_lens_cpu - 1) % self.page_size == 0
        pages = self._take(int(fresh.sum()))
        if pages is None:
            return None
        out = last_loc.to(torch.int64) + 1
        out[fresh.to(out.device)] = pages * self.page_size
        return out
