"""`head_tables` (addresses: bit-equal)."""

import pytest
import torch

from sglang_kvc.kernels.head_tables import (
    head_tables,
    head_tables_ref,
    head_tables_triton,
)
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels import oracles


def awkward_case(device: str) -> Case:
    """Never compressed, a one-token tail, a full last page, skewed heads."""
    return make_case(
        [50, 97, 80, 400],
        [0, 96, 48, 320],
        layers=3,
        group=2,
        head_dim=16,
        device=device,
        skew=4.0,
    )


def arguments(case: Case, device: str) -> dict[str, object]:
    return {
        "tables": case.tables,
        "slots": torch.tensor(case.slots, device=device),
        "seq_lens": torch.tensor(case.seq_lens, device=device),
        "num_kv_heads": 2,
    }


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [26, 128, 131])
def test_equals_reference(width: int, device: str) -> None:
    case = awkward_case(device)
    args = arguments(case, device)
    blocks, lens = head_tables_triton(**args, width=width)
    expected_blocks, expected_lens = head_tables_ref(**args, width=width)
    assert torch.equal(blocks, expected_blocks)
    assert torch.equal(lens, expected_lens)


def test_reference_lists_every_entry_in_order() -> None:
    case = awkward_case("cpu")
    blocks, lens = head_tables(**arguments(case, "cpu"), width=26)
    assert blocks.shape == (3, 4, 2, 26)
    for r in range(4):
        for lh in range(6):
            layer, head = divmod(lh, 2)
            count = int(lens[layer, r, head])
            entry = torch.arange(count)
            block = blocks[layer, r, head][entry // PAGE_SIZE].long()
            rows = block * PAGE_SIZE + entry % PAGE_SIZE
            expected = [row for row, _ in oracles.entries(case, r, lh)]
            assert rows.tolist() == expected
