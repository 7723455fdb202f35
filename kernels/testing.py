"""Random valid arenas, tables and plans: the input builder of tests and benches."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_kvc.kernels import query_ring as rings
from sglang_kvc.kernels.kv_dtype import E4M3, stored_bytes
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.pass_plan import PassRequest, build_plan
from sglang_kvc.kernels.query_ring import (
    QueryRing,
    load_queries_ref,
    ring_pages,
    store_queries_ref,
)

NAN_BYTE = 0x7F
"""NaN in e4m3."""


class Case(NamedTuple):
    """A batch of requests in an arena. Request r has slots[r], seq_lens[r] and so on.

    Cells that no request owns hold NaN (K, V) and -1 (score): reading one shows.
    ``query_ring`` lies in memory of its own; every slot but the padding's has one.
    ``group``: query heads of a KV head. ``query_dtype`` is that of the model.
    """

    arena: Arena
    tables: BlockTables
    query_ring: QueryRing
    group: int
    query_dtype: torch.dtype
    slots: list[int]
    seq_lens: list[int]
    folds: list[int]
    packed_pages: list[int]
    free_pages: list[int]

    @property
    def queries(self) -> torch.Tensor:
        """What passes see of all rings, [slots, L, w, Hq, D]; the padding's is 0."""
        slots, window = len(self.query_ring.pages), self.query_ring.window
        device = self.arena.k.device
        each = torch.arange(slots, device=device).repeat_interleave(window)
        found = load_queries_ref(
            self.query_ring,
            each,
            torch.arange(window, device=device).repeat(slots),
            group=self.group,
            head_dim=self.arena.head_dim,
            dtype=rings.query_dtype(self.arena),
        ).unflatten(0, (slots, window))
        found[0] = 0
        return found.transpose(1, 2)


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


