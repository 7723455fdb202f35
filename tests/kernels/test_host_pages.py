"""Pages of the pool in host memory and back: bit by bit, in the order that is said."""

import pytest
import torch

from sglang_kvc.kernels.kv_dtype import E4M3, stored_bytes
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.memory.host_pages import AT_ONCE, HostPages
from sglang_kvc.sessions.host import Copy

PAGES = 100


def tokens(pages: list[int], device: str) -> torch.Tensor:
    """Token ids of pages of the pool."""
    ids = torch.tensor(pages)[:, None] * 16 + torch.arange(16)
    return ids.flatten().to(device)


def make_arena(device: str, dtype: torch.dtype = torch.bfloat16) -> Arena:
    shape = (PAGES, 2, 3, 16, 8)
    k, v = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
    return Arena(k=k, v=v, score=torch.rand(shape[:-1]).to(device), scales=None)


def cells(arena: Arena) -> list[torch.Tensor]:
    return [stored_bytes(part).clone() for part in arena.cells]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, E4M3])
def test_pages_come_back_bit_by_bit(device: str, dtype: torch.dtype) -> None:
    """To other pages of the pool, through scattered ones of host memory."""
    arena = make_arena(device, dtype)
    host, before = HostPages(arena, 1.0), cells(arena)
    assert host.count == PAGES - 1
    order = torch.randperm(PAGES - 1)
    count = AT_ONCE + 7
    from_, to = (1 + order[:count]).tolist(), (1 + order[-count:]).tolist()
    slots = [*range(5, 5 + count // 2), *range(60, 60 + count - count // 2)]
    host.copy_all([Copy(slots, tokens(from_, device), to_host=True)])
    for now, then in zip(cells(arena), before, strict=True):
        assert torch.equal(now, then)
    host.copy_all([Copy(slots, tokens(to, device), to_host=False)])
    others = [page for page in range(PAGES) if page not in to]
    for now, then in zip(cells(arena), before, strict=True):
        assert torch.equal(now[to], then[from_])
        assert torch.equal(now[others], then[others])


def test_copies_are_made_in_their_order(device: str) -> None:
    """What comes back may take the pages, here and there, of what goes."""
    arena = make_arena(device)
    host, before = HostPages(arena, 0.1), cells(arena)
    host.copy_all([Copy([3], tokens([10], device), to_host=True)])
    swap = [
        Copy([4], tokens([20], device), to_host=True),
        Copy([3], tokens([20], device), to_host=False),
        Copy([3], tokens([30], device), to_host=True),
    ]
    host.copy_all([*swap, Copy([4, 3], tokens([40, 41], device), to_host=False)])
    for now, then in zip(cells(arena), before, strict=True):
        assert torch.equal(now[[20, 40, 41]], then[[10, 20, 30]])
