"""`add_novelty`: arithmetic on sums, for prompts; a constant for what was decoded."""

import pytest
import torch

from sglang_kvc.kernels.key_diff import key_diff
from sglang_kvc.kernels.novelty import (
    add_novelty,
    add_novelty_ref,
    add_novelty_triton,
)
from sglang_kvc.kernels.testing import Case, make_case, make_plan

HEADS = 4
WEIGHT = 0.5


def make(
    device: str = "cpu", head_dim: int = 16
) -> tuple[Case, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Requests 0 and 2 are pooled; 1 was decoded and has a unit."""
    case = make_case(
        [37, 90, 135], [0, 48, 32], layers=2, group=1, head_dim=head_dim, device=device
    )
    plan = make_plan(case)
    assert plan.pool_tail.tolist() == [1, 0, 1]
    generator = torch.Generator(device=device).manual_seed(0)
    scores = torch.rand(plan.num_entries, generator=generator, device=device) ** 8
    diffs = key_diff(case.arena, case.tables, plan)
    # What is 0 there is padding.
    scores[diffs == 0] = 0
    novelty_unit = torch.arange(9.0, device=device)
    return case, scores, diffs, novelty_unit


@pytest.mark.interpreter
def test_kernel_equals_reference(device: str) -> None:
    case, scores, diffs, novelty_unit = make(device)
    plan, found, noted = make_plan(case), scores.clone(), novelty_unit.clone()
    where = (case.tables, plan)
    add_novelty_triton(*where, found, diffs, noted, weight=WEIGHT)
    add_novelty_ref(*where, scores, diffs, novelty_unit, weight=WEIGHT)
    torch.testing.assert_close(found, scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(noted, novelty_unit, rtol=1e-6, atol=0)


@pytest.mark.interpreter
def test_decoded_alone_needs_no_keys(device: str) -> None:
    case, scores, _, novelty_unit = make(device)
    plan = make_plan(case)
    plan = plan._replace(pool_tail=torch.zeros_like(plan.pool_tail), any_pooled=False)
    found, noted = scores.clone(), novelty_unit.clone()
    where = (case.tables, plan)
    add_novelty_triton(*where, found, None, noted, weight=WEIGHT)
    add_novelty_ref(*where, scores, None, novelty_unit, weight=WEIGHT)
    assert torch.equal(found, scores)
    assert torch.equal(noted, torch.arange(9.0, device=device))


def test_reference_against_a_loop() -> None:
    case, scores, diffs, novelty_unit = make()
    plan, expected = make_plan(case), scores.double().clone()
    for r, slot in enumerate(case.slots):
        offsets = case.tables.block_offsets[slot].tolist()
        tail, blocks = int(plan.tail_blocks[r]), int(plan.fold_blocks[r])
        entries, new = [], []
        for head in range(HEADS):
            first = int(plan.entry_base[r]) + 16 * (offsets[head] + head * tail)
            packed = 16 * (offsets[head + 1] - offsets[head])
            entries += range(first, first + packed + case.seq_lens[r] - case.folds[r])
            new += range(first + packed, first + packed + 16 * blocks)
        if plan.pool_tail[r]:
            unit = WEIGHT * scores[entries].double().mean()
            mean = diffs[entries].double().mean()
            for i in new:
                expected[i] += unit * diffs[i] / mean
            assert slot != case.slots[1]
        else:
            unit = novelty_unit[slot].double()
            expected[new] += unit
        novelty_unit[slot] = unit
    noted = torch.arange(9.0)
    add_novelty(case.tables, plan, scores, diffs, noted, weight=WEIGHT)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(noted, novelty_unit, rtol=1e-5, atol=0)


def test_a_prompt_needs_its_keys() -> None:
    case, scores, _, novelty_unit = make()
    with pytest.raises(ValueError, match="pools a prompt"):
        add_novelty(
            case.tables, make_plan(case), scores, None, novelty_unit, weight=1.0
        )


def test_keys_that_are_all_alike_add_nothing() -> None:
    case, scores, diffs, novelty_unit = make()
    before = scores.clone()
    plan = make_plan(case)
    add_novelty(case.tables, plan, scores, 0 * diffs, novelty_unit, weight=1.0)
    first = int(plan.entry_base[1])
    assert torch.equal(scores[:first], before[:first])