class Deal(NamedTuple):
    """Who has which page: request r has slots[r], packed[r] and tails[r]."""

    seq_lens: list[int]
    folds: list[int]
    slots: list[int]
    packed: list[list[int]]
    tails: list[list[int]]
    free: list[int]

    @property
    def num_slots(self) -> int:
        """Slots of the tables, with the padding's and one that nobody has."""
        return len(self.slots) + 2

    @property
    def num_pages(self) -> int:
        """Pages of the arena, with the padding's."""
        return 1 + sum(map(len, (*self.packed, *self.tails, self.free)))

    def tail_tokens(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions behind the fold of request r, and the arena's tokens of them."""
        pos = torch.arange(self.folds[r], self.seq_lens[r])
        pages = torch.tensor(self.tails[r], dtype=torch.int64)
        page = pages[(pos - self.folds[r]) // PAGE_SIZE]
        return pos, page * PAGE_SIZE + pos % PAGE_SIZE


def deal_pages(
    seq_lens: Sequence[int],
    folds: Sequence[int],
    packed_pages: Sequence[int],
    spare_pages: int | None,
    rng: random.Random,
) -> Deal:
    """Give every request a slot and its pages; arguments are those of `make_case`."""
    tails = [-(-(n - f) // PAGE_SIZE) for n, f in zip(seq_lens, folds, strict=True)]
    owned = sum(tails) + sum(packed_pages)
    total = owned + (owned if spare_pages is None else spare_pages)
    pages = rng.sample(range(1, total + 1), total)
    requests = len(seq_lens)
    slots = rng.sample(range(1, requests + 2), requests)
    packed_of, tail_of = [], []
    for packed, tail in zip(packed_pages, tails, strict=True):
        packed_of.append([pages.pop() for _ in range(packed)])
        tail_of.append([pages.pop() for _ in range(tail)])
    return Deal(list(seq_lens), list(folds), slots, packed_of, tail_of, pages)


def fill_tables(
    deal: Deal,
    heads: int,
    skew: float,
    rng: random.Random,
    generator: torch.Generator,
) -> BlockTables:
    """Write who has which page, and split packed blocks over `heads`, L * H.

    Cells that say nothing of a request are random: stale.
    """
    slots, pages = deal.num_slots, deal.num_pages
    max_len = max(deal.seq_lens) + PAGE_SIZE
    max_pages = max(map(len, deal.tails)) + max(map(len, deal.packed)) + 1
    stale = {"generator": generator, "dtype": torch.int32}
    tables = BlockTables(
        req_to_token=torch.randint(0, pages * PAGE_SIZE, (slots, max_len), **stale),
        fold_lens=torch.zeros(slots, dtype=torch.int32),
        block_offsets=torch.zeros(slots, heads + 1, dtype=torch.int32),
        packed_pages=torch.randint(0, pages, (slots, max_pages), **stale),
    )
    tables.req_to_token[0] = 0
    for r, slot in enumerate(deal.slots):
        packed, blocks = deal.packed[r], deal.folds[r] // PAGE_SIZE
        counts = _deal_blocks(len(packed) * heads, blocks, heads, skew, rng)
        pos, token = deal.tail_tokens(r)
        tables.fold_lens[slot] = deal.folds[r]
        tables.packed_pages[slot, : len(packed)] = torch.tensor(packed).int()
        tables.block_offsets[slot, 1:] = torch.tensor(counts).cumsum(0)
        tables.req_to_token[slot, pos] = token.int()
    return tables


def fill_arena(
    deal: Deal,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Arena:
    """Draw what the requests own, on the generator's device; poison the rest.

    Scales of an e4m3 arena differ from 1 and from layer to layer.
    """
    owned = torch.zeros(deal.num_pages, PAGE_SIZE, dtype=torch.bool)
    owned[0] = True
    for r, packed in enumerate(deal.packed):
        _, token = deal.tail_tokens(r)
        owned[packed] = True
        owned.view(-1)[token] = True

    drawn = {"generator": generator, "device": generator.device}
    shape = (deal.num_pages, layers, kv_heads, PAGE_SIZE)
    wide = torch.bfloat16 if dtype == E4M3 else dtype
    k, v = (torch.randn(*shape, head_dim, dtype=wide, **drawn) for _ in range(2))
    score = torch.rand(shape, **drawn)
    free = ~owned[:, None, None, :].to(generator.device)
    for cells in (k, v):
        cells.masked_fill_(free[..., None], torch.nan)
        cells[0] = 0
    score.masked_fill_(free, -1.0)
    if dtype != E4M3:
        return Arena(k, v, score)
    scales = 0.5 + torch.rand(2, layers, **drawn)
    return Arena(k.to(E4M3), v.to(E4M3), score, scales)


def fill_ring(
    queries: torch.Tensor, arena: Arena, generator: torch.Generator
) -> QueryRing:
    """Rings of all slots but the padding's, in shuffled pages of their own.

    `queries` [slots, L, w, Hq, D] are what is stored; cells between rings are noise.
    """
    slots, layers, window, num_heads, head_dim = queries.shape
    heads, device = arena.num_kv_heads, queries.device
    size = arena.k.element_size()
    each = ring_pages(window, num_heads // heads, size)
    pages = torch.randperm((slots - 1) * each, generator=generator, device=device) + 1
    shape = (1 + len(pages), layers, heads, PAGE_SIZE * head_dim * size)
    noise = {"generator": generator, "device": device, "dtype": torch.uint8}
    k, v = (torch.randint(0, 256, shape, **noise) for _ in range(2))
    table = torch.cat([pages.new_zeros(each), pages]).view(slots, each).int()
    ring = QueryRing(k, v, table, window)
    each_slot = torch.arange(slots, device=device).repeat_interleave(window)
    rows = torch.arange(window, device=device).repeat(slots)
    for layer in range(layers):
        asked = queries[:, layer].flatten(0, 1)
        store_queries_ref(ring, each_slot, rows, asked, layer=layer)
    return ring


def random_ring(slots: int, window: int, num_heads: int, arena: Arena) -> QueryRing:
    """Rings of random queries, `num_heads` a layer, beside an arena."""
    generator = torch.Generator(arena.k.device).manual_seed(0)
    shape = (slots, arena.num_layers, window, num_heads, arena.head_dim)
    drawn = {"generator": generator, "device": arena.k.device}
    queries = torch.randn(shape, dtype=rings.query_dtype(arena), **drawn)
    return fill_ring(queries, arena, generator)


def make_case(
    seq_lens: Sequence[int],
    folds: Sequence[int] | None = None,
    *,
    layers: int,
    kv_heads: int = 2,
    group: int,
    head_dim: int,
    packed_pages: Sequence[int] | None = None,
    skew: float = 2.0,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    window: int = 8,
    spare_pages: int | None = None,
    poison_padding: bool = False,
) -> Case:
    """Build a random batch; pages, slots and stale table cells are all shuffled.

    Parameters
    ----------
    seq_lens : [R] logical tokens.
    folds : [R] of them that are packed, multiples of 16; 0 (default): uncompressed.
    layers, kv_heads : L, H; a page has a block for each of the L * H heads.
    group : query heads a KV head.
    packed_pages : [R] pages of the packed blocks, at most fold / 16, which is
        halved (rounded up) by default.
    skew : exponent of the heads' random weights; 0 makes heads equal.
    dtype, query_dtype : of K and V, and of the model; the same by default.
    window : w, rows of the query ring.
    spare_pages : free pages for packing; the packed and folded pages by default.
    poison_padding : fill the padding page with NaN, so that reading it shows.
    """
    rng = random.Random(seed)
    folds = [0] * len(seq_lens) if folds is None else folds
    if packed_pages is None:
        packed_pages = [(fold // PAGE_SIZE + 1) // 2 for fold in folds]
    deal = deal_pages(seq_lens, folds, packed_pages, spare_pages, rng)
    host = torch.Generator().manual_seed(seed)
    tables = fill_tables(deal, layers * kv_heads, skew, rng, host)

    # The big tensors are made where they live.
    generator = torch.Generator(device).manual_seed(seed)
    arena = fill_arena(deal, layers, kv_heads, head_dim, dtype, generator)
    if poison_padding:
        for cells in (stored_bytes(arena.k), stored_bytes(arena.v), arena.score):
            cells[0] = torch.nan if cells.is_floating_point() else NAN_BYTE
    ring_shape = (deal.num_slots, layers, window, kv_heads * group, head_dim)
    model_dtype = query_dtype or dtype
    queries = torch.randn(
        ring_shape, dtype=model_dtype, generator=generator, device=device
    )
    return Case(
        arena=arena,
        tables=BlockTables(*(table.to(device) for table in tables)),
        query_ring=fill_ring(queries, arena, generator),
        group=group,
        query_dtype=model_dtype,
        slots=deal.slots,
        seq_lens=deal.seq_lens,
        folds=deal.folds,
        packed_pages=list(packed_pages),
        free_pages=deal.free,
    )


def make_plan(
    case: Case,
    keep_pages: Sequence[int] | None = None,
    fold_new: Sequence[int] | None = None,
    protected: int = 8,
    query_start: Sequence[int] | None = None,
    repeated: Sequence[bool] | None = None,
    spare: float = 0.0,
) -> PassPlan:
    """Plan one eviction pass over all requests of `case`.

    Parameters
    ----------
    keep_pages : [R] pages to keep; half of those that compete by default.
    fold_new : [R] fold lengths after the pass; all whole pages by default.
    query_start : [R]; 0 by default, so that the ring's w last queries count.
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
            )
        )
    return build_plan(requests, case.arena.heads_per_page, case.arena.k.device)
