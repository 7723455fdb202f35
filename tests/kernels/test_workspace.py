"""What a server sets aside for passes is what their ops allocate."""

import pytest

from sglang_kvc.config.option_checks import MAX_WINDOW
from sglang_kvc.kernels import select
from sglang_kvc.kernels.plan_heads import PARTIAL_BYTES, split_heads
from sglang_kvc.kernels.testing import make_case, make_plan


@pytest.mark.parametrize("heads", [1, 24, 256, 1024])
@pytest.mark.parametrize("groups", [1, 2])
def test_selection_takes_what_it_is_charged(heads: int, groups: int) -> None:
    scratch = select.make_scratch(heads, "meta")
    held = sum(part.nbytes for part in scratch)
    # Caps, and the block offsets of the result.
    held += scratch.evicted.nbytes + 4 * (heads + 1)
    counts = 4 * select.ROUNDS * groups * select.DIGITS
    assert held <= select.SCRATCH_BYTES_PER_HEAD * heads
    assert counts == select.SCRATCH_BYTES_PER_GROUP * groups


@pytest.mark.parametrize("requests", [1, 3, 64])
@pytest.mark.parametrize("heads", [1, 24, 256, 640])
@pytest.mark.parametrize("values", [64, 256, 16 * MAX_WINDOW])
def test_partial_results_fit(requests: int, heads: int, values: int) -> None:
    """Head dimensions, and rows of the longest window with 16 query heads a KV head."""
    lengths = [100_000] + [16] * (requests - 1)
    plan = make_plan(make_case(lengths, layers=1, kv_heads=1, group=1, head_dim=1))
    splits = split_heads(plan, heads, entries=512, values=values)
    assert 4 * heads * values * splits.programs * splits.requests <= PARTIAL_BYTES
