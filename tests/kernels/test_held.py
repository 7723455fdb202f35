"""`follow_positions`: where survivors stand, against a dictionary of arena rows."""

import pytest
import torch

from sglang_kvc.kernels.held import (
    follow_positions_ref,
    follow_positions_triton,
    page_ordinals,
)
from sglang_kvc.kernels.layout import PAGE_SIZE

HEADS = 6
PACKED, TAIL = [7, 2, 9], [4, 11]
FOLD = 160
FORMS = [
    follow_positions_ref,
    pytest.param(follow_positions_triton, marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 90, 170, 300])
@pytest.mark.parametrize("packed", [PACKED, []], ids=["packed", "first"])
def test_survivors_stand_where_they_stood(
    form, packed: list[int], tokens: int, device: str
) -> None:
    # Where every KV stands: what is packed anywhere below the fold, the tail in order.
    fold_old = FOLD if packed else 0
    stands = {}
    known = torch.randint(0, FOLD, (len(packed) * HEADS * PAGE_SIZE,))
    cells = iter(known.tolist())
    for page in packed:
        first = page * HEADS * PAGE_SIZE
        stands |= {first + i: next(cells) for i in range(HEADS * PAGE_SIZE)}
    for i, page in enumerate(TAIL):
        for lh in range(HEADS):
            for offset in range(PAGE_SIZE):
                row = (page * HEADS + lh) * PAGE_SIZE + offset
                stands[row] = fold_old + i * PAGE_SIZE + offset
    rows = torch.tensor(sorted(stands))[torch.randperm(len(stands))[: len(stands) // 2]]

    pages = torch.tensor([*packed, *TAIL], device=device)
    held = form(
        rows.int().to(device),
        page_ordinals(pages, 12),
        known.int().to(device),
        fold_old=fold_old,
        fold_new=fold_old + len(TAIL) * PAGE_SIZE,
        tokens=tokens,
        heads_per_page=HEADS,
    )
    expected = [stands[row] for row in rows.tolist()]
    assert held.positions.tolist() == expected
    end = fold_old + len(TAIL) * PAGE_SIZE
    counts = [expected.count(p) if p < end else HEADS for p in range(tokens)]
    assert held.holders.tolist() == counts
