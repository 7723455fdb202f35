"""Random valid arenas, tables and plans: the input builder of tests and benches."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.pass_plan import PassRequest, build_plan


class Case(NamedTuple):
    """A batch of requests in an arena. Request r has slots[r], seq_lens[r] and so on.

    Cells that no request owns hold NaN (K, V) and -1 (score), and ``query_lse`` holds
    NaN: reading one shows.
    """

    arena: Arena
    tables: BlockTables
    query_ring: torch.Tensor
    query_lse: torch.Tensor
    slots: list[int]
    seq_lens: list[int]
    folds: list[int]
    packed_pages: list[int]
    free_pages: list[int]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_ring.shape[3] // self.arena.num_kv_heads


def _deal_blocks(
    total: int, cap: int, heads: int, skew: float, rng: random.Random
) -> list[int]:
    """Split `total` blocks over heads, at most `cap` each; a high `skew` is uneven."""
    weights = [rng.random() ** skew for _ in range(heads)]
    counts = [min(cap, int(total * w / sum(weights))) for w in weights]
    missing = total - sum(counts)
    for h in rng.sample(range(heads), heads):
        extra = min(missing, cap - counts[h])
        counts[h] += extra
        missing -= extra
    return counts


def make_case(
    num_requests: int,
    L: int,
    H: int,
    G: int,
    D: int,
    seq_lens: Sequence[int],
    folds: Sequence[int] | None = None,
    packed_pages: Sequence[int] | None = None,
    skew: float = 2.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    window: int = 8,
    score_levels: int = 0,
    spare_pages: int | None = None,
) -> Case:
    """Build a random batch; pages, slots and stale table cells are all shuffled.

    Parameters
    ----------
    num_requests : R.
    L, H, G, D : layers, KV heads, query heads a KV head, head_dim.
    seq_lens : [R] logical tokens.
    folds : [R] of them that are packed, multiples of 16; 0 (default): uncompressed.
    packed_pages : [R] pages of the packed blocks, at most fold / 16, which is
        halved (rounded up) by default.
    skew : exponent of the heads' random weights; 0 makes heads equal.
    window : w, rows of the query ring.
    score_levels : draw stored scores from this many values; 0 makes them all differ.
    spare_pages : free pages for packing; the packed and folded pages by default.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    heads = L * H
    folds = list(folds) if folds is not None else [0] * num_requests
    if packed_pages is None:
        packed_pages = [(fold // PAGE_SIZE + 1) // 2 for fold in folds]
    tails = [-(-(n - f) // PAGE_SIZE) for n, f in zip(seq_lens, folds, strict=True)]
    owned = sum(tails) + sum(packed_pages)
    spare = owned if spare_pages is None else spare_pages
    pages = rng.sample(range(1, owned + spare + 1), owned + spare)

    num_slots = num_requests + 2
    slots = rng.sample(range(1, num_slots), num_requests)
    max_len = max(seq_lens) + PAGE_SIZE
    num_pages = owned + spare + 1
    req_to_token = torch.randint(
        0, num_pages * PAGE_SIZE, (num_slots, max_len), generator=generator
    ).int()
    req_to_token[0] = 0
    fold_lens = torch.zeros(num_slots, dtype=torch.int32)
    block_offsets = torch.zeros(num_slots, heads + 1, dtype=torch.int32)
    max_pages = max(tails) + max(packed_pages) + 1
    page_table = torch.randint(
        0, num_pages, (num_slots, max_pages), generator=generator
    ).int()
    cells_owned = torch.zeros(num_pages, heads, PAGE_SIZE, dtype=torch.bool)
    cells_owned[0] = True
    for r, slot in enumerate(slots):
        fold_lens[slot] = folds[r]
        packed = [pages.pop() for _ in range(packed_pages[r])]
        page_table[slot, : len(packed)] = torch.tensor(packed, dtype=torch.int32)
        counts = _deal_blocks(
            len(packed) * heads, folds[r] // PAGE_SIZE, heads, skew, rng
        )
        block_offsets[slot, 1:] = torch.tensor(counts).cumsum(0)
        tail = torch.tensor([pages.pop() for _ in range(tails[r])], dtype=torch.int64)
        pos = torch.arange(folds[r], seq_lens[r])
        token = tail[(pos - folds[r]) // PAGE_SIZE] * PAGE_SIZE + pos % PAGE_SIZE
        req_to_token[slot, pos] = token.int()
        cells_owned[packed] = True
        cells_owned[token // PAGE_SIZE, :, token % PAGE_SIZE] = True

    # The big tensors are made where they live.
    generator = torch.Generator(device).manual_seed(seed)
    random_like = {"generator": generator, "device": device}
    shape = (num_pages, L, H, PAGE_SIZE, D)
    k, v = (torch.randn(shape, dtype=dtype, **random_like) for _ in range(2))
    free = ~cells_owned.view(shape[:4]).to(device)
    for cells in (k, v):
        cells.masked_fill_(free[..., None], torch.nan)
        cells[0] = 0
    score = torch.rand(shape[:4], **random_like)
    if score_levels:
        score = (score * score_levels).floor() / score_levels
    score.masked_fill_(free, -1.0)
    ring_shape = (num_slots, L, window, H * G, D)
    return Case(
        arena=Arena(k, v, score),
        tables=BlockTables(
            req_to_token=req_to_token.to(device),
            fold_lens=fold_lens.to(device),
            block_offsets=block_offsets.to(device),
            packed_pages=page_table.to(device),
        ),
        query_ring=torch.randn(ring_shape, dtype=dtype, **random_like),
        query_lse=torch.full(ring_shape[:-1], torch.nan, device=device),
        slots=slots,
        seq_lens=list(seq_lens),
        folds=folds,
        packed_pages=list(packed_pages),
        free_pages=pages,
    )


def make_plan(
    case: Case,
    keep_pages: Sequence[int] | None = None,
    fold_new: Sequence[int] | None = None,
    protected: int = 8,
    query_start: Sequence[int] | None = None,
    recorded: Sequence[bool] | None = None,
    repeated: Sequence[bool] | None = None,
    spare: float = 0.0,
) -> PassPlan:
    """Plan one eviction pass over all requests of `case`.

    Parameters
    ----------
    keep_pages : [R] pages to keep; half of those that compete by default.
    fold_new : [R] fold lengths after the pass; all whole pages by default.
    query_start : [R]; 0 by default, so that the ring's w last queries count.
    recorded : [R]; False by default: no log2-sum-exp2 was recorded.
    repeated : [R]; False by default: new and stored scores are added.
    spare : part of what is kept that a group with a bound could lose as well.
    """
    requests: list[PassRequest] = []
    for r, slot in enumerate(case.slots):
        full = case.seq_lens[r] // PAGE_SIZE * PAGE_SIZE
        new = max(full if fold_new is None else fold_new[r], case.folds[r])
        held = case.packed_pages[r] + (new - case.folds[r]) // PAGE_SIZE
        keep = (held + 1) // 2 if keep_pages is None else keep_pages[r]
        requests.append(
            PassRequest(
                slot=slot,
                seq_len=case.seq_lens[r],
                fold_old=case.folds[r],
                fold_new=new,
                query_start=query_start[r] if query_start else 0,
                packed_pages=case.packed_pages[r],
                evict_pages=held - keep,
                evict_most_pages=held - keep + int(keep * spare),
                protected=protected,
                is_first=case.folds[r] == 0,
                repeated=bool(repeated[r]) if repeated else False,
                pool_tail=case.folds[r] == 0 or r % 2 == 0,
                recorded=bool(recorded[r]) if recorded else False,
            )
        )
    return build_plan(requests, case.arena.heads_per_page, case.arena.k.device)
