"""`follow_positions`: where survivors stand, against a dictionary of arena rows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

from sglang_kvc.kernels.held import (
    FollowedRequest,
    Held,
    KeptPositions,
    follow_positions_ref,
    follow_positions_triton,
    thousandths_ref,
    thousandths_triton,
)
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables

HEADS, NUM_PAGES, LONGEST = 6, 1200, 18_000
FORMS = [
    follow_positions_ref,
    pytest.param(follow_positions_triton, marks=pytest.mark.interpreter),
]
each_form = pytest.mark.parametrize("form", FORMS)


class Asked(NamedTuple):
    """A request: its packed pages, those of its folded tail, and what it asks."""

    packed: list[int]
    tail: list[int]
    tokens: int
    fold_old: int = 160
    part: float = 0.5
    """Of its KVs that survive."""

    @property
    def fold_new(self) -> int:
        return self.fold_old + len(self.tail) * PAGE_SIZE


def first(tail: Sequence[int], tokens: int, part: float = 0.5) -> Asked:
    """At its first pass nothing is packed."""
    return Asked([], list(tail), tokens, fold_old=0, part=part)


class Followed(NamedTuple):
    """Arguments of a call, and what must come of it, by request."""

    tables: BlockTables
    rows: torch.Tensor
    requests: list[FollowedRequest]
    positions: list[list[int]]
    holders: list[list[int]]


def stands(asked: Asked, known: Sequence[int]) -> dict[int, int]:
    """Where every KV stands: what is packed as is known, the tail in order."""
    page_cells = HEADS * PAGE_SIZE
    found = {}
    for ordinal, page in enumerate(asked.packed):
        for i in range(page_cells):
            found[page * page_cells + i] = known[ordinal * page_cells + i]
    for i, page in enumerate(asked.tail):
        for row in range(page * page_cells, (page + 1) * page_cells):
            found[row] = asked.fold_old + i * PAGE_SIZE + row % PAGE_SIZE
    return found


def make(batch: Sequence[Asked], device: str) -> Followed:
    """Tables and survivors of a batch; slots and survivors that nobody asks about."""
    slots = len(batch) + 2
    tokens = torch.full((slots, LONGEST), -1, dtype=torch.int32)
    ints = {"dtype": torch.int32, "device": device}
    rows = [torch.full((HEADS * PAGE_SIZE,), -1)]
    requests, positions, holders = [], [], []
    for r, asked in enumerate(batch):
        slot, size = slots - 1 - r, len(asked.packed) * HEADS * PAGE_SIZE
        known = torch.randint(0, max(asked.fold_old, 1), (size,))
        where = stands(asked, known.tolist())
        for i, page in enumerate(asked.tail):
            begin = asked.fold_old + i * PAGE_SIZE
            ids = torch.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            tokens[slot, begin : begin + PAGE_SIZE] = ids
        kept = round(len(where) * asked.part)
        own = torch.tensor(sorted(where), dtype=torch.int64)
        own = own[torch.randperm(len(where))[:kept]]
        before = None
        if asked.packed:
            pages = torch.tensor(asked.packed, device=device)
            before = KeptPositions(pages, known.int().to(device))
        folds, base = (asked.fold_old, asked.fold_new), sum(map(len, rows))
        requests.append(FollowedRequest(slot, *folds, asked.tokens, base, kept, before))
        rows += [own, torch.full((HEADS * PAGE_SIZE,), -1)]
        expected = [where[row] for row in own.tolist()]
        positions.append(expected)
        counts = [0] * asked.fold_new + [HEADS] * max(asked.tokens - asked.fold_new, 0)
        for position in expected:
            counts[position] += 1
        holders.append(counts[: asked.tokens])
    offsets = torch.zeros(slots, HEADS + 1, **ints)
    tables = BlockTables(tokens.to(device), offsets[:, 0], offsets, offsets)
    return Followed(tables, torch.cat(rows).to(**ints), requests, positions, holders)


def check(form: Callable[..., Held], batch: Sequence[Asked], device: str) -> None:
    made = make(batch, device)
    held = form(made.tables, made.rows, made.requests, num_pages=NUM_PAGES)
    assert [own.tolist() for own in held.positions] == made.positions
    assert held.holders.tolist() == sum(made.holders, [])
    assert {part.dtype for part in (*held.positions, held.holders)} == {torch.int32}


@each_form
@pytest.mark.parametrize("tokens", [0, 1, 90, 170, 300])
@pytest.mark.parametrize("packed", [[7, 2, 9], []], ids=["packed", "first"])
def test_survivors_stand_where_they_stood(
    form: Callable[..., Held], packed: list[int], tokens: int, device: str
) -> None:
    """One request; its prompt ends before, within and behind what is folded."""
    fold_old = 160 if packed else 0
    check(form, [Asked(packed, [4, 11], tokens, fold_old)], device)


BATCHES = {
    "sizes": [
        first([1], 3),
        Asked([2], [3], 170),
        Asked(list(range(10, 40)), list(range(40, 57)), 400),
        Asked([5, 4], [7, 6, 8], 0),
    ],
    "none known": [first([3, 1], 40), first([2], 16), first([9, 8, 7, 6], 64)],
    "no survivor": [
        Asked([2], [3], 50, part=0),
        first([8, 4], 33),
        first([5], 1, part=0),
    ],
    "nothing survives": [first([5], 9, part=0), Asked([1], [2], 20, part=0)],
    "no token": [first([5], 0), Asked([1], [2], 0)],
    "nothing folded": [Asked([4, 2], [], 200), first([7], 8)],
    # More pages, tokens and survivors than a program takes.
    "blocks": [first([3], 20), first(range(20, 1100), 17_500, part=0.02)],
    "no request": [],
}


@each_form
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_requests_of_a_launch_keep_apart(
    form: Callable[..., Held], batch: list[Asked], device: str
) -> None:
    check(form, batch, device)


@each_form
def test_requests_may_share_pages_of_their_prompts(
    form: Callable[..., Held], device: str
) -> None:
    """The prefix tree's, which one has folded further than the other one.

    The third has packed a page before they come: its tail has another beginning.
    """
    prompt = list(range(50, 60))
    batch = [
        first([*prompt, 1, 2], 200),
        first([*prompt[:6], 3], 100),
        Asked([4, 5], [*prompt[4:], 6], 250, fold_old=4 * PAGE_SIZE),
    ]
    check(form, batch, device)


@each_form
def test_positions_are_tensors_of_their_own(
    form: Callable[..., Held], device: str
) -> None:
    """A request that ends gives its memory back, whoever shared the launch."""
    made = make(BATCHES["sizes"], device)
    held = form(made.tables, made.rows, made.requests, num_pages=NUM_PAGES)
    for own, request in zip(held.positions, made.requests, strict=True):
        assert own.untyped_storage().nbytes() == 4 * request.kept


@pytest.mark.parametrize(
    "form",
    [
        thousandths_ref,
        pytest.param(thousandths_triton, marks=pytest.mark.interpreter),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 1023, 1025])
def test_thousandths_are_of_all_heads_and_halves_go_up(
    form: Callable[..., torch.Tensor], tokens: int, ranks: int, device: str
) -> None:
    heads = 16
    by_rank = torch.randint(heads + 1, (tokens, ranks), dtype=torch.int32)
    everything = heads * ranks
    expected = [
        (held * 1000 + everything // 2) // everything
        for held in by_rank.sum(1).tolist()
    ]
    shares = form(by_rank.to(device), heads=everything)
    assert shares.tolist() == expected
    assert shares.dtype == torch.int16
