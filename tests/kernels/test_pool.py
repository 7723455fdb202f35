"""`pool_scores`: a choice, so bit-equal."""

import pytest
import torch

from sglang_kvc.kernels.pool import (
    Pooling,
    pool_scores,
    pool_scores_ref,
    pool_scores_triton,
)
from sglang_kvc.kernels.testing import make_case, make_plan


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "pooling",
    [
        Pooling(0, 1, 1.0, 1.0),
        Pooling(3, 3, 0.5, 0.3),
        Pooling(32, 3, 0.9, 1.0),
        Pooling(64, 3, 0.95, 0.03),
        Pooling(1, 63, 0.97, 0.5),
        Pooling(128, 0, 0.3, 1.0),
    ],
)
def test_pooling_equals_reference(pooling: Pooling, device: str) -> None:
    case = make_case(
        [37, 90, 16], [0, 48, 0], layers=2, group=1, head_dim=16, device=device
    )
    plan = make_plan(case)
    scores = torch.rand(plan.num_entries, device=device)
    args = (case.tables, plan, scores)
    pooled = pool_scores_triton(*args, pooling=pooling)
    assert pooled.data_ptr() != scores.data_ptr()
    assert torch.equal(pooled, pool_scores_ref(*args, pooling=pooling))


@pytest.mark.parametrize(("decay", "gain"), [(1.0, 1.0), (0.75, 1.0), (0.75, 0.5)])
def test_pooling_reference_against_a_loop(decay: float, gain: float) -> None:
    """Tails of requests 0 and 2 are pooled; packed entries and request 1 are copied."""
    case = make_case([37, 40, 75], [0, 16, 32], layers=1, group=1, head_dim=16)
    plan = make_plan(case)
    assert plan.pool_tail.tolist() == [1, 0, 1]
    scores = torch.rand(plan.num_entries)
    pooling = Pooling(5, 2, decay, gain)
    pooled = pool_scores(case.tables, plan, scores, pooling=pooling)
    expected = scores.clone()
    for r in (0, 2):
        offsets = case.tables.block_offsets[case.slots[r]].tolist()
        for head in range(2):
            blocks = offsets[head + 1] + head * int(plan.tail_blocks[r])
            first = int(plan.entry_base[r]) + 16 * blocks
            tail = case.seq_lens[r] - case.folds[r]
            for i in range(tail):
                near = range(max(i - 5, 0), min(i + 3, tail))
                expected[first + i] = max(
                    scores[first + j] * (gain * decay ** abs(i - j) if i != j else 1)
                    for j in near
                )
    assert torch.equal(pooled, expected)
